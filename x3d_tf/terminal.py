"""Text on its way to a terminal: control characters in names and messages from elsewhere are escaped.

A terminal obeys control characters: a file's name could clear the screen, retitle the window or hide what follows it.
Imports no TensorFlow.
"""

import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO

from tqdm import tqdm

from x3d_tf.files import WriteError
from x3d_tf.text import plural

# C0 but for tab and line feed, DEL, C1, overrides of the direction of writing, and surrogates, which stand for bytes of
# file names that are no UTF-8 and cannot be encoded
_UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LINE_BREAKS = re.compile("[\n\u2028\u2029]")
_CURSOR_UP = re.compile("(?:\x1b\\[A)+")  # how tqdm gets from one bar to the one above


class OutputClosed(Exception):
    """Whatever read standard output, such as `head`, has ended."""


def printable(text: str) -> str:
    """The text with its control characters but tab and line feed as escapes such as `\\x1b`."""
    return _UNSAFE.sub(_escape, text)


def one_line(text: object) -> str:
    """The text as `printable`, with its line breaks as escapes, too: for names within a line, errors and warnings."""
    return _LINE_BREAKS.sub(_escape, printable(str(text)))


def _escape(match: re.Match[str]) -> str:
    return match.group().encode("unicode_escape").decode("ascii")


def tell(doing: str) -> None:
    """Prints a line on standard error about what takes a while, above a progress bar if there is one."""
    tqdm.write(one_line(doing), file=sys.stderr)


def progress_bar(total: int, noun: str, doing: str, **settings: Any) -> "tqdm[Any]":
    """A progress bar of things that are counted one by one.

    Args:
        total: how many there are.
        noun: what they are, in the singular.
        doing: what becomes of them.
        **settings: further ones of `tqdm`.
    """
    things = plural(noun) if total != 1 else noun
    bar_format = f"{{desc}}: {{n_fmt}}/{{total_fmt}} {things} |{{bar:20}}| {{remaining}} left"
    return tqdm(total=total, desc=doing, bar_format=bar_format, mininterval=1.0, **settings)


class Terminal:
    """Text stream over standard output or standard error that prints what is `printable`.

    Args:
        stream: to write to.
        bars: whether it is the one with progress bars, which start with a carriage return and stay one line. Errors of
            that stream are dropped: there is nowhere to tell of them.

    Raises:
        OutputClosed: by the methods that write: nobody reads any more.
        WriteError: by the methods that write: the disk is full.
    """

    def __init__(self, stream: TextIO, *, bars: bool = False) -> None:
        self._stream, self._bars = stream, bars

    def write(self, text: str) -> int:
        """Writes text, escaped."""
        self._do(self._stream.write, self._escaped(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes several texts, escaped."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Passes on what was written."""
        self._do(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _escaped(self, text: str) -> str:
        if self._bars and text.startswith("\r"):
            return "\r" + one_line(text[1:])
        return text if self._bars and _CURSOR_UP.fullmatch(text) else printable(text)

    def _do(self, action: Any, *arguments: str) -> None:
        if self._bars:
            with suppress(OSError):
                action(*arguments)
            return
        try:
            action(*arguments)
        except BrokenPipeError as error:
            raise OutputClosed from error
        except OSError as error:
            raise WriteError(f"standard output cannot be written: {error.strerror or error}") from error
