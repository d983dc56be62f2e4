"""Strict parsing of numbers and class names, and formatting of counts, flags and paths. Imports no TensorFlow.

Python's `int` and `float` also accept underscores and non-ASCII digits, and `int` raises above 4,300 digits.
"""

import difflib
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from x3d_tf.errors import require

_DIGITS = re.compile(r"[0-9]{1,18}")  # fits into 64 bits
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def whole(text: str) -> int | None:
    """Returns the integer for a text of 1 to 18 ASCII digits, or None for any other text."""
    return int(text) if _DIGITS.fullmatch(text) else None


def decimal(text: str) -> float:
    """Returns the finite number for a text such as `-1`, ` .5` or `1e-3`, or nan for any other text."""
    value = float(text) if _NUMBER.fullmatch(text.strip(" \t")) else math.nan
    return value if math.isfinite(value) else math.nan


def lines_of(text: str) -> list[str]:
    """Returns the lines of a file, without their ends: line feeds, carriage returns or both.

    Unlike `str.splitlines`, it does not end lines at characters such as U+2028, so the numbers are those of editors.
    """
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def binding_flag(name: str, value: str | float) -> str:
    """Returns a --gin_bindings flag for a setting, quoted so that the printed command can be copied into a shell."""
    if isinstance(value, bool):
        return f"--gin_bindings={name}={value}"
    return "--gin_bindings=" + shlex.quote(f"{name}={json.dumps(value, ensure_ascii=False)}")


def plural(noun: str) -> str:
    """Returns the plural of a regular English noun, such as `clip`, `class`, `box` or `entry`."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def counted(count: int, noun: str) -> str:
    """Returns a count with its noun, such as `1 clip` or `2 clips`; `noun` is in the singular."""
    return f"{count} {noun if count == 1 else plural(noun)}"


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Returns a question that suggests the known names close to a mistyped one, or "" if there are none.

    Args:
        name: the mistyped name.
        known: the names that exist.
        prefix: text to print before each suggestion, such as "--".
    """
    close = difflib.get_close_matches(name, list(known))
    return f"did you mean {' or '.join(prefix + candidate for candidate in close)}?" if close else ""


def distinct_ends(paths: Iterable[Path]) -> dict[Path, str]:
    """Returns the end of each path: its name, with as many folders as distinguish it from the other paths."""
    ends, rest, length = dict[Path, str](), [*dict.fromkeys(paths)], 0
    while rest:
        length += 1
        candidates = {path: path.parts[-length:] for path in rest}
        counts = Counter(candidates.values())
        found = {path for path, end in candidates.items() if counts[end] == 1 or end == path.parts}
        ends |= {path: str(Path(*candidates[path])) for path in found}
        rest = [path for path in rest if path not in found]
    return ends


def check_class_name(name: object, where: str) -> None:
    """Raises `UserError` if a class name is not exactly one line of text.

    Class lists have one name per line, so an empty or multi-line name would shift the names after it.

    Args:
        name: untrusted class name.
        where: file and line, or setting, that begins the message.
    """
    valid = isinstance(name, str) and name.splitlines() == [name] and "\0" not in name and _is_encodable(name)
    require(valid, where, "name a class in one line of text, without line breaks or NUL", name)


def _is_encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can contain
        return False
    return True
