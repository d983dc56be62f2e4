"""Views that are not valid."""

from typing import Any

import pytest

from x3d_tf.types import ViewSpec


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
