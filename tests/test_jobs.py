"""Contact sheets and the progress bar of predictions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from x3d_tf import plots
from x3d_tf.inference import prediction
from x3d_tf.inference.jobs import SHEET_ROWS, _Tally, save_contact_sheet
from x3d_tf.inference.prediction import Prediction

PATHS = [Path("videos/hug/a.mp4"), Path("videos/kick/a.mp4"), Path("videos/kick/b.mp4")]


@pytest.mark.parametrize(
    ("times", "seconds"), [((0.23, 0.27), "0.00 - 1.23 s"), ((0.2, 0.9), "0.0 - 1.2 s")], ids=["close", "apart"]
)
def test_rows_of_a_contact_sheet_are_told_apart(
    times: tuple[float, float], seconds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save_clips", lambda *arguments: drawn.extend(arguments))
    tally, frames = _Tally(SHEET_ROWS), np.zeros((2, 8, 8, 3), np.uint8)
    results = [Prediction(path, 0, 1.234, np.float32([0.25, 0.75]), frames, np.array(times)) for path in PATHS]
    assert list(tally.count(results)) == results
    save_contact_sheet(tmp_path / "a.png", tally, ("jump", "run"), "title")
    labels = [label.splitlines() for label in drawn[1]]
    assert [label[:2] for label in labels] == [["hug/a.mp4", seconds], ["kick/a.mp4", seconds], ["b.mp4", seconds]]
    assert drawn[4] == [list(times)] * 3


def test_the_progress_bar_tells_files_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(prediction._VideoBar, "set_postfix_str", lambda _, text: shown.append(text))
    monkeypatch.setattr(prediction, "_predict_windows", lambda *_: iter(()))
    network: Any = None
    sampler: Any = type("Sampler", (), {"window": 5.0})
    assert list(prediction._predict(network, sampler, PATHS, 0, True)) == []
    assert shown == ["hug/a.mp4", "kick/a.mp4", "b.mp4"]
