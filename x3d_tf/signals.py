"""Handling of Ctrl-C and SIGTERM, which schedulers and containers send before SIGKILL. Imports no TensorFlow."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_REPEAT_SECONDS = 0.2


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM; a `KeyboardInterrupt`, so that code that saves its work on Ctrl-C also does so here."""


def exit_status(error: KeyboardInterrupt) -> int:
    """Returns the exit status of an interrupted command: 143 for SIGTERM, 130 for Ctrl-C."""
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


def install_stop_handlers() -> None:
    """Makes the first Ctrl-C or SIGTERM raise `KeyboardInterrupt` or `Terminated` in the main thread.

    A second signal does not interrupt saving; it prints how to exit immediately, which a third signal does. Signals
    that are already ignored, as under `nohup`, stay ignored.
    """
    raised = False

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal raised
        if not raised:
            raised = True
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    for number in _STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_count_signals, args=(reader,), daemon=True).start()


@contextmanager
def held_back() -> Iterator[None]:
    """Delays Ctrl-C and SIGTERM until the end of the block; an error in the block takes precedence.

    Only has an effect in the main thread, where Python handles signals. Keep the block short.
    """
    received: list[tuple[int, FrameType | None]] = []
    before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    handlers = {number: handler for number, handler in before.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    try:
        for number in handlers:
            signal.signal(number, lambda *signal_args: received.append(signal_args))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for first, frame in received[:1]:
        handlers[signal.Signals(first)](first, frame)


@contextmanager
def recorded() -> Iterator[list[int]]:
    """Records the numbers of received Ctrl-C and SIGTERM in the yielded list within the block, and raises nothing.

    Only has an effect in the main thread, where Python handles signals. Ignored signals stay ignored.
    """
    received: list[int] = []
    with _handled_by(lambda number, _: received.append(number)):
        yield received


@contextmanager
def default_actions() -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM end the process at once within the block, which a library call may not let Python do.

    A thread repeats the setting, because TensorFlow replaces the action of SIGTERM while it connects to other workers.
    """
    done = threading.Event()
    with _handled_by(signal.SIG_DFL) as numbers:
        thread = threading.Thread(target=_repeat_default_actions, args=(numbers, done), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _repeat_default_actions(numbers: Iterable[int], done: threading.Event) -> None:
    c_library = ctypes.CDLL(None)  # Python sets actions in the main thread only, which may be in a library call
    c_library.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    while not done.wait(_REPEAT_SECONDS):
        for number in numbers:
            c_library.signal(number, None)  # SIG_DFL


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], Any] | signal.Handlers) -> Iterator[list[int]]:
    """Handles the signals that are not ignored in another way within the block; yields their numbers."""
    before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    changed = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    if threading.current_thread() is not threading.main_thread():
        changed = {}
    try:
        for number in changed:
            signal.signal(number, handler)
        yield [*changed]
    finally:
        for number, old in changed.items():
            signal.signal(number, old)


def _count_signals(pipe: int) -> None:
    """Counts signals in a separate thread, because the main thread may be busy in a long TensorFlow op."""
    count = 0
    while numbers := os.read(pipe, 1):
        count += numbers[0] in _STOP_SIGNALS
        if count == 2:
            print("still stopping; a third signal exits immediately without saving", file=sys.stderr, flush=True)
        elif count > 2:
            os._exit(128 + numbers[0])


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Blocks Ctrl-C in the block; processes started in it ignore Ctrl-C permanently."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
