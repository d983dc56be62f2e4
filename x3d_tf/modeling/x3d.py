"""X3D as one flat Keras graph. `graph` defines it once; a set of parts supplies the layers."""

import dataclasses
from typing import TYPE_CHECKING, Any

import keras
from keras import layers, ops

from x3d_tf.errors import require
from x3d_tf.modeling.architecture import (
    FC1_WIDTH,
    STAGE_NAMES,
    Architecture,
    ModelOptions,
    StagePlan,
    plan,
    pool_window,
    require_classes,
    se_width,
)
from x3d_tf.modeling.expansion import Expansion, as_expansion, name_of
from x3d_tf.modeling.layers import (
    ChannelwiseConv3D,
    Conv3D,
    Dropout,
    GhostBatchNorm,
    PointwiseConv3D,
    Regions,
    RequireWindow,
    Swish,
    conv_initializer,
)
from x3d_tf.modeling.roi_align import regions
from x3d_tf.types import ClipSpec, Combine, FrameSampling, Storage, Task

if TYPE_CHECKING:
    from x3d_tf.modeling.metadata import Metadata

_TASKS = ("single_label", "multi_label")
MEAN, STD = 0.45 * 255, 0.225 * 255  # for RGB in 0..255, one value for all channels (PySlowFast)


def build_x3d(
    network: str | Expansion,
    num_classes: int = 400,
    *,
    include_top: bool = True,
    task: Task = "single_label",
    name: str | None = None,
    **options: Any,
) -> "X3D":
    """Builds a network with randomly initialized weights.

    Args:
        network: a variant (x2d, x3d_xs, x3d_s, x3d_m, x3d_l, x3d_xl, x3d_xxl) or any `Expansion`.
        num_classes: number of outputs of the classifier.
        include_top: False stops before fc1: the output is then pool5, (N, channels).
        task: "single_label" or "multi_label". Determines whether `portable` converts logits to probabilities with
            softmax or with sigmoid; the network itself returns logits.
        name: name of the model. Defaults to the name of the variant.
        **options: the fields of `ModelOptions`: input, stem_kernel, se, swish, swish_before, separable, shortcut_norm,
            head_pool, bn_group, drop_connect, dropout.

    Returns:
        A model that maps clips (N, T, H, W, 3), RGB in 0..255, uint8 or float, of any T, H and W, to logits (N,
        num_classes). The outputs of its layers conv1, res2, ..., res5, conv5, pool5 and fc1 can be used as features.

    Raises:
        ValueError, TypeError: an unknown variant or option, or a value of the wrong type or out of range.

    Example:
        >>> model = build_x3d("x3d_m", num_classes=10, drop_connect=0.1)
    """
    known = [field.name for field in dataclasses.fields(ModelOptions)]
    for option in options:
        require(option in known, "build_x3d's options", f"be one of {', '.join(known)}", option)
    return X3D(
        as_expansion(network), num_classes, ModelOptions(**options), include_top=include_top, task=task, name=name
    )


class Network(keras.Model):
    """Base class of the classifier and the detector.

    Attributes:
        expansion, options, num_classes, include_top, task: the arguments that the network was built from.
        class_names: class names, one per output, if the network was loaded by `x3d_tf.load`; otherwise empty.
        stretch: whether training frames were resized to squares, ignoring the aspect ratio. Evaluation does the same.
        stored: size and JPEG quality of the stored training frames. Frames of videos are then resized and compressed
            alike. None if the training frames were not stored, or if this is unknown.
        frame_sampling: rule that chose the frames of the training clips; see `data.sampling.frame_indices`.
        test_views: default number of clips per video whose probabilities are combined.
        combine: how they are combined: "mean", or "max" for each class.
        backbone_end: name of the layer whose output is the input of the head.
        logits: logits tensor in the network's graph, the input of the loss.
    """

    expansion: Expansion
    options: ModelOptions
    num_classes: int
    include_top: bool
    task: Task
    class_names: tuple[str, ...] = ()
    stretch: bool = False
    stored: Storage | None = None
    frame_sampling: FrameSampling = "slowfast"
    test_views: int = 10
    combine: Combine = "mean"
    backbone_end: str = "conv5"

    @property
    def clip(self) -> ClipSpec:
        """Training clip of the network: frames, stride and size."""
        return self.expansion.clip

    @property
    def eval_size(self) -> int:
        """Side in pixels of the single centre crop used in evaluation, and by default in inference."""
        return self.clip.size

    def copy_metadata(self, source: "Network | Metadata") -> None:
        """Copies the metadata that is not stored in the weights: the class names and how clips are made from videos."""
        for name in ("class_names", "stretch", "stored", "frame_sampling", "test_views", "combine"):
            setattr(self, name, getattr(source, name))

    @property
    def logits(self) -> Any:
        return self.output

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "Network":
        parsed = {"expansion": Expansion(**config["expansion"]), "options": ModelOptions(**config["options"])}
        return cls(**(config | parsed))


@keras.saving.register_keras_serializable("x3d_tf")
class X3D(Network):
    """The trainable classifier, as built by `build_x3d`. Its config holds the arguments of the constructor."""

    def __init__(
        self,
        expansion: Expansion,
        num_classes: int,
        options: ModelOptions,
        *,
        include_top: bool = True,
        task: Task = "single_label",
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        require_classes(num_classes)
        require(isinstance(include_top, bool), "include_top", "be True or False", include_top)
        require(task in _TASKS, "task", f"be one of {', '.join(_TASKS)}", task)
        clips = keras.Input((None, None, None, 3), name="clip")
        pools_windows = include_top and options.head_pool != "global"
        outputs = graph(
            RequireWindow(options.head_pool, expansion.clip.size, name="window")(clips) if pools_windows else clips,
            plan(expansion, options),
            TrainableParts(options),
            train_size=expansion.clip.size,
            num_classes=num_classes if include_top else None,
            task=task,
        )
        super().__init__(inputs=clips, outputs=outputs, name=name or layer_name(expansion), **kwargs)
        self.expansion, self.options = expansion, options
        self.num_classes, self.include_top, self.task = num_classes, include_top, task

    def get_config(self) -> dict[str, Any]:
        return {
            "expansion": dataclasses.asdict(self.expansion),
            "num_classes": self.num_classes,
            "options": dataclasses.asdict(self.options),
            "include_top": self.include_top,
            "task": self.task,
            "name": self.name,
        }


def layer_name(expansion: Expansion) -> str:
    """Returns the default name of a model, with only the characters that Keras allows."""
    return "".join(c if c.isalnum() else "_" for c in name_of(expansion)).strip("_")


class ClipParts:
    """Methods shared by all sets of parts whose tensors are (N, T, H, W, C)."""

    def normalize(self, x: Any, name: str) -> Any:
        return layers.Normalization(axis=None, mean=MEAN, variance=STD**2, name=name)(x)

    def mean(self, x: Any, name: str) -> Any:
        return layers.GlobalAveragePooling3D(keepdims=True, name=name)(x)

    def scale(self, x: Any, scale: Any, name: str) -> Any:
        return layers.Multiply(name=name)([x, scale])

    def activation(self, x: Any, function: str, name: str) -> Any:
        return layers.Activation(function, name=name)(x)

    def as_clips(self, x: Any) -> Any:
        """Returns the tensor as (N, T, H, W, C)."""
        return x

    def regions(self, x: Any, boxes: Any, clips: Any, name: str) -> Any:
        """Pools feature maps (N, H, W, C) in boxes (N, B, 4) of the clips to (N, B, 7, 7, C)."""
        return regions(x, boxes, clips.shape[2], clips.shape[3])


class TrainableParts(ClipParts):
    """Creates the layers of the trainable network.

    Another class with the same methods builds the same graph from other layers.
    """

    def __init__(self, options: ModelOptions) -> None:
        self.options = options

    def pointwise(self, x: Any, filters: int, name: str, stride: int = 1) -> Any:
        return PointwiseConv3D(filters, stride, name=name)(x)

    def conv(self, x: Any, filters: int, kernel: tuple[int, int, int], name: str, stride: int = 1) -> Any:
        return Conv3D(filters, kernel, stride, name=name)(x)

    def channelwise(self, x: Any, kernel: tuple[int, int, int], name: str, stride: int = 1) -> Any:
        return ChannelwiseConv3D(kernel, stride, name=name)(x)

    def difference(self, x: Any, name: str) -> Any:
        neighbors = [
            layers.Cropping3D((frames, (0, 0), (0, 0)), "channels_last", name=f"{name}_{which}")(x)
            for which, frames in (("next", (1, 0)), ("this", (0, 1)))
        ]
        return layers.Subtract(name=name)(neighbors)

    def norm(self, x: Any, name: str, gamma: str = "ones") -> Any:
        return GhostBatchNorm(self.options.bn_group, gamma_initializer=gamma, name=name)(x)

    def activation(self, x: Any, function: str, name: str) -> Any:
        return Swish(name=name)(x) if function == "silu" else super().activation(x, function, name)

    def regions(self, x: Any, boxes: Any, clips: Any, name: str) -> Any:
        return Regions(name=name, dtype=x.dtype)([x, boxes, clips])

    def drop_branch(self, x: Any, rate: float, name: str) -> Any:
        return Dropout(rate, noise_shape=(None, 1, 1, 1, 1), name=name)(x) if rate else x

    def dropout(self, x: Any, name: str) -> Any:
        return Dropout(self.options.dropout, dtype=x.dtype, name=name)(x) if self.options.dropout else x


def graph(
    clips: Any, architecture: Architecture, parts: Any, *, train_size: int, num_classes: int | None, task: Task
) -> Any:
    """Builds the complete network, in execution order (paper, Table 1).

    Args:
        clips: (N, T, H, W, 3), RGB in 0..255.
        architecture: widths, depths and options of the network.
        parts: creates the layers; see `TrainableParts`.
        train_size: side of the training crop in pixels, which sets the window of the head's fixed poolings.
        num_classes: number of outputs; None stops at pool5.
        task: "single_label" or "multi_label": the probabilities that fixed pooling averages.

    Returns:
        Logits (N, num_classes), or pool5 (N, head_width).
    """
    x = conv5(backbone(clips, architecture, parts), architecture, parts)
    window = pool_window(train_size)
    return head(x, architecture.options, parts, window=window, num_classes=num_classes, task=task)


def backbone(clips: Any, architecture: Architecture, parts: Any) -> Any:
    """Builds the network up to res5. The arguments are those of `graph`."""
    x = parts.normalize(clips, "normalize")
    if architecture.options.input == "difference":
        x = parts.difference(x, "difference")
    x = parts.conv(x, architecture.stem_width, (1, 3, 3), "conv1_xy", stride=2)
    x = parts.channelwise(x, (architecture.options.stem_kernel, 1, 1), "conv1_t")
    x = layers.ReLU(name="conv1")(parts.norm(x, "conv1_bn"))
    for stage_index, (stage_name, stage) in enumerate(zip(STAGE_NAMES, architecture.stages)):
        for index in range(stage.depth):
            rate = architecture.drop_connect(stage_index)
            x = block(x, f"{stage_name}_{index}", architecture, stage, index, rate, parts)
            last = index == stage.depth - 1  # its output is named after the stage
            x = layers.ReLU(name=stage_name if last else f"{stage_name}_{index}")(x)
    return x


def conv5(x: Any, architecture: Architecture, parts: Any) -> Any:
    """Builds the last convolution, 1x1x1, to the width of the head."""
    x = parts.pointwise(x, architecture.head_width, "conv5_conv")
    return layers.ReLU(name="conv5")(parts.norm(x, "conv5_bn"))


def block(
    x: Any, name: str, architecture: Architecture, stage: StagePlan, index: int, drop_rate: float, parts: Any
) -> Any:
    """Builds a residual block up to the sum; the caller adds the final ReLU (paper, appendix A.3)."""
    options, inner = architecture.options, stage.inner_width
    stride = stage.stride if index == 0 else 1
    shortcut, widens = x, x.shape[-1] != stage.width
    if stride > 1 or widens:
        shortcut = parts.pointwise(x, stage.width, f"{name}_shortcut", stride)
        if architecture.has_shortcut_norm(widens):
            shortcut = parts.norm(shortcut, f"{name}_shortcut_bn")
    if options.separable:
        x = parts.pointwise(x, inner, f"{name}_conv_a")
    else:
        x = parts.conv(x, inner, (3, 1, 1), f"{name}_conv_a")
    x = parts.norm(x, f"{name}_conv_a_bn")
    x = parts.activation(x, "silu" if options.swish_before else "relu", f"{name}_conv_a_act")
    if options.separable:
        x = parts.channelwise(x, (3, 3, 3), f"{name}_conv_b", stride)
    else:
        x = parts.conv(x, inner, (1, 3, 3), f"{name}_conv_b", stride)
    x = parts.norm(x, f"{name}_conv_b_bn")
    if architecture.has_se(index):
        x = squeeze_excitation(x, f"{name}_se", parts)
    x = parts.activation(x, "silu" if options.swish else "relu", f"{name}_conv_b_act")
    x = parts.pointwise(x, stage.width, f"{name}_conv_c")
    x = parts.norm(x, f"{name}_conv_c_bn", gamma="zeros")  # each new block starts as the identity of its shortcut
    x = parts.drop_branch(x, drop_rate, f"{name}_drop")
    return layers.Add(name=f"{name}_add")([shortcut, x])


def squeeze_excitation(x: Any, name: str, parts: Any) -> Any:
    """Scales each channel by a factor in (0, 1) computed from the means of all channels."""
    width = x.shape[-1]
    scale = parts.mean(x, f"{name}_pool")
    for role, filters, activation in (("reduce", se_width(width), "relu"), ("expand", width, "sigmoid")):
        scale = layers.Dense(filters, activation, kernel_initializer=conv_initializer(filters), name=f"{name}_{role}")(
            scale
        )
    return parts.scale(x, scale, f"{name}_scale")


def head(x: Any, options: ModelOptions, parts: Any, *, window: int, num_classes: int | None, task: Task) -> Any:
    """Builds the head from conv5 to logits. `window` is the side of the fixed poolings, in positions of conv5."""
    x, full = parts.as_clips(x), full_precision()
    x = ops.cast(x, full) if x.dtype != full else x
    if options.head_pool == "global" or num_classes is None:
        x = layers.GlobalAveragePooling3D(name="pool5", dtype=full)(x)
    else:
        x = ops.mean(x, axis=1)
        x = layers.AveragePooling2D(window, strides=1, name="pool5", dtype=full)(x)
    if num_classes is None:
        return x
    x = fc2(parts.dropout(fc1(x), "dropout"), num_classes)
    if options.head_pool == "fixed_logits":
        x = ops.mean(x, axis=(1, 2))
    elif options.head_pool == "fixed_probabilities":
        if task == "multi_label":  # logit of the mean probability: log p - log(1 - p)
            x = _log_mean(_log_sigmoid(x)) - _log_mean(_log_sigmoid(-x))
        else:
            x = _log_mean(ops.log_softmax(x))
    return x


def _log_mean(x: Any) -> Any:
    """Returns the logarithm of the mean over all positions, (N, C), given logarithms (N, H, W, C)."""
    peak = ops.max(x, axis=(1, 2), keepdims=True)  # subtracted so that no class underflows in all windows
    return ops.log(ops.mean(ops.exp(x - peak), axis=(1, 2))) + ops.squeeze(peak, axis=(1, 2))


def _log_sigmoid(x: Any) -> Any:
    """Computes log(sigmoid(x)) without overflow, from operations that all export formats support."""
    return ops.minimum(x, 0.0) - ops.log(1.0 + ops.exp(-ops.abs(x)))


def fc1(x: Any) -> Any:
    """Applies the hidden layer of the classifier along the last axis."""
    initializer = conv_initializer(FC1_WIDTH)
    dense = layers.Dense(
        FC1_WIDTH, "relu", use_bias=False, kernel_initializer=initializer, name="fc1", dtype=full_precision()
    )
    return dense(x)


def fc2(x: Any, num_classes: int) -> Any:
    """Applies the last layer of the classifier, which returns logits."""
    normal = keras.initializers.RandomNormal(stddev=0.01)
    return layers.Dense(num_classes, kernel_initializer=normal, name="fc2", dtype=full_precision())(x)


def full_precision() -> str:
    """Returns the dtype of the weights, in which the head computes under mixed precision, too."""
    return str(keras.config.dtype_policy().variable_dtype)
