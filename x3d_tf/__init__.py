"""X3D video networks for Keras and TensorFlow.

Public names are imported on first use, so that computing the cost of a network does not import TensorFlow.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from x3d_tf.data.batches import dataset
    from x3d_tf.inference.prediction import Prediction, predict_videos
    from x3d_tf.modeling.architecture import ModelOptions
    from x3d_tf.modeling.cost import cost
    from x3d_tf.modeling.detection import Detector, build_detector
    from x3d_tf.modeling.expansion import VARIANTS, Expansion
    from x3d_tf.modeling.kernels import set_kernels
    from x3d_tf.modeling.portable import portable
    from x3d_tf.modeling.saving import load, save
    from x3d_tf.modeling.x3d import X3D, build_x3d
    from x3d_tf.types import ClipSpec

_LAZY_NAMES = {
    "ClipSpec": "types",
    "Detector": "modeling.detection",
    "Expansion": "modeling.expansion",
    "ModelOptions": "modeling.architecture",
    "Prediction": "inference.prediction",
    "VARIANTS": "modeling.expansion",
    "X3D": "modeling.x3d",
    "build_detector": "modeling.detection",
    "build_x3d": "modeling.x3d",
    "cost": "modeling.cost",
    "dataset": "data.batches",
    "load": "modeling.saving",
    "portable": "modeling.portable",
    "predict_videos": "inference.prediction",
    "save": "modeling.saving",
    "set_kernels": "modeling.kernels",
}

__all__ = [
    "VARIANTS",
    "X3D",
    "ClipSpec",
    "Detector",
    "Expansion",
    "ModelOptions",
    "Prediction",
    "build_detector",
    "build_x3d",
    "cost",
    "dataset",
    "load",
    "portable",
    "predict_videos",
    "save",
    "set_kernels",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _LAZY_NAMES:
        raise AttributeError(f"module 'x3d_tf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"x3d_tf.{_LAZY_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
