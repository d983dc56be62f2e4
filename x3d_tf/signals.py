"""Ctrl-C and SIGTERM, which preemption, schedulers and containers send before they kill. Imports no TensorFlow."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM. Whatever saves its work on Ctrl-C does so now, too."""


def status_of(error: KeyboardInterrupt) -> int:
    """Exit status of a command that was stopped: 143 by SIGTERM, 130 by Ctrl-C."""
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


def stop_in_order() -> None:
    """Makes the first Ctrl-C or SIGTERM raise `KeyboardInterrupt` or `Terminated` in the main thread.

    A second one does not cut the saving short: it says how to end at once, which a third one does. Signals that are
    ignored, as those of `nohup`, stay so.
    """
    raised = False

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal raised
        if not raised:
            raised = True
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    for number in _STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_count, args=(reader,), daemon=True).start()


@contextmanager
def held_back() -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM raise after the block, not within it; an error of the block goes first.

    Only in the main thread, in which Python handles signals. The block should be short.
    """
    held: list[tuple[int, FrameType | None]] = []
    before = {number: signal.getsignal(number) for number in _STOPPING}
    raising = {number: handler for number, handler in before.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        raising = {}
    try:
        for number in raising:
            signal.signal(number, lambda *got: held.append(got))
        yield
    finally:
        for number, handler in raising.items():
            signal.signal(number, handler)
    for got, frame in held[:1]:
        raising[signal.Signals(got)](got, frame)


def _count(pipe: int) -> None:
    """Counts signals in a thread of its own: the main one may be within an operation of TensorFlow for long."""
    count = 0
    while numbers := os.read(pipe, 1):
        count += numbers[0] in _STOPPING
        if count == 2:
            print("still stopping; a third signal ends at once and saves nothing more", file=sys.stderr, flush=True)
        elif count > 2:
            os._exit(128 + numbers[0])


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Holds back Ctrl-C; processes that are started in the block never get it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
