"""Our implementations in TensorFlow, for inference and training. `predict` and `train` return the call to measure."""

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from command import CLASSES
from keras_networks import network, set_random_weights
from measuring import Case
from numpy.typing import NDArray
from synthetic_clips import softmax, squares
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

import x3d_tf
from x3d_tf.config import Execution, Recipe, TrainConfig
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.losses import SoftmaxLoss
from x3d_tf.modeling import x3d
from x3d_tf.modeling.folded import fold
from x3d_tf.modeling.keras_parts import TrainableParts
from x3d_tf.modeling.layers import ChannelwiseConv3D, conv_initializer
from x3d_tf.parallel import map_clips_in_parallel
from x3d_tf.training.step import TrainStep, precision_scope

Call = Callable[[], NDArray[np.float32]]


def limit_threads(threads: int, *, single_threaded_ops: bool = False) -> None:
    """Sets the number of threads of the process. Must be called before TensorFlow computes anything.

    Args:
        threads: number of threads.
        single_threaded_ops: whether each operation uses one thread, as in our commands that process clips in parallel.
    """
    if tf.config.threading.get_inter_op_parallelism_threads() != threads:
        tf.config.threading.set_intra_op_parallelism_threads(1 if single_threaded_ops else threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)


def set_device(case: Case) -> str:
    """Configures the device of a case and returns its name in TensorFlow."""
    if case.device == "cpu":
        return "CPU:0"
    if not tf.config.list_physical_devices("GPU"):
        raise RuntimeError("TensorFlow sees no GPU")
    tf.config.experimental.enable_tensor_float_32_execution(case.tf32)
    return "GPU:0"


def describe(case: Case) -> str:
    """Returns the version of TensorFlow, its device and how that computes float32 products."""
    if set_device(case) == "CPU:0":
        return f"TensorFlow {tf.__version__}: the CPU"
    name = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0]).get("device_name")
    products = "TF32" if tf.config.experimental.tensor_float_32_execution_enabled() else "float32"
    return f"TensorFlow {tf.__version__}: {name}; float32 products in {products}"


def predict(case: Case, name: str, precision: str = "float32") -> Call:
    """Returns the inference call of an implementation for uint8 clips, compiled except for "portable, not compiled".

    Args:
        case: computation to perform.
        name: key of `FORWARD`.
        precision: key of `keras_networks.POLICIES`.
    """
    limit_threads(case.threads, single_threaded_ops="in parallel" in name)
    set_device(case)
    model = network(case.network, precision=precision)
    function, to_probabilities = FORWARD[name](model, case.batch)
    clips = tf.constant(squares(case.network, case.batch))
    if name == "portable, not compiled":
        return lambda: to_probabilities(function(clips, training=False).numpy())
    spec = tf.TensorSpec(clips.shape, tf.uint8)
    concrete = tf.function(
        lambda clips: function(clips, training=False), input_signature=[spec]
    ).get_concrete_function()
    if name == "frozen":
        frozen = convert_variables_to_constants_v2(concrete)
        return lambda: frozen(clips)[0].numpy()
    return lambda: to_probabilities(concrete(clips).numpy())  # numpy() waits for the device


def _in_parallel(network: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that processes the clips of a batch in parallel."""
    single = functools.partial(network, training=False)
    return lambda clips, training: map_clips_in_parallel(single)(clips)


def _identity(outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    return outputs


# Functions from a network and a batch size to a model and the function that converts its outputs to probabilities.
FORWARD: dict[str, Callable[[x3d_tf.X3D, int], tuple[Any, Any]]] = {
    "trainable": lambda model, batch: (model, softmax),
    "portable": lambda model, batch: (x3d_tf.portable(model, [str(n) for n in range(CLASSES)]), _identity),
    "portable, not compiled": lambda model, batch: FORWARD["portable"](model, batch),
    "folded": lambda model, batch: (fold(model, batch=batch), _identity),
    "frozen": lambda model, batch: (fold(model, batch=batch), _identity),
    "trainable, clips in parallel": lambda model, batch: (_in_parallel(model), softmax),
    "folded, clips in parallel": lambda model, batch: (_in_parallel(fold(model, batch=1)), _identity),
    "grouped": lambda model, batch: (with_grouped_convolutions(model), softmax),
}


class GroupedParts(TrainableParts):
    """Layers of the trainable network, with Keras' grouped convolution as the channel-wise convolution."""

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
    """Returns the same network with the layers of `GroupedParts` and the same weights."""
    with mock.patch.object(x3d, "TrainableParts", GroupedParts):
        grouped = x3d_tf.X3D(model.expansion, model.num_classes, model.options)
    for layer in model.layers:
        weights = layer.get_weights()
        if isinstance(layer, ChannelwiseConv3D):
            weights = [weights[0][:, :, :, None, :]]
        grouped.get_layer(layer.name).set_weights(weights)
    return grouped


def train(case: Case, *, grouped: bool = False, comparable: bool = False, **execution: Any) -> Callable[[], float]:
    """Returns the training step of a run, on one batch that stays in memory.

    Args:
        case: computation to perform.
        grouped: whether to use Keras' grouped convolution.
        comparable: whether the loss is to equal that of other implementations: without dropout, and all clips share
            batch-norm statistics.
        **execution: fields of `Execution`.
    """
    in_slices = case.device == "cpu" and not grouped and case.batch >= case.threads
    limit_threads(case.threads, single_threaded_ops=in_slices)
    config = TrainConfig(
        expansion=x3d_tf.VARIANTS[case.network].expansion,
        model=x3d_tf.ModelOptions(dropout=0.0, bn_group=case.batch) if comparable else x3d_tf.ModelOptions(),
        dataset=DatasetSpec(records="none"),
        recipe=Recipe(batch=case.batch, reference_batch=case.batch, learning_rate=1e-4, warmup_fraction=0),
        execution=Execution(**execution),
    )
    strategy = tf.distribute.MirroredStrategy([set_device(case)])  # the trainer's default
    keras.utils.set_random_seed(0)
    with strategy.scope():
        with precision_scope(config.execution.precision):
            model = x3d_tf.X3D(config.expansion, CLASSES, config.model)
            set_random_weights(model)
            model = with_grouped_convolutions(model) if grouped else model
        step = TrainStep(model, config, strategy, SoftmaxLoss(case.batch))
    batches = iter(strategy.distribute_datasets_from_function(lambda context: _one_batch(case, config)))
    return lambda: float(step(batches, 1)["loss"][0])  # float() waits for the device


def _one_batch(case: Case, config: TrainConfig) -> tf.data.Dataset:
    """Returns a dataset that repeats one batch, split into the micro-batches of a step; pixels are float32."""
    clips = tf.constant(squares(case.network, case.batch), tf.float32)
    labels = tf.range(case.batch, dtype=tf.int32)
    micro_batches = config.execution.accumulation
    complete = tf.data.Dataset.from_tensors((clips, labels))
    if micro_batches == 1:
        return complete.repeat()
    return complete.unbatch().batch(case.batch // micro_batches, drop_remainder=True).repeat()
