"""Entry point of all commands: parses flags, runs `main` and reports errors in one line."""

import atexit
import faulthandler
import os
import re
import sys
import textwrap
import threading
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from absl import flags, logging

from x3d_tf import registry, signals, startup
from x3d_tf.errors import UserError
from x3d_tf.files import require_local
from x3d_tf.terminal import OutputClosed, Terminal, one_line
from x3d_tf.text import did_you_mean

FLAGS = flags.FLAGS

_BROKEN_PIPE_STATUS = 141  # exit status of programs that SIGPIPE ends
_HELP_WIDTH = 110  # characters
_COMMON_FLAGS = ("plugin", "verbose")


def run(
    main: Callable[..., None],
    *,
    positional: bool = False,
    settings: Mapping[str, str] | None = None,
    addresses: Collection[str] = (),
) -> None:
    """Parses the flags and calls `main`.

    `--help` prints the command's docstring and flags and exits with status 0.

    A `UserError` or `OSError` is printed as one line on stderr, with exit status 1. Ctrl-C gives exit status 130,
    SIGTERM 143, and a closed standard output 141 without a message. Other exceptions are bugs of the package and keep
    their traceback. Control characters in the output are escaped.

    Args:
        main: the command. With `positional` it receives the list of positional arguments.
        positional: whether the command accepts positional arguments, which may be mixed with flags.
        settings: settings of the library that flags of another name set, with the names of the flags. Error messages
            that begin with a setting name its flag instead.
        addresses: names of the flags whose values may be addresses, such as http://HOST:PORT. Values of all others, and
            positional arguments, are refused if they are: no command reads or writes object storage.
    """
    _escape_output()
    _enable_crash_traceback()
    signals.install_stop_handlers()
    try:
        try:
            _run(main, positional, addresses)
        finally:
            sys.stdout.flush()  # here, so that a full disk is still reported
    except (UserError, OSError) as error:  # OSError: a full disk, a folder without permission
        traceback.clear_frames(error.__traceback__)  # closes progress bars before the message is printed
        _discard_unwritable_output()
        sys.exit(f"error: {one_line(_with_flag(str(error), settings or {}))}")
    except KeyboardInterrupt as error:
        print("\nterminated" if isinstance(error, signals.Terminated) else "\ninterrupted", file=sys.stderr)
        _exit_now(signals.exit_status(error))
    except OutputClosed:
        _exit_now(_BROKEN_PIPE_STATUS)
    if "tensorflow" in sys.modules:
        _exit_quickly()


def _exit_quickly() -> NoReturn:
    """Ends a command that succeeded, after its exit handlers, without dismantling TensorFlow, which takes a second."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the interpreter does
    atexit._run_exitfuncs()
    _exit_now(0)


def _run(main: Callable[..., None], positional: bool, addresses: Collection[str]) -> None:
    flags.DEFINE_bool("verbose", False, "Show all messages that TensorFlow prints while it starts.")
    flags.DEFINE_multi_string(
        "plugin",
        None,
        "Python module with your own tasks or data sets, such as my_task for my_task.py in the working folder; repeat "
        "the flag for each module. A plugin is a program: only load code that you trust.",
    )
    if _asks_for_help(sys.argv[1:]):
        print(_help())
        return
    FLAGS.set_gnu_getopt(positional)
    arguments = _parse_flags(sys.argv)
    if arguments and not positional:
        raise UserError(f"unexpected argument {arguments[0]!r}; this command only accepts flags, see --help")
    _require_local_paths(arguments, addresses)
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)  # TensorFlow's Python logger is verbose at INFO
    startup.set_mode("verbose" if FLAGS.verbose else "quiet")
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    for module in FLAGS.plugin or ():
        registry.load_plugin(module)
    main(arguments) if positional else main()


def require_free(path: str | Path, overwrite: bool, another: str) -> None:
    """Checks that an output file may be written.

    Args:
        path: the file.
        overwrite: whether it may be replaced.
        another: what the user can change, such as `another --output`.

    Raises:
        UserError: the file exists and `overwrite` is false.
    """
    if Path(path).exists() and not overwrite:
        raise UserError(f"{path} exists; choose {another}, or pass --overwrite to replace it")


def require_path(flag: str, path: str | Path | None, kind: str = "file or folder") -> None:
    """Raises `UserError` if the path of a flag does not exist.

    Args:
        flag: name of the flag, such as "--boxes".
        path: value of the flag, or None if the flag was not given, which is not an error.
        kind: noun for the message.
    """
    if path is not None and not Path(path).exists():
        raise UserError(f"{flag}={path}: no such {kind}")


def _with_flag(message: str, settings: Mapping[str, str]) -> str:
    """Returns an error message with the flag instead of the setting or argument of the library that it begins with.

    Arguments of library functions have the names of the flags that set them.
    """
    begin = re.match(r"([\w.]+)(?=: | must )", message)
    flag = settings.get(begin[1], begin[1]) if begin else ""
    return f"--{flag}{message[len(begin[1]) :]}" if begin and flag in _command_flags() else message


def _parse_flags(argv: list[str]) -> list[str]:
    """Returns the positional arguments; raises `UserError` for an unknown, missing or invalid flag."""
    try:
        return FLAGS(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        hint = did_you_mean(error.flagname, _command_flags(), prefix="--") or "see --help"
        raise UserError(f"--{error.flagname} is not a flag of this command; {hint}") from None
    except flags.Error as error:
        raise UserError(_flag_error(str(error), str(error.__context__))) from None


def _flag_error(message: str, cause: str) -> str:
    """Rewords an error message of absl; `cause` is the message of the flag parser, with which some of them end."""
    missing = re.findall(r"Flag (--\w+) must have a value other than None", message)
    if missing:
        names = ", ".join(f"{flag} ({_first_sentence(FLAGS[flag[2:]])})" for flag in missing)
        return f"{names} is required" if len(missing) == 1 else f"these flags are required: {names}"
    bad = re.fullmatch(r"flag --(\w+)=(.*)", message.removesuffix(f": {cause}"), re.DOTALL)
    if bad and bad[1] in FLAGS:
        return f"--{bad[1]} must be {_rule(FLAGS[bad[1]].parser)}, got {bad[2]!r}"
    if message.startswith("Missing value for flag "):
        return f"{message.removeprefix('Missing value for flag ')} requires a value"
    return message


def _rule(parser: Any) -> str:
    """Returns the rule for the values of a flag, which follows "must be"."""
    if isinstance(parser, flags.EnumParser):
        return f"one of {', '.join(parser.enum_values)}"
    if isinstance(parser, flags.BooleanParser):
        return "true or false"
    lower, upper = getattr(parser, "lower_bound", None), getattr(parser, "upper_bound", None)
    kind = {flags.IntegerParser: "an integer", flags.FloatParser: "a number"}.get(type(parser), "text")
    if lower is not None and upper is not None:
        return f"{kind} in {lower}..{upper}"
    return (
        kind
        + (f", at least {lower}" if lower is not None else "")
        + (f", at most {upper}" if upper is not None else "")
    )


def _require_local_paths(arguments: list[str], addresses: Collection[str]) -> None:
    """Raises `UserError` if a flag or a positional argument is the address of an object store."""
    for name, flag in _command_flags().items():
        values = flag.value if isinstance(flag.value, list) else [flag.value]
        for value in values if name not in addresses else ():
            if isinstance(value, str):
                require_local(re.sub(r"^\w+=", "", value), f"--{name}")  # SPLIT=FILE
    for argument in arguments:
        require_local(argument, "the path of a file or folder")


def _asks_for_help(arguments: list[str]) -> bool:
    candidates = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return any(argument in ("--help", "-help", "-h") for argument in candidates)


def _command_flags() -> dict[str, Any]:
    """Returns the command's flags sorted by name, without those that libraries define."""
    key_flags = {flag.name: flag for flag in FLAGS.get_key_flags_for_module(sys.argv[0])}
    return {name: key_flags.get(name, FLAGS[name]) for name in sorted({*key_flags, *_COMMON_FLAGS})}


def _help() -> str:
    lines = [str(sys.modules["__main__"].__doc__ or "").strip(), "", "flags:"]
    for name, flag in _command_flags().items():
        lines.append(f"  --[no]{name}" if flag.boolean else f"  --{name}={_placeholder(flag.parser)}")
        text = _help_of(flag)
        if flag.default is not None and "Defaults to" not in text:
            text += f" Defaults to {_format_default(flag.default)}."
        lines += textwrap.wrap(text, _HELP_WIDTH, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _placeholder(parser: Any) -> str:
    """Returns the placeholder for a flag's value in --help."""
    if isinstance(parser, flags.EnumParser):
        return "|".join(parser.enum_values)
    return {flags.IntegerParser: "INTEGER", flags.FloatParser: "NUMBER"}.get(type(parser), "TEXT")


def _format_default(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return ",".join(default) if isinstance(default, list) else str(default)


def _help_of(flag: Any) -> str:
    """Returns a flag's help without what absl adds: the values of an enum, and a note that it can be repeated."""
    return re.sub(r"^<[^>]*>: ", "", flag.help).partition(";\n")[0]


def _first_sentence(flag: Any) -> str:
    sentence = _help_of(flag).partition(". ")[0].rstrip(".")
    return sentence[:1].lower() + sentence[1:]


def _enable_crash_traceback() -> None:
    """Prints a traceback if the process crashes, to the current standard error even if that is redirected later."""
    with suppress(OSError, AttributeError, ValueError):  # standard error is closed
        faulthandler.enable(os.dup(sys.stderr.fileno()))


def _escape_output() -> None:
    """Replaces standard output and standard error by `Terminal`s that accept any text, even if they are closed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    with suppress(AttributeError):  # streams of notebooks and tests cannot be reconfigured
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.stdout, sys.stderr = Terminal(sys.stdout), Terminal(sys.stderr, bars=True)
    logging.get_absl_handler().python_handler.stream = sys.stderr


def _discard_unwritable_output() -> None:
    """Redirects unwritable output to the null device, because Python would try to write it again on exit."""
    try:
        sys.stdout.flush()
    except (UserError, OutputClosed):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit_now(status: int) -> NoReturn:
    """Exits without waiting for TensorFlow's threads, which may be busy for a long time."""
    with suppress(UserError, OutputClosed):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"warning: {one_line(message)}", file=sys.stderr)
