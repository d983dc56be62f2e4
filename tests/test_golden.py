"""Golden tests: compares with tensors that PySlowFast and pytorchvideo computed in double precision."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from recipe import assert_close, assert_probes, clips, give_recipe_weights, named_weights, recipe_weight

from x3d_tf import X3D, Expansion, ModelOptions, build_x3d
from x3d_tf.training.optimizer import SGD

pytestmark = pytest.mark.usefixtures("float64", "uncompiled_module")  # test_pytorchvideo_tensors runs the CPU kernels


@pytest.fixture(scope="module")
def golden(shared_data: Path) -> dict[str, np.ndarray]:
    path = shared_data / "golden" / "x3d_xs_float64.npz"
    if not path.is_file():
        pytest.skip("the reference tensors in ../shared/data/golden are absent")
    with np.load(path) as arrays:
        return dict(arrays)


def xs(size: int, **options: Any) -> X3D:
    """Builds X3D-XS for a crop of `size` pixels, with the weights of the recipe."""
    expansion = Expansion(12, 5, size / 112, 1, 2.25, 2.2)
    model = build_x3d(expansion, num_classes=7, options=ModelOptions(dropout=0.0, **options))
    give_recipe_weights(model)
    return model


def test_recipe_weights_and_clips() -> None:
    first = recipe_weight("s1.pathway0_stem.bn.weight", (24,))[:3]
    np.testing.assert_allclose(first, [0.7223961051, 0.6276789489, 0.9680711783], atol=1e-10)
    assert clips("clips/eval", 2, 5, 72, 104).ravel()[:3].tolist() == [177, 253, 118]


def test_every_stage(golden: dict[str, np.ndarray]) -> None:
    model = xs(72)
    stages = ["conv1", "res2", "res3", "res4", "res5", "conv5", "pool5", "fc1"]
    outputs = [model.get_layer(stage).output for stage in stages] + [model.output]
    features = keras.Model(model.input, outputs)(clips("clips/eval", 2, 5, 72, 104))
    for stage, feature in zip([*stages, "logits"], features):
        assert_close(feature, golden[f"eval/{stage}"])
    assert_close(model(clips("clips/square", 2, 5, 72, 72)), golden["eval/logits_square"])


@pytest.mark.parametrize("pool", ["global", "fixed_probabilities", "fixed_logits"])
def test_head_poolings(golden: dict[str, np.ndarray], pool: str) -> None:
    logits = xs(72, head_pool=pool)(clips("clips/large", 1, 5, 104, 104))
    assert_close(keras.ops.softmax(logits), golden[f"head/{pool}"])


def test_pytorchvideo(golden: dict[str, np.ndarray]) -> None:
    model = xs(72, shortcut_norm="on_width_change", head_pool="fixed_logits")
    assert_close(model(clips("clips/square", 2, 5, 72, 72)), golden["pytorchvideo/logits"])
    assert_close(model(clips("clips/large", 1, 5, 104, 104)), golden["pytorchvideo/logits_fixed"])


@pytest.mark.slow
def test_two_training_steps(eager: None, golden: dict[str, np.ndarray]) -> None:
    """Runs eagerly. test_training_step in test_pytorchvideo_tensors.py, in the default run, covers the CPU kernels."""
    model = xs(48)
    optimizer = SGD(0.05, momentum=0.9, l2=5e-3)
    optimizer.exclude(w for w in model.trainable_weights if w.name in ("gamma", "beta"))
    weights = named_weights(model)
    before = {name: np.asarray(variable) for name, variable in weights}
    for number in (0, 1):
        with tf.GradientTape() as tape:
            logits = model(clips("clips/train", 4, 5, 48, 48), training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits([3, 1, 4, 1], logits))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        assert_close(logits, golden[f"train/step{number}/logits"])
        assert_close(loss, golden[f"train/step{number}/loss"])
        if number == 0:
            by_path = dict(zip((v.path for v in model.trainable_variables), gradients))
            for name, variable in weights:
                if variable.trainable:
                    assert_probes(name, by_path[variable.path], golden[f"train/gradient/{name.source}"])
        optimizer.learning_rate = 0.02
    for name, variable in weights:
        if variable.trainable:
            assert_probes(name, np.asarray(variable) - before[name], golden[f"train/change/{name.source}"])
        else:
            assert_close(variable, golden[f"train/after/{name.source}"])
