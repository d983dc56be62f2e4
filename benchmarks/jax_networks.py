"""Our networks on JAX, for inference and training, with several forms of the channel-wise convolution.

`predict` and `train` return the call to measure. The weights are those of the other backends.
"""

import functools
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported

import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras_networks import network
from measuring import Case
from numpy.typing import NDArray
from synthetic_clips import squares

import x3d_tf
from x3d_tf.modeling import layers
from x3d_tf.training.optimizer import SGD

Convolution = Callable[[Any, Any, int], Any]  # the signature of `layers.channelwise_conv3d`


def grouped(x: Any, kernel: Any, stride: int) -> Any:
    """Convolves (N, T, H, W, C) with (kt, kh, kw, C) by one grouped convolution."""
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, :, None, :],
        (1, stride, stride),
        [(size // 2, size // 2) for size in kernel.shape[:3]],
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        feature_group_count=x.shape[-1],
    )


def with_gradients_of(other: Convolution, forward: Convolution) -> Convolution:
    """Returns a convolution that computes `forward`, and the gradients of `other`."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def run(x: Any, kernel: Any, stride: int) -> Any:
        return forward(x, kernel, stride)

    def backward(stride: int, inputs: tuple[Any, Any], upstream: Any) -> Any:
        return jax.vjp(lambda x, kernel: other(x, kernel, stride), *inputs)[1](upstream)

    run.defvjp(lambda x, kernel, stride: (run(x, kernel, stride), (x, kernel)), backward)
    return run


# By name. One that proves faster can become a kernel of the package as it is.
FORMS: dict[str, Convolution] = {
    "taps": layers.depthwise_taps,  # the package's on accelerators: one depthwise 2-D convolution per temporal tap
    "grouped": grouped,
    "multiply-adds": layers.multiply_adds,  # the package's on CPUs
    "grouped, gradients of multiply-adds": with_gradients_of(layers.multiply_adds, grouped),
}


class _Call:
    """A call with the peak of the device memory that its executable needs, in bytes; None if JAX does not know it."""

    def __init__(self, call: Callable[[], Any], compiled: Any) -> None:
        self._call = call
        analysis = compiled.memory_analysis()
        self.peak_bytes: int | None = None
        if analysis is not None:
            held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
            self.peak_bytes = held + analysis.temp_size_in_bytes

    def __call__(self) -> Any:
        return self._call()


def describe(case: Case) -> str:
    """Returns the version of JAX, its device and how that computes float32 products."""
    device = _device(case)
    if case.device == "cpu":
        return f"JAX {jax.__version__}: the CPU"
    products = {"tensorfloat32": "TF32"}.get(jax.config.jax_default_matmul_precision, "float32")
    return f"JAX {jax.__version__}: {device.device_kind}; float32 products in {products}"


def _device(case: Case) -> Any:
    """Configures the device of a case and returns it."""
    jax.config.update("jax_default_matmul_precision", "tensorfloat32" if case.tf32 else "float32")
    device = jax.devices()[0]
    if case.device != device.platform:
        raise RuntimeError("JAX sees no GPU")
    return device


def _compile(function: Callable[..., Any], form: str, *arguments: Any, **options: Any) -> Any:
    """Compiles a function of a network whose channel-wise convolutions have a form of `FORMS`."""
    with mock.patch.object(layers, "channelwise_conv3d", FORMS[form]):
        return jax.jit(function, **options).lower(*arguments).compile()


def _values(variables: list[Any]) -> list[Any]:
    return [variable.value for variable in variables]


def predict(case: Case, form: str, precision: str = "float32") -> Callable[[], NDArray[np.float32]]:
    """Returns the inference call for uint8 clips.

    Args:
        case: computation to perform.
        form: key of `FORMS`.
        precision: key of `keras_networks.POLICIES`.
    """
    _device(case)
    model = network(case.network, precision=precision)
    weights = _values(model.trainable_variables), _values(model.non_trainable_variables)
    clips = jax.device_put(squares(case.network, case.batch))

    def probabilities(weights: Any, clips: Any) -> Any:
        logits, _ = model.stateless_call(*weights, clips, training=False)
        return jax.nn.softmax(logits)

    compiled = _compile(probabilities, form, weights, clips)
    return _Call(lambda: np.asarray(compiled(weights, clips)), compiled)  # waits for the device


def train(case: Case, form: str, precision: str = "float32") -> Callable[[], float]:
    """Returns a training step: cross entropy, Nesterov momentum, and L2 except for batch norms.

    As in the peers' step, nothing is dropped, and all clips share batch-norm statistics.

    Args:
        case: computation to perform.
        form, precision: see `predict`.
    """
    _device(case)
    options = x3d_tf.ModelOptions(dropout=0.0, bn_group=case.batch)
    model = network(case.network, precision=precision, options=options)
    optimizer = SGD(1e-4, l2=5e-5)
    norms = [layer for layer in model.layers if isinstance(layer, layers.GhostBatchNorm)]
    optimizer.exclude(weight for norm in norms for weight in norm.trainable_weights)
    optimizer.build(model.trainable_variables)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def loss_of(weights: Any, others: Any, clips: Any, labels: Any) -> tuple[Any, Any]:
        logits, others = model.stateless_call(weights, others, clips, training=True)
        return cross_entropy(labels, logits), others

    def step(state: Any, clips: Any, labels: Any) -> tuple[Any, Any]:
        weights, others, slots = state
        (loss, others), gradients = jax.value_and_grad(loss_of, has_aux=True)(weights, others, clips, labels)
        weights, slots = optimizer.stateless_apply(slots, gradients, weights)
        return loss, (weights, others, slots)

    parts = (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
    state = jax.tree.map(jnp.copy, tuple(map(_values, parts)))  # each step overwrites it, and not the model's variables
    batch = jax.device_put((squares(case.network, case.batch).astype(np.float32), np.arange(case.batch)))
    compiled = _compile(step, form, state, *batch, donate_argnums=0)

    def call() -> float:
        nonlocal state
        loss, state = compiled(state, *batch)
        return float(loss)  # waits for the device: the loss and the new state come from one executable

    return _Call(call, compiled)
