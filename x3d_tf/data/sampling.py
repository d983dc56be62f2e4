"""Index arithmetic for sampling frames and crops of a video. Imports no TensorFlow.

Functions take the array namespace `xp`: numpy, or `tensorflow.experimental.numpy` inside a tf.data graph. Both compute
the same formulas in float64, with multiplications before divisions, so that products of integers are exact. If the
frame rate or the clip length in frames is not an integer (8.16 frames per second; X3D-M at 1 frame per second),
rounding may leave a position just below an integer, and truncation then gives the preceding frame.

A video has `frames` frames at `fps` frames per second. Strides are counted at 30 frames per second for every `fps`.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from x3d_tf.errors import require
from x3d_tf.types import ClipSpec, ClipStarts, Combine, FrameSampling, Storage, stored_to_json

if TYPE_CHECKING:
    from x3d_tf.modeling.x3d import Network

STRIDE_FPS = 30.0  # frames per second at which the paper and PySlowFast count temporal strides
UNSTORED_SHORT_SIDE = 256  # pixels; PySlowFast's instructions first scale the videos of Kinetics to this size


def decoded_short_side(stored: Storage | None, resize: int) -> int:
    """Returns the short side in pixels to which larger frames are scaled during decoding.

    This is the short side of the records that the network was trained on. Without records it is the larger of 256 and
    `resize`: released weights were trained on videos scaled to 256. Full 4K frames would also take gigabytes, and would
    flicker when scaled down without antialiasing.

    Args:
        stored: storage format of the network's training records, or None.
        resize: short side to which frames are then scaled for the network, as in `ViewSpec`.
    """
    return max(UNSTORED_SHORT_SIDE, resize) if stored is None else stored.short_side


def clip_contract(model: "Network") -> dict[str, Any]:
    """Returns the input format of a network and the steps from a video to its clips, as numbers and text for JSON.

    The entries of `rules` are in the order of the steps and are named after the other entries.
    """
    offsets = frame_indices(0, _far(model.clip), STRIDE_FPS, model.clip, model.frame_sampling)
    combined = {"clips": model.test_views, "combine": model.combine}
    return _contract(model, model.frame_sampling, offsets, combined, _rules(model))


def key_frame_contract(model: "Network") -> dict[str, Any]:
    """Returns the input format of a network and the steps from a key frame to its clip; see `clip_contract`."""
    far = _far(model.clip)
    offsets = key_frame_indices(far, 2 * far, STRIDE_FPS, model.clip) - far
    return _contract(model, "key_frame", offsets, {}, _key_frame_rules(model))


def _far(clip: ClipSpec) -> int:
    """Returns a frame that is far from both ends of a video of twice as many frames."""
    return 10 * round(clip_length(clip, STRIDE_FPS))


def _contract(
    model: "Network", frame_sampling: str, offsets: NDArray[Any], combined: dict[str, Any], rules: dict[str, str]
) -> dict[str, Any]:
    return {
        "frames": model.clip.frames,
        "stride": model.clip.stride,
        "frames_per_second": STRIDE_FPS,  # frame rate at which the stride is counted
        "frame_sampling": frame_sampling,
        "offsets": offsets.tolist(),  # frames of a clip relative to its start, at that rate
        **combined,
        "stored": stored_to_json(model.stored),
        "decoded_short_side": decoded_short_side(model.stored, model.expansion.test_size),
        "resize": model.expansion.test_size,
        "resized": "both sides" if model.stretch else "the short side",
        "crop": model.eval_size,
        "colours": "RGB",
        "range": [0, 255],
        "rules": rules,
    }


_COMBINED: dict[Combine, str] = {"mean": "mean", "max": "maximum for each class"}


def _rules(model: "Network") -> dict[str, str]:
    step = "(span - 1) / (frames - 1)" if model.frame_sampling == "slowfast" else "stride * fps / frames_per_second"
    return {
        "fps": "constant frame rate of the video in frames per second, as a 32-bit float",
        "span": "stride * frames * fps / frames_per_second: number of video frames that a clip spans, not rounded",
        "clips": "clip k = 0 ... clips - 1 starts at frame k * floor(last / (clips - 1)), where last = "
        "max(frames of the video - span, 0); a single clip starts at floor(last / 2)",
        "offsets": f"frame i = 0 ... frames - 1 of a clip is frame floor(start + i * {step}) of the video, or the last "
        "frame if that is past the end",
        **_picture_rules(model),
        "prediction": f"{_COMBINED[model.combine]} of the probabilities over the clips",
    }


def _key_frame_rules(model: "Network") -> dict[str, str]:
    return {
        "fps": "constant frame rate of the video in frames per second, as a 32-bit float",
        "span": "stride * frames * fps / frames_per_second: number of video frames that a clip spans, not rounded",
        "offsets": "frame i = 0 ... frames - 1 of a clip is frame key - floor(span / 2) + floor(i * stride * fps / "
        "frames_per_second) of the video, where key is the key frame; past an end, the first or last frame",
        **_picture_rules(model),
    }


def _picture_rules(model: "Network") -> dict[str, str]:
    """Returns the rules from a decoded frame to the pixels of a clip."""
    stored = model.stored
    jpeg = (
        f"compressed as a JPEG file with quality {stored.jpeg_quality} and decoded with the accurate integer DCT"
        if stored
        else "used as decoded"
    )
    sizes = "height and width become `resize`"
    if not model.stretch:
        sizes = "the short side becomes `resize`, the long side floor(long side * resize / short side)"
    return {
        "decoded_short_side": "a frame with a longer short side is scaled to it by FFmpeg's bilinear scaler, with the "
        "long side rounded down and interlaced frames scaled as progressive; smaller frames keep their size",
        "stored": f"each frame of a clip is {jpeg}",
        "resize": f"{sizes}; bilinear with half-pixel centres, without antialiasing, not rounded",
        "crop": "square with this side, first row ceil((height - crop) / 2) and first column ceil((width - crop) / 2)",
    }


def clip_length(clip: ClipSpec, fps: Any) -> Any:
    """Returns the number of source frames that a clip spans, τ·T·fps/30, float64, not rounded."""
    return clip.stride * clip.frames * fps / STRIDE_FPS


def last_start(frames: Any, fps: Any, clip: ClipSpec, xp: Any = np) -> Any:
    """Returns the largest start of a clip in source frames, float64. Training starts are uniform below it.

    0 for videos shorter than the clip. (PySlowFast `decoder.get_start_end_idx`.)
    """
    return xp.maximum(_float64(frames, xp) - clip_length(clip, _float64(fps, xp)), 0.0)


def require_windows(clip: ClipSpec, window: float | None, hop: float | None) -> None:
    """Raises `UserError` unless a video can be divided into such windows.

    Args:
        clip: the network's clip.
        window: window length in seconds; None means the complete video.
        hop: seconds between the starts of two windows; None means the window's length.
    """
    span = clip.stride * clip.frames / STRIDE_FPS
    require(
        window is None or window >= span, "window", f"be at least {span:g} s, the length of the network's clip", window
    )
    require(hop is None or window is not None, "hop", "be set together with window", hop)
    require(hop is None or hop > 0, "hop", "be positive", hop)


def view_starts(
    frames: Any, fps: Any, clip: ClipSpec, temporal_views: int, clip_starts: ClipStarts = "offset", xp: Any = np
) -> Any:
    """Returns the starts of the clips for evaluation, in source frames, float64 [temporal_views].

    Args:
        frames, fps: number of frames and frame rate of the video.
        clip: the network's clip.
        temporal_views: number of clips, K.
        clip_starts: "offset" spreads the clips evenly from frame 0 in steps of floor(last_start/(K-1)) frames, so that
            the last one starts less than K-1 frames before `last_start`; a single clip is centred, as in section 4.3 of
            the paper. "slowfast" is PySlowFast's default, last_start·k/K, whose last clip starts last_start/K before
            `last_start`. Use it to compare with released 10- and 30-view results.
        xp: array namespace.

    Raises:
        UserError: `clip_starts` has another value.
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
    """Returns the indices of a clip's frames.

    Args:
        start: first source frame, float64 [...]; may be fractional.
        frames, fps: number of frames and frame rate of the video.
        clip: the network's clip.
        sampling: "slowfast" spreads the frames evenly from the first to the last frame of the span, (τT-1)/(T-1) apart,
            as released weights were trained (PySlowFast `decoder.temporal_sampling`). "exact" takes every τ-th frame.
        xp: array namespace.

    Returns:
        int64 [..., T] in 0..frames-1; a clip that extends past the end repeats the last frame.

    Raises:
        UserError: `sampling` has another value.
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
    """Returns the frame indices of all clips for a prediction of a video, int64 [temporal_views, T].

    The arguments are those of `view_starts`, with clip starts "offset", and `frame_indices`.
    """
    starts = view_starts(frames, fps, clip, temporal_views)
    return np.asarray(frame_indices(starts, frames, fps, clip, sampling))


def key_frame_indices(key_frame: Any, frames: Any, fps: Any, clip: ClipSpec, xp: Any = np) -> Any:
    """Returns the frame indices of the clip around a key frame.

    The key frame begins the second half of the clip. Frames are τ apart, counted at 30 frames per second. The clip of
    X3D-S, which spans 78 frames, does not include the key frame itself. (PySlowFast `utils.get_sequence`.)

    Args:
        key_frame: index of the key frame.
        frames, fps: number of frames and frame rate of the video.
        clip: the network's clip.
        xp: array namespace.

    Returns:
        int64 [T] in 0..frames-1; a clip that extends past an end repeats the first or last frame.
    """
    fps = _float64(fps, xp)
    steps = xp.floor(xp.arange(clip.frames, dtype=xp.float64) * (clip.stride * fps) / STRIDE_FPS)
    half = xp.floor(clip_length(clip, fps) / 2)
    position = _float64(key_frame, xp) - half + steps
    return xp.asarray(xp.minimum(xp.maximum(position, 0.0), _float64(frames, xp) - 1.0), dtype=xp.int64)


def resized_shape(height: Any, width: Any, short_side: Any, xp: Any = np) -> tuple[Any, Any]:
    """Returns height and width in pixels after scaling the short side; the long side is rounded down.

    (PySlowFast `transform.random_short_side_scale_jitter`.)
    """
    shortest = xp.minimum(height, width)
    return height * short_side // shortest, width * short_side // shortest


def crop_offsets(height: Any, width: Any, crop: int, spatial_crops: int, xp: Any = np) -> list[tuple[Any, Any]]:
    """Returns the top and left pixel of each crop: the centre, or three crops along the longer side.

    (PySlowFast `transform.uniform_crop`; the centre is rounded up.)

    Args:
        height, width: size of the frame, at least `crop`.
        crop: side of the square crop in pixels.
        spatial_crops: number of crops, 1 or 3.
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
