"""Videos -> the frames of their records, in worker processes that decode one video at a time each.

Imports no TensorFlow: the workers import this module and only decode.
"""

import os
import signal
import stat
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from x3d_tf.errors import UserError
from x3d_tf.processes import Worker, WorkerDied, TimedOut
from x3d_tf.data.video import image_sequences
from x3d_tf.data.build.sources import Video
from x3d_tf.data.video.image_sequences import State
from x3d_tf.data.video.decode import EncodedVideo, VideoError, encode_video, frame_at

TIMEOUT = 600.0  # seconds that a video may take by default
_START = 300.0  # seconds within which a worker has to be ready: a cold network disk takes its time
_TRIES = 2  # a worker may also end for another reason than its video: memory that others took

Result = EncodedVideo | VideoError
Encode = Callable[[Video], Result]


class Retryable(VideoError):
    """A video that may pass when it is tried again: it took too long, or changed meanwhile."""


def state_of(path: Path) -> State:
    """Size in bytes and time of the last change in nanoseconds; (-1, -1) of what does not exist.

    Of a folder of frames it stands for the names, sizes and times of all images.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            return image_sequences.state_of(path)
    except OSError:  # a link to nowhere
        return -1, -1
    return status.st_size, status.st_mtime_ns


def encode_or_reason(video: Video, short_side: int, quality: int) -> Result:
    """The frames of a video, or why there are none.

    Args:
        video: a file, or a folder of frames.
        short_side, quality: see `video.encode_video`.
    """
    try:
        if video.path.is_dir():
            encoded = image_sequences.encode_folder(
                video.path, short_side, quality, video.start, video.end, video.frame_rate
            )
        else:
            encoded = encode_video(video.path, short_side, quality, video.start, video.end)
    except VideoError as error:
        return VideoError(error.path, f"{error.reason} (key frame {video.media_id})") if video.annotation else error
    if video.annotation is not None:
        place = frame_at(video.annotation.second, encoded.start, encoded.fps)
        if place >= len(encoded.frames):
            last = encoded.start + (len(encoded.frames) - 1) / encoded.fps
            return VideoError(video.path, f"ends at {last:.1f} s, before the key frame {video.media_id}")
        if place < 0:
            return VideoError(video.path, f"begins at {encoded.start:.1f} s, after the key frame {video.media_id}")
    return encoded


def encode_all(
    videos: Sequence[Video], encode: Encode, workers: int, timeout: float = TIMEOUT
) -> Generator[Result, None, None]:
    """Applies `encode` to each video in worker processes; results come in the order of the videos, few at a time.

    Args:
        videos: one whose file is no longer in its `state` gives a `Retryable`.
        encode: function that can be pickled.
        workers: number of processes.
        timeout: seconds that a video may take; one that takes longer gives a `Retryable`, and its worker is ended.

    Yields:
        For each video what `encode` returned. A file on which its process ends twice gives a `VideoError`.

    Raises:
        UserError: a worker cannot start, which is no fault of a video.
    """
    pool = _Workers(encode, timeout)
    waiting: deque[Future[Result]] = deque()
    threads = ThreadPoolExecutor(min(workers, len(videos)) or 1)
    try:
        for video in videos:
            waiting.append(_submitted(threads, pool.encode, video))
            if len(waiting) > 2 * workers:  # results wait for their turn in memory, so only a few may be under way
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.end()
        threads.shutdown(cancel_futures=True)


def _submitted(threads: ThreadPoolExecutor, encode: Encode, video: Video) -> Future[Result]:
    try:
        return threads.submit(encode, video)
    except RuntimeError as error:
        raise UserError(f"workers cannot be started: {error}; use fewer --workers") from error


class _Workers:
    """Processes that encode one video at a time each; called from as many threads, each of which waits for one."""

    def __init__(self, encode: Encode, timeout: float) -> None:
        self._encode, self._timeout = encode, timeout
        self._lock = threading.Lock()
        self._running: set[Worker] = set()
        self._idle: list[Worker] = []
        self._ended = False

    def encode(self, video: Video) -> Result:
        """The frames of a video, or why there are none; raises UserError where no worker can start."""
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
                return Retryable(video.path, f"takes longer than {self._timeout:g} s (--timeout)")
            except WorkerDied as ended:
                self._drop(worker)
                status = ended.status
                continue
            with self._lock:
                self._idle.append(worker)
            return result
        if status == -signal.SIGKILL:  # no fault of a decoder: systems end processes so where memory is short
            return Retryable(video.path, "the system ended the process that decodes it; use fewer --workers")
        return VideoError(video.path, "kills the process that decodes it")

    def _take(self) -> Worker:
        """A worker that is ready."""
        with self._lock:
            if self._ended:
                raise WorkerDied(None)  # no more videos are wanted
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
                f"a worker process cannot start: {error} before it was ready, and may have printed why. Where memory "
                "is short, use fewer --workers; a script that builds records must guard its entry with: if __name__ == "
                '"__main__":'
            ) from error
        return worker

    def _drop(self, worker: Worker) -> None:
        with self._lock:
            self._running.discard(worker)
        worker.kill()

    def end(self) -> None:
        """Ends all workers, also those that are busy; threads that wait for them are told."""
        with self._lock:
            self._ended = True
            running = list(self._running)
        for worker in running:
            worker.kill()


def _serve(pipe: Any, encode: Encode) -> None:
    """Runs a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles the keyboard, and ends its workers
    parent = parent_process()
    if parent is not None:  # a killed parent cannot end its workers: each watches for that itself
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(encode, *question) if question else None)  # none but asks whether the worker is ready


def _answer(encode: Encode, video: Video) -> Result | Exception:
    try:
        result = encode(video)
    except MemoryError:
        result = VideoError(video.path, "takes more memory than there is")
    except Exception as error:  # a fault of the package: it is raised where it was asked for
        error.add_note(traceback.format_exc())
        return error
    if video.state is not None and not _is_unchanged(video, video.state):
        return Retryable(video.path, "changed while the records were built")
    return result


def _is_unchanged(video: Video, state: State) -> bool:
    if video.path.is_dir():
        return image_sequences.is_unchanged(video.path, state, video.start, video.end, video.frame_rate)
    return state_of(video.path) == state


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
