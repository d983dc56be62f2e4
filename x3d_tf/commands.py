"""What the commands share: flags, running `main` and saying what went wrong in one line."""

import difflib
import faulthandler
import os
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from absl import flags, logging

from x3d_tf import signals, startup
from x3d_tf.errors import UserError
from x3d_tf.terminal import OutputClosed, Terminal, one_line

FLAGS = flags.FLAGS

_CLOSED = 141  # status of programs that SIGPIPE ends
_WIDTH = 110  # of --help


def run(main: Callable[..., None], *, positional: bool = False) -> None:
    """Parses the flags and calls `main`.

    With `positional`, `main` gets the arguments that are no flags, which may stand before, between and after flags;
    otherwise there may be none. `--help` prints the command's docstring and flags, with exit status 0.

    A `UserError` or `OSError` becomes one line on stderr and exit status 1. Ctrl-C gives exit status 130, SIGTERM 143,
    and a closed standard output 141, without a message. Anything else is a fault of the package and keeps its
    traceback. Control characters in what is printed are escaped.
    """
    _escape_output()
    _enable_crash_traceback()
    signals.stop_in_order()
    try:
        try:
            _run(main, positional)
        finally:
            sys.stdout.flush()  # here, where a full disk can still be told
    except (UserError, OSError) as error:  # OSError: a full disk, a folder without permission
        traceback.clear_frames(error.__traceback__)  # closes progress bars, which would end below the message
        _discard_output()
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt as error:
        print("\nterminated" if isinstance(error, signals.Terminated) else "\ninterrupted", file=sys.stderr)
        _leave(signals.status_of(error))
    except OutputClosed:
        _leave(_CLOSED)


def _run(main: Callable[..., None], positional: bool) -> None:
    flags.DEFINE_bool("verbose", False, "Show the messages of TensorFlow's start. Defaults to false.")
    if _asks_for_help(sys.argv[1:]):
        print(_help())
        return
    FLAGS.set_gnu_getopt(positional)
    arguments = _parsed(sys.argv)
    if arguments and not positional:
        raise UserError(f"unexpected argument {arguments[0]!r}; settings are flags, --help lists them")
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)  # TensorFlow's Python side tells of its inner workings
    startup.set_mode("verbose" if FLAGS.verbose else "quiet")
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    main(arguments) if positional else main()


def require_path(flag: str, path: str | Path | None, what: str = "file or folder") -> None:
    """Raises `UserError` where a path that a flag gives does not exist.

    Args:
        flag: its name, such as "--boxes".
        path: None where the flag was not given, which is no error.
        what: is looked for, for the message.
    """
    if path is not None and not Path(path).exists():
        raise UserError(f"{flag}={path}: no such {what}")


def _parsed(argv: list[str]) -> list[str]:
    """The arguments that are no flags; raises `UserError` where a flag is unknown, missing or has a bad value."""
    try:
        return FLAGS(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        close = difflib.get_close_matches(error.flagname, _own_flags())
        hint = f"did you mean {' or '.join(f'--{name}' for name in close)}?" if close else "--help lists them"
        raise UserError(f"--{error.flagname} is not a flag of this command; {hint}") from None
    except flags.Error as error:
        raise UserError(_in_words(str(error), str(error.__context__))) from None


def _in_words(message: str, cause: str) -> str:
    """A message of absl's about flags in words of ours; `cause`, of what a parser raised, is the end of some."""
    missing = re.findall(r"Flag (--\w+) must have a value other than None", message)
    if missing:
        which = ", ".join(f"{flag} ({_first_sentence(FLAGS[flag[2:]])})" for flag in missing)
        return f"{which} is required" if len(missing) == 1 else f"these flags are required: {which}"
    bad = re.fullmatch(r"flag --(\w+)=(.*)", message.removesuffix(f": {cause}"), re.DOTALL)
    if bad and bad[1] in FLAGS:
        return f"--{bad[1]} must be {_rule(FLAGS[bad[1]].parser)}, got {bad[2]!r}"
    if message.startswith("Missing value for flag "):
        return f"{message.removeprefix('Missing value for flag ')} requires a value"
    return message


def _rule(parser: Any) -> str:
    """What the values of a flag are."""
    if isinstance(parser, flags.EnumParser):
        return f"one of {', '.join(parser.enum_values)}"
    if isinstance(parser, flags.BooleanParser):
        return "true or false"
    lower, upper = getattr(parser, "lower_bound", None), getattr(parser, "upper_bound", None)
    kind = {flags.IntegerParser: "a whole number", flags.FloatParser: "a number"}.get(type(parser), "text")
    if lower is not None and upper is not None:
        return f"{kind} in {lower}..{upper}"
    return (
        kind
        + (f", at least {lower}" if lower is not None else "")
        + (f", at most {upper}" if upper is not None else "")
    )


def _asks_for_help(arguments: list[str]) -> bool:
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return any(argument in ("--help", "-help", "-h") for argument in own)


def _own_flags() -> dict[str, Any]:
    """The flags of the command, by name in order; those of libraries are left out."""
    own = {flag.name: flag for flag in FLAGS.get_key_flags_for_module(sys.argv[0])}
    return {name: own.get(name, FLAGS[name]) for name in sorted({*own, "verbose"})}


def _help() -> str:
    lines = [str(sys.modules["__main__"].__doc__ or "").strip(), "", "flags:"]
    for name, flag in _own_flags().items():
        lines.append(f"  --[no]{name}" if flag.boolean else f"  --{name}={_value(flag.parser)}")
        text = _help_of(flag)
        if flag.default not in (None, False) and "Defaults to" not in text:
            text += f" Defaults to {_shown(flag.default)}."
        lines += textwrap.wrap(text, _WIDTH, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _value(parser: Any) -> str:
    """Stands for a flag's value in --help."""
    if isinstance(parser, flags.EnumParser):
        return "|".join(parser.enum_values)
    return {flags.IntegerParser: "WHOLE_NUMBER", flags.FloatParser: "NUMBER"}.get(type(parser), "TEXT")


def _shown(default: Any) -> str:
    return ",".join(default) if isinstance(default, list) else str(default)


def _help_of(flag: Any) -> str:
    return flag.help.partition(";\n")[0]  # after which absl says that it may be repeated, which ours say themselves


def _first_sentence(flag: Any) -> str:
    sentence = _help_of(flag).partition(". ")[0].rstrip(".")
    return sentence[:1].lower() + sentence[1:]


def _enable_crash_traceback() -> None:
    """Has a crash of the process print where it was, to what is standard error now, also when that is redirected."""
    with suppress(OSError, AttributeError, ValueError):  # of a stream that is closed
        faulthandler.enable(os.dup(sys.stderr.fileno()))


def _escape_output() -> None:
    """Makes standard output and standard error `Terminal`s that take any text, also where they are closed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
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
