"""Types shared by several packages: clip and view specifications, annotations, and storage formats.

Imports no TensorFlow.
"""

import math
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from x3d_tf.errors import check_field_types, require

# Annotation of records: one class per clip; any number of classes per clip; boxes on the clip's middle frame, each with
# any number of classes.
AnnotationKind = Literal["single_label", "multi_label", "detection"]
Activation = Literal["softmax", "sigmoid"]  # from logits to probabilities: of one class, or of each class by itself
Box = tuple[float, float, float, float]
FrameSampling = Literal["slowfast", "exact"]
ClipStarts = Literal["offset", "slowfast"]
Combine = Literal["mean", "max"]  # how the probabilities of a video's views are combined
BoxSource = Literal["proposals", "annotated"]

NAME_RULE = "be a name of at most 64 lower-case letters, digits and _, and start with a letter"
_NAME = re.compile("[a-z][a-z0-9_]{0,63}")
MAX_VIEWS = 1000  # limit for the clips that a prediction combines; the number may come from an untrusted file
_LONGEST_LABEL = 40  # characters
_MAX_SHORT_SIDE = 65535  # pixels: the limit of the JPEG format


@dataclass(frozen=True)
class ClipSpec:
    """Input clip of a network.

    Attributes:
        frames: number of frames per clip, T.
        stride: distance between successive frames, τ, in source frames at 30 frames per second; may be fractional.
        size: side of the square crop in pixels, S.
    """

    frames: int
    stride: float
    size: int

    def __post_init__(self) -> None:
        check_field_types(self)
        require(self.frames >= 1, "ClipSpec.frames", "be at least 1", self.frames)
        require(0 < self.stride < math.inf, "ClipSpec.stride", "be positive", self.stride)
        require(self.size >= 1, "ClipSpec.size", "be at least 1", self.size)


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """Views of a video that an evaluation combines (paper section 4, "K-Center" and "K-LeftCenterRight").

    Attributes:
        temporal_views: number of clips spread over the video, K.
        spatial_crops: 1 (centre) or 3 (left, centre and right; top, centre and bottom for portrait videos).
        resize: short side in pixels to which frames are scaled.
        crop: side of the square crop in pixels, at most `resize`.
        stretch: resize both sides to `resize`, ignoring the aspect ratio.
    """

    temporal_views: int = 10
    spatial_crops: int = 1
    resize: int
    crop: int
    stretch: bool = False

    def __post_init__(self) -> None:
        check_field_types(self)
        require(self.temporal_views >= 1, "ViewSpec.temporal_views", "be at least 1", self.temporal_views)
        require(self.spatial_crops in (1, 3), "ViewSpec.spatial_crops", "be 1 or 3", self.spatial_crops)
        require(self.crop >= 1, "ViewSpec.crop", "be at least 1", self.crop)
        require(self.crop <= self.resize, "ViewSpec.crop", f"be at most ViewSpec.resize = {self.resize}", self.crop)
        distinct = not self.stretch or self.spatial_crops == 1
        require(distinct, "ViewSpec.spatial_crops", "be 1 for stretched frames, which are square", self.spatial_crops)

    @property
    def views(self) -> int:
        """Number of views per video. View v is crop v % spatial_crops of clip v // spatial_crops."""
        return self.temporal_views * self.spatial_crops


@dataclass(frozen=True)
class Metric:
    """A number that training, validation or an evaluation measures.

    Attributes:
        name: its name in files and messages, such as "top1" or "map"; the rule is `NAME_RULE`.
        kind: "share" in [0, 1], shown in percent; "loss"; "count", which is added up instead of averaged; or "number",
            any other finite number.
        note: what is counted, for the summary of a run.
        label: its name in tables and figures, such as "top-1"; at most 40 printable characters, none of them a space at
            an end. Defaults to `name`.
        better: which of two values is better, for early stopping. Defaults to "lower" for a loss, otherwise "higher".

    Raises:
        SettingTypeError, UserError: names the field, the rule and the value received.
    """

    name: str
    kind: Literal["share", "loss", "count", "number"]
    note: str = ""
    label: str = ""
    better: Literal["higher", "lower"] | None = None

    def __post_init__(self) -> None:
        check_field_types(self)
        require(is_name(self.name), "Metric.name", NAME_RULE, self.name)
        if not self.label:
            object.__setattr__(self, "label", self.name)
        if self.better is None:
            object.__setattr__(self, "better", "lower" if self.kind == "loss" else "higher")
        valid = self.label.isprintable() and 1 <= len(self.label.strip()) == len(self.label) <= _LONGEST_LABEL
        rule = f"have 1 to {_LONGEST_LABEL} printable characters, none of them a space at an end"
        require(valid, "Metric.label", rule, self.label)

    def rank(self, value: float) -> float:
        """Returns the key by which two values are compared: the greater one is better."""
        return -value if self.better == "lower" else value

    def text(self, value: float) -> str:
        """Returns the name and a value for a message."""
        return f"{self.name} {value:.1%}" if self.kind == "share" else f"{self.name} {value:.4g}"

    def cell(self, value: float) -> str:
        """Returns a value for a table; shares are in percent."""
        return f"{100 * value:.1f}" if self.kind == "share" else f"{value:.4g}"

    def labelled(self, value: float) -> str:
        """Returns the label and a value with its unit, for summaries and titles."""
        return f"{self.label} {self.cell(value)}" + (" %" if self.kind == "share" else "")


class Annotation(NamedTuple):
    """Annotations of a key frame: labelled boxes, and proposals from a person detector.

    Boxes are (x1, y1, x2, y2) as fractions of the frame, in [0, 1].

    Attributes:
        second: time of the key frame in the file, in seconds.
        boxes: distinct annotated boxes.
        labels: class indices of each box, ascending; empty for a box without labels.
        proposals: boxes of the person detector.
        scores: scores of the proposals.
    """

    second: float
    boxes: tuple[Box, ...]
    labels: tuple[tuple[int, ...], ...]
    proposals: tuple[Box, ...] = ()
    scores: tuple[float, ...] = ()


class TimedLabel(NamedTuple):
    """A class of a part of a video.

    Attributes:
        label: class index.
        start, end: first and last second of the file in which the class is visible.
    """

    label: int
    start: float
    end: float


@dataclass(frozen=True)
class Storage:
    """Storage format of the frames in records; predictions apply the same format to their frames.

    None instead of a `Storage` means that frames were not re-encoded, as for weights trained with other software.

    Attributes:
        short_side: short side in pixels to which larger frames were scaled, 1..65535; smaller frames kept their size.
        jpeg_quality: JPEG quality, 1..95. JPEG files in folders of images may have been stored unchanged.

    Raises:
        SettingTypeError, UserError: names the field, the rule and the value received.
    """

    short_side: int
    jpeg_quality: int

    def __post_init__(self) -> None:
        check_field_types(self)
        inside = 1 <= self.short_side <= _MAX_SHORT_SIDE
        require(inside, "Storage.short_side", f"be in 1..{_MAX_SHORT_SIDE} pixels", self.short_side)
        require(1 <= self.jpeg_quality <= 95, "Storage.jpeg_quality", "be in 1..95", self.jpeg_quality)


def stored_to_json(stored: Storage | None) -> dict[str, int] | str:
    """Returns the JSON value for a storage format: {"short_side": 96, "jpeg_quality": 95}, or "none"."""
    return "none" if stored is None else asdict(stored)


def stored_from_json(value: Any) -> Storage | None:
    """Parses and checks the output of `stored_to_json`.

    Raises:
        UserError: the value is invalid.
    """
    if value == "none":
        return None
    valid = isinstance(value, dict) and set(value) == {"short_side", "jpeg_quality"}
    require(valid, "stored", 'be "none" or have short_side and jpeg_quality', value)
    return Storage(**value)


def is_name(name: str) -> bool:
    """Returns True if a text can be the name of a task or of a metric; the rule is `NAME_RULE`."""
    return _NAME.fullmatch(name) is not None
