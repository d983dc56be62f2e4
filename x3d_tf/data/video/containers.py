"""Opens video files with PyAV and selects the video stream. Imports no TensorFlow."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
from av.stream import Disposition

from x3d_tf.errors import UserError

# Still pictures that accompany audio or video: covers, chapter thumbnails.
_STILL_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails
# Metadata need not be UTF-8. PyAV 19 has no such option any more.
_LENIENT: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


class VideoError(UserError):
    """A video that cannot be read.

    Attributes:
        path: path of the file.
        reason: cause, a clause in one line.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)  # arguments from which pickle restores it
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@contextmanager
def open_container(path: str | Path) -> Iterator[tuple["av.container.InputContainer", "av.VideoStream"]]:
    """Opens a file and yields it with its video stream; errors within the block become `VideoError`.

    Raises:
        VideoError: the file is missing, empty, not a video, or has no video stream.
    """
    file = Path(path)
    with decoding_errors_as_video_error(path):
        if not file.is_file():
            raise VideoError(path, "no such file")
        if file.stat().st_size == 0:
            raise VideoError(path, "the file is empty")
        # "file:" prevents FFmpeg from taking a name like "concat:a|b" for a protocol. The whitelist prevents playlists
        # from opening network addresses.
        with av.open(f"file:{file}", options={"protocol_whitelist": "file"}, **_LENIENT) as container:
            if _is_text_or_image(container.format.name):
                raise VideoError(path, f"is not a video but {container.format.long_name}")
            stream = _video_stream(container)
            if stream is None:
                raise VideoError(path, "has no video stream")
            if stream.codec_context is None:
                raise VideoError(path, "cannot be decoded (FFmpeg has no decoder for its codec)")
            if not stream.codec_context.codec.name.startswith("lib"):
                # Multithreaded FFmpeg decoders conceal damage in pictures non-deterministically.
                stream.thread_count = 1
            yield container, stream


@contextmanager
def decoding_errors_as_video_error(path: str | Path) -> Iterator[None]:
    """Re-raises every decoding error within the block as a VideoError."""
    try:
        yield
    except VideoError:
        raise
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(path, f"cannot be decoded ({reason})") from error


def packets(container: "av.container.InputContainer", *streams: "av.VideoStream") -> Iterator["av.Packet[Any]"]:
    """Yields the non-empty packets of the given streams, or of all streams, up to the end or to unreadable data."""
    try:
        for packet in container.demux(*streams):
            if packet.size:
                yield packet
    except av.InvalidDataError:
        return  # truncation is detected by comparing with the stated length


def _is_text_or_image(format_name: str) -> bool:
    """Returns True for FFmpeg formats that present text files and single images as videos."""
    return format_name in ("tty", "image2") or format_name.endswith("_pipe")


def _video_stream(container: "av.container.InputContainer") -> "av.VideoStream | None":
    """Returns FFmpeg's best video stream, without still pictures."""
    videos = [stream for stream in container.streams.video if not stream.disposition & _STILL_PICTURES]
    best = container.streams.best("video")
    return next(
        (stream for stream in videos if best is not None and stream.index == best.index), next(iter(videos), None)
    )
