"""Videos with boxes and actions drawn into them."""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from x3d_tf.data.preview import COLOURS
from x3d_tf.data.video.decode import Pixels, probe, read_frames
from x3d_tf.files import atomic_path, os_errors_as_write_error
from x3d_tf.inference.actions import ActionScores, format_actions
from x3d_tf.plots import shortened

_Rectangle = tuple[float, float, float, float]  # left, top, right, bottom, in pixels

_UNLIMITED = 1 << 30  # pixels
_CODEC = "libx264" if "libx264" in av.codecs_available else "mpeg4"


def draw_video(
    path: str | Path, output: str | Path, scores: Sequence[ActionScores], names: Sequence[str], threshold: float
) -> None:
    """Writes a video as an mp4 file with boxes and actions drawn into it.

    Each box is shown from half a second before its second until half a second after it.

    Args:
        path: the video.
        output: the file to write, which ends in .mp4. An existing file is replaced atomically.
        scores: the actions of each second, from 0.
        names: names of the actions.
        threshold: lowest score of an action that is drawn; a box shows three actions at most.

    Raises:
        VideoError: the video cannot be read.
        WriteError: the file cannot be written.
    """
    output = Path(output)
    info = probe(path)
    rate = Fraction(info.fps).limit_denominator(1001)
    with (
        os_errors_as_write_error(output),
        atomic_path(output) as partial,
        av.open(str(partial), "w", format="mp4") as container,
    ):
        stream: Any = None
        for number, frame in enumerate(read_frames(path, _UNLIMITED)):
            height, width = (side // 2 * 2 for side in frame.pixels.shape[:2])  # yuv420p requires even sides
            if stream is None:
                stream = container.add_stream(_CODEC, rate=rate)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            second = min(math.floor(Fraction(info.start) + number / rate + Fraction(1, 2)), len(scores) - 1)
            picture = _draw(frame.pixels[:height, :width], scores[second], names, threshold)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        if stream is not None:
            container.mux(stream.encode())


def _draw(pixels: Pixels, scores: ActionScores, names: Sequence[str], threshold: float) -> Pixels:
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    pen, size = ImageDraw.Draw(picture), max(10, picture.height // 36)
    corners = scores.boxes * np.array((picture.width, picture.height) * 2)
    colours = [COLOURS[number % len(COLOURS)][1] for number in range(len(corners))]
    for box, colour in zip(corners.tolist(), colours):
        pen.rectangle(box, outline=colour, width=max(2, size // 6))
    longest = min(int(picture.width / (0.65 * size)), 36)  # characters per line
    written: list[_Rectangle] = []
    for (x1, y1, _, _), actions, colour in zip(corners.tolist(), format_actions(scores, names, threshold), colours):
        if not actions:
            continue
        text = "\n".join(shortened(each, longest) for each in actions)
        left, top, right, bottom = pen.multiline_textbbox((2, 0), text, _font(size))
        place = _free_rectangle((x1, y1, x1 + right + left, y1 + bottom + top), picture.size, written)
        pen.rectangle(place, fill=colour)
        ink = (0, 0, 0) if colour[1] > 150 else (255, 255, 255)  # much green makes a colour bright
        pen.multiline_text((place[0] + 2, place[1]), text, ink, _font(size))
        written.append(place)
    return np.asarray(picture)


def _free_rectangle(wanted: _Rectangle, size: tuple[int, int], written: Sequence[_Rectangle]) -> _Rectangle:
    """Returns the nearest place for a text inside the picture that covers no other text, if space is left."""
    width, height = wanted[2] - wanted[0], wanted[3] - wanted[1]
    left = max(min(wanted[0], size[0] - 1 - width), 0.0)
    highest = max(min(wanted[1], size[1] - 1 - height), 0.0)
    top = highest
    for other in sorted(written, key=lambda other: other[1]):
        if left < other[2] and other[0] < left + width and top < other[3] and other[1] < top + height:
            top = other[3] + 1
    top = top if top + height < size[1] else highest
    return left, top, left + width, top + height


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Loads matplotlib's font, because Pillow's has only Latin letters."""
    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
