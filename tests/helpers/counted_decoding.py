"""Builds of text files instead of videos, without worker processes: each takes milliseconds."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from video_fixtures import noise_video

from x3d_tf.data.building import builder
from x3d_tf.data.building.encoding import Retryable
from x3d_tf.data.building.sources import Video
from x3d_tf.data.datasets.base import Inputs
from x3d_tf.data.records import index
from x3d_tf.data.video.decode import EncodedVideo, VideoError

SLOW: set[str] = set()  # names of videos that take too long


def write_texts(folder: Path) -> Path:
    """Writes two splits of text files, one of which cannot be decoded, and a stray file."""
    for name in ("train/run/0", "train/run/1", "train/jump/2", "train/jump/bad 3", "train/jump/4", "test/run/5"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "test" / "stray").touch()
    return folder


def count_decoding(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sets two videos per shard and replaces worker processes by a loop; returns the names of decoded videos."""
    decoded: list[str] = []
    pictures = noise_video(0, 9)

    def encode_all(videos: Sequence[Video], *_: object) -> Iterator[EncodedVideo | VideoError]:
        for video in videos:
            decoded.append(video.path.name)
            number = int(video.path.name[-1])
            if video.path.name in SLOW:
                yield Retryable(video.path, "is slow")
            elif "bad" in video.path.read_text():
                yield VideoError(video.path, "is bad")
            else:
                yield EncodedVideo(pictures.frames[: number + 1], 30.0)

    SLOW.clear()
    monkeypatch.setattr(builder, "encode_all", encode_all)
    monkeypatch.setattr(index, "VIDEOS_PER_SHARD", 2)
    return decoded


def build(videos: Path, output: Path, **settings: Any) -> builder.BuildResult:
    """Calls `build_records` with inputs and options."""
    inputs = {name: settings.pop(name) for name in [*settings] if name in Inputs.__dataclass_fields__}
    return builder.build_records(Inputs(videos=videos, **inputs), output, progress=False, **settings)


def content(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of all files directly in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def stop_at(monkeypatch: pytest.MonkeyPatch, count: int, before: bool) -> Callable[[], None]:
    """Raises before or after the `count`th file is renamed; returns a function that undoes this."""
    replace, calls = Path.replace, itertools.count()

    def stopping(self: Path, target: Path) -> Path:
        number = next(calls)
        if number == count and before:
            raise KeyboardInterrupt
        result = replace(self, target)
        if number == count:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Path, "replace", stopping)
    return lambda: monkeypatch.setattr(Path, "replace", replace)
