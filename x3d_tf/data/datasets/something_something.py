"""The data set `something_something_v2`. Imports no TensorFlow.

Its lists are JSON files of videos with their templates; `--classes` is the JSON file of the templates' numbers.
"""

import json
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
    text = read_text(path, setting)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno} is not JSON: {error.msg}") from error
    except RecursionError as error:
        raise UserError(f"{path} is not JSON: brackets are nested too deep") from error
    require(isinstance(content, kind) and bool(content), str(path), rule)
    return content


def _read_classes(path: Path) -> list[str]:
    """Reads an object of class numbers, as texts, by template."""
    content = _read_json(path, "classes", dict, "be an object of class numbers by template")
    numbers = {name: whole(number) if isinstance(number, str) else None for name, number in content.items()}
    for name in numbers:
        check_class_name(name, f"{path}: a template")
    rule = f"number the templates from 0 to {len(numbers) - 1}"
    require(set(numbers.values()) == {*range(len(numbers))}, str(path), rule)
    return sorted(numbers, key=lambda name: numbers[name] or 0)


def _read_list(path: Path, classes: ClassNames, files: VideoFiles) -> list[Entry]:
    """Reads an array of objects with `id` and `template`; brackets around the template's objects are ignored."""
    entries = []
    for number, item in enumerate(_read_json(path, "lists", list, "be an array of videos"), 1):
        where = f"{path}, entry {number}"
        video = item.get("id") if isinstance(item, dict) else None
        require(isinstance(video, str) and bool(video), where, "be an object with the id of a video, a text", item)
        template = item.get("template")
        if not isinstance(template, str):
            raise UserError(f"{where} must have a template. The official test list has none: omit it")
        label = classes.find(template.replace("[", "").replace("]", ""), f"{where}: the template")
        entries.append(Entry(str(video), (label,), where, files.named(str(video))))
    return entries
