"""What the commands share: running `main` and saying what went wrong in one line."""

import os
import sys
import warnings
from collections.abc import Callable

from absl import app, flags, logging

from x3d_tf._checks import UserError


def run(main: Callable[..., None], *, positional: bool = False) -> None:
    """Parses the flags and calls `main`.

    With `positional`, `main` gets the arguments that are no flags, which may stand before, between and after flags;
    otherwise there may be none.

    A `UserError` or `OSError` becomes one line on stderr and exit status 1; Ctrl-C becomes exit status 130. Anything
    else is a fault of the package and keeps its traceback.
    """

    def _main(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # TensorFlow's Python side tells of its inner workings
        if len(argv) > 1 and not positional:
            sys.exit(f"error: unexpected argument {argv[1]!r}; settings are flags, --help lists them")
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        try:
            main(argv[1:]) if positional else main()
        except (UserError, OSError) as error:  # OSError: a full disk, a folder without permission
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)  # not by way of TensorFlow's threads, which may be busy for a long time

    flags.FLAGS.set_gnu_getopt(positional)
    app.run(_main)


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def quiet_tensorflow() -> None:
    """Keeps TensorFlow's start-up notices off the terminal; to be called before its first import."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
