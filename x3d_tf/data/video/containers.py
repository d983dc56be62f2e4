"""Opens video files with PyAV and finds the stream that is the video. Imports no TensorFlow."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
from av.stream import Disposition

from x3d_tf.errors import UserError

# Pictures that players show beside a sound or a film: covers, thumbnails of chapters.
_NO_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails
# Titles and comments need not be UTF-8; PyAV 19 no longer asks what to do then.
_LENIENT: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


class VideoError(UserError):
    """A video that cannot be read.

    Attributes:
        path: the file.
        reason: one line.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)  # these arguments let it travel between processes
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@contextmanager
def open_container(path: str | Path) -> Iterator[tuple["av.container.InputContainer", "av.VideoStream"]]:
    """The opened file and its video stream; failures inside the block are `reported`.

    Raises:
        VideoError: the file is missing, empty, not a video, or has no video stream.
    """
    file = Path(path)
    with reported(path):
        if not file.is_file():
            raise VideoError(path, "no such file")
        if file.stat().st_size == 0:
            raise VideoError(path, "the file is empty")
        # "file:" keeps FFmpeg from taking a name such as "concat:a|b" for a protocol; a playlist in disguise is not
        # allowed to reach for other files or the network.
        with av.open(f"file:{file}", options={"protocol_whitelist": "file"}, **_LENIENT) as container:
            if _not_video(container.format.name):
                raise VideoError(path, f"is not a video but {container.format.long_name}")
            stream = _video_stream(container)
            if stream is None:
                raise VideoError(path, "has no video stream")
            if stream.codec_context is None:
                raise VideoError(path, "cannot be decoded (FFmpeg has no decoder for its video)")
            if not stream.codec_context.codec.name.startswith("lib"):
                # In several threads FFmpeg's own decoders mend damaged pictures a little differently each time.
                stream.thread_count = 1
            yield container, stream


@contextmanager
def reported(path: str | Path) -> Iterator[None]:
    """Turns every failure of decoding inside the block into a VideoError."""
    try:
        yield
    except VideoError:
        raise
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(path, f"cannot be decoded ({reason})") from error


def packets(container: "av.container.InputContainer", *streams: "av.VideoStream") -> Iterator["av.Packet[Any]"]:
    """Packets with content, of all streams unless some are given, up to the end or to what cannot be read."""
    try:
        for packet in container.demux(*streams):
            if packet.size:
                yield packet
    except av.InvalidDataError:
        return  # the stated length tells whether much is missing


def _not_video(format_name: str) -> bool:
    """Whether FFmpeg's format is one that shows text files and single images as videos."""
    return format_name in ("tty", "image2") or format_name.endswith("_pipe")


def _video_stream(container: "av.container.InputContainer") -> "av.VideoStream | None":
    """FFmpeg's best video stream, among those that are videos."""
    videos = [stream for stream in container.streams.video if not stream.disposition & _NO_VIDEO]
    best = container.streams.best("video")
    return next(
        (stream for stream in videos if best is not None and stream.index == best.index), next(iter(videos), None)
    )
