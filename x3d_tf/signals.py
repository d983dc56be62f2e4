"""Handling of Ctrl-C and SIGTERM, which schedulers and containers send before SIGKILL. Imports no TensorFlow."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
    with restored():
        for number in _STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ():
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, _: received.append(number))
        yield received


@contextmanager
def restored() -> Iterator[None]:
    """Restores the handlers of Ctrl-C and SIGTERM after the block, in which a library may replace them."""
    before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


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
