"""The forward pass of a training step: clips side by side, and no more kept for the backward pass than is wanted.

The network stays the one graph that it is, whose layers are called one after the other. Each takes the batch in parts
that do not wait for each other; batch norm and dropout, which are of the whole batch, take all parts at once. What lies
between two tensors can be recomputed: the forward pass keeps the first alone, and the gradient runs the layers again.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from x3d_tf.modeling.architecture import STAGE_NAMES, plan
from x3d_tf.modeling.layers import Dropout, GhostBatchNorm
from x3d_tf.modeling.x3d import Network
from x3d_tf.parallel import num_batch_slices

_Parts = list[Any]  # of a tensor: some of the batch's clips each
_Observer = Callable[[GhostBatchNorm, _Parts], None]  # of what goes into a batch norm


def forward_of(model: Network, recompute: str = "nothing") -> Callable[..., Any]:
    """The network in training as a function from its input to logits, which updates its state as the model does.

    Args:
        model: frozen as it is to stay.
        recompute: what the gradient computes again, as `Execution.recompute` says.

    Returns:
        The function. Another argument, `observe`, is called with each batch norm and the parts of its input; not of
        what is recomputed.
    """
    first, last = model.get_layer("clip").output, model.get_layer(model.backbone_end).output
    cuts = {"nothing": _whole, "activations": _around_activations, "blocks": _around_blocks}[recompute](model)
    makers = {id(layer.output): layer for layer in model.layers}
    segments = [_Segment(_between(makers, inputs, output), inputs, output, again) for inputs, output, again in cuts]
    detects = isinstance(model.input, dict)
    more = model.input if detects else {}  # the clips and their boxes
    head = keras.Model([last, *more.values()] if detects else last, model.logits)
    whole = keras.Model(model.input, model.logits)

    @tf.autograph.experimental.do_not_convert
    def forward(given: Any, observe: _Observer | None = None) -> Any:
        clips = given["clip"] if detects else given
        parts = num_batch_slices(clips.shape[0], model.options.bn_group)
        if parts == 1 and recompute == "nothing" and observe is None:
            return whole(given, training=True)
        values = {id(first): tf.split(tf.cast(clips, first.dtype), parts)}
        for segment in segments:
            values[id(segment.output)] = segment([values[id(tensor)] for tensor in segment.inputs], observe)
        backbone = tf.concat(values[id(last)], 0)
        return head([backbone, *(given[name] for name in more)] if detects else backbone, training=True)

    return forward


_Cut = tuple[list[Any], Any, bool]  # inputs of a segment, its output, whether to recompute it


def _whole(model: Network) -> Iterator[_Cut]:
    yield [model.get_layer("clip").output], model.get_layer(model.backbone_end).output, False


def _around_blocks(model: Network) -> Iterator[_Cut]:
    """Keeps the outputs of the stem and of the residual blocks."""
    x = model.get_layer("clip").output
    for name in ("conv1", *(end for _, end in _blocks(model))):
        y = model.get_layer(name).output
        yield [x], y, True
        x = y
    yield [x], model.get_layer(model.backbone_end).output, False


def _around_activations(model: Network) -> Iterator[_Cut]:
    """Keeps also the outputs of the convolutions: batch norm, activations and squeeze-excitation are recomputed.

    A convolution ends the segment of what comes before it, for its gradient needs its input, not its output: the
    former is recomputed, and the convolution itself falls away, being of no use.
    """
    x = model.get_layer("conv1").output
    yield [model.get_layer("clip").output], x, False
    for block, end in _blocks(model):
        a, b, c = (model.get_layer(f"{block}_conv_{role}").output for role in "abc")
        y = model.get_layer(end).output
        yield [x], a, False
        yield [a], b, True
        yield [b], c, True
        yield [x, c], y, False
        x = y
    yield [x], model.get_layer(model.backbone_end).output, False


def _blocks(model: Network) -> Iterator[tuple[str, str]]:
    """Names of the residual blocks in order, each with the name of the layer that ends it."""
    for stage_name, stage in zip(STAGE_NAMES, plan(model.expansion, model.options).stages):
        for index in range(stage.depth):
            block = f"{stage_name}_{index}"
            yield block, stage_name if index == stage.depth - 1 else block


def _between(makers: dict[int, Any], inputs: Iterable[Any], output: Any) -> list[Any]:
    """The layers that make the output of the inputs, in an order in which they can be called.

    Args:
        makers: by the `id` of a tensor of the network, the layer that puts it out.
        inputs, output: such tensors.
    """
    found: dict[int, Any] = {id(tensor): None for tensor in inputs}

    def visit(tensor: Any) -> None:
        if id(tensor) not in found:
            maker = makers[id(tensor)]
            for own in tf.nest.flatten(maker.input):
                visit(own)
            found[id(tensor)] = maker

    visit(output)
    return [layer for layer in found.values() if layer is not None]


@dataclass(frozen=True)
class _Segment:
    """Layers from some tensors of a network to another one."""

    layers: list[Any]
    inputs: list[Any]
    output: Any
    recompute: bool

    def __call__(self, given: list[_Parts], observe: _Observer | None) -> _Parts:
        return self._recomputed(given) if self.recompute else self._run(given, observe)

    def _run(self, given: list[_Parts], observe: _Observer | None = None) -> _Parts:
        values = {id(tensor): parts for tensor, parts in zip(self.inputs, given)}
        for layer in self.layers:
            taken = [values[id(tensor)] for tensor in tf.nest.flatten(layer.input)]
            if observe is not None and isinstance(layer, GhostBatchNorm):
                observe(layer, taken[0])
            if isinstance(layer, GhostBatchNorm | Dropout):
                made = layer(taken[0], training=True)
            elif isinstance(layer.input, list):
                made = [layer(list(parts)) for parts in zip(*taken)]
            else:
                made = [layer(part) for part in taken[0]]
            values[id(layer.output)] = made
        return values[id(self.output)]

    def _recomputed(self, given: list[_Parts]) -> _Parts:
        """The layers are run without a state of their own.

        The gradient starts from the same state, and so draws the same numbers, and the new state of the first run alone
        is taken over.
        """
        (parts,) = given
        trained = [variable for layer in self.layers for variable in layer.trainable_variables]
        kept = [variable for layer in self.layers for variable in layer.non_trainable_variables]
        # not variables, which a custom gradient refuses
        state = [tf.convert_to_tensor(variable) for variable in kept]

        def run(weights: Iterable[Any], parts: _Parts) -> tuple[_Parts, list[Any]]:
            with keras.StatelessScope(state_mapping=[*zip(trained, weights), *zip(kept, state)]) as scope:
                made = self._run([parts])
            return made, [scope.get_current_value(variable) for variable in kept]

        @tf.custom_gradient
        def once(*values: Any) -> tuple[Any, Callable[..., Any]]:
            weights, parts = values[: len(trained)], list(values[len(trained) :])
            made, new_state = run(weights, parts)

            def gradient(*upstreams: Any) -> list[Any]:
                upstreams = upstreams[: len(parts)]
                # Inputs of their own, that come with the gradient: TensorFlow would otherwise take both runs for one,
                # or take the second as soon as the first.
                with tf.control_dependencies(upstreams):
                    again = [tf.identity(part) for part in parts]
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch([*weights, *again])
                    made, _ = run(weights, again)
                return tape.gradient(made, [*weights, *again], list(upstreams))

            return (*made, *new_state), gradient

        results = once(*[tf.convert_to_tensor(variable) for variable in trained], *parts)
        for variable, value in zip(kept, results[len(parts) :]):
            variable.assign(value)
        return list(results[: len(parts)])
