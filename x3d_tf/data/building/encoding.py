"""Encodes videos as the JPEG frames of their records, in worker processes.

Imports no TensorFlow, which keeps the workers small.
"""

import os
import signal
import stat
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from x3d_tf.data.building.sequence_examples import encode_example
from x3d_tf.data.building.sources import Video
from x3d_tf.data.video import image_sequences
from x3d_tf.data.video.decode import EncodedVideo, VideoError, encode_video, frame_at
from x3d_tf.data.video.image_sequences import FileState
from x3d_tf.errors import UserError
from x3d_tf.processes import TimedOut, Worker, WorkerDied

TIMEOUT = 600.0  # default time limit per video in seconds
_START = 300.0  # time limit for starting a worker in seconds: importing from a cold network disk is slow
_END_TOLERANCE = 1.0  # seconds: lists state times in whole seconds
_LABEL_TOLERANCE = 2.0  # seconds: the official labels of Charades end up to 1.55 s after their video
_TRIES = 2  # a worker may also die of a lack of memory that is not the video's fault

Result = EncodedVideo | VideoError
Encode = Callable[[Video], Result]


class Retryable(VideoError):
    """A failure that may not recur: the video took too long, changed during the build, or its worker was killed."""


def file_state(path: Path) -> FileState:
    """Returns the size in bytes and the modification time in nanoseconds, or (-1, -1) if the file does not exist.

    For a folder of frames, returns a fingerprint of the names, sizes and times of its images.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            return image_sequences.folder_state(path)
    except OSError:  # such as a dangling link
        return -1, -1
    return status.st_size, status.st_mtime_ns


def encode_or_error(video: Video, short_side: int, quality: int) -> Result:
    """Returns the encoded frames of a video, or the error if it cannot be encoded.

    Args:
        video: video file, folder of frames or SequenceExample.
        short_side, quality: see `decode.encode_video`.
    """
    try:
        if video.example is not None:
            encoded = encode_example(video.path, video.example, short_side, quality, video.frame_rate)
        elif video.path.is_dir():
            encoded = image_sequences.encode_folder(
                video.path, short_side, quality, video.start, video.end, video.frame_rate
            )
        else:
            encoded = encode_video(video.path, short_side, quality, video.start, video.end)
    except VideoError as error:
        return VideoError(error.path, f"{error.reason} (key frame {video.media_id})") if video.annotation else error
    last = encoded.start + len(encoded.frames) / encoded.fps
    if video.must_cover_segment and video.end is not None and last < video.end - _END_TOLERANCE:
        return VideoError(video.path, f"ends at {last:.1f} s, before the end of its segment, {video.end:g} s")
    for label in video.timed:
        if last < label.end - _LABEL_TOLERANCE:
            return VideoError(video.path, f"ends at {last:.1f} s, before the end of an annotation, {label.end:g} s")
        if last <= label.start:
            return VideoError(video.path, f"ends at {last:.1f} s, before the start of an annotation, {label.start:g} s")
    if video.annotation is not None:
        index = frame_at(video.annotation.second, encoded.start, encoded.fps)
        if index >= len(encoded.frames):
            last = encoded.start + (len(encoded.frames) - 1) / encoded.fps
            return VideoError(video.path, f"ends at {last:.1f} s, before the key frame {video.media_id}")
        if index < 0:
            return VideoError(video.path, f"begins at {encoded.start:.1f} s, after the key frame {video.media_id}")
    return encoded


def encode_all(
    videos: Sequence[Video], encode: Encode, workers: int, timeout: float = TIMEOUT
) -> Generator[Result, None, None]:
    """Applies `encode` to each video in worker processes and yields the results in the order of the videos.

    Args:
        videos: videos to encode. A file that differs from its `state` gives a `Retryable`.
        encode: picklable function of a video.
        workers: number of processes.
        timeout: time limit per video in seconds. Beyond it the worker is killed and the result is a `Retryable`.

    Yields:
        The result of `encode` for each video, or a `VideoError` if the worker crashed on it twice.

    Raises:
        UserError: a worker cannot start.
    """
    pool = _Workers(encode, timeout)
    waiting: deque[Future[Result]] = deque()
    threads = ThreadPoolExecutor(min(workers, len(videos)) or 1)
    try:
        for video in videos:
            waiting.append(_submit(threads, pool.encode, video))
            if len(waiting) > 2 * workers:  # limits the results that wait in memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.kill_all()
        threads.shutdown(cancel_futures=True)


def _submit(threads: ThreadPoolExecutor, encode: Encode, video: Video) -> Future[Result]:
    try:
        return threads.submit(encode, video)
    except RuntimeError as error:
        raise UserError(f"worker processes cannot be started: {error}; use fewer --workers") from error


class _Workers:
    """Pool of worker processes, used from one thread per worker."""

    def __init__(self, encode: Encode, timeout: float) -> None:
        self._encode, self._timeout = encode, timeout
        self._lock = threading.Lock()
        self._running: set[Worker] = set()
        self._idle: list[Worker] = []
        self._closed = False

    def encode(self, video: Video) -> Result:
        """Returns the encoded frames of a video or its error; raises UserError if no worker can start."""
        status = None
        for _ in range(_TRIES):
            worker = self._take()
            result: Result
            try:
                result = worker.ask(video, timeout=self._timeout)
            except VideoError as error:
                result = error
            except TimedOut:
                self._drop(worker)
                return Retryable(video.path, f"takes longer than {self._timeout:g} s to decode (--timeout)")
            except WorkerDied as died:
                self._drop(worker)
                status = died.status
                continue
            with self._lock:
                self._idle.append(worker)
            return result
        if status == -signal.SIGKILL:  # sent by the system when memory runs out; decoders crash with other signals
            return Retryable(
                video.path, "the system killed its decoder process, probably for lack of memory; use fewer --workers"
            )
        return VideoError(video.path, "crashes the decoder process")

    def _take(self) -> Worker:
        """Returns an idle worker, or starts one."""
        with self._lock:
            if self._closed:
                raise WorkerDied(None)
            if self._idle:
                return self._idle.pop()
            try:
                worker = Worker(_serve, self._encode)
            except OSError as error:
                raise UserError(f"a worker process cannot be started: {error.strerror}; use fewer --workers") from error
            self._running.add(worker)
        try:
            worker.ask(timeout=_START)
        except (WorkerDied, TimedOut) as error:
            self._drop(worker)
            raise UserError(
                f"a worker process cannot start: {error} before it was ready; it may have printed the reason. "
                "If memory is short, use fewer --workers. A script that builds records must guard its entry with: "
                'if __name__ == "__main__":'
            ) from error
        return worker

    def _drop(self, worker: Worker) -> None:
        with self._lock:
            self._running.discard(worker)
        worker.kill()

    def kill_all(self) -> None:
        """Kills all workers, including busy ones, which raises WorkerDied in the threads that wait for them."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        for worker in running:
            worker.kill()


def _serve(pipe: Any, encode: Encode) -> None:
    """Serves requests in a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and kills its workers
    parent = parent_process()
    if parent is not None:  # a killed parent cannot stop its workers, so they watch it
        threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    with suppress(EOFError, ConnectionError):  # the parent has exited; killed in between, it resets the connection
        while True:
            request = pipe.recv()
            pipe.send(_handle(encode, *request) if request else None)  # an empty request checks that it is ready


def _handle(encode: Encode, video: Video) -> Result | Exception:
    try:
        result = encode(video)
    except MemoryError:
        result = VideoError(video.path, "needs more memory than is available")
    except Exception as error:  # a bug in this package: raised again in the parent
        error.add_note(traceback.format_exc())
        return error
    if video.state is not None and not _is_unchanged(video, video.state):
        return Retryable(video.path, "changed during the build")
    return result


def _is_unchanged(video: Video, state: FileState) -> bool:
    if video.path.is_dir():
        return image_sequences.is_unchanged(video.path, state, video.start, video.end, video.frame_rate)
    return file_state(video.path) == state


def _exit_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
