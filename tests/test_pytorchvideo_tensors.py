"""Golden tests: compares with stored tensors of pytorchvideo, which need not be installed (see also test_parity.py)."""

import functools
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from recipe import assert_close, assert_probes, clips, give_recipe_weights, named_weights

from x3d_tf import X3D, Expansion, ModelOptions, build_x3d

PATH = Path(__file__).parent / "fixtures" / "pytorchvideo_xs.npz"  # documented in make_pytorchvideo_xs.py
STAGES = ("conv1", "res2", "res3", "res4", "res5", "conv5")

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    with np.load(PATH) as arrays:
        return dict(arrays)


def build(**options: Any) -> X3D:
    """Builds X3D-XS for small clips, without dropout."""
    expansion = Expansion(12, 3, 33 / 112, 1, 2.25, 2.2)
    return build_x3d(expansion, num_classes=7, options=ModelOptions(dropout=0.0, **options))


@functools.cache
def shared() -> X3D:
    """Builds the shared network once, because building takes most of the time."""
    return build(shortcut_norm="on_width_change", head_pool="fixed_logits")


@pytest.fixture
def model() -> X3D:
    give_recipe_weights(shared())
    return shared()


def test_every_stage(model: X3D, stored: dict[str, np.ndarray]) -> None:
    outputs = {stage: model.get_layer(stage).output for stage in STAGES} | {"logits": model.output}
    for stage, feature in keras.Model(model.input, outputs)(clips("clips/eval", 1, 3, 33, 41)).items():
        assert_close(feature, stored[f"eval/{stage}"], label=stage)


def test_large_clips(model: X3D, stored: dict[str, np.ndarray]) -> None:
    """Checks clips with several windows, whose logits are averaged."""
    assert_close(model(clips("clips/large", 2, 3, 72, 104)), stored["large/logits"])


def test_mobile_form(stored: dict[str, np.ndarray]) -> None:
    model = build(shortcut_norm="always", head_pool="global")
    give_recipe_weights(model)
    assert_close(model(clips("clips/eval", 1, 3, 33, 41)), stored["mobile/logits"])


def test_training_step(model: X3D, stored: dict[str, np.ndarray]) -> None:
    """Compares the gradients of all weights and the running statistics after the step."""
    with tf.GradientTape() as tape:
        logits = model(clips("clips/train", 4, 3, 33, 33), training=True)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits([3, 1, 4, 1], logits))
    gradients = tape.gradient(loss, model.trainable_variables)
    by_path = dict(zip((variable.path for variable in model.trainable_variables), gradients))
    compared = set()
    for name, variable in named_weights(model):
        kind = "gradient" if variable.trainable else "statistics"
        compared.add(key := f"train/{kind}/{name.source}")
        assert_probes(name, by_path.get(variable.path, variable), stored[key])
    assert compared == {key for key in stored if key.startswith("train/")}
