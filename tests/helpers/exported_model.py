"""A small network whose export is shared by the tests of a process, because an export takes seconds."""

import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import x3d_tf
from x3d_tf.types import Storage

if TYPE_CHECKING:
    from x3d_tf.export.models import ExportableModel

TINY = x3d_tf.Expansion(gamma_tau=2, gamma_t=4, gamma_s=48 / 112, gamma_b=1, gamma_d=0.2)  # evaluates 54 x 54 pixels
NAMES = ("jump", "запуск", "a,b", "d", "e", "f")


def random_network(classes: int = len(NAMES)) -> x3d_tf.X3D:
    """Returns a network with random batch norms and classifier, so that every weight affects the probabilities."""
    network = x3d_tf.build_x3d(TINY, num_classes=classes)
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
    """Returns the path of a saved `random_network`, with the metadata of records of small frames."""
    path, network = Path(_scratch().name) / "tiny.keras", random_network()
    network.stored, network.test_views = Storage(48, 80), 3
    x3d_tf.save(network, path, NAMES)
    return path


@functools.cache
def opened_model() -> "ExportableModel":
    """Returns the model of `model_file`."""
    from x3d_tf.export.models import open_model

    return open_model(model_file())


def three_classes(folder: Path) -> "ExportableModel":
    """Saves a network with random batch norms and classifier in `folder` and opens it; clips are 4 x 64 x 64."""
    from x3d_tf.export.models import open_model

    network = x3d_tf.build_x3d(x3d_tf.Expansion(gamma_tau=2, gamma_t=4, gamma_s=64 / 112, gamma_d=0.2), num_classes=3)
    draw = np.random.default_rng(0)
    for layer in network.layers:
        if hasattr(layer, "moving_mean"):
            shape = layer.gamma.shape
            layer.set_weights([draw.random(shape) + 0.5, *draw.normal(0, 0.3, (2, *shape)), draw.random(shape) + 0.5])
    network.get_layer("fc2").kernel.assign(draw.normal(0, 0.3, network.get_layer("fc2").kernel.shape))
    x3d_tf.save(network, folder / "model.keras", ("hug", "kick", "wave"))
    return open_model(folder / "model.keras")


@functools.cache
def served_folder() -> Path:
    """Returns the folder of the SavedModel of `model_file`, .../tiny/1."""
    from x3d_tf.export.saved_model import export_saved_model

    return export_saved_model(opened_model(), Path(_scratch().name) / "serving" / "tiny")


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()
