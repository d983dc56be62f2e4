"""Printed predictions of windows."""

from pathlib import Path

import numpy as np
import pytest

from x3d_tf.data.video.decode import VideoError
from x3d_tf.inference.console import print_windows
from x3d_tf.inference.prediction import Prediction

NO_THUMBNAILS = np.zeros((0, 8, 8, 3), np.uint8), np.zeros(0)


def test_windows_are_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    def window(path: str, start: float, *probabilities: float) -> Prediction:
        return Prediction(Path(path), start, start + 2, np.float32(probabilities), *NO_THUMBNAILS)

    results = [
        window("a", 0, 0.9, 0.1),
        window("a", 1, 0.7, 0.3),
        window("a", 2, 0.4, 0.6),
        VideoError("a", "breaks off"),
        window("b", 0, 0.2, 0.8),
    ]
    print_windows(results, ("jump", "run"))
    found = capsys.readouterr()
    assert found.out.splitlines() == [
        "a",
        "       0.0 -      3.0 s   80.0%  jump",
        "       2.0 -      4.0 s   60.0%  run",
        "b",
        "       0.0 -      2.0 s   80.0%  run",
    ]
    assert found.err == "error: a: breaks off\n"
