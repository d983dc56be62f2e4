"""Validation of user input; every error names the setting, the rule and the value received."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

_MAX_INTEGER = 2**63 - 1  # larger integers do not fit into TensorFlow's int64
_MAX_SHOWN = 500  # characters of a value in a message


class UserError(ValueError):
    """An error that the user can fix: commands print the message without a traceback."""


class SettingTypeError(UserError, TypeError):
    """A setting of the wrong type."""


_NO_VALUE = object()


def require(condition: bool, setting: str, rule: str, value: object = _NO_VALUE) -> None:
    """Raises `UserError("setting must rule, got value")` unless `condition` holds.

    Args:
        condition: result of the check.
        setting: name of the setting or file, which begins the message.
        rule: text that follows "must" in the message.
        value: value received. If it is omitted, the message ends after the rule.
    """
    if not condition:
        raise UserError(f"{setting} must {rule}" + ("" if value is _NO_VALUE else f", got {_format_value(value)}"))


def _format_value(value: object) -> str:
    """Returns the value for a message, shortened because values from files can have any length."""
    try:
        text = repr(value)
    except ValueError:  # Python cannot format integers of more than 4,300 digits
        return "a number with thousands of digits"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}... ({len(text)} characters)"


def check_field_types(instance: Any) -> None:
    """Checks every field of a dataclass instance against its type annotation.

    Supports int, float (any real number is accepted), bool, str, other dataclasses, `Literal`, `X | None` and
    `tuple[...]`. The check is needed because configuration files can assign any value to any field.

    Raises:
        SettingTypeError: names the class, the field, the expected type and the value received.
        UserError: an integer does not fit into 64 bits.
    """
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if not _matches(value, hints[field.name]):
            raise SettingTypeError(
                f"{type(instance).__name__}.{field.name} must be {_expected(hints[field.name])}, got "
                f"{_format_value(value)}"
            )
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int):
                setting = f"{type(instance).__name__}.{field.name}"
                require(abs(number) <= _MAX_INTEGER, setting, "fit into 64 bits", number)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message; libraries append internal details."""
    return str(error).partition("\n")[0]


def first_few(names: Sequence[str], separator: str = ", ") -> str:
    """Returns the first ten names as text, followed by "..." if there are more."""
    return separator.join([*names[:10], *(["..."] if len(names) > 10 else [])])


def _expected(hint: Any) -> str:
    """Returns the rule for values of a type, which follows "must be"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return f"one of {', '.join(arguments)}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_expected, arguments))
    if origin is not None:
        return str(hint).replace("typing.", "")
    return "None" if hint is types.NoneType else hint.__name__


def _matches(value: object, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return isinstance(value, str) and value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[-1] is Ellipsis:
            return all(_matches(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_matches, value, arguments))
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    return isinstance(value, hint)
