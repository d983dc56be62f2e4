"""Files without a video stream, and the error that names them."""

import pickle
from pathlib import Path

import av
import pytest
from video_fixtures import id3_cover

from x3d_tf.data.video.decode import VideoError, probe


def test_a_song_with_a_cover_is_not_a_video(tmp_path: Path) -> None:
    path = tmp_path / "song.mp3"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("mp3", rate=48000, layout="mono")
        silence = av.AudioFrame(format=sound.format.name, layout="mono", samples=48000)
        silence.rate = 48000
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
    path.write_bytes(id3_cover() + path.read_bytes())
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(VideoError, match="has no video stream"):
        probe(path)


def test_errors_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "the file is empty")))
    assert (error.path, error.reason, str(error)) == ("a.mp4", "the file is empty", "a.mp4: the file is empty")
