"""Parity tests: compares the networks with pytorchvideo 0.1.5 on the same weights. Run with -m parity.

`pytest -m parity -rP` prints the differences, relative to the largest entry.
"""

import gc
import runpy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from recipe import FLOAT64_BOUND, clips, difference, give_recipe_weights, named_weights

from x3d_tf import VARIANTS, X3D, ModelOptions, build_x3d
from x3d_tf.modeling.pytorch.convert import export_checkpoint
from x3d_tf.modeling.pytorch.weight_names import Naming, to_ours
from x3d_tf.training.optimizer import SGD

FLOAT32_BOUND = 1e-5  # relative to the largest entry
STAGES = ("conv1", "res2", "res3", "res4", "res5", "conv5")
SIZES = {  # side of the training crop, and of the crops in 30-view evaluation
    "x3d_xs": (160, 182),
    "x3d_s": (160, 182),
    "x3d_m": (224, 256),
    "x3d_l": (312, 356),
    "x3d_xl": (312, 356),
}
FORMS = [*(("standard", name) for name in SIZES), ("mobile", "x3d_xs"), ("mobile", "x3d_l")]
LEARNING_RATES, L2 = (0.05, 0.02), 5e-3  # PyTorch's optimizer and Keras' differ with two rates and L2

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def pytorchvideo() -> ModuleType:
    """Fails instead of skipping without torch or pytorchvideo, because -m parity requests the tests."""
    try:
        import pytorchvideo_models
    except ImportError as error:
        pytest.fail(f"{error}: pip install torch==2.13.0 && pip install -e '.[parity]'", pytrace=False)
    return pytorchvideo_models


@pytest.fixture(scope="module", autouse=True)
def full_precision() -> Iterator[None]:
    """Disables TensorFloat-32, which rounds the products to 10 bits on GPUs."""
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    yield
    tf.config.experimental.enable_tensor_float_32_execution(before)


@pytest.fixture(scope="module", params=FORMS, ids=" ".join)
def pair(
    request: pytest.FixtureRequest, pytorchvideo: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Any, Any]]:
    """Yields a name, pytorchvideo's network and ours; only one pair is in memory at a time."""
    form, name = request.param
    reference = getattr(pytorchvideo, form)(name)
    folder = tmp_path_factory.mktemp("weights")
    head_pool = "fixed_logits" if form == "standard" else "global"
    yield name, reference, with_stages(pytorchvideo.imported(reference, folder, head_pool=head_pool))
    keras.backend.clear_session()
    gc.collect()


def with_stages(model: X3D) -> Callable[[np.ndarray], dict[str, Any]]:
    """Compiles the network for any size, with the outputs of its stages and the logits."""
    outputs = {stage: model.get_layer(stage).output for stage in STAGES} | {"logits": model.output}
    features = keras.Model(model.input, outputs)
    return tf.function(features, input_signature=[tf.TensorSpec((None, None, None, None, 3), tf.uint8)])


def assert_equal(actual: Mapping[str, Any], expected: Mapping[str, np.ndarray], bound: float) -> None:
    """Compares arrays by name, prints the largest differences, and fails with all that exceed the bound."""
    assert actual.keys() == expected.keys()
    differences = {name: difference(actual[name], expected[name]) for name in expected}
    worst = sorted(differences, key=lambda name: -differences[name])[:7]
    print(f"{len(differences)} arrays, at most:", *(f"{name} {differences[name]:.1e}" for name in worst))
    wrong = {name: value for name, value in differences.items() if not value <= bound}
    assert not wrong


@pytest.mark.parametrize("views", ["training", "testing"])
def test_stages_and_logits(pair: tuple[str, Any, Any], views: str) -> None:
    name, reference, ours = pair
    size = SIZES[name][views == "testing"]
    batch = clips(f"clips/{views}", 1, VARIANTS[name].expansion.clip.frames, size, size)
    assert_equal(ours(batch), reference(batch), FLOAT32_BOUND)


def test_a_final_softmax_averages_probabilities(pytorchvideo: ModuleType, tmp_path: Path) -> None:
    """By default, pytorchvideo's networks end in a softmax and then average over positions."""
    reference = pytorchvideo.standard("x3d_xs", softmax=True)
    reference.model.blocks[5].proj.weight.data *= 40  # makes the windows disagree
    model = pytorchvideo.imported(reference, tmp_path, head_pool="fixed_probabilities")
    batch = clips("clips/testing", 1, 4, 182, 182)
    probabilities = reference(batch)["logits"]
    assert probabilities.sum() == pytest.approx(1)
    assert_equal({"probabilities": keras.ops.softmax(model(batch))}, {"probabilities": probabilities}, FLOAT32_BOUND)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("name", "frames", "height", "width"), [("x3d_s", 5, 48, 48), ("x3d_m", 6, 61, 75)])
def test_two_training_steps(
    pytorchvideo: ModuleType, tmp_path: Path, name: str, frames: int, height: int, width: int
) -> None:
    """Compares all gradients of the first step, and all weights, changes and running statistics after the second."""
    reference = pytorchvideo.standard(name, clip=(frames, height), num_classes=7, double=True)
    model = pytorchvideo.imported(reference, tmp_path, head_pool="fixed_logits")
    named = named_weights(model, "pytorchvideo")

    def theirs(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name.target: to_ours(arrays[name.source], name.kind) for name, _ in named if name.source in arrays}

    def ours() -> dict[str, np.ndarray]:
        return {name.target: np.asarray(variable) for name, variable in named}

    before = ours()
    assert_equal(before, theirs(reference.state()), 0)
    batch, labels = clips("clips/train", 4, frames, height, width), np.array([3, 1, 4, 1])
    expected = theirs(reference.train(batch, labels, LEARNING_RATES, L2))
    gradients = train(model, batch, labels)
    assert_equal({n.target: gradients[v.path] for n, v in named if v.path in gradients}, expected, FLOAT64_BOUND)
    after, expected = ours(), theirs(reference.state())
    assert_equal(after, expected, FLOAT64_BOUND)
    changes = {target: after[target] - before[target] for target in after}
    assert_equal(changes, {target: expected[target] - before[target] for target in after}, FLOAT64_BOUND)


def train(model: X3D, batch: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Runs steps of our optimizer without dropout. Returns the gradients of the first step by path."""
    model.get_layer("dropout").rate = 0.0
    optimizer = SGD(LEARNING_RATES[0], momentum=0.9, l2=L2)
    optimizer.exclude(w for w in model.trainable_weights if w.name in ("gamma", "beta"))
    first: dict[str, np.ndarray] = {}
    for rate in LEARNING_RATES:
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, model(batch, training=True))
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, model.trainable_variables)
        first = first or {v.path: np.asarray(g) for v, g in zip(model.trainable_variables, gradients)}
        optimizer.learning_rate = rate
        optimizer.apply(gradients, model.trainable_variables)
    return first


@pytest.mark.parametrize(
    ("form", "naming", "shortcut_norm"),
    [("standard", "pytorchvideo", "always"), ("mobile", "pytorchvideo_mobile", "on_width_change")],
)
def test_exported_weights_load_strictly(
    pytorchvideo: ModuleType, tmp_path: Path, form: str, naming: Naming, shortcut_norm: Any
) -> None:
    """Includes networks with another batch norm on the shortcut of res2."""
    model = build_x3d("x3d_xs", num_classes=7, options=ModelOptions(shortcut_norm=shortcut_norm))
    give_recipe_weights(model)
    export_checkpoint(model, tmp_path / "weights.pyth", naming)
    reference = getattr(pytorchvideo, form)("x3d_xs", num_classes=7)
    reference.load(tmp_path / "weights.pyth")
    batch = clips("clips/training", 1, 4, 160, 160)
    assert_equal({"logits": model(batch)}, {"logits": reference(batch)["logits"]}, FLOAT32_BOUND)


def test_stored_tensors_equal_pytorchvideos() -> None:
    """Checks the fixture of test_pytorchvideo_tensors.py."""
    script = runpy.run_path(str(Path(__file__).parent / "fixtures" / "make_pytorchvideo_xs.py"))
    with np.load(script["PATH"]) as stored:
        assert_equal(script["tensors"](), stored, FLOAT64_BOUND / 100)
