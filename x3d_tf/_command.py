"""What the commands share: running `main` and saying what went wrong in one line."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from absl import app, flags, logging

from x3d_tf import _signals
from x3d_tf._checks import UserError
from x3d_tf._terminal import OutputClosed, Terminal, one_line

_CLOSED = 141  # status of programs that SIGPIPE ends


def run(main: Callable[..., None], *, positional: bool = False) -> None:
    """Parses the flags and calls `main`.

    With `positional`, `main` gets the arguments that are no flags, which may stand before, between and after flags;
    otherwise there may be none.

    A `UserError` or `OSError` becomes one line on stderr and exit status 1. Ctrl-C gives exit status 130, SIGTERM 143,
    and a closed standard output 141, without a message. Anything else is a fault of the package and keeps its
    traceback. Control characters in what is printed are escaped.
    """

    def _main(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # TensorFlow's Python side tells of its inner workings
        if len(argv) > 1 and not positional:
            sys.exit(f"error: unexpected argument {argv[1]!r}; settings are flags, --help lists them")
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        main(argv[1:]) if positional else main()

    _escape_output()
    _signals.stop_in_order()
    flags.FLAGS.set_gnu_getopt(positional)
    try:
        try:
            app.run(_main)
        finally:
            sys.stdout.flush()  # here, where a full disk can still be told
    except (UserError, OSError) as error:  # OSError: a full disk, a folder without permission
        traceback.clear_frames(error.__traceback__)  # closes progress bars, which would end below the message
        _discard_output()
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt as error:
        print("\nterminated" if isinstance(error, _signals.Terminated) else "\ninterrupted", file=sys.stderr)
        _leave(_signals.status_of(error))
    except OutputClosed:
        _leave(_CLOSED)


def _escape_output() -> None:
    """Makes standard output and standard error `Terminal`s that take any text."""
    with suppress(AttributeError):  # a stream of a notebook or a test
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.stdout, sys.stderr = Terminal(sys.stdout), Terminal(sys.stderr, bars=True)
    logging.get_absl_handler().python_handler.stream = sys.stderr


def _discard_output() -> None:
    """Sends what cannot be written nowhere, for Python would try once more when it ends."""
    try:
        sys.stdout.flush()
    except (UserError, OutputClosed):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(status: int) -> NoReturn:
    """Ends the process, not by way of TensorFlow's threads, which may be busy for a long time."""
    with suppress(UserError, OutputClosed):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"warning: {one_line(message)}", file=sys.stderr)


def quiet_tensorflow() -> None:
    """Keeps TensorFlow's start-up notices off the terminal; to be called before its first import."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
