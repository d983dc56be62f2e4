"""Flags of the command `evaluate`."""

import re
from collections.abc import Callable

import pytest

from x3d_tf import evaluate
from x3d_tf.errors import UserError


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--run, --model, --compare and --detections must be given, got none"),
        ("--run=a --model=b", "--run, --model, --compare and --detections must be given, got --run, --model"),
        ("--model=b --records=c", "--model=b requires --split, --output"),
        ("--run=a --sweep --views=3", "--views must not be given with --sweep"),
        ("--model=a --watch", "--model must not be given with --watch"),
        ("--compare=a --split=b", "--split must not be given with --compare"),
        ("--compare=nowhere", "nowhere has no report"),
    ],
)
def test_conflicting_flags(flags: str, message: str, in_process: Callable[..., None]) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        in_process(evaluate, *flags.split())
