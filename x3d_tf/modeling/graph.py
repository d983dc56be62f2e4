"""X3D and EfficientNet3D as calls of `Parts`, in execution order: their only definition. Imports no TensorFlow.

A function gets its widths from the architecture and reads no attribute of a tensor.
"""

from typing import Literal, get_args

from x3d_tf.errors import require
from x3d_tf.modeling.architecture import (
    FC1_WIDTH,
    Architecture,
    BlockPlan,
    ModelOptions,
    plan,
    pool_window,
    se_width,
)
from x3d_tf.modeling.expansion import Expansion
from x3d_tf.modeling.parts import Parts, Tensor
from x3d_tf.types import NAME_RULE, Activation, is_name

DetectionHead = Literal["full", "simple", "frame"]
_TASK_ACTIVATIONS: dict[str, Activation] = {  # of the built-in tasks
    "single_label": "softmax",
    "multi_label": "sigmoid",
    "detection": "sigmoid",
}


def graph(
    clips: Tensor,
    architecture: Architecture,
    parts: Parts[Tensor],
    *,
    train_size: int,
    num_classes: int | None,
    activation: Activation,
) -> Tensor:
    """Builds the complete classifier (paper, Table 1, or EfficientNet3D of section 4.3).

    Args:
        clips: (N, T, H, W, 3), RGB in 0..255.
        architecture: widths, depths and options of the network.
        parts: creates the layers.
        train_size: side of the training crop in pixels, which sets the window of the head's fixed poolings.
        num_classes: number of outputs; None stops at pool5.
        activation: turns logits into the probabilities that fixed pooling averages.

    Returns:
        Logits (N, num_classes), or pool5 (N, head_width).
    """
    x = parts.head_input(conv5(backbone(clips, architecture, parts), architecture, parts))
    pool = architecture.options.head_pool
    if pool == "global" or num_classes is None:
        x = parts.global_pool(x, "pool5")
    else:
        x = parts.window_pool(parts.time_mean(x), pool_window(train_size), "pool5")
    if num_classes is None:
        return x
    x = fc2(fc1(x, architecture, parts), num_classes, architecture, parts)
    if pool == "fixed_logits":
        x = parts.spatial_mean(x)
    elif pool == "fixed_probabilities":
        x = parts.mean_probability(x, activation)
    return x


def probabilities_graph(
    clips: Tensor,
    expansion: Expansion,
    options: ModelOptions,
    parts: Parts[Tensor],
    *,
    num_classes: int,
    activation: Activation,
) -> Tensor:
    """Builds the complete classifier up to its probabilities (N, num_classes); the arguments are those of `graph`."""
    architecture, train_size = plan(expansion, options), expansion.clip.size
    logits = graph(clips, architecture, parts, train_size=train_size, num_classes=num_classes, activation=activation)
    return parts.probabilities(logits, activation, "probabilities")


def detection_graph(
    clips: Tensor,
    boxes: Tensor,
    architecture: Architecture,
    parts: Parts[Tensor],
    *,
    head: DetectionHead,
    num_classes: int,
) -> Tensor:
    """Builds the complete detector (paper, section 5).

    The backbone of the classifier is followed by RoIAlign, the maximum over each box, and the two dense layers of the
    classifier. The last feature maps are averaged over time, because a box does not move within a clip.

    Args:
        clips: (N, T, H, W, 3), RGB in 0..255.
        boxes: (N, B, 4), x1, y1, x2, y2 in [0, 1] of the clip.
        architecture: widths, depths and options of the network.
        parts: creates the layers.
        head: "full", "simple" or "frame"; see `detection.build_detector`.
        num_classes: number of outputs per box.

    Returns:
        Logits (N, B, num_classes).
    """
    x = backbone(clips, architecture, parts)
    if head != "simple":
        x = conv5(x, architecture, parts)
    x = parts.time_mean(parts.head_input(x))
    if head == "frame":
        x = parts.per_box(parts.spatial_max(x), boxes)
    else:
        x = parts.spatial_max(parts.regions(x, boxes, clips, "regions"))
    if head != "simple":
        x = fc1(x, architecture, parts)
    return fc2(x, num_classes, architecture, parts)


def require_activation(activation: object) -> None:
    """Raises `UserError` unless `activation` turns logits into probabilities."""
    names = get_args(Activation)
    require(activation in names, "activation", f"be one of {', '.join(names)}", activation)


def task_and_activation(task: str | None, activation: Activation | None) -> tuple[str, Activation]:
    """Returns the task and the activation of a classifier; either, if it is None, follows from the other.

    Without both, they are "single_label" and "softmax". The activation of a task of your own defaults to "softmax".
    """
    if activation is None:
        activation = "softmax" if task is None else _TASK_ACTIVATIONS.get(task, "softmax")
    require_activation(activation)
    if task is None:
        task = "single_label" if activation == "softmax" else "multi_label"
    return task, activation


def require_task(task: str, activation: Activation, *, detects: bool) -> None:
    """Raises `UserError` unless the task has a valid name and, if it is built in, fits the network.

    Args:
        task: name of the task.
        activation: activation of the network.
        detects: whether the network is a detector.
    """
    require(is_name(task), "task", NAME_RULE, task)
    expected = _TASK_ACTIVATIONS.get(task, activation)
    require(activation == expected, "activation", f"be {expected!r} for the task {task}", activation)
    if task in _TASK_ACTIVATIONS:
        network = "a detector" if detects else "a network that classifies clips"
        require(detects == (task == "detection"), "task", f"fit {network}", task)


def require_head(head: object) -> None:
    """Raises `UserError` unless `head` is the name of a detection head."""
    require(head in get_args(DetectionHead), "head", f"be one of {', '.join(get_args(DetectionHead))}", head)


def backbone(clips: Tensor, architecture: Architecture, parts: Parts[Tensor]) -> Tensor:
    """Builds the network up to its last stage. The arguments are those of `graph`."""
    options = architecture.options
    x = parts.normalize(clips, "normalize")
    if options.input == "difference":
        x = parts.difference(x, "difference")
    x = parts.conv(x, architecture.stem_width, (1, 3, 3), "conv1_xy", stride=2)
    x = parts.channelwise(x, (options.stem_kernel, 1, 1), "conv1_t")
    x = parts.activation(parts.norm(x, norm_of("conv1_t")), "relu", "conv1")
    for block_plan in architecture.blocks():
        x = block(x, block_plan, options, parts)
    return x


def block(x: Tensor, plan: BlockPlan, options: ModelOptions, parts: Parts[Tensor]) -> Tensor:
    """Builds a block (paper, appendix A.3); one without a shortcut ends in ReLU too: no bottleneck is linear."""
    name, shortcut = plan.name, x
    if plan.shortcut == "projection":
        shortcut = parts.pointwise(x, plan.width, f"{name}_shortcut", plan.stride)
        if plan.shortcut_norm:
            shortcut = parts.norm(shortcut, norm_of(f"{name}_shortcut"))
    if plan.expands:
        if options.separable:
            x = parts.pointwise(x, plan.inner_width, f"{name}_conv_a")
        else:
            x = parts.conv(x, plan.inner_width, (3, 1, 1), f"{name}_conv_a")
        x = parts.norm(x, norm_of(f"{name}_conv_a"))
        x = parts.activation(x, "silu" if options.swish_before else "relu", f"{name}_conv_a_act")
    if options.separable:
        x = parts.channelwise(x, plan.kernel, f"{name}_conv_b", plan.stride)
    else:
        x = parts.conv(x, plan.inner_width, (1, 3, 3), f"{name}_conv_b", plan.stride)
    x = parts.norm(x, norm_of(f"{name}_conv_b"))
    if plan.se:
        x = squeeze_excitation(x, plan.inner_width, f"{name}_se", parts)
    x = parts.activation(x, "silu" if options.swish else "relu", f"{name}_conv_b_act")
    x = parts.pointwise(x, plan.width, f"{name}_conv_c")
    x = parts.norm(x, norm_of(f"{name}_conv_c"), ends_branch=plan.shortcut is not None)
    if plan.shortcut is not None:
        x = parts.add(shortcut, parts.drop_branch(x, plan.drop_rate, f"{name}_drop"), f"{name}_add")
    return parts.activation(x, "relu", plan.end)


def squeeze_excitation(x: Tensor, width: int, name: str, parts: Parts[Tensor]) -> Tensor:
    """Scales each of the `width` channels by a factor in (0, 1) computed from the means of all channels."""
    factors = parts.mean(x, f"{name}_pool")
    factors = parts.excitation(factors, se_width(width), "relu", f"{name}_reduce")
    factors = parts.excitation(factors, width, "sigmoid", f"{name}_expand")
    return parts.scale(x, factors, f"{name}_scale")


def conv5(x: Tensor, architecture: Architecture, parts: Parts[Tensor]) -> Tensor:
    """Builds the last convolution, 1x1x1, to the width of the head."""
    x = parts.pointwise(x, architecture.head_width, "conv5_conv")
    return parts.activation(parts.norm(x, norm_of("conv5_conv")), "relu", "conv5")


def fc1(x: Tensor, architecture: Architecture, parts: Parts[Tensor]) -> Tensor:
    """Builds the hidden layer of the head, which EfficientNet3D lacks."""
    return parts.dense(x, FC1_WIDTH, "fc1", function="relu", bias=False) if architecture.is_x3d else x


def fc2(x: Tensor, num_classes: int, architecture: Architecture, parts: Parts[Tensor]) -> Tensor:
    """Builds dropout and the last layer of the head, which returns logits."""
    return parts.dense(parts.dropout(x, architecture.options.dropout, "dropout"), num_classes, "fc2")


def norm_of(name: str) -> str:
    """Returns the name of the batch norm after a convolution, given that of the convolution."""
    return {"conv1_t": "conv1_bn", "conv5_conv": "conv5_bn"}.get(name, f"{name}_bn")
