"""The command `predict`: flags that are not valid."""

from collections.abc import Callable
from pathlib import Path

import pytest
from absl.flags import IllegalFlagValueError
from video_fixtures import numbered_frames, write_video

import x3d_tf
from x3d_tf import predict
from x3d_tf.errors import UserError

TINY = x3d_tf.Expansion(gamma_tau=5, gamma_t=4, gamma_s=32 / 112, gamma_b=1, gamma_d=0.2)
NAMES = ("sit", "talk to (e.g., self, a person, a group)", "wave")


@pytest.mark.usefixtures("flags_of_one_command")
def test_the_command_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process, because each process of its own would import TensorFlow again."""
    from absl import flags
    from absl.testing import flagsaver

    predict.define_flags()
    flags.FLAGS(["predict", "--model=m.keras"])
    (tmp_path / "there.csv").touch()
    for settings, videos, message in (
        ({}, [], "the command line must name video files or folders"),
        ({"contact_sheet": "a.jpg"}, ["a.mp4"], "--contact_sheet must end in .png, got 'a.jpg'"),
        ({"json": "a", "csv": "a"}, ["a.mp4"], "output files must be distinct"),
        (
            {"csv": str(tmp_path / "there.csv")},
            ["a.mp4"],
            "exists; choose another name, or pass --overwrite to replace it",
        ),
        ({"model": str(tmp_path)}, ["a.mp4"], "no such model file or run folder"),
    ):
        with flagsaver.flagsaver(**settings), pytest.raises(ValueError, match=message):
            predict.main(videos)


def test_the_number_of_views_is_limited(in_process: Callable[..., None]) -> None:
    with pytest.raises(IllegalFlagValueError, match="--views=1001"):
        in_process(predict, "--model=m.keras", "--views=1001", "film.mp4", positional=True)


def test_a_classifier_takes_no_boxes(tmp_path: Path, in_process: Callable[..., None]) -> None:
    film = write_video(tmp_path / "film.mp4", numbered_frames(75, 48, 97))
    x3d_tf.save(x3d_tf.build_x3d(TINY, 3), tmp_path / "b.keras", NAMES)
    with pytest.raises(UserError, match=r"--boxes must not be given with .*, a model of the task single_label"):
        in_process(predict, f"--model={tmp_path / 'b.keras'}", "--boxes=x", film, positional=True)
