"""Clips cut from a stream of frames, and of a file."""

from pathlib import Path

import numpy as np
from video_fixtures import smooth_frames, write_video

import x3d_tf
from x3d_tf.data.sampling import frame_indices, view_starts
from x3d_tf.data.video.clip_reader import VideoClips, cut_clips

TINY = x3d_tf.Expansion(gamma_tau=2, gamma_t=4, gamma_s=48 / 112, gamma_b=1, gamma_d=0.2)  # tests on 54 pixels


def test_a_stream_that_ends_early_repeats_its_last_frame() -> None:
    frames = [np.full((2, 2, 3), number, np.uint8) for number in range(6)]
    parts = [np.array([[0, 2], [4, 9]]), np.array([[8, 9]])]
    cuts = [
        (cut.part, cut.numbers, [int(pixels[0, 0, 0]) for pixels in cut.frames]) for cut in cut_clips(frames, parts)
    ]
    assert cuts == [(0, (0, 2), [0, 2]), (0, (4, 5), [4, 5])]


def test_equal_clips_are_computed_once_and_only_their_frames_are_stored(tmp_path: Path) -> None:
    """The video has 5 frames, a clip spans 8: its frames are the first, the third and twice the last."""
    path, kept = write_video(tmp_path / "short.avi", smooth_frames(5)), []

    def clips_of(frames: int, fps: float) -> np.ndarray:
        return frame_indices(view_starts(frames, fps, TINY.clip, 10), frames, fps, TINY.clip)

    video = VideoClips(path, clips_of, 256, lambda pixels: kept.append(pixels) or len(kept))
    (cut,) = video
    assert (cut.numbers, cut.clips, cut.frames) == ((0, 2, 4, 4), 10, [1, 2, 3, 3])
    assert video.chosen == [cut.numbers] * 10
    assert len(kept) == 3
