"""Combination of the views of each video, against the obvious loop. No TensorFlow."""

from typing import get_args

import numpy as np
import pytest

from x3d_tf.config import TrainConfig
from x3d_tf.errors import UserError
from x3d_tf.evaluation.eval_config import EvalConfig
from x3d_tf.evaluation.views import CombinedViews
from x3d_tf.types import Combine


@pytest.mark.parametrize("combine", get_args(Combine))
def test_views_may_come_in_any_order_and_count_several_times(combine: Combine) -> None:
    random = np.random.default_rng(0)
    views = random.permutation([0] * 5 + [1] * 2 + [2] * 3)
    probabilities = random.random((len(views), 4), np.float32)
    combined = CombinedViews(combine, videos=3, classes=4)
    combined.add(views[:6], probabilities[:6])
    combined.add(views[6:], probabilities[6:])
    combined.add(np.array([1]), probabilities[:1], times=3)
    assert combined.views.tolist() == [5, 5, 3]
    for video in range(3):
        rows = [row for row, number in zip(probabilities, views) if number == video]
        rows += [probabilities[0]] * 3 if video == 1 else []
        expected = [max(column) if combine == "max" else sum(column) / len(column) for column in zip(*rows)]
        np.testing.assert_allclose(combined.result()[video], expected, rtol=1e-6)


def test_reports_of_another_combination_have_folders_of_their_own() -> None:
    run = TrainConfig(combine="max")
    assert [EvalConfig(combine=combine).suffix(run) for combine in (None, "max", "mean")] == ["", "", "_mean"]
    with pytest.raises(UserError, match=r"EvalConfig.combine must be .*got 'sum'"):
        EvalConfig(combine="sum")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"TrainConfig.combine must be .*got 'sum'"):
        TrainConfig(combine="sum")  # type: ignore[arg-type]
