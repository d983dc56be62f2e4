"""The data set `something_something_v2`. Imports no TensorFlow.

Its lists are JSON files of videos with their templates; `--classes` is the JSON file of the templates' numbers.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from x3d_tf.data.building.listed import ClassNames, Entry, VideoFiles, collect
from x3d_tf.data.building.sources import Sources
from x3d_tf.data.datasets.base import Inputs
from x3d_tf.errors import UserError, require
from x3d_tf.files import read_text
from x3d_tf.text import check_class_name, whole


class SomethingSomething:
    """Videos of 174 actions with objects, each with one class. Many actions differ in left and right only."""

    name = "something_something_v2"
    requires = ("videos", "lists", "classes")
    accepts = ()
    flips = False

    def sources(self, inputs: Inputs) -> Sources:
        """Returns the videos of the lists, files `ID.*` in any folder.

        Raises:
            UserError: a list cannot be read or an entry breaks its rule; the message names file and entry.
        """
        classes = ClassNames(_read_classes(inputs.path("classes")), f"the templates in {inputs.classes}")
        files = VideoFiles(inputs.path("videos"))
        lists = {split: _read_list(path, classes, files) for split, path in inputs.lists.items()}
        return collect(files.folder, lists, classes.names, inputs.seed)


DATASETS = (SomethingSomething(),)


def _read_json(path: Path, setting: str, kind: type, rule: str) -> Any:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        require(not repeated, str(path), "not repeat a key of an object", repeated[:1])
        return dict(pairs)

    text = read_text(path, setting)
    try:
        content = json.loads(text, object_pairs_hook=distinct)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno} is not JSON: {error.msg}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} must not have a number with thousands of digits: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path} is not JSON: brackets are nested too deep") from error
    require(isinstance(content, kind) and bool(content), str(path), rule)
    return content


def _read_classes(path: Path) -> list[str]:
    """Reads an object of class numbers, as texts, by template."""
    content = _read_json(path, "classes", dict, "be an object of class numbers by template")
    names: dict[int, str] = {}
    for name, text in content.items():
        check_class_name(name, f"{path}: a template")
        number = whole(text) if isinstance(text, str) else None
        if number is None or number >= len(content):
            rule = f'be a text with a number from 0 to {len(content) - 1}, such as "0"'
            require(False, f"{path}: the number of {name!r}", rule, text)
        other = names.setdefault(number or 0, name)
        require(other == name, f"{path}: the number of {name!r}", f"not be that of {other!r}", text)
    return [names[number] for number in range(len(names))]


def _read_list(path: Path, classes: ClassNames, files: VideoFiles) -> list[Entry]:
    """Reads an array of objects with `id` and `template`; brackets around the template's objects are ignored."""
    entries = []
    for number, item in enumerate(_read_json(path, "lists", list, "be an array of videos"), 1):
        where = f"{path}, entry {number}"
        video = item.get("id") if isinstance(item, dict) else None
        require(
            isinstance(video, str) and bool(video), where, 'be an object with an id that is a text such as "1"', item
        )
        template = item.get("template")
        if not isinstance(template, str):
            raise UserError(f"{where} must have a template. The official test list has none: omit it")
        label = classes.find(template.replace("[", "").replace("]", ""), f"{where}: the template")
        entries.append(Entry(str(video), (label,), where, files.named(str(video))))
    return entries
