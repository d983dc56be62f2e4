"""The trainable classifier, one flat Keras graph, and the base class of all networks."""

import dataclasses
from typing import Any, Literal

import keras

from x3d_tf.errors import require
from x3d_tf.modeling.architecture import ModelOptions, plan, require_classes, resolve
from x3d_tf.modeling.cost import Cost, cost
from x3d_tf.modeling.expansion import Expansion, Family, name_of
from x3d_tf.modeling.graph import DetectionHead, graph, probabilities_graph, require_task, task_and_activation
from x3d_tf.modeling.keras_parts import TrainableParts
from x3d_tf.modeling.layers import RequireWindow
from x3d_tf.modeling.parts import Parts
from x3d_tf.types import Activation, ClipSpec, Combine, FrameSampling, Storage


def build_x3d(
    network: str | Expansion,
    num_classes: int = 400,
    *,
    include_top: bool = True,
    activation: Activation | None = None,
    task: str | None = None,
    options: ModelOptions | None = None,
    name: str | None = None,
) -> "X3D":
    """Builds a network with randomly initialized weights.

    Args:
        network: a variant (x2d, x3d_xs, x3d_s, x3d_m, x3d_l, x3d_xl, x3d_xxl, and EfficientNet3D's efficientnet3d_b0,
            _b3, _b4 and efficientnet3d_matched_b0, _b3, _b4) or any `Expansion`.
        num_classes: number of outputs of the classifier.
        include_top: False stops before fc1: the output is then pool5, (N, channels).
        activation: "softmax" for networks that choose one class, "sigmoid" for networks that decide on each class by
            itself. `portable` turns logits into probabilities with it; the network itself returns logits. Defaults to
            "sigmoid" for the task "multi_label", otherwise to "softmax".
        task: name of the task, for the metadata. Defaults to "single_label" for softmax and "multi_label" for sigmoid.
        options: what the factors do not determine. Defaults to `ModelOptions()`.
        name: name of the model. Defaults to the name of the variant.

    Returns:
        A model that maps clips (N, T, H, W, 3), RGB in 0..255, uint8 or float, of any T, H and W, to logits (N,
        num_classes). The outputs of its layers conv1, res2, ..., res5, conv5, pool5 and fc1 can be used as features.
        EfficientNet3D has res2 to res8, and no fc1.

    Raises:
        ValueError, TypeError: an unknown variant, or a value of the wrong type or out of range.
        UserError: the activation or this kind of network does not fit the task.

    Example:
        >>> model = build_x3d("x3d_m", num_classes=10, options=ModelOptions(drop_connect=0.1))
    """
    expansion, options = resolve(network, options)
    return X3D(
        expansion,
        num_classes,
        options,
        include_top=include_top,
        activation=activation,
        task=task,
        name=name,
    )


class Network(keras.Model):
    """Base class of the classifier and the detector.

    Attributes:
        expansion, options, num_classes, include_top, activation, task, head: the arguments that the network was built
            from. Only detectors have a `head`.
        form: always "trainable"; see `Metadata`.
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
    activation: Activation
    task: str
    head: DetectionHead | None = None
    form: Literal["trainable"] = "trainable"
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

    @property
    def logits(self) -> Any:
        return self.output

    def with_parts(self, clip: Any, parts: Parts[Any], options: ModelOptions | None = None) -> keras.Model:
        """Builds this network, which has a classifier, from other parts, without its weights, up to its probabilities.

        Args:
            clip: the Keras input for clips.
            parts: creates the layers.
            options: options that replace those of the network.
        """
        inputs = self._keras_inputs(clip)
        return keras.Model(inputs, self.apply_parts(inputs, parts, options), name=self.name)

    def apply_parts(self, inputs: Any, parts: Parts[Any], options: ModelOptions | None = None) -> Any:
        """Builds this network, which has a classifier, from parts of any framework.

        Args:
            inputs: tensors of the parts, as the network takes them: the clips; or a dictionary of "clip" and "boxes".
            parts: creates the layers.
            options: options that replace those of the network.

        Returns:
            The tensor of the probabilities.
        """
        raise NotImplementedError

    @staticmethod
    def _keras_inputs(clip: Any) -> Any:
        """Returns the inputs of the network for the Keras input of its clips."""
        return clip

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
        activation: Activation | None = None,
        task: str | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        require_classes(num_classes)
        require(isinstance(include_top, bool), "include_top", "be True or False", include_top)
        task, activation = task_and_activation(task, activation)
        require_task(task, activation, detects=False)
        clips = keras.Input((None, None, None, 3), name="clip")
        pools_windows = include_top and options.head_pool != "global"
        outputs = graph(
            RequireWindow(options.head_pool, expansion.clip.size, name="window")(clips) if pools_windows else clips,
            plan(expansion, options),
            TrainableParts(options.bn_group),
            train_size=expansion.clip.size,
            num_classes=num_classes if include_top else None,
            activation=activation,
        )
        super().__init__(inputs=clips, outputs=outputs, name=name or layer_name(expansion, options.family), **kwargs)
        self.expansion, self.options = expansion, options
        self.num_classes, self.include_top = num_classes, include_top
        self.activation, self.task = activation, task

    def apply_parts(self, inputs: Any, parts: Parts[Any], options: ModelOptions | None = None) -> Any:
        return probabilities_graph(
            inputs,
            self.expansion,
            options or self.options,
            parts,
            num_classes=self.num_classes,
            activation=self.activation,
        )

    def get_config(self) -> dict[str, Any]:
        return {
            "expansion": dataclasses.asdict(self.expansion),
            "num_classes": self.num_classes,
            "options": dataclasses.asdict(self.options),
            "include_top": self.include_top,
            "activation": self.activation,
            "task": self.task,
            "name": self.name,
        }


def require_classifier(model: Network) -> None:
    """Raises `UserError` unless the model is a trainable network with its classifier, as all other forms require."""
    trainable, rule = isinstance(model, Network), "be a trainable network, from build_x3d, build_detector or load"
    require(trainable, "the model", rule, type(model).__name__)
    require(model.include_top, "the network", "have its classifier (include_top)", model.include_top)


def cost_of(model: Network) -> Cost:
    """Returns the cost of a network on one evaluation clip; for a detector, with one box."""
    clip = ClipSpec(model.clip.frames, model.clip.stride, model.eval_size)
    return cost(model.expansion, clip, num_classes=model.num_classes, options=model.options, head=model.head)


def layer_name(expansion: Expansion, family: Family) -> str:
    """Returns the default name of a model, with only the characters that Keras allows."""
    return "".join(c if c.isalnum() else "_" for c in name_of(expansion, family)).strip("_")
