"""Checks of text from outside: names of classes, and numbers; text for command lines; counts. Imports no TensorFlow.

Python's `int` and `float` also take underscores and digits of other scripts, and `int` raises from 4,300 digits on.
"""

import json
import math
import re
import shlex

from x3d_tf.errors import require

_DIGITS = re.compile(r"[0-9]{1,18}")  # fits into 64 bits
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def whole(text: str) -> int | None:
    """The whole number of 1 to 18 ASCII digits that the text is; None where it is none."""
    return int(text) if _DIGITS.fullmatch(text) else None


def decimal(text: str) -> float:
    """The finite number that the text is, such as `-1`, ` .5` or `1e-3`; nan where it is none."""
    value = float(text) if _NUMBER.fullmatch(text.strip(" \t")) else math.nan
    return value if math.isfinite(value) else math.nan


def binding_flag(name: str, value: str | float) -> str:
    """A setting as it stands on a command line that is printed to be copied, whatever the text of its value."""
    return "--gin_bindings=" + shlex.quote(f"{name}={json.dumps(value, ensure_ascii=False)}")


def plural(noun: str) -> str:
    """The plural of an English noun that forms it by a rule: `clip`, `class`, `box`, `entry`."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def counted(count: int, noun: str) -> str:
    """How many there are of something: `1 clip`, `2 clips`; the noun is given in the singular."""
    return f"{count} {noun if count == 1 else plural(noun)}"


def check_class_name(name: object, where: str) -> None:
    """Raises `UserError` unless the name of a class can be one line of a text file.

    Lists of classes have one name a line: a name of two lines, or of none, would shift those after it.

    Args:
        name: of a class, from outside.
        where: begins the message: file and line, or the setting.
    """
    good = isinstance(name, str) and name.splitlines() == [name] and "\0" not in name and _is_unicode(name)
    require(good, where, "name a class in one line of text, without line breaks or NUL", name)


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # a half of a surrogate pair, as JSON can have it
        return False
    return True
