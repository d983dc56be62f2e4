"""Selects which implementation of the layers' math to use."""

from typing import Literal, get_args

import keras

from x3d_tf.errors import require

Kernels = Literal["auto", "ops", "cpu", "gpu"]

_chosen: Kernels = "auto"


def set_kernels(name: Kernels) -> None:
    """Selects the kernels that layers use from now on in this process.

    All kernels compute the same results from the same weights. Functions that are already traced do not change.
    Predictions and evaluations of files do not use the layers' math.

    Args:
        name: "ops" for the portable implementation in `keras.ops`, which supports any backend; "cpu" or "gpu" for
            TensorFlow kernels optimized for that device, which run on both; "auto", the default, to select by backend
            and device.

    Raises:
        ValueError: unknown name, or TensorFlow kernels with another backend.

    Example:
        >>> x3d_tf.set_kernels("ops")  # rule out the optimized kernels when a result looks wrong
    """
    global _chosen
    require(name in get_args(Kernels), "kernels", f"be one of {', '.join(get_args(Kernels))}", name)
    backend = keras.backend.backend()
    rule = f"be auto or ops with Keras' {backend} backend"
    require(backend == "tensorflow" or name in ("auto", "ops"), "kernels", rule, name)
    _chosen = name


def active_kernels() -> Literal["ops", "cpu", "gpu"]:
    """Returns the kernels in use: those set by `set_kernels`, or else those for the backend and device."""
    if _chosen != "auto":
        return _chosen
    if keras.backend.backend() != "tensorflow":
        return "ops"
    import tensorflow as tf

    return "gpu" if tf.config.list_physical_devices("GPU") else "cpu"
