"""Types that several packages share: how the frames of records were stored, and how those of a clip are chosen.

Imports no TensorFlow.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from x3d_tf._checks import check_field_types, require

FrameSampling = Literal["slowfast", "exact"]

MAX_VIEWS = 1000  # clips of a video that a prediction is the mean of; the number may come from someone else's file
_MAX_SHORT_SIDE = 65535  # pixels: no JPEG file has a longer side


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
