"""Metadata of a model file, from which its network can be rebuilt. Imports no TensorFlow."""

import dataclasses
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from x3d_tf.errors import UserError, check_field_types, require
from x3d_tf.modeling.architecture import ModelOptions, plan, require_classes, require_window
from x3d_tf.modeling.cost import parameters, weight_shapes
from x3d_tf.modeling.expansion import MAX_SIDE, Expansion
from x3d_tf.modeling.graph import DetectionHead, require_task
from x3d_tf.text import check_class_name, counted
from x3d_tf.types import (
    MAX_VIEWS,
    Activation,
    Combine,
    FrameSampling,
    Storage,
    stored_from_json,
    stored_to_json,
)

if TYPE_CHECKING:
    from x3d_tf.modeling.x3d import Network

FORMAT_VERSION = 3
JSON_LIMIT = 16 * 1024 * 1024  # bytes
_NAMES_LIMIT = 2_000_000  # characters of all class names, so that even their escaped JSON is below JSON_LIMIT
_INTEGER_DIGITS = 18


@dataclass(frozen=True)
class Metadata:
    """Metadata from which a network can be rebuilt.

    Attributes:
        expansion: the six expansion factors.
        options: the other options of the network.
        num_classes: number of outputs of the classifier.
        include_top: whether the network has a classifier.
        class_names: class names, one per output; empty without a classifier.
        form: `trainable` (this package's layers, logits), `portable` (stock Keras layers, probabilities), or `exported`
            (a file for another runtime, probabilities).
        size: side of the input clip in pixels; the training crop for the trainable form.
        task: name of the task. single_label requires a classifier with softmax, multi_label one with sigmoid, and
            detection a detector.
        activation: function from logits to probabilities; always "sigmoid" for a detector.
        stretch: whether frames are resized to squares, ignoring the aspect ratio, before they are cropped.
        detection_head: "full", "simple" or "frame" for a detector; None for a classifier.
        stored: size and JPEG quality of the stored training frames; None if the frames were not stored.
        frame_sampling: rule that chooses the frames of a clip. Always "slowfast" for a detector, which uses another
            rule.
        test_views: number of clips per video whose predictions are combined, 1 to 1000.
        combine: how they are combined: "mean", or "max" for each class.

    Raises:
        UserError: a field is invalid. Names the field, the rule and the value received.
    """

    expansion: Expansion
    options: ModelOptions
    num_classes: int
    include_top: bool
    class_names: tuple[str, ...]
    form: Literal["trainable", "portable", "exported"]
    size: int
    task: str = "single_label"
    activation: Activation = "softmax"
    stretch: bool = False
    detection_head: DetectionHead | None = None
    stored: Storage | None = None
    frame_sampling: FrameSampling = "slowfast"
    test_views: int = 10
    combine: Combine = "mean"

    def __post_init__(self) -> None:
        check_field_types(self)
        require_classes(self.num_classes)
        require(32 <= self.size <= MAX_SIDE, "size", f"be in [32, {MAX_SIDE}] pixels", self.size)
        if self.include_top:
            require_window(self.options, self.size, self.expansion.clip.size)
        plan(self.expansion, self.options)  # checks the bounds before anything of this size is counted or built
        characters = sum(map(len, self.class_names))
        require(characters <= _NAMES_LIMIT, "class_names", f"have at most {_NAMES_LIMIT} characters", characters)
        expected = self.num_classes if self.include_top else 0
        require(len(self.class_names) == expected, "class_names", f"have {expected} entries", len(self.class_names))
        for number, name in enumerate(self.class_names):
            check_class_name(name, f"class_names[{number}]")
        detects = self.detection_head is not None
        require(self.include_top or not detects, "detection_head", "be None without a classifier", self.detection_head)
        is_sigmoid = not detects or self.activation == "sigmoid"
        require(is_sigmoid, "activation", "be 'sigmoid' for a detector", self.activation)
        require_task(self.task, self.activation, detects=detects)
        is_valid_sampling = not detects or self.frame_sampling == "slowfast"
        require(is_valid_sampling, "frame_sampling", "be 'slowfast' for a detector", self.frame_sampling)
        require(1 <= self.test_views <= MAX_VIEWS, "test_views", f"be in 1..{MAX_VIEWS}", self.test_views)

    @classmethod
    def from_model(
        cls, model: "Network", *, class_names: tuple[str, ...], form: Any, size: int | None = None
    ) -> "Metadata":
        """Returns the metadata of a built network."""
        return cls(
            model.expansion,
            model.options,
            model.num_classes,
            model.include_top,
            class_names,
            form,
            size or model.clip.size,
            model.task,
            model.activation,
            model.stretch,
            model.head,
            model.stored,
            model.frame_sampling,
            model.test_views,
            model.combine,
        )

    def layers(self) -> list[tuple[str, int]]:
        """Returns the name and the number of trainable parameters of each layer."""
        num_classes = self.num_classes if self.include_top else None
        return parameters(self.expansion, num_classes, self.options, self.detection_head)

    def weight_shapes(self) -> dict[str, list[tuple[int, ...]]]:
        """Returns the shapes of the arrays of each layer of the trainable network by name; see `cost.weight_shapes`."""
        num_classes = self.num_classes if self.include_top else None
        return weight_shapes(self.expansion, num_classes, self.options, self.detection_head)

    def require_capacity(self, where: str, weights: int, arrays: int | None = None) -> None:
        """Checks, before the network is built, that a file is large enough to hold its weights.

        Args:
            where: the file or member that holds the weights, for the message.
            weights: number of weights that it can hold.
            arrays: number of arrays that it holds, if known; each layer has at least one.

        Raises:
            UserError: the file is too small. Names `where`, the rule and the count so far.
        """
        count = 0
        for number, (_, parameters_) in enumerate(self.layers(), start=1):
            count += parameters_
            rule = f"hold at least {count} parameters for the network in its metadata"
            require(count <= weights, where, rule, weights)
            if arrays is not None:
                rule = f"hold at least {number} arrays for the network in its metadata"
                require(number <= arrays, where, rule, arrays)

    def to_json(self) -> str:
        """Returns the metadata as a JSON object."""
        fields = {**dataclasses.asdict(self), "stored": stored_to_json(self.stored)}
        return json.dumps({"format_version": FORMAT_VERSION, **fields}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Metadata":
        """Parses and checks JSON written by `to_json`.

        Raises:
            UserError: invalid JSON, another format version, a missing or unknown field, or a value out of range.
        """
        require(len(text) <= JSON_LIMIT, "the metadata", f"have at most {JSON_LIMIT} bytes", len(text))
        try:
            fields = json.loads(text, parse_int=_parse_int)
            version = fields.pop("format_version")
            require(version == FORMAT_VERSION, "format_version", f"be {FORMAT_VERSION}", version)
            fields["expansion"] = Expansion(**fields["expansion"])
            fields["options"] = ModelOptions(**fields["options"])
            require(isinstance(fields["class_names"], list), "class_names", "be a list", fields["class_names"])
            fields["class_names"] = tuple(fields["class_names"])
            fields["stored"] = stored_from_json(fields["stored"])
            return cls(**fields)
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise UserError(f"invalid X3D metadata: {error}") from error


def _parse_int(digits: str) -> int:
    if len(digits) > _INTEGER_DIGITS:  # keeps messages short
        raise ValueError(f"an integer must have at most {_INTEGER_DIGITS} digits, got {len(digits)}")
    return int(digits)


def class_names_or_numbers(class_names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Returns the class names, or numbers, with a warning, if there are none."""
    if class_names is not None:
        return tuple(class_names)
    warnings.warn(f"class_names is missing: {counted(count, 'class')} numbered from 0", stacklevel=3)
    return tuple(str(number) for number in range(count))


def copy_metadata(source: "Network | Metadata", model: Any) -> None:
    """Copies what the weights do not hold into a network: its class names, and how clips are made from videos.

    Args:
        source: the network or the metadata.
        model: a `Network`, or an object with its attributes.
    """
    for name in ("class_names", "stretch", "stored", "frame_sampling", "test_views", "combine"):
        setattr(model, name, getattr(source, name))
