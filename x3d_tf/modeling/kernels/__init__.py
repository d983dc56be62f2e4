"""Several forms of the same arithmetic: which of them the layers take."""

from typing import Literal, get_args

import keras

from x3d_tf.errors import require

Kernels = Literal["auto", "ops", "cpu", "gpu"]

_chosen: Kernels = "auto"


def set_kernels(name: Kernels) -> None:
    """Chooses the forms that layers take from now on, in this process.

    All of them compute the same from the same weights. Functions that are traced already stay as they are.

    Args:
        name: "ops", the plain form in `keras.ops`, of any backend; "cpu" or "gpu", TensorFlow operations that are fast
            there, which run on both; "auto", the default, what suits the backend and the machine.

    Raises:
        ValueError: another name, or TensorFlow's forms under another backend.

    Example:
        >>> x3d_tf.set_kernels("ops")  # is a result the network's, or a fast form's?
    """
    global _chosen
    require(name in get_args(Kernels), "kernels", f"be among {', '.join(get_args(Kernels))}", name)
    backend = keras.backend.backend()
    rule = f"be auto or ops under Keras' {backend} backend"
    require(backend == "tensorflow" or name in ("auto", "ops"), "kernels", rule, name)
    _chosen = name


def active_kernels() -> Literal["ops", "cpu", "gpu"]:
    """The forms that layers take now: what `set_kernels` chose, or what suits the backend and the machine."""
    if _chosen != "auto":
        return _chosen
    if keras.backend.backend() != "tensorflow":
        return "ops"
    import tensorflow as tf

    return "gpu" if tf.config.list_physical_devices("GPU") else "cpu"
