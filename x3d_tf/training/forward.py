"""Training forward pass: slices of a batch in parallel, with optional gradient checkpointing.

The layers of the network are called in order, each on independent slices of the batch. Batch norm and dropout depend on
the complete batch and therefore take all slices at once. With gradient checkpointing, a segment of layers keeps only
its input, and the backward pass runs the segment again.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from x3d_tf.modeling.architecture import BlockPlan, plan
from x3d_tf.modeling.layers import Dropout, GhostBatchNorm
from x3d_tf.modeling.x3d import Network
from x3d_tf.parallel import num_batch_slices

_Slices = list[Any]  # a tensor, split along the batch axis
_Observer = Callable[[GhostBatchNorm, _Slices], None]


def forward_of(model: Network, recompute: str = "nothing") -> Callable[..., Any]:
    """Returns a function that runs the network in training mode, from its input to logits.

    The function updates the network's state, such as batch-norm statistics, as a call of the model does.

    Args:
        model: the network. Freeze its layers first.
        recompute: the activations to recompute in the backward pass; see `Execution.recompute`.

    Returns:
        The function `forward(inputs, observe=None)`. It calls `observe`, if any, with each batch-norm layer outside of
        recomputed segments and the slices of that layer's input.
    """
    first, last = model.get_layer("clip").output, model.get_layer(model.backbone_end).output
    cuts = {"nothing": _uncut, "activations": _cut_at_convolutions, "blocks": _cut_at_blocks}[recompute](model)
    producers = {id(layer.output): layer for layer in model.layers}
    segments = [
        _Segment(_layers_between(producers, inputs, output), inputs, output, recomputed)
        for inputs, output, recomputed in cuts
    ]
    is_named = isinstance(model.input, dict)  # the head then also takes the inputs besides the clip, such as boxes
    head_inputs = model.input if is_named else {}
    head = keras.Model([last, *head_inputs.values()] if is_named else last, model.logits)
    network = keras.Model(model.input, model.logits)

    @tf.autograph.experimental.do_not_convert
    def forward(inputs: Any, observe: _Observer | None = None) -> Any:
        clips = inputs["clip"] if is_named else inputs
        slices = num_batch_slices(clips.shape[0], model.options.bn_group)
        if slices == 1 and recompute == "nothing" and observe is None:
            return network(inputs, training=True)
        values = {id(first): tf.split(tf.cast(clips, first.dtype), slices)}
        for segment in segments:
            values[id(segment.output)] = segment([values[id(tensor)] for tensor in segment.inputs], observe)
        backbone = tf.concat(values[id(last)], 0)
        return head([backbone, *(inputs[name] for name in head_inputs)] if is_named else backbone, training=True)

    return forward


_Cut = tuple[list[Any], Any, bool]  # inputs and output of a segment; True to recompute it


def _uncut(model: Network) -> Iterator[_Cut]:
    yield [model.get_layer("clip").output], model.get_layer(model.backbone_end).output, False


def _cut_at_blocks(model: Network) -> Iterator[_Cut]:
    """Yields segments that keep only the outputs of the stem and of the blocks."""
    x = model.get_layer("clip").output
    for name in ("conv1", *(block.end for block in _blocks(model))):
        y = model.get_layer(name).output
        yield [x], y, True
        x = y
    yield [x], model.get_layer(model.backbone_end).output, False


def _cut_at_convolutions(model: Network) -> Iterator[_Cut]:
    """Yields segments that recompute batch norm, activations and squeeze-excitation, and keep convolution outputs.

    Each segment ends with a convolution. Its gradient requires its input, which is recomputed, but not its output, so
    TensorFlow prunes the recomputed convolution.
    """
    x = model.get_layer("conv1").output
    yield [model.get_layer("clip").output], x, False
    for block in _blocks(model):
        roles = "abc" if block.expands else "bc"
        convolutions = [model.get_layer(f"{block.name}_conv_{role}").output for role in roles]
        yield [x], convolutions[0], False
        for before, after in itertools.pairwise(convolutions):
            yield [before], after, True
        y = model.get_layer(block.end).output
        yield [x, convolutions[-1]], y, False
        x = y
    yield [x], model.get_layer(model.backbone_end).output, False


def _blocks(model: Network) -> Iterator[BlockPlan]:
    """Yields the blocks in order."""
    return plan(model.expansion, model.options).blocks()


def _layers_between(producers: dict[int, Any], inputs: Iterable[Any], output: Any) -> list[Any]:
    """Returns the layers that compute `output` from `inputs`, in topological order.

    Args:
        producers: the layer that outputs each tensor of the network, by the `id` of the tensor.
        inputs: tensors of the network.
        output: a tensor of the network.
    """
    found: dict[int, Any] = {id(tensor): None for tensor in inputs}

    def visit(tensor: Any) -> None:
        if id(tensor) not in found:
            producer = producers[id(tensor)]
            for source in tf.nest.flatten(producer.input):
                visit(source)
            found[id(tensor)] = producer

    visit(output)
    return [layer for layer in found.values() if layer is not None]


@dataclass(frozen=True)
class _Segment:
    """The layers of a network between some of its tensors and another one."""

    layers: list[Any]
    inputs: list[Any]
    output: Any
    recompute: bool

    def __call__(self, inputs: list[_Slices], observe: _Observer | None) -> _Slices:
        return self._run_recomputed(inputs) if self.recompute else self._run(inputs, observe)

    def _run(self, inputs: list[_Slices], observe: _Observer | None = None) -> _Slices:
        values = {id(tensor): slices for tensor, slices in zip(self.inputs, inputs)}
        for layer in self.layers:
            arguments = [values[id(tensor)] for tensor in tf.nest.flatten(layer.input)]
            if observe is not None and isinstance(layer, GhostBatchNorm):
                observe(layer, arguments[0])
            if isinstance(layer, GhostBatchNorm | Dropout):
                outputs = layer(arguments[0], training=True)
            elif isinstance(layer.input, list):
                outputs = [layer(list(slices)) for slices in zip(*arguments)]
            else:
                outputs = [layer(x) for x in arguments[0]]
            values[id(layer.output)] = outputs
        return values[id(self.output)]

    def _run_recomputed(self, inputs: list[_Slices]) -> _Slices:
        """Runs the layers statelessly, and again in the backward pass.

        Both runs start from the same state and therefore draw the same random numbers. Only the new state of the first
        run is assigned.
        """
        (slices,) = inputs
        trainable = [variable for layer in self.layers for variable in layer.trainable_variables]
        non_trainable = [variable for layer in self.layers for variable in layer.non_trainable_variables]
        # tensors, because tf.custom_gradient does not accept variables
        state = [tf.convert_to_tensor(variable) for variable in non_trainable]

        def run(weights: Iterable[Any], slices: _Slices) -> tuple[_Slices, list[Any]]:
            mapping = [*zip(trainable, weights), *zip(non_trainable, state)]
            with keras.StatelessScope(state_mapping=mapping) as scope:
                outputs = self._run([slices])
            return outputs, [scope.get_current_value(variable) for variable in non_trainable]

        @tf.custom_gradient
        def run_with_gradient(*values: Any) -> tuple[Any, Callable[..., Any]]:
            weights, slices = values[: len(trainable)], list(values[len(trainable) :])
            outputs, new_state = run(weights, slices)

            def gradient(*upstreams: Any) -> list[Any]:
                upstreams = upstreams[: len(slices)]
                # The copies depend on the incoming gradient. Without them TensorFlow would merge the two runs, or run
                # the second one right after the first.
                with tf.control_dependencies(upstreams):
                    copies = [tf.identity(x) for x in slices]
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch([*weights, *copies])
                    outputs, _ = run(weights, copies)
                return tape.gradient(outputs, [*weights, *copies], list(upstreams))

            return (*outputs, *new_state), gradient

        results = run_with_gradient(*[tf.convert_to_tensor(variable) for variable in trainable], *slices)
        for variable, value in zip(non_trainable, results[len(slices) :]):
            variable.assign(value)
        return list(results[: len(slices)])
