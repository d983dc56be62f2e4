"""Contact sheets: the clips of the trainer with their labels and names."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from video_fixtures import noise_video, write_records

from x3d_tf import ClipSpec, plots
from x3d_tf.data.input_pipeline import training_dataset
from x3d_tf.data.preview import label_text, save_preview
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.video.decode import EncodedVideo, encode_jpeg

CLIP = ClipSpec(3, 2.0, 28)
SETTINGS: dict[str, Any] = {"jitter": (32, 40), "flip": True, "batch": 3, "seed": 7}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Records whose class and name contain the number of the video."""
    return write_records(tmp_path_factory.mktemp("records"), {"train": [noise_video(seed, 12) for seed in range(7)]})


def preview(manifest: Manifest, path: Path, clips: int, timed: bool = True) -> None:
    stream = training_dataset(manifest, "train", CLIP, **SETTINGS, replica_batch=1)
    order = {name: SETTINGS[name] for name in ("batch", "seed")}
    save_preview(manifest, "train", CLIP, stream, path, classes=manifest.classes, clips=clips, timed=timed, **order)


def test_rows_are_the_first_clips_of_training(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save_clips", lambda *args: drawn.extend(args))
    preview(manifest, tmp_path / "a.png", 8)
    clips, captions, path, title, times = drawn
    batches = list(training_dataset(manifest, "train", CLIP, **SETTINGS).take(3).as_numpy_iterator())
    np.testing.assert_array_equal(clips, np.concatenate([pixels for pixels, _ in batches])[:8])
    labels = np.concatenate([labels for _, labels in batches])[:8].tolist()
    assert captions == [
        f"class {label:03d}\ntrain/{label}\n{own[0]:.2f} to {own[-1]:.2f} s of 0.40 s"
        for label, own in zip(labels, times)
    ]
    assert path == tmp_path / "a.png"
    assert str(manifest.folder) in title


def test_clips_without_times(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caption of clips whose frames may differ from those of the records states no seconds."""
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save_clips", lambda *args: drawn.extend(args))
    preview(manifest, tmp_path / "a.png", 3, timed=False)
    _, captions, _, _, times = drawn
    labels = next(training_dataset(manifest, "train", CLIP, **SETTINGS).as_numpy_iterator())[1].tolist()
    assert captions == [f"class {label:03d}\ntrain/{label}" for label in labels]
    assert times is None


def test_frames_are_shown_with_their_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grey level of each frame is four times its number."""
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save_clips", lambda *args: drawn.extend(args))
    grey = [encode_jpeg(np.full((40, 52, 3), 4 * number, np.uint8)) for number in range(30)]
    manifest = write_records(tmp_path / "records", {"train": [EncodedVideo(grey, 30.0)] * 3})
    preview(manifest, tmp_path / "a.png", 6)
    clips, _, _, _, times = drawn
    expected = [[round(float(frame.mean()) / 4) / 30 for frame in clip] for clip in clips]
    np.testing.assert_allclose(times, expected, atol=1e-6)
    assert len({own[0] for own in times}) > 3


def test_the_sheet_shows_the_clips(tmp_path: Path) -> None:
    """Finds each single-coloured frame at its position."""
    colours = np.random.default_rng(0).integers(30, 220, (2, 4, 3))
    clips = [np.broadcast_to(row[:, None, None], (4, 64, 64, 3)) for row in colours]
    plots.save_clips(clips, ["a$^{$", "大 x\udcff\nsecond line"], tmp_path / "a.png", "title", [[0, 0.5, 1, 61]] * 2)
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    places = []
    for colour in colours.reshape(-1, 3):
        rows, columns = np.nonzero(np.abs(picture - colour).max(axis=-1) <= 1)
        assert len(rows) > 100 * 100  # an inch at 110 dots is 110 pixels
        places.append((np.median(rows), np.median(columns)))
    tops, lefts = np.array(places).reshape(2, 4, 2).transpose(2, 0, 1)
    assert (np.diff(tops, axis=0) > 100).all()
    assert (np.diff(lefts, axis=1) > 100).all()
    assert np.abs(np.diff(lefts, axis=0)).max() <= 1


def test_names_of_single_and_multi_label_targets() -> None:
    assert label_text(np.int32(1), ("a", "b")) == "b"
    assert label_text(np.float32([1, 0, 1]), ("a", "b", "c")) == "a, c"


@pytest.mark.usefixtures("flags_of_one_command")
def test_the_command(manifest: Manifest, tmp_path: Path) -> None:
    """Runs the command in this process, because a new one would import TensorFlow again."""
    from absl import flags
    from absl.testing import flagsaver

    from x3d_tf import preview

    preview.define_flags()
    flags.FLAGS(["preview", "--gin_file=gin/x3d_s.gin"])
    small = ["Expansion.gamma_t=3", "Expansion.gamma_s=0.3", "Recipe.batch=3"]
    output = tmp_path / "new" / "a.png"
    settings = {"records": str(manifest.folder), "gin_bindings": small, "output": str(output), "clips": 2}
    with flagsaver.flagsaver(**settings):
        preview.main()
        assert output.read_bytes().startswith(b"\x89PNG")
        with pytest.raises(ValueError, match="exists; choose another --output, or pass --overwrite to replace it"):
            preview.main()
    with flagsaver.flagsaver(**settings | {"output": "a.jpg"}), pytest.raises(ValueError, match="must end in"):
        preview.main()
