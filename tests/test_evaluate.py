"""Flags of the command `evaluate`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--run, --model, --compare and --detections must be given, got none"),
        ("--run=a --model=b", "--run, --model, --compare and --detections must be given, got --run, --model"),
        ("--model=b --records=c", "--model=b requires --split, --output"),
        ("--run=a --sweep --views=3", "--views must not be given with --sweep"),
        ("--model=a --watch", "--model must not be given with --watch"),
        ("--compare=a --split=b", "--split must not be given with --compare"),
        ("--compare=nowhere", "error: nowhere has no report"),
    ],
)
def test_conflicting_flags(flags: str, message: str) -> None:
    command = [sys.executable, "-m", "x3d_tf.evaluate", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
