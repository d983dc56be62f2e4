"""Rates and lengths of files with irregular times."""

from pathlib import Path

import pytest
from video_fixtures import numbered_frames, write_video

from x3d_tf.data.video import timeline
from x3d_tf.data.video.decode import VideoError, probe


def at_times(path: Path, times_ms: list[int], codec: str = "libx264") -> Path:
    return write_video(path, numbered_frames(len(times_ms)), 30, times_ms, codec)


def test_a_few_late_pictures_do_not_make_millions_of_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MAX_FRAMES", 1000)
    times = [number * 10 + 30_000 * (number // 20) for number in range(60)]
    with pytest.raises(
        VideoError, match="spread 60 pictures over 6059 frames at 100 per second; at most 1000 can be read"
    ):
        probe(at_times(tmp_path / "a.mkv", times))


def test_bursts_are_ignored_in_the_rate(tmp_path: Path) -> None:
    """Late recorders write pictures in bursts; steps of a millisecond must not give a rate of 1000."""
    times = [100 * (number // 4) + number % 4 for number in range(60)]
    assert probe(at_times(tmp_path / "a.mkv", times)).fps < 60
