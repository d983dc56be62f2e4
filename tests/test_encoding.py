"""Worker processes that encode videos, their failures, and files that change."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from video_fixtures import DiesAtStart, die_on_three, trouble_by_name

from x3d_tf.data.building import encoding
from x3d_tf.data.building.encoding import Retryable, encode_all, file_state
from x3d_tf.data.building.sources import Video
from x3d_tf.data.video import image_sequences
from x3d_tf.data.video.decode import EncodedVideo, VideoError
from x3d_tf.errors import UserError


def test_a_file_that_crashes_its_worker_is_left_out() -> None:
    results = list(encode_all([Video(Path(str(n)), "", ()) for n in range(8)], die_on_three, workers=2))
    for number, result in enumerate(results):
        if number == 3:
            assert isinstance(result, VideoError)
            assert str(result) == "3: crashes the decoder process" and not isinstance(result, Retryable)
        elif number == 5:
            assert isinstance(result, Retryable) and "the system killed its decoder process" in str(result)
        else:
            assert isinstance(result, EncodedVideo)
            assert result.frames == [str(number).encode()]
    assert len(results) == 8


def test_a_failure_affects_one_video_only(tmp_path: Path) -> None:
    names = ["first", "hangs", "changes", "replaced", "memory", "last"]
    videos = []
    for path in (tmp_path / name for name in names):
        path.write_text("video")
        videos.append(Video(path, "", (), state=file_state(path)))
    (tmp_path / "replaced").write_text("other")
    os.utime(tmp_path / "replaced", ns=(0, 0))
    results = dict(zip(names, encode_all(videos, trouble_by_name, workers=2, timeout=3), strict=True))
    for name in ("first", "last"):
        assert results[name] == EncodedVideo([name.encode()], 30.0)
    failures = {name: result for name, result in results.items() if isinstance(result, VideoError)}
    assert {name: failure.reason for name, failure in failures.items()} == {
        "hangs": "takes longer than 3 s to decode (--timeout)",
        "changes": "changed during the build",
        "replaced": "changed during the build",
        "memory": "needs more memory than is available",
    }
    assert [name for name, failure in failures.items() if isinstance(failure, Retryable)] == names[1:4]


def test_a_bug_in_the_package_is_raised(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="a fault") as caught:
        list(encode_all([Video(Path("fault"), "", ())], trouble_by_name, workers=1))
    assert "trouble_by_name" in caught.value.__notes__[0]


def test_a_worker_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    videos = [Video(Path(str(number)), "", ()) for number in range(3)]
    with pytest.raises(UserError, match="a worker process cannot start: its process ended with status 3 before it was"):
        list(encode_all(videos, DiesAtStart(), workers=2))

    def no_memory(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(encoding, "Worker", no_memory)
    with pytest.raises(UserError, match="a worker process cannot be started: Cannot allocate memory; use fewer"):
        list(encode_all(videos, die_on_three, workers=2))


def test_changed_folders_of_frames_are_detected(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number}.jpg").write_text("frame")
    (tmp_path / "notes").touch()
    state = file_state(tmp_path)
    image_sequences._scan_once.cache_clear()
    assert image_sequences.is_unchanged(tmp_path, state, 0.0, None)
    (tmp_path / "notes").write_text("not a frame")
    assert file_state(tmp_path) == state
    (tmp_path / "40.jpg").write_text("another")  # in place: the folder itself does not change
    assert file_state(tmp_path) != state
    assert image_sequences.is_unchanged(tmp_path, state, 0.0, 1.0)  # frames 0 to 29
    assert not image_sequences.is_unchanged(tmp_path, state, 1.0, 2.0)
    image_sequences._scan_once.cache_clear()
    assert not image_sequences.is_unchanged(tmp_path, state, 0.0, 1.0)  # a process that lists the folder now
    assert not image_sequences.is_unchanged(tmp_path / "gone", state, 0.0, None)


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError, BrokenPipeError])
@pytest.mark.parametrize("call", ["recv", "send"])
def test_a_worker_whose_parent_was_killed_ends_without_a_message(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], call: str
) -> None:
    monkeypatch.setattr(encoding.signal, "signal", lambda *_: None)

    def fail(*_: object) -> None:
        raise error

    pipe = SimpleNamespace(recv=lambda: (Video(Path("1"), "", ()),), send=lambda _: None)
    setattr(pipe, call, fail)
    encoding._serve(pipe, die_on_three)
