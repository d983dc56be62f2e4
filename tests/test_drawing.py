"""Videos with boxes and actions drawn into them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from video_fixtures import numbered_frames, write_video

from x3d_tf.data.video.decode import probe, read_frames
from x3d_tf.inference.actions import ActionScores
from x3d_tf.inference.drawing import _draw, _free_rectangle, draw_video

NAMES = ("sit", "talk to (e.g., self, a person, a group)", "wave")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wide video of two and a half seconds."""
    return write_video(tmp_path_factory.mktemp("videos") / "film.mp4", numbered_frames(75, 48, 97))


def test_a_drawn_video_has_boxes_that_stay_until_half_way_to_the_next(film: Path, tmp_path: Path) -> None:
    box = np.float32([[0.25, 0.25, 0.75, 0.75]])
    none = np.zeros((0, 4), np.float32), np.zeros((0, 3), np.float32)
    acting = [ActionScores(0, *none), ActionScores(1, box, np.float32([[0.9, 0.1, 0.1]])), ActionScores(2, *none)]
    draw_video(film, tmp_path / "drawn.mp4", acting, NAMES, 0.5)
    info = probe(tmp_path / "drawn.mp4")
    assert (info.width, info.height, info.delivered) == (96, 48, 75)
    frames = [frame.pixels.astype(int) for frame in read_frames(tmp_path / "drawn.mp4")]
    reddish = [frame[12:36, 24:26, 0].mean() - frame[12:36, 24:26, 1].mean() > 40 for frame in frames]
    assert reddish == [15 <= number < 45 for number in range(75)]
    assert [path.name for path in tmp_path.iterdir()] == ["drawn.mp4"]


@pytest.mark.parametrize(
    ("place", "written", "expected"),
    [
        ((10, 10, 40, 20), [], (10, 10, 40, 20)),
        ((80, 10, 110, 20), [], (69, 10, 99, 20)),  # it would reach beyond the right side
        ((-5, 45, 25, 55), [], (0, 39, 30, 49)),
        ((10, 10, 40, 20), [(20, 5, 60, 15)], (10, 16, 40, 26)),
        ((10, 10, 40, 20), [(20, 15, 60, 25), (0, 5, 60, 14)], (10, 26, 40, 36)),
        ((10, 10, 40, 20), [(50, 5, 60, 15)], (10, 10, 40, 20)),
        ((10, 30, 40, 40), [(20, 25, 60, 45)], (10, 30, 40, 40)),  # no room below
        ((0, 0, 200, 10), [], (0, 0, 200, 10)),
    ],
)
def test_texts_of_boxes_stay_in_the_picture_and_apart(place: Any, written: Any, expected: Any) -> None:
    assert _free_rectangle(place, (100, 50), written) == expected


def test_drawn_texts_are_shortened_but_for_their_ends() -> None:
    def drawn(name: str, score: float) -> np.ndarray:
        acting = ActionScores(0, np.float32([[0.5, 0, 1, 1]]), np.float32([[score]]))
        return _draw(np.zeros((96, 128, 3), np.uint8), acting, [name], 0.5)

    once = drawn("a" * 40 + " дом", 0.9)
    np.testing.assert_array_equal(once, drawn("a" * 400 + " дом", 0.9))
    assert (once != drawn("a" * 40 + " дом", 0.8)).any() and (once != drawn("a" * 40 + " сад", 0.9)).any()
