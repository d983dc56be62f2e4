"""Records of key frames for tests."""

from pathlib import Path
from typing import Any

from x3d_tf.data.building.builder import BuildResult, build_records
from x3d_tf.data.datasets.base import Inputs


def build_key_frames(videos: Path, output: Path, boxes: dict[str, Path], **settings: Any) -> BuildResult:
    """Builds records of key frames; the settings are other inputs of the data set, or those of `build_records`."""
    inputs = {name: settings.pop(name) for name in [*settings] if name in Inputs.__dataclass_fields__}
    return build_records(Inputs(videos=videos, boxes=boxes, **inputs), output, **settings)
