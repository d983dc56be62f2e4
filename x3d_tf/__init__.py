"""X3D video networks for Keras and TensorFlow.

The public names are resolved when they are first used, so that counting a network's cost imports no TensorFlow.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from x3d_tf.data.batches import dataset
    from x3d_tf.evaluation.prediction import Prediction, predict_videos
    from x3d_tf.modeling.architecture import ModelOptions
    from x3d_tf.modeling.cost import cost
    from x3d_tf.modeling.detection import Detector, build_detector
    from x3d_tf.modeling.expansion import VARIANTS, ClipSpec, Expansion
    from x3d_tf.modeling.lowerings import set_lowering
    from x3d_tf.modeling.portable import portable
    from x3d_tf.modeling.saving import load, save
    from x3d_tf.modeling.x3d import X3D, build_x3d

_ROOMS = {
    "ClipSpec": "modeling.expansion",
    "Detector": "modeling.detection",
    "Expansion": "modeling.expansion",
    "ModelOptions": "modeling.architecture",
    "Prediction": "evaluation.prediction",
    "VARIANTS": "modeling.expansion",
    "X3D": "modeling.x3d",
    "build_detector": "modeling.detection",
    "build_x3d": "modeling.x3d",
    "cost": "modeling.cost",
    "dataset": "data.batches",
    "load": "modeling.saving",
    "portable": "modeling.portable",
    "predict_videos": "evaluation.prediction",
    "save": "modeling.saving",
    "set_lowering": "modeling.lowerings",
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
    "set_lowering",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'x3d_tf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"x3d_tf.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
