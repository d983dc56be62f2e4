"""Terminal output with control characters escaped, and progress bars.

Control characters in file names or messages could clear the screen, retitle the window or hide text. Imports no
TensorFlow.
"""

import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO

from tqdm import tqdm

from x3d_tf.files import WriteError
from x3d_tf.text import plural

# C0 except tab and line feed, DEL, C1, bidirectional overrides, and surrogates, which represent non-UTF-8 bytes of file
# names and cannot be encoded
_UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LINE_BREAKS = re.compile("[\n\u2028\u2029]")
_CURSOR_UP = re.compile("(?:\x1b\\[A)+")  # tqdm moves to the bar above with these


class OutputClosed(Exception):
    """Raised when the reader of standard output, such as `head`, has exited."""


def printable(text: str) -> str:
    """Returns the text with control characters, except tab and line feed, escaped as in `\\x1b`."""
    return _UNSAFE.sub(_escape, text)


def one_line(text: object) -> str:
    """Returns the text with control characters and line breaks escaped, for names, errors and warnings."""
    return _LINE_BREAKS.sub(_escape, printable(str(text)))


def _escape(match: re.Match[str]) -> str:
    return match.group().encode("unicode_escape").decode("ascii")


def tell(status: str) -> None:
    """Prints a status line on standard error, above the progress bar if one is shown."""
    tqdm.write(one_line(status), file=sys.stderr)


def progress_bar(total: int, noun: str, action: str, **settings: Any) -> "tqdm[Any]":
    """Returns a progress bar that counts items.

    Args:
        total: number of items.
        noun: noun for the items, in the singular.
        action: description of the task, at the start of the bar.
        **settings: other arguments of `tqdm`.
    """
    items = plural(noun) if total != 1 else noun
    bar_format = f"{{desc}}: {{n_fmt}}/{{total_fmt}} {items} |{{bar:20}}| {{remaining}} left"
    return tqdm(total=total, desc=action, bar_format=bar_format, mininterval=1.0, **settings)


class Terminal:
    """Text stream that wraps standard output or standard error and escapes control characters.

    Args:
        stream: stream to write to.
        bars: True for the stream that shows progress bars, whose lines start with a carriage return. Write errors of
            that stream are ignored because they cannot be reported anywhere.

    Raises:
        OutputClosed: the reader of the stream has exited (raised by the methods that write).
        WriteError: the disk is full (raised by the methods that write).
    """

    def __init__(self, stream: TextIO, *, bars: bool = False) -> None:
        self._stream, self._bars = stream, bars

    def write(self, text: str) -> int:
        """Writes text with control characters escaped."""
        self._call(self._stream.write, self._escaped(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes lines with control characters escaped."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes the stream."""
        self._call(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _escaped(self, text: str) -> str:
        if self._bars and text.startswith("\r"):
            return "\r" + one_line(text[1:])
        return text if self._bars and _CURSOR_UP.fullmatch(text) else printable(text)

    def _call(self, action: Any, *arguments: str) -> None:
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
