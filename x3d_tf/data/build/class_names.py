"""Names of classes: the order of their labels, and what in a list of them looks like a slip. Imports no TensorFlow."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

from x3d_tf.errors import first_few
from x3d_tf.text import decimal

_MOST = 10  # doubts that are told one by one
_DIGITS = re.compile(r"[0-9]+")
_BETWEEN_WORDS = re.compile(r"[\s_-]+")
_MONTH = "(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)"
_CHANGED = (  # whole names without their case, and what they suggest
    (
        r"[+-]?(1\.#(ind|qnan)|nan)|<?na>?|n/a|#n/a( n/a)?|#na|nat|null|none|\(null\)|undefined",
        "what pandas, spreadsheets and databases write, or read, for a missing value",
    ),
    (r"#(ref!|value!|name\?|div/0!|num!|null!|spill!|calc!)", "an error of a spreadsheet's formula"),
    (r"true|false", "what spreadsheets and pandas turn into a truth value"),
    (r"[+-]?[0-9]+\.0+", "what pandas and spreadsheets make of a whole number"),
    (r"[+-]?[0-9]*\.?[0-9]+e[+-]?[0-9]+|[0-9]{16,}", "a number that spreadsheets round or write in another form"),
    (
        rf"[0-9]{{1,4}}([-/.])[0-9]{{1,2}}\1[0-9]{{1,4}}|[0-9]{{1,2}}[-/][0-9]{{1,4}}|[0-9]{{1,2}}[- ]?{_MONTH}"
        rf"|{_MONTH}[- ]?[0-9]{{1,4}}",
        "what spreadsheets make of a date, or turn into one",
    ),
)
_PATTERNS = tuple((re.compile(pattern, re.ASCII | re.IGNORECASE), reason) for pattern, reason in _CHANGED)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Each name once, in the order of the labels: by value where all are digits, `9` before `10`; else as text.

    Args:
        names: of classes; digits are ASCII ones, and of equal numbers the order is that of the text.
    """
    distinct = set(names)
    numbers = all(_DIGITS.fullmatch(name) for name in distinct)
    return tuple(sorted(distinct, key=_by_value if numbers else None))


def _by_value(digits: str) -> tuple[int, str, str]:
    """Sorts as (value, text) does, also numbers of more digits than Python converts."""
    significant = digits.lstrip("0")
    return len(significant), significant, digits


def doubts(names: Sequence[str]) -> list[str]:
    """Sentences about names that look like a slip in a list: one class under two names, or damage by a spreadsheet.

    Args:
        names: of the classes, each once.

    Returns:
        None where nothing is to be said; names are quoted, so that spaces are seen.
    """
    alike = defaultdict(list)
    for name in names:
        alike[_essence(name)].append(name)
    told = [
        f"the classes {_quoted(group)} differ only in case, spaces, hyphens or the form of numbers: are they one class?"
        for group in alike.values()
        if len(group) > 1
    ]
    if len(told) > _MOST:
        told[_MOST:] = [f"{len(told) - _MOST} more groups of classes differ only so"]
    spaced = [name for name in names if name != name.strip()]
    told += [f"the names of the classes {_quoted(spaced)} begin or end with spaces"] if spaced else []
    for pattern, reason in _PATTERNS:
        found = [name for name in names if pattern.fullmatch(name.strip())]
        told += [f"the class names {_quoted(found)} are {reason}: are they meant?"] if found else []
    return told


def _essence(name: str) -> str | float:
    """What is left of a name without case, spaces, hyphens and the form of its characters; of a number its value."""
    text = unicodedata.normalize("NFKC", name).casefold()
    text = "".join(character for character in text if unicodedata.category(character) != "Cf").strip()
    number = decimal(text.replace(",", "."))
    return _BETWEEN_WORDS.sub("", text) if number != number else number


def _quoted(names: Sequence[str]) -> str:
    return first_few([repr(name) for name in names])
