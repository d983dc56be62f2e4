"""Class names: their order, and warnings about names that look like mistakes. Imports no TensorFlow."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

from x3d_tf.errors import first_few
from x3d_tf.text import decimal

_MAX_GROUPS = 10  # groups of similar names that get a warning each
_DIGITS = re.compile(r"[0-9]+")
_BETWEEN_WORDS = re.compile(r"[\s_-]+")
_MONTH = "(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)"
_SUSPICIOUS = (  # patterns of complete names, ignoring case, and their likely origin
    (
        r"[+-]?(1\.#(ind|qnan)|nan)|<?na>?|n/a|#n/a( n/a)?|#na|nat|null|none|\(null\)|undefined",
        "read as missing values by pandas, spreadsheets or databases",
    ),
    (r"#(ref!|value!|name\?|div/0!|num!|null!|spill!|calc!)", "errors of spreadsheet formulas"),
    (r"true|false", "read as truth values by spreadsheets and pandas"),
    (r"[+-]?[0-9]+\.0+", "integers as pandas and spreadsheets write them"),
    (r"[+-]?[0-9]*\.?[0-9]+e[+-]?[0-9]+|[0-9]{16,}", "numbers that spreadsheets round or reformat"),
    (
        rf"[0-9]{{1,4}}([-/.])[0-9]{{1,2}}\1[0-9]{{1,4}}|[0-9]{{1,2}}[-/][0-9]{{1,4}}|[0-9]{{1,2}}[- ]?{_MONTH}"
        rf"|{_MONTH}[- ]?[0-9]{{1,4}}",
        "read as dates by spreadsheets",
    ),
)
_PATTERNS = tuple((re.compile(pattern, re.ASCII | re.IGNORECASE), reason) for pattern, reason in _SUSPICIOUS)


def sort_class_names(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the distinct names in label order: by value if all are numbers (`9` before `10`), else as text.

    Args:
        names: class names. Only ASCII digits make a number; names of equal value are sorted as text.
    """
    distinct = set(names)
    numbers = all(_DIGITS.fullmatch(name) for name in distinct)
    return tuple(sorted(distinct, key=_by_value if numbers else None))


def _by_value(digits: str) -> tuple[int, str, str]:
    """Returns a key that sorts like (value, text), for numbers of any length: Python limits the digits of an int."""
    significant = digits.lstrip("0")
    return len(significant), significant, digits


def suspicious_names(names: Sequence[str]) -> list[str]:
    """Returns warnings about names that look like mistakes: one class under two names, or damage by a spreadsheet.

    Args:
        names: distinct class names.

    Returns:
        One sentence per warning, with the names in quotes, so that spaces are visible. Empty if nothing looks wrong.
    """
    similar = defaultdict(list)
    for name in names:
        similar[_normalize(name)].append(name)
    warnings = [
        f"the classes {_quoted(group)} differ only in case, spaces, hyphens or number format: are they the same class?"
        for group in similar.values()
        if len(group) > 1
    ]
    if len(warnings) > _MAX_GROUPS:
        warnings[_MAX_GROUPS:] = [f"{len(warnings) - _MAX_GROUPS} more groups of classes differ only in this way"]
    spaced = [name for name in names if name != name.strip()]
    warnings += [f"the names of the classes {_quoted(spaced)} begin or end with spaces"] if spaced else []
    for pattern, reason in _PATTERNS:
        found = [name for name in names if pattern.fullmatch(name.strip())]
        warnings += [f"the class names {_quoted(found)} are {reason}: are they intended?"] if found else []
    return warnings


def _normalize(name: str) -> str | float:
    """Returns the value of a number; for other names, the text without case, spaces, hyphens and Unicode variants."""
    text = unicodedata.normalize("NFKC", name).casefold()
    text = "".join(character for character in text if unicodedata.category(character) != "Cf").strip()
    number = decimal(text.replace(",", "."))
    return _BETWEEN_WORDS.sub("", text) if number != number else number


def _quoted(names: Sequence[str]) -> str:
    return first_few([repr(name) for name in names])
