"""Our forms that TensorFlow runs, to predict and to train. Each maker gets a case and gives the call to measure."""

import functools
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from clips import softmax, squares
from command import CLASSES
from measuring import Case
from numpy.typing import NDArray
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

import x3d_tf
from x3d_tf.config import Execution, Recipe, TrainConfig
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.modeling import x3d
from x3d_tf.modeling.folded import deployed
from x3d_tf.modeling.layers import ChannelwiseConv3D, GhostBatchNorm, conv_initializer
from x3d_tf.parallel import map_clips_in_parallel
from x3d_tf.training.step import TrainStep, precision_scope

Call = Callable[[], NDArray[np.float32]]


def limit_threads(threads: int, *, side_by_side: bool = False) -> None:
    """For the whole process; to be called before TensorFlow computes anything.

    Args:
        threads: in all.
        side_by_side: an operation gets one of them, as in our commands where clips are taken side by side.
    """
    if tf.config.threading.get_inter_op_parallelism_threads() != threads:
        tf.config.threading.set_intra_op_parallelism_threads(1 if side_by_side else threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)


def network(name: str) -> x3d_tf.X3D:
    """A network none of whose batch norms is at its first values, and whose classes differ; every time the same."""
    keras.utils.set_random_seed(0)
    model = x3d_tf.build_x3d(name, num_classes=CLASSES)
    draw = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, GhostBatchNorm):
            shape = layer.gamma.shape
            layer.set_weights([draw.random(shape) + 0.5, *draw.normal(0, 0.3, (2, *shape)), draw.random(shape) + 0.5])
    model.get_layer("fc2").kernel.assign(draw.normal(0, 0.3, model.get_layer("fc2").kernel.shape))
    return model


def predict(case: Case, form: str) -> Call:
    """A form of the network as a function of uint8 clips, compiled but for the one that is called as it is.

    Args:
        case: what to compute.
        form: a key of `FORWARD`.
    """
    limit_threads(case.threads, side_by_side="side by side" in form)
    model = network(case.network)
    function, finish = FORWARD[form](model, case.batch)
    clips = tf.constant(squares(case.network, case.batch))
    if form == "portable, not compiled":
        return lambda: finish(function(clips, training=False).numpy())
    spec = tf.TensorSpec(clips.shape, tf.uint8)
    concrete = tf.function(
        lambda clips: function(clips, training=False), input_signature=[spec]
    ).get_concrete_function()
    if form == "frozen":
        frozen = convert_variables_to_constants_v2(concrete)
        return lambda: frozen(clips)[0].numpy()
    return lambda: finish(concrete(clips).numpy())  # an array, so that the device has finished


def _side_by_side(network: Callable[..., Any]) -> Callable[..., Any]:
    """Clip by clip, several at a time."""
    single = functools.partial(network, training=False)
    return lambda clips, training: map_clips_in_parallel(single)(clips)


def _as_it_is(outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    return outputs


# From the network and a batch to a model, and what makes probabilities of its outputs.
FORWARD: dict[str, Callable[[x3d_tf.X3D, int], tuple[Any, Any]]] = {
    "trainable": lambda model, batch: (model, softmax),
    "portable": lambda model, batch: (x3d_tf.portable(model, [str(n) for n in range(CLASSES)]), _as_it_is),
    "portable, not compiled": lambda model, batch: FORWARD["portable"](model, batch),
    "deployed": lambda model, batch: (deployed(model, batch=batch), _as_it_is),
    "frozen": lambda model, batch: (deployed(model, batch=batch), _as_it_is),
    "trainable side by side": lambda model, batch: (_side_by_side(model), softmax),
    "deployed side by side": lambda model, batch: (_side_by_side(deployed(model, batch=1)), _as_it_is),
    "grouped": lambda model, batch: (with_grouped_convolutions(model), softmax),
}


class GroupedLayerFactory(x3d.TrainableParts):
    """The trainable network's layers, but Keras' own grouped convolution for the channel-wise ones."""

    def channelwise(self, x: Any, kernel: tuple[int, int, int], name: str, stride: int = 1) -> Any:
        channels = x.shape[-1]
        x = keras.layers.ZeroPadding3D([size // 2 for size in kernel], name=f"{name}_pad")(x)
        return keras.layers.Conv3D(
            channels,
            kernel,
            strides=(1, stride, stride),
            groups=channels,
            use_bias=False,
            kernel_initializer=conv_initializer(channels, kernel),
            name=name,
        )(x)


def with_grouped_convolutions(model: x3d_tf.X3D) -> x3d_tf.X3D:
    """Returns the same network, with the same weights, built by `GroupedLayerFactory`."""
    with mock.patch.object(x3d, "TrainableParts", GroupedLayerFactory):
        grouped = x3d_tf.X3D(model.expansion, model.num_classes, model.options)
    for layer in model.layers:
        weights = layer.get_weights()
        if isinstance(layer, ChannelwiseConv3D):
            weights = [weights[0][:, :, :, None, :]]
        grouped.get_layer(layer.name).set_weights(weights)
    return grouped


def train(
    case: Case, *, grouped: bool = False, options: Mapping[str, Any] | None = None, **execution: Any
) -> Callable[[], float]:
    """The training step of a run, on one batch that stays in memory.

    Args:
        case: what to compute.
        grouped: with Keras' own grouped convolution.
        options: fields of `ModelOptions`.
        **execution: fields of `Execution`.
    """
    limit_threads(case.threads, side_by_side=not grouped and case.batch >= case.threads)
    config = TrainConfig(
        expansion=x3d_tf.VARIANTS[case.network].expansion,
        model=x3d_tf.ModelOptions(**(options or {})),
        dataset=DatasetSpec(records="none"),
        recipe=Recipe(batch=case.batch, reference_batch=case.batch, learning_rate=1e-4, warmup_fraction=0),
        execution=Execution(**execution),
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])  # the trainer's default where there is no GPU
    keras.utils.set_random_seed(0)
    with strategy.scope():
        with precision_scope(config.execution.precision):
            model = x3d_tf.X3D(config.expansion, CLASSES, config.model)
            model = with_grouped_convolutions(model) if grouped else model
        step = TrainStep(model, config, strategy)
    batches = iter(strategy.distribute_datasets_from_function(lambda context: _one_batch(case, config)))
    return lambda: float(step(batches, 1)["loss"][0])  # the loss, so that the device has finished


def _one_batch(case: Case, config: TrainConfig) -> tf.data.Dataset:
    """The same batch for ever, in as many parts as a step takes, pixels float32 as those of the input pipeline."""
    clips = tf.constant(squares(case.network, case.batch), tf.float32)
    labels = tf.range(case.batch, dtype=tf.int32)
    parts = config.execution.accumulation
    whole = tf.data.Dataset.from_tensors((clips, labels))
    return (whole if parts == 1 else whole.unbatch().batch(case.batch // parts, drop_remainder=True)).repeat()
