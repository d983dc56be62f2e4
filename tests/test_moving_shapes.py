"""The synthetic data set moving_shapes, whose classes differ only in motion."""

import hashlib
import io
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from video_fixtures import noise_video, write_records

from x3d_tf.data.datasets import moving_shapes
from x3d_tf.data.datasets.moving_shapes import DIRECTIONS, draw_picture, shifts
from x3d_tf.data.datasets.spec import DatasetSpec, open_dataset
from x3d_tf.data.datasets.synthetic import ShiftedPictures
from x3d_tf.data.records.format import parse_frames, parse_record
from x3d_tf.data.records.manifest import Manifest


def render(seed: int, direction: str) -> np.ndarray:
    """Renders the frames of a video."""
    picture = draw_picture(seed)
    return np.stack([np.roll(picture, (row, column), (0, 1)) for row, column in shifts(seed, direction)])


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving_shapes, "VIDEOS", {"train": 8, "test": 4})


def spec(folder: Path, **settings: Any) -> DatasetSpec:
    return DatasetSpec(**({"records": str(folder), "flip": False, "name": "moving_shapes"} | settings))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_frames_of_all_directions_are_shifted_copies(seed: int) -> None:
    clips = {direction: render(seed, direction) for direction in DIRECTIONS}
    assert {clip.shape for clip in clips.values()} == {(90, 128, 128, 3)}
    for direction, clip in clips.items():
        moved = shifts(seed, "left") - shifts(seed, direction)
        for frame, copy, shift in zip(clips["left"], clip, moved):
            np.testing.assert_array_equal(frame, np.roll(copy, shift, (0, 1)))


@pytest.mark.parametrize(("direction", "opposite"), [("left", "right"), ("up", "down")])
def test_reversed_videos_have_the_opposite_direction(direction: str, opposite: str) -> None:
    np.testing.assert_array_equal(render(5, direction)[::-1], render(5, opposite))


def test_shapes_move_in_the_direction_of_their_class() -> None:
    for direction, step in (("left", (0, -1)), ("right", (0, 1)), ("up", (-1, 0)), ("down", (1, 0))):
        frames = render(3, direction)
        moved = next(frame for frame in frames if (frame != frames[0]).any())
        pixels = [n for n in range(1, 6) if (np.roll(frames[0], (n * step[0], n * step[1]), (0, 1)) == moved).all()]
        assert len(pixels) == 1


def test_videos_start_anywhere_at_any_speed() -> None:
    paths = np.array([shifts(seed, "right") for seed in range(900)])  # [videos, frames, 2]
    for frame in (0, 44, 89):
        # 16 cells of the torus: 56 videos in each on average, 7.3 of standard deviation.
        cells = np.histogram2d(*(paths[:, frame].T % 128), bins=4, range=[[0, 128]] * 2)[0]
        assert np.abs(cells - 900 / 16).max() < 5 * 7.3
    speeds = (paths[:, -1, 1] - paths[:, 0, 1]) / 89
    low, high = moving_shapes.SPEEDS
    quarters = np.histogram(speeds, bins=4, range=(low, high))[0]  # 225 in each on average, 13 of standard deviation
    assert np.abs(quarters - 225).max() < 5 * 13


def test_shaking_adds_shifts_that_are_the_same_in_all_directions() -> None:
    plain, shaking = moving_shapes.MovingShapes(), moving_shapes.ShakingShapes()
    added = {name: shaking.shifts(4, name) - plain.shifts(4, name) for name in DIRECTIONS}
    assert all((values == added["left"]).all() for values in added.values())
    values = np.stack([shaking.shifts(seed, "up") - plain.shifts(seed, "up") for seed in range(200)])
    assert abs(values.mean()) < 5 * 7 / np.sqrt(values.size)
    assert values.std() == pytest.approx(np.sqrt(49 + 1 / 12), rel=0.02)  # rounding adds the variance 1/12
    assert abs(np.mean(values[:, 1:] * values[:, :-1])) < 2.5  # frames are independent


@pytest.mark.usefixtures("few")
def test_records_hold_those_videos(tmp_path: Path) -> None:
    manifest = open_dataset(spec(tmp_path / "a" / "shapes"))
    assert manifest.classes == ("down", "left", "right", "up")
    assert [sorted(r.labels[0] for r in manifest.split(s).records) for s in ("train", "test")] == [
        [0, 0, 1, 1, 2, 2, 3, 3],
        [0, 1, 2, 3],
    ]
    seeds = []
    for split in manifest.splits.values():
        for shard in split.shards:
            for serialized in tf.data.TFRecordDataset(str(manifest.folder / shard.file)):
                parsed = parse_record(serialized)
                seeds.append(int(parsed.media_id.numpy().decode().split("/")[1]))
                expected = render(seeds[-1], manifest.classes[int(parsed.labels[0])])
                jpegs = parse_frames(serialized).numpy()
                assert len(jpegs) == 90
                for index in (0, 1, 89):
                    decoded = np.asarray(Image.open(io.BytesIO(jpegs[index]))).astype(int)
                    assert np.abs(decoded - expected[index]).mean() < 4
    assert len(set(seeds)) == 12  # splits share no video


def test_the_videos_do_not_change() -> None:
    """Published results were measured on them."""
    content = hashlib.sha256()
    for seed in range(4):
        for direction in DIRECTIONS:
            content.update(shifts(seed, direction).astype("<i8").tobytes())
        content.update(draw_picture(seed).tobytes())
    assert content.hexdigest() == "644807a6e5690882ed74cfd9d4c5b0670986c90e23968e35c7ebf3a3b129e53a"


def test_the_complete_dataset_is_balanced() -> None:
    assert moving_shapes.VIDEOS == {"train": 800, "test": 100}
    assert all(count % len(DIRECTIONS) == 0 for count in moving_shapes.VIDEOS.values())


@pytest.mark.usefixtures("few")
def test_an_interrupted_creation_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Manifest, "save", interrupted)  # the last step
        open_dataset(spec(tmp_path / "shapes"))
    assert list(tmp_path.iterdir()) == []
    killed = tmp_path / ".shapes.moving_shapes_partial.killed"  # a killed process could not clean up
    live = tmp_path / ".shapes.moving_shapes_partial.live"
    for folder in (killed, live):
        folder.mkdir()
    (killed / "shard").touch()
    for path in (killed / "shard", killed):
        os.utime(path, (time.time() - 3600,) * 2)
    assert len(open_dataset(spec(tmp_path / "shapes")).split("train").records) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == [".shapes.moving_shapes_partial.live", "shapes"]


@pytest.mark.usefixtures("few")
def test_one_of_two_concurrent_processes_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = ShiftedPictures._write

    def other_is_faster(dataset: ShiftedPictures, folder: Path) -> None:
        monkeypatch.setattr(ShiftedPictures, "_write", write)
        dataset.open(tmp_path / "shapes")
        (tmp_path / "shapes" / "mark").touch()
        write(dataset, folder)

    monkeypatch.setattr(ShiftedPictures, "_write", other_is_faster)
    manifest = open_dataset(spec(tmp_path / "shapes"))
    assert (tmp_path / "shapes" / "mark").exists()
    assert len(manifest.split("test").records) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


def test_other_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="is not empty and does not hold moving_shapes"):
        open_dataset(spec(tmp_path))
    write_records(tmp_path / "others", {"train": [noise_video(0, 2)], "test": [noise_video(1, 2)]})
    with pytest.raises(ValueError, match=r"others holds records other than moving_shapes.*gin/data/records\.gin"):
        open_dataset(spec(tmp_path / "others"))
