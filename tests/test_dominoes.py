"""The synthetic data set dominoes, whose classes differ only in the direction of a fine texture."""

from pathlib import Path

import numpy as np
import pytest

from x3d_tf.data.datasets import dominoes
from x3d_tf.data.datasets.dominoes import DIRECTIONS, SIDE, draw_picture, draw_texture, shifts
from x3d_tf.data.datasets.spec import DatasetSpec, open_dataset


def test_the_pairs_of_a_class_are_adjacent_in_its_direction() -> None:
    for name in DIRECTIONS:
        bright = draw_texture(7, name)
        pairs = {}
        for other, (rows, columns) in DIRECTIONS.items():  # the naive count
            shifted = [[bright[(y - rows) % SIDE, (x - columns) % SIDE] for x in range(SIDE)] for y in range(SIDE)]
            pairs[other] = np.logical_and(bright, shifted).mean()
        chance = bright.mean() ** 2
        assert pairs.pop(name) > 2 * chance
        assert all(abs(share - chance) < 0.1 * chance for share in pairs.values())


def test_all_classes_are_equally_bright() -> None:
    shares = np.array([[draw_texture(seed, name).mean() for seed in range(10)] for name in DIRECTIONS])
    assert np.abs(shares.mean(axis=1) / shares.mean() - 1).max() < 0.005
    assert shares.mean() == pytest.approx(1 - (1 - dominoes.DENSITY) ** 2, rel=0.01)


@pytest.mark.parametrize("seed", [0, 1])
def test_shapes_and_colours_are_those_of_all_classes(seed: int) -> None:
    pictures = np.stack([draw_picture(seed, name) for name in DIRECTIONS])
    colours = [np.unique(picture.reshape(-1, 3), axis=0) for picture in pictures]
    assert all(np.array_equal(colours[0], other) for other in colours[1:])
    textured = (pictures != pictures[0]).any(axis=(0, 3))
    assert 0.05 < textured.mean() < 0.5


def test_half_the_size_hides_the_direction() -> None:
    """Horizontal neighbours of the classes horizontal and vertical, after averaging over squares."""

    def visible(reduce: int) -> float:
        texture = {name: draw_texture(3, name).astype(float) for name in ("horizontal", "vertical")}
        small = {k: v.reshape(SIDE // reduce, reduce, SIDE // reduce, reduce).mean((1, 3)) for k, v in texture.items()}
        lag = {k: np.corrcoef(v[:, 1:].ravel(), v[:, :-1].ravel())[0, 1] for k, v in small.items()}
        return lag["horizontal"] - lag["vertical"]

    assert visible(1) > 0.3 and visible(2) < 0.5 * visible(1) and visible(4) < 0.25 * visible(1)


def test_the_motion_is_in_any_direction() -> None:
    paths = np.array([shifts(seed) for seed in range(400)])  # [videos, frames, 2]
    assert paths.shape[1:] == (dominoes.FRAMES, 2)
    moved = paths[:, -1] - paths[:, 0]
    quadrants = np.histogram2d(*np.sign(moved + 0.5).T, bins=2)[0]  # 100 in each on average, 8.7 of standard deviation
    assert np.abs(quadrants - 100).max() < 5 * 8.7
    speeds = np.hypot(*moved.T) / (dominoes.FRAMES - 1)
    assert dominoes.SPEEDS[0] - 0.1 < speeds.min() < speeds.max() < dominoes.SPEEDS[1] + 0.1


def test_its_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(count % len(DIRECTIONS) == 0 for count in dominoes.VIDEOS.values())
    training = dominoes.VIDEOS["train"]
    monkeypatch.setattr(dominoes, "VIDEOS", {"train": 4, "test": 4})
    manifest = open_dataset(DatasetSpec(str(tmp_path / "dominoes"), flip=False, name="dominoes"))
    assert manifest.classes == ("diagonal_down", "diagonal_up", "horizontal", "vertical")
    assert [record.labels for record in manifest.split("train").records] == [(0,), (1,), (2,), (3,)]
    assert sum(shard.bytes for shard in manifest.splits["train"].shards) / 4 * training < 200e6
    with pytest.raises(ValueError, match=r"DatasetSpec\.flip must be False for dominoes"):
        DatasetSpec(str(tmp_path), name="dominoes")
