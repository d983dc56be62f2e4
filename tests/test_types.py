"""Views that are not valid, and the direction of metrics."""

from typing import Any

import pytest

from x3d_tf.types import Metric, ViewSpec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temporal_views": 0}, "ViewSpec.temporal_views must be at least 1, got 0"),
        ({"spatial_crops": 2}, "ViewSpec.spatial_crops must be 1 or 3, got 2"),
        ({"crop": 200}, "ViewSpec.crop must be at most ViewSpec.resize = 182, got 200"),
        ({"resize": 182.5}, "ViewSpec.resize must be int, got 182.5"),
    ],
)
def test_view_spec_errors_name_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        ViewSpec(**({"resize": 182, "crop": 160} | change))


def test_metrics_state_which_value_is_better() -> None:
    metrics = [Metric("a", kind) for kind in ("share", "loss", "count", "number")]  # type: ignore[arg-type]
    assert [metric.better for metric in metrics] == ["higher", "lower", "higher", "higher"]
    error, gain = Metric("mae", "number", better="lower"), Metric("gain", "loss", better="higher")
    assert error.rank(0.1) > error.rank(0.2) and gain.rank(0.2) > gain.rank(0.1)
    with pytest.raises(ValueError, match=r"Metric\.better must be one of higher, lower or None, got 'less'"):
        Metric("mae", "number", better="less")  # type: ignore[arg-type]
