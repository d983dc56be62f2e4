"""The forward pass of a training step that keeps less for the backward pass, which computes the rest again.

The network stays the one graph that it is. It is run in segments, models of their own between two of its tensors,
which share its layers. A segment that is recomputed keeps its input alone; its gradient runs it once more.
"""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from x3d_tf.modeling.architecture import STAGE_NAMES, plan
from x3d_tf.modeling.x3d import X3D


def forward_of(model: X3D, recompute: str) -> Callable[[Any], Any]:
    """The network in training as a function from clips to logits, which updates the layers' state as the model does.

    Args:
        model: frozen as it is to stay.
        recompute: what the gradient computes again, as `Execution.recompute` says.
    """
    if recompute == "nothing":
        return lambda clips: model(clips, training=True)
    cuts = _around_blocks(model) if recompute == "blocks" else _around_activations(model)
    segments = [(inputs, output, _segment(inputs, output, again)) for inputs, output, again in cuts]

    def forward(clips: Any) -> Any:
        values = {id(model.input): tf.cast(clips, model.input.dtype)}
        for inputs, output, segment in segments:
            values[id(output)] = segment([values[id(tensor)] for tensor in inputs])
        return values[id(model.output)]

    return forward


_Cut = tuple[list[Any], Any, bool]  # inputs of a segment, its output, whether to recompute it


def _around_blocks(model: X3D) -> Iterator[_Cut]:
    """Keeps the outputs of the stem and of the residual blocks."""
    x = model.input
    for name in ("conv1", *(end for _, end in _blocks(model))):
        y = model.get_layer(name).output
        yield [x], y, True
        x = y
    yield [x], model.output, False


def _around_activations(model: X3D) -> Iterator[_Cut]:
    """Keeps also the outputs of the convolutions: batch norm, activations and squeeze-excitation are recomputed.

    A convolution ends the segment of what comes before it, for its gradient needs its input, not its output: the
    former is recomputed, and the convolution itself falls away, being of no use.
    """
    x = model.get_layer("conv1").output
    yield [model.input], x, False
    for block, end in _blocks(model):
        a, b, c = (model.get_layer(f"{block}_conv_{role}").output for role in "abc")
        y = model.get_layer(end).output
        yield [x], a, False
        yield [a], b, True
        yield [b], c, True
        yield [x, c], y, False
        x = y
    yield [x], model.output, False


def _blocks(model: X3D) -> Iterator[tuple[str, str]]:
    """Names of the residual blocks in order, each with the name of the layer that ends it."""
    for stage_name, stage in zip(STAGE_NAMES, plan(model.expansion, model.options).stages):
        for index in range(stage.depth):
            block = f"{stage_name}_{index}"
            yield block, stage_name if index == stage.depth - 1 else block


def _segment(inputs: list[Any], output: Any, recompute: bool) -> Callable[[list[Any]], Any]:
    segment = keras.Model(inputs, output)
    if recompute:
        return lambda values: _recomputed(segment, *values)
    return lambda values: segment(values, training=True)


def _recomputed(segment: keras.Model, x: Any) -> Any:
    """The output of a segment of which nothing but the input is kept for the gradient.

    The segment is run as a function without state: the gradient starts from the same state, and so draws the same
    numbers, and the new state of the first run alone is taken over.
    """
    # not variables, which a custom gradient refuses
    state = [tf.convert_to_tensor(variable) for variable in segment.non_trainable_variables]

    @tf.custom_gradient
    def run(x: Any, *weights: Any) -> tuple[Any, Callable[..., Any]]:
        y, new_state = segment.stateless_call(weights, state, [x], training=True)

        def gradient(upstream: Any, *unused: Any) -> list[Any]:
            # An input of its own, that comes with the gradient: TensorFlow would otherwise take both runs for one, or
            # take the second as soon as the first.
            with tf.control_dependencies([upstream]):
                again = tf.identity(x)
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch([again, *weights])
                y, _ = segment.stateless_call(weights, state, [again], training=True)
            return tape.gradient(y, [again, *weights], upstream)

        return (y, *new_state), gradient

    y, *new_state = run(x, *[tf.convert_to_tensor(variable) for variable in segment.trainable_variables])
    for variable, value in zip(segment.non_trainable_variables, new_state):
        variable.assign(value)
    return y
