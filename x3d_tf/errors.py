"""Checks of values that users write: every error names the setting, the rule and the value received."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

_LARGEST = 2**63 - 1  # of whole numbers: beyond, they fit neither TensorFlow nor, far beyond, a float
_LONGEST_SHOWN = 500  # characters of a value in a message


class UserError(ValueError):
    """Something that whoever called can mend: commands print its message and no traceback."""


class SettingTypeError(UserError, TypeError):
    """A setting of the wrong type."""


_NO_VALUE = object()


def require(condition: bool, setting: str, rule: str, value: object = _NO_VALUE) -> None:
    """Raises `UserError("setting must rule, got value")` unless `condition` holds.

    Args:
        condition: whether the rule holds.
        setting: the setting or the file, which begins the message.
        rule: follows "must".
        value: the value received. Omitted where there is none, and then the message ends with the rule.
    """
    if not condition:
        raise UserError(f"{setting} must {rule}" + ("" if value is _NO_VALUE else f", got {_shown(value)}"))


def _shown(value: object) -> str:
    """The value for a message, which stays a line: what comes from a file may be any length."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}... ({len(text)} characters)"


def check_field_types(instance: Any) -> None:
    """Holds every field of a dataclass instance against its annotation.

    Understands what the settings of this package use: int, float (any real number is accepted), bool, str, other
    dataclasses, `Literal`, `X | None` and `tuple[...]`. A configuration language gives any field any value, so the
    types that a static checker guarantees elsewhere are checked here.

    Raises:
        SettingTypeError: naming the class, the field, the type expected and the value received.
        UserError: a whole number that does not fit into 64 bits.
    """
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if not _matches(value, hints[field.name]):
            hint = hints[field.name]
            expected = str(hint).replace("typing.", "") if typing.get_origin(hint) else hint.__name__
            raise SettingTypeError(f"{type(instance).__name__}.{field.name} must be {expected}, got {_shown(value)}")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int):
                setting = f"{type(instance).__name__}.{field.name}"
                require(abs(number) <= _LARGEST, setting, "fit into 64 bits", number)


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message: libraries add accounts of their inner workings."""
    return str(error).partition("\n")[0]


def first_few(names: Sequence[str]) -> str:
    """The first ten of names that may be many, for a message."""
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


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
