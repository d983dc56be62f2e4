"""The first command of the README."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_x3d_s_learns_the_synthetic_videos(tmp_path: Path) -> None:
    """Takes fifteen minutes on two slow cores."""
    command = [sys.executable, "-m", "x3d_tf.train", f"--gin_file={ROOT / 'gin' / 'x3d_s.gin'}"]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
    results = json.loads((tmp_path / "runs/x3d_s/evaluation/moving_shapes_test_10center/results.json").read_text())
    assert results["samples"] == 100
    assert results["top1"] >= 0.85
    last_lines = "\n".join(done.stdout.splitlines()[-3:])
    for file in ("model.keras", "curves.png", "results.json", "confusion.png"):
        assert file in last_lines
    assert (tmp_path / "runs/x3d_s/model.keras").is_file()
