"""A small network whose export the tests share: made once in a process, for an export takes seconds."""

import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import x3d_tf
from x3d_tf.types import Storage

if TYPE_CHECKING:
    from x3d_tf.export.models import Source

TINY = x3d_tf.Expansion(gamma_tau=2, gamma_t=4, gamma_s=48 / 112, gamma_b=1, gamma_d=0.2)  # tests on 54 pixels
NAMES = ("jump", "запуск", "a,b", "d", "e", "f")


def decided_network(classes: int = len(NAMES), **options: Any) -> x3d_tf.X3D:
    """A network of which every weight counts, batch norms too, and that does not give all classes the same."""
    network = x3d_tf.build_x3d(TINY, num_classes=classes, **options)
    draw = np.random.default_rng(0)
    for layer in network.layers:
        if hasattr(layer, "moving_variance"):
            shape = layer.moving_variance.shape
            layer.moving_mean.assign(draw.normal(0, 0.2, shape))
            layer.moving_variance.assign(draw.uniform(0.5, 2, shape))
            layer.gamma.assign(draw.uniform(0.5, 1.5, shape))
            layer.beta.assign(draw.normal(0, 0.2, shape))
    kernel = network.get_layer("fc2").kernel
    kernel.assign(draw.normal(0, 0.3, kernel.shape))
    return network


@functools.cache
def model_file() -> Path:
    """The network of `decided_network`, saved as if trained on records of small frames."""
    path, network = Path(_scratch().name) / "tiny.keras", decided_network()
    network.stored, network.test_views = Storage(48, 80), 3
    x3d_tf.save(network, path, NAMES)
    return path


def three_classes(folder: Path) -> "Source":
    """A network for clips of 4 frames of 64 x 64, whose batch norms and classes are not as fresh ones; saved there."""
    from x3d_tf.export.models import open_model

    network = x3d_tf.build_x3d(x3d_tf.Expansion(gamma_tau=2, gamma_t=4, gamma_s=64 / 112, gamma_d=0.2), num_classes=3)
    draw = np.random.default_rng(0)
    for layer in network.layers:
        if hasattr(layer, "moving_mean"):
            shape = layer.gamma.shape
            layer.set_weights([draw.random(shape) + 0.5, *draw.normal(0, 0.3, (2, *shape)), draw.random(shape) + 0.5])
    network.get_layer("fc2").kernel.assign(draw.normal(0, 0.3, network.get_layer("fc2").kernel.shape))
    x3d_tf.save(x3d_tf.portable(network, ("hug", "kick", "wave")), folder / "model.keras")
    return open_model(folder / "model.keras")


@functools.cache
def served_folder() -> Path:
    """That file's SavedModel: the version's folder, .../tiny/1."""
    from x3d_tf.export.models import open_model
    from x3d_tf.export.saved_model import export_saved_model

    return export_saved_model(open_model(model_file()), Path(_scratch().name) / "serving" / "tiny")


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()
