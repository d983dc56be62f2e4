"""Lists of class names in text files. Imports no TensorFlow."""

from importlib import resources
from pathlib import Path
from typing import Literal

from x3d_tf.errors import require
from x3d_tf.files import read_text
from x3d_tf.text import check_class_name


def read_classes(path: Path) -> tuple[str, ...]:
    """Reads class names from a text file with one name per line, in the order of their labels.

    Raises:
        UserError: the file cannot be read, has an empty line between names, or repeats a name.
    """
    names = [line.strip() for line in read_text(path, "classes").rstrip().split("\n")]
    seen: dict[str, int] = {}
    for line, name in enumerate(names, 1):
        require(bool(name), f"{path}, line {line}", "name a class: line numbers are labels, so none may be empty", name)
        check_class_name(name, f"{path}, line {line}")
        require(name not in seen, f"{path}, line {line}", f"not repeat line {seen.get(name)}", name)
        seen[name] = line
    return tuple(names)


def kinetics_classes(count: Literal[400, 600] = 400) -> tuple[str, ...]:
    """Returns the class names of Kinetics-400 or Kinetics-600 in the order of their labels."""
    with resources.as_file(resources.files("x3d_tf.data") / "labels" / f"kinetics{count}.txt") as path:
        return read_classes(path)
