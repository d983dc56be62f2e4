"""Which frames and which crops of a video a network sees: index arithmetic only. Imports no TensorFlow.

Every function takes the array namespace to compute in, `xp`: numpy, or `tensorflow.experimental.numpy` inside a tf.data
graph. There is one formula for both, in float64 and with multiplications before divisions, so that products of whole
numbers are exact. Where the rate, or the length of a clip in frames, is no whole number (8.16 frames a second; X3D-M at
1 a second) rounding may leave a position just below a whole frame, and truncation then takes the frame before.

A video is `frames` long at `fps` frames a second; strides are counted at 30 frames a second, whatever `fps` is.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from x3d_tf.errors import require
from x3d_tf.types import ClipSpec, ClipStarts, FrameSampling, Storage, stored_to_json

if TYPE_CHECKING:
    from x3d_tf.modeling.x3d import Network

STRIDE_FPS = 30.0  # frames per second at which the paper and PySlowFast count temporal strides
UNSTORED_SHORT_SIDE = 256  # pixels; PySlowFast's instructions scale the videos of Kinetics to it before anything else


def decoded_short_side(stored: Storage | None, resize: int) -> int:
    """Short side in pixels to which larger frames of a video are scaled as they are decoded.

    That of the records that a network was trained on. Where frames were not stored it is 256, or `resize` where that is
    more: the videos that released weights were trained on had been scaled to it, and whole frames of 4K video would
    take gigabytes and, scaled down without antialiasing, flicker.

    Args:
        stored: of the network.
        resize: short side that the network's frames are scaled to then, as in `ViewSpec`.
    """
    return max(UNSTORED_SHORT_SIDE, resize) if stored is None else stored.short_side


def input_contract(model: "Network") -> dict[str, Any]:
    """Returns what applications feed a network and how they make it of a video, in numbers and in words, for JSON.

    The entries of `rules` are in the order in which they are followed; their names are those of the other entries.
    """
    clip, detects = model.clip, model.task == "detection"
    far = 10 * round(clip_length(clip, STRIDE_FPS))  # from both ends of a video
    if detects:
        offsets = key_frame_indices(far, 2 * far, STRIDE_FPS, clip) - far
    else:
        offsets = frame_indices(0, far, STRIDE_FPS, clip, model.frame_sampling)
    return {
        "frames": clip.frames,
        "stride": clip.stride,
        "frames_per_second": STRIDE_FPS,  # of a video whose frames the stride counts
        "frame_sampling": "key_frame" if detects else model.frame_sampling,
        "offsets": offsets.tolist(),  # of the frames of a clip from its start, in a video of that rate
        **({} if detects else {"clips": model.test_views}),
        "stored": stored_to_json(model.stored),
        "decoded_short_side": decoded_short_side(model.stored, model.expansion.test_size),
        "resize": model.expansion.test_size,
        "resized": "both sides" if model.stretch else "the short side",
        "crop": model.eval_size,
        "colours": "RGB",
        "range": [0, 255],
        "rules": _key_frame_rules(model) if detects else _rules(model),
    }


def _rules(model: "Network") -> dict[str, str]:
    step = "(span - 1) / (frames - 1)" if model.frame_sampling == "slowfast" else "stride * fps / frames_per_second"
    return {
        "fps": "frames a second of the video, constant, as a 32-bit float",
        "span": "stride * frames * fps / frames_per_second: frames of the video that a clip spans, not rounded",
        "clips": "clip k = 0 ... clips - 1 starts at frame k * floor(last / (clips - 1)), where last = "
        "max(frames of the video - span, 0); a clip alone starts at floor(last / 2)",
        "offsets": f"frame i = 0 ... frames - 1 of a clip is frame floor(start + i * {step}) of the video, and where "
        "that is past the end, the last frame of the video",
        **_picture_rules(model),
        "prediction": "the mean of the probabilities of the clips",
    }


def _key_frame_rules(model: "Network") -> dict[str, str]:
    return {
        "fps": "frames a second of the video, constant, as a 32-bit float",
        "span": "stride * frames * fps / frames_per_second: frames of the video that a clip spans, not rounded",
        "offsets": "frame i = 0 ... frames - 1 of a clip is frame key - floor(span / 2) + floor(i * stride * fps / "
        "frames_per_second) of the video, where key is the key frame, and where that is past an end, the frame there",
        **_picture_rules(model),
    }


def _picture_rules(model: "Network") -> dict[str, str]:
    """From a decoded frame to the pixels of the clip."""
    stored = model.stored
    jpeg = (
        f"compressed as a JPEG file of quality {stored.jpeg_quality}, and decoded by the accurate integer transform"
        if stored
        else "as it is decoded"
    )
    sizes = "height and width become `resize`"
    if not model.stretch:
        sizes = "the short side becomes `resize`, the long side floor(long side * resize / short side)"
    return {
        "decoded_short_side": "a frame whose short side is longer is scaled to it, the long side rounded down, by "
        "FFmpeg's bilinear scaler, interlaced ones as whole pictures; others keep their size",
        "stored": f"each frame of a clip is {jpeg}",
        "resize": f"{sizes}; bilinear with half-pixel centres, without antialiasing, not rounded",
        "crop": "the square of that side whose first row is ceil((height - crop) / 2) and whose first column is "
        "ceil((width - crop) / 2)",
    }


def clip_length(clip: ClipSpec, fps: Any) -> Any:
    """Source frames that a clip spans, τ·T·fps/30, float64, not rounded."""
    return clip.stride * clip.frames * fps / STRIDE_FPS


def last_start(frames: Any, fps: Any, clip: ClipSpec, xp: Any = np) -> Any:
    """The largest start of a clip, in source frames, float64; training starts are uniform in [0, this).

    0 for videos shorter than the clip. (PySlowFast `decoder.get_start_end_idx`.)
    """
    return xp.maximum(_float64(frames, xp) - clip_length(clip, _float64(fps, xp)), 0.0)


def require_windows(clip: ClipSpec, window: float | None, hop: float | None) -> None:
    """Raises `UserError` unless predictions can be made for such windows of a video.

    Args:
        clip: of the network.
        window: seconds; None is the whole video.
        hop: seconds from the start of one window to that of the next; None is the window's length.
    """
    span = clip.stride * clip.frames / STRIDE_FPS
    require(window is None or window >= span, "window", f"be at least {span:g} s, a clip of the network", window)
    require(hop is None or window is not None, "hop", "come with a window", hop)
    require(hop is None or hop > 0, "hop", "be positive", hop)


def view_starts(
    frames: Any, fps: Any, clip: ClipSpec, temporal_views: int, clip_starts: ClipStarts = "offset", xp: Any = np
) -> Any:
    """Starts of the clips that testing looks at, in source frames, float64 [temporal_views].

    Args:
        frames, fps: length of the video and its rate.
        clip: the network's clip.
        temporal_views: clips, K.
        clip_starts: "offset" spreads them evenly from the first possible start on, in steps of
            floor(last_start/(K-1)) frames, so that the last of them is less than K-1 frames before `last_start`; where
            K is 1 it takes the middle, as the paper's section 4.3 says. "slowfast" is PySlowFast's default,
            last_start·k/K, which ends last_start/K before that: with it compare against released 10- and 30-view
            numbers.
        xp: array namespace.

    Raises:
        UserError: an unknown `clip_starts`.
    """
    require(clip_starts in ("offset", "slowfast"), "clip_starts", 'be "offset" or "slowfast"', clip_starts)
    last = last_start(frames, fps, clip, xp)
    views = xp.arange(temporal_views, dtype=xp.float64)
    if clip_starts == "slowfast":
        return last * views / temporal_views
    if temporal_views == 1:
        return xp.floor(last / 2) + views
    return views * xp.floor(last / (temporal_views - 1))


def frame_indices(
    start: Any, frames: Any, fps: Any, clip: ClipSpec, sampling: FrameSampling = "slowfast", xp: Any = np
) -> Any:
    """Indices of a clip's frames.

    Args:
        start: first source frame, float64 [...]; need not be whole.
        frames, fps: length of the video and its rate.
        clip: the network's clip.
        sampling: "slowfast" spreads the frames evenly from the first to the last frame of the span, so that they lie
            (τT-1)/(T-1) apart (PySlowFast `decoder.temporal_sampling`; released weights were trained so); "exact"
            takes every τ-th.
        xp: array namespace.

    Returns:
        int64 [..., T] in 0..frames-1; a clip that reaches past the end repeats the last frame.

    Raises:
        UserError: an unknown `sampling`.
    """
    require(sampling in ("slowfast", "exact"), "frame_sampling", 'be "slowfast" or "exact"', sampling)
    steps = xp.arange(clip.frames, dtype=xp.float64)
    fps = _float64(fps, xp)
    if sampling == "exact":
        offsets = steps * (clip.stride * fps) / STRIDE_FPS
    else:
        offsets = steps * (clip_length(clip, fps) - 1.0) / max(clip.frames - 1, 1)
    position = xp.expand_dims(_float64(start, xp), -1) + offsets  # [..., T]
    inside = xp.minimum(xp.maximum(position, 0.0), _float64(frames, xp) - 1.0)
    return xp.asarray(inside, dtype=xp.int64)  # truncates


def view_indices(
    frames: int, fps: float, clip: ClipSpec, temporal_views: int, sampling: FrameSampling
) -> NDArray[np.int64]:
    """Indices of the frames of all clips that a video is predicted by, int64 [temporal_views, T].

    Arguments as `view_starts`, which spreads the clips by "offset", and `frame_indices`.
    """
    starts = view_starts(frames, fps, clip, temporal_views)
    return np.asarray(frame_indices(starts, frames, fps, clip, sampling))


def key_frame_indices(key_frame: Any, frames: Any, fps: Any, clip: ClipSpec, xp: Any = np) -> Any:
    """Indices of the frames of the clip around a key frame.

    The key frame is the first of the second half; frames lie τ apart, counted at 30 frames a second. X3D-S, whose clip
    is 78 frames long, leaves it out itself. (PySlowFast `utils.get_sequence`.)

    Args:
        key_frame: its index.
        frames, fps: length of the video and its rate.
        clip: the network's clip.
        xp: array namespace.

    Returns:
        int64 [T] in 0..frames-1; a clip that reaches past an end repeats the frame there.
    """
    fps = _float64(fps, xp)
    steps = xp.floor(xp.arange(clip.frames, dtype=xp.float64) * (clip.stride * fps) / STRIDE_FPS)
    half = xp.floor(clip_length(clip, fps) / 2)
    position = _float64(key_frame, xp) - half + steps
    return xp.asarray(xp.minimum(xp.maximum(position, 0.0), _float64(frames, xp) - 1.0), dtype=xp.int64)


def resized_shape(height: Any, width: Any, short_side: Any, xp: Any = np) -> tuple[Any, Any]:
    """Height and width in pixels after scaling the short side to `short_side`; the long side is rounded down.

    (PySlowFast `transform.random_short_side_scale_jitter`.)
    """
    shortest = xp.minimum(height, width)
    return height * short_side // shortest, width * short_side // shortest


def crop_offsets(height: Any, width: Any, crop: int, spatial_crops: int, xp: Any = np) -> list[tuple[Any, Any]]:
    """Top and left pixel of each crop: the centre alone, or left, centre, right along the longer side.

    (PySlowFast `transform.uniform_crop`; the centre is rounded up.)

    Args:
        height, width: of the frame, both at least `crop`.
        crop: side of the square in pixels.
        spatial_crops: 1 or 3.
        xp: array namespace.
    """
    top, left = (height - crop + 1) // 2, (width - crop + 1) // 2
    if spatial_crops == 1:
        return [(top, left)]
    upright = height > width
    first = (xp.where(upright, 0, top), xp.where(upright, left, 0))
    last = (xp.where(upright, height - crop, top), xp.where(upright, left, width - crop))
    return [first, (top, left), last]


def _float64(value: Any, xp: Any) -> Any:
    return xp.asarray(value, dtype=xp.float64)
