"""Types that several packages share: how the frames of records were stored, and how those of a clip are chosen.

Imports no TensorFlow.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from x3d_tf.errors import check_field_types, require

# A clip has one class, or any number of them; or each of the boxes on its middle frame has any number.
Task = Literal["single_label", "multi_label", "detection"]
Box = tuple[float, float, float, float]
FrameSampling = Literal["slowfast", "exact"]
ClipStarts = Literal["offset", "slowfast"]

MAX_VIEWS = 1000  # clips of a video that a prediction is the mean of; the number may come from someone else's file
_MAX_SHORT_SIDE = 65535  # pixels: no JPEG file has a longer side


@dataclass(frozen=True)
class ClipSpec:
    """What a network sees of a video.

    Attributes:
        frames: frames of a clip, T.
        stride: source frames from one to the next, τ, counted at 30 frames per second; need not be whole.
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
    """The views of a video that testing averages over (paper section 4, "K-Center" and "K-LeftCenterRight").

    Attributes:
        temporal_views: clips spread over the video, K.
        spatial_crops: 1 (the centre) or 3 (left, centre, right; top, centre, bottom of upright videos).
        resize: short side in pixels to which frames are scaled.
        crop: side of the square crop in pixels, at most `resize`.
        stretch: whether both sides are scaled to `resize`, so that the crop sees all of a wide frame, but for its rim.
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
        """Clips of one video, K times crops. View v is clip v // spatial_crops, crop v % spatial_crops."""
        return self.temporal_views * self.spatial_crops


class Annotation(NamedTuple):
    """What is known of a frame of a video, its key frame: who does what, and what a detector of persons found.

    Boxes are x1, y1, x2, y2 in [0, 1] of the frame.

    Attributes:
        second: of the file, where the frame is.
        boxes: each once.
        labels: of each box its classes, ascending indices; none of a box alone.
        proposals: boxes found.
        scores: of the proposals.
    """

    second: float
    boxes: tuple[Box, ...]
    labels: tuple[tuple[int, ...], ...]
    proposals: tuple[Box, ...] = ()
    scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class Storage:
    """How the frames of records were stored. A network that was trained on them expects frames that went the same way.

    None in place of it: the frames were not stored, as of weights that were trained elsewhere.

    Attributes:
        short_side: pixels to which the short side of larger frames was scaled, 1..65535; smaller ones kept their size.
        jpeg_quality: of the JPEG files, 1..95. Folders of images may hold JPEG files that were taken as they were.

    Raises:
        SettingTypeError, UserError: naming the field, the rule and the value received.
    """

    short_side: int
    jpeg_quality: int

    def __post_init__(self) -> None:
        check_field_types(self)
        inside = 1 <= self.short_side <= _MAX_SHORT_SIDE
        require(inside, "Storage.short_side", f"be in 1..{_MAX_SHORT_SIDE} pixels", self.short_side)
        require(1 <= self.jpeg_quality <= 95, "Storage.jpeg_quality", "be in 1..95", self.jpeg_quality)


def stored_to_json(stored: Storage | None) -> dict[str, int] | str:
    """Returns what files say of the frames: {"short_side": 96, "jpeg_quality": 95}, or "none"."""
    return "none" if stored is None else asdict(stored)


def stored_from_json(value: Any) -> Storage | None:
    """Reads and checks what `stored_to_json` made.

    Raises:
        UserError: something else.
    """
    if value == "none":
        return None
    named = isinstance(value, dict) and set(value) == {"short_side", "jpeg_quality"}
    require(named, "stored", 'be "none" or have short_side and jpeg_quality', value)
    return Storage(**value)
