"""What a model file of ours says of itself: enough to build the network again. Imports no TensorFlow."""

import dataclasses
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from x3d_tf.errors import UserError, check_field_types, require
from x3d_tf.modeling.architecture import ModelOptions, plan, require_classes, require_window
from x3d_tf.modeling.cost import parameters
from x3d_tf.modeling.expansion import MAX_SIDE, Expansion
from x3d_tf.text import check_class_name, counted
from x3d_tf.types import MAX_VIEWS, FrameSampling, Storage, Task, stored_from_json, stored_to_json

if TYPE_CHECKING:
    from x3d_tf.modeling.x3d import Network

FORMAT_VERSION = 2
JSON_LIMIT = 16 * 1024 * 1024  # bytes
_NAMES_LIMIT = 2_000_000  # characters of all class names: their JSON is below the limit whatever they are
_INTEGER_DIGITS = 18


@dataclass(frozen=True)
class Metadata:
    """A network in words.

    Attributes:
        expansion: its factors.
        options: the builder's other choices.
        num_classes: outputs of the classifier.
        include_top: whether it has one.
        class_names: one for each output, or none where there is no classifier.
        form: `trainable` (this package's layers, logits) or `portable` (stock layers, probabilities).
        size: side of the portable form's clip in pixels; the training crop for the trainable one.
        task: whether a clip has one class or any number of them, or boxes on it have.
        stretch: whether frames are to be scaled to squares before a crop is cut out, instead of by their short side.
        detection_head: of a detector "full", "simple" or "frame"; else none.
        stored: how the frames that it was trained on were stored; None where they were not.
        frame_sampling: how the frames of its clips are chosen; "slowfast" for a detector, which has a rule of its own.
        test_views: clips of a video that its predictions are the mean of, 1..1000.

    Raises:
        UserError: naming the field, the rule and the value received.
    """

    expansion: Expansion
    options: ModelOptions
    num_classes: int
    include_top: bool
    class_names: tuple[str, ...]
    form: Literal["trainable", "portable"]
    size: int
    task: Task = "single_label"
    stretch: bool = False
    detection_head: Literal["full", "simple", "frame"] | None = None
    stored: Storage | None = None
    frame_sampling: FrameSampling = "slowfast"
    test_views: int = 10

    def __post_init__(self) -> None:
        check_field_types(self)
        require_classes(self.num_classes)
        require(32 <= self.size <= MAX_SIDE, "size", f"be in [32, {MAX_SIDE}] pixels", self.size)
        if self.include_top:
            require_window(self.options, self.size, self.expansion.clip.size)
        plan(self.expansion, self.options)  # whose bounds hold before a file's network is counted or built
        letters = sum(map(len, self.class_names))
        require(letters <= _NAMES_LIMIT, "class_names", f"have at most {_NAMES_LIMIT} characters together", letters)
        expected = self.num_classes if self.include_top else 0
        require(len(self.class_names) == expected, "class_names", f"be {expected}", len(self.class_names))
        for number, name in enumerate(self.class_names):
            check_class_name(name, f"class_names[{number}]")
        detects = self.task == "detection"
        fits = (self.detection_head is not None) == detects and (self.include_top or not detects)
        require(fits, "detection_head", f"be there in detectors alone (task {self.task!r})", self.detection_head)
        plain = not detects or self.frame_sampling == "slowfast"
        require(plain, "frame_sampling", "be 'slowfast' for a detector", self.frame_sampling)
        require(1 <= self.test_views <= MAX_VIEWS, "test_views", f"be in 1..{MAX_VIEWS}", self.test_views)

    @classmethod
    def of(cls, model: "Network", *, class_names: tuple[str, ...], form: Any, size: int | None = None) -> "Metadata":
        """Describes a built network."""
        return cls(
            model.expansion,
            model.options,
            model.num_classes,
            model.include_top,
            class_names,
            form,
            size or model.clip.size,
            model.task,
            model.stretch,
            getattr(model, "head", None),
            model.stored,
            model.frame_sampling,
            model.test_views,
        )

    def layers(self) -> Iterator[tuple[str, int]]:
        """The layers of the network and their trainable parameters, counted as they are asked for."""
        absent = set() if self.include_top else {"fc1", "fc2"}
        if self.detection_head == "simple":
            absent = {"conv5", "fc1", "fc2"}
        for name, count in parameters(self.expansion, self.num_classes, self.options):
            if name not in absent:
                yield name, count
        if self.detection_head == "simple":
            width = plan(self.expansion, self.options).stages[-1].width
            yield "fc2", (width + 1) * self.num_classes

    def require_fit(self, where: str, weights: int, arrays: int | None = None) -> None:
        """Refuses a network that a file cannot hold, counted only until that is known, before it is built.

        Args:
            where: what the weights are in, for the message.
            weights: how many it has room for.
            arrays: how many arrays it has, where that is known; each layer has at least one.

        Raises:
            UserError: naming `where`, the rule and the count so far.
        """
        count = 0
        for number, (_, parameters_) in enumerate(self.layers(), start=1):
            count += parameters_
            rule = f"have room for the parameters of the network that is described, {count} or more"
            require(count <= weights, where, rule, weights)
            if arrays is not None:
                rule = f"have an array for each layer of the network that is described, {number} or more"
                require(number <= arrays, where, rule, arrays)

    def to_json(self) -> str:
        """As a JSON object."""
        fields = {**dataclasses.asdict(self), "stored": stored_to_json(self.stored)}
        return json.dumps({"format_version": FORMAT_VERSION, **fields}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Metadata":
        """Reads and checks what `to_json` wrote.

        Raises:
            UserError: not JSON, another format version, a missing or unknown field, a value outside its range.
        """
        require(len(text) <= JSON_LIMIT, "the description", f"be at most {JSON_LIMIT} bytes", len(text))
        try:
            fields = json.loads(text, parse_int=_integer)
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
            raise UserError(f"not a description of an X3D network: {error}") from error


def _integer(digits: str) -> int:
    if len(digits) > _INTEGER_DIGITS:  # messages would be as long
        raise ValueError(f"an integer has at most {_INTEGER_DIGITS} digits, got {len(digits)}")
    return int(digits)


def named_or_numbered(class_names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """The names, or numbers where there are none; then warns, for who reads those cannot tell what they mean."""
    if class_names is not None:
        return tuple(class_names)
    warnings.warn(f"no class names were given: {counted(count, 'class')} numbered from 0", stacklevel=3)
    return tuple(str(number) for number in range(count))
