"""What a model file of ours says of itself: enough to build the network again. Imports no TensorFlow."""

import dataclasses
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from x3d_tf._checks import UserError, check_field_types, require
from x3d_tf._text import check_class_name
from x3d_tf.modeling.architecture import ModelOptions, plan
from x3d_tf.modeling.expansion import Expansion, Task

if TYPE_CHECKING:
    from x3d_tf.modeling.x3d import Network

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Description:
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
        squeeze: whether frames are to be scaled to squares before a crop is cut out, instead of by their short side.
        detection_head: of a detector "full", "simple" or "frame"; else none.

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
    squeeze: bool = False
    detection_head: Literal["full", "simple", "frame"] | None = None

    def __post_init__(self) -> None:
        check_field_types(self)
        require(1 <= self.num_classes <= 1_000_000, "num_classes", "be in [1, 1000000]", self.num_classes)
        require(32 <= self.size <= 4096, "size", "be in [32, 4096] pixels", self.size)
        side = self.expansion.clip.size
        require(side <= 4096, "crop of expansion.gamma_s", "be at most 4096 pixels", side)
        architecture = plan(self.expansion, self.options)  # bounded, for a file may ask for any network
        blocks = sum(stage.depth for stage in architecture.stages)
        widest = max(*(max(stage.width, stage.inner_width) for stage in architecture.stages), architecture.stem_width)
        require(blocks <= 10_000, "blocks of the network", "be at most 10000", blocks)
        require(widest <= 100_000, "channels of the network", "be at most 100000", widest)
        require(self.expansion.gamma_t <= 10_000, "expansion.gamma_t", "be at most 10000", self.expansion.gamma_t)
        require(self.options.stem_kernel <= 99, "options.stem_kernel", "be at most 99", self.options.stem_kernel)
        expected = self.num_classes if self.include_top else 0
        require(len(self.class_names) == expected, "class_names", f"be {expected}", len(self.class_names))
        for number, name in enumerate(self.class_names):
            check_class_name(name, f"class_names[{number}]")
        detects = self.task == "detection"
        fits = (self.detection_head is not None) == detects and (self.include_top or not detects)
        require(fits, "detection_head", f"be there in detectors alone (task {self.task!r})", self.detection_head)

    @classmethod
    def of(cls, model: "Network", *, class_names: tuple[str, ...], form: Any, size: int | None = None) -> "Description":
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
            model.squeeze,
            getattr(model, "head", None),
        )

    def to_json(self) -> str:
        """As a JSON object."""
        return json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Description":
        """Reads and checks what `to_json` wrote.

        Raises:
            UserError: not JSON, another format version, a missing or unknown field, a value outside its range.
        """
        try:
            fields = json.loads(text)
            version = fields.pop("format_version")
            require(version == FORMAT_VERSION, "format_version", f"be {FORMAT_VERSION}", version)
            fields["expansion"] = Expansion(**fields["expansion"])
            fields["options"] = ModelOptions(**fields["options"])
            require(isinstance(fields["class_names"], list), "class_names", "be a list", fields["class_names"])
            fields["class_names"] = tuple(fields["class_names"])
            return cls(**fields)
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise UserError(f"not a description of an X3D network: {error}") from error


def named_or_numbered(class_names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """The names, or numbers where there are none; then warns, for who reads those cannot tell what they mean."""
    if class_names is not None:
        return tuple(class_names)
    warnings.warn(f"no class names were given: the {count} classes are numbered", stacklevel=3)
    return tuple(str(number) for number in range(count))
