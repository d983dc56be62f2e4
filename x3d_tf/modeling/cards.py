"""Reads the model cards in exported files, without their runtimes. Imports no TensorFlow.

The cards are treated as untrusted. Running the file needs trust: its graph is executed by native code.
"""

import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from x3d_tf import wire
from x3d_tf.errors import UserError, first_line, require
from x3d_tf.files import read_limited, require_regular
from x3d_tf.modeling.metadata import JSON_LIMIT, Metadata
from x3d_tf.terminal import one_line

CARD = "model_card.json"  # in the folder of a SavedModel, and the member of a .tflite file
SAVED_MODEL = "saved_model.pb"  # in the folder of a SavedModel
UNREADABLE = (  # errors that parsers raise for damaged files
    *(ValueError, TypeError, LookupError, OSError, EOFError, AttributeError, RuntimeError, RecursionError),
    *(NotImplementedError, OverflowError, zipfile.BadZipFile, zlib.error, ElementTree.ParseError),
)

_METADATA = "network_metadata"  # entry of a card
_FILE_LIMIT = 512 * 1024 * 1024  # bytes
_XML_LIMIT = 16 * 1024 * 1024  # bytes, without the weights
_FIELDS_LIMIT = 10_000  # of an ONNX file: its nodes are within one of them
_PROPERTIES, _KEY, _VALUE = 14, 1, 2  # fields of onnx.ModelProto.metadata_props


def is_exported(path: str | Path) -> bool:
    """Returns whether a path has the name of an exported file, or is the folder of a SavedModel.

    A run folder is none, whatever else is in it.
    """
    path = Path(path)
    if path.is_dir():
        return (path / SAVED_MODEL).is_file() and not (path / "model.keras").exists()
    return path.suffix.lower() in _READERS


def runs_in_tensorflow(path: str | Path) -> bool:
    """Returns whether a model runs in TensorFlow: run folders, `.keras` files and SavedModels do."""
    return not is_exported(path) or Path(path).is_dir()


def files_of(path: Path) -> list[Path]:
    """Returns the files of a model: all files in a folder, an OpenVINO `.xml` file and its `.bin` file, or the file."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    files = [path, path.with_suffix(".bin")] if path.suffix.lower() == ".xml" else [path]
    return [file for file in files if file.is_file()]


def read_exported_metadata(path: str | Path) -> Metadata:
    """Reads the metadata of the network in an exported file from its model card.

    Args:
        path: `.tflite`, `.onnx` or OpenVINO `.xml` file, or folder of a SavedModel (a version).

    Raises:
        UserError: the file does not exist, is damaged, was not exported by this version of the package, or holds a
            detector.
    """
    path = Path(path)
    try:
        require(path.exists(), str(path), "exist: no such file or folder")
        card = json.loads(_card_of(path))
        entry = card.get(_METADATA)
        writer = one_line(str(card.get("created_by", "another program"))[:100])
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    except UNREADABLE as error:
        raise UserError(f"{path} has no model card that can be read: {one_line(first_line(error))}") from error
    if entry is None:
        raise UserError(f"{path} was exported by {writer}, whose model card has no {_METADATA}; export the model again")
    try:
        metadata = Metadata.from_json(json.dumps(entry))
        require(metadata.form == "exported", "form", "be 'exported'", metadata.form)
        require(metadata.include_top, "include_top", "be true: the file must have a classifier", metadata.include_top)
    except UserError as error:
        raise UserError(f"the model card of {path}, created by {writer}: {error}") from error
    if metadata.detection_head is not None:
        raise UserError(f"{path} holds a detector; detectors run from a run folder or a .keras file")
    return metadata


def card_entry(metadata: Metadata) -> dict[str, Any]:
    """Returns the entry of a card that `read_exported_metadata` reads."""
    return {_METADATA: json.loads(metadata.to_json())}


def _card_of(path: Path) -> str | bytes:
    if path.is_dir():
        return read_limited(path / CARD, JSON_LIMIT)
    require_regular(path)
    return _READERS[path.suffix.lower()](path)


def card_in_zip(path: Path) -> bytes:
    """Returns the model card of a `.tflite` file, which is also a zip archive.

    Raises:
        UserError: the card is too large, or compressed: a small file could then expand without bound.
        KeyError, zipfile.BadZipFile: there is none.
    """
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(CARD)
        stored = member.compress_type == zipfile.ZIP_STORED and member.compress_size == member.file_size
        require(stored, CARD, "be stored without compression", member.compress_type)
        require(member.file_size <= JSON_LIMIT, CARD, f"have at most {JSON_LIMIT} bytes", member.file_size)
        return archive.read(member)


def _card_in_onnx(path: Path) -> bytes:
    content = read_limited(path, _FILE_LIMIT)
    for begin, end in wire.fields(content, 0, len(content), _PROPERTIES, _FIELDS_LIMIT):
        keys = [*wire.fields(content, begin, end, _KEY, _FIELDS_LIMIT)]  # none for an empty key
        if [content[first : min(last, first + 10)] for first, last in keys] == [b"card"]:
            ((first, last), *_) = wire.fields(content, begin, end, _VALUE, _FIELDS_LIMIT)
            require(last - first <= JSON_LIMIT, "the card", f"have at most {JSON_LIMIT} bytes", last - first)
            return content[first:last]
    raise ValueError("it has no metadata property named card")


def _card_in_openvino(path: Path) -> str:
    text = read_limited(path, _XML_LIMIT).decode()
    require("<!DOCTYPE" not in text, "the XML", "have no document type")  # entities can expand without bound
    element = ElementTree.fromstring(text).find("rt_info/x3d_tf/card")  # of text: a declared encoding has no effect
    if element is None:
        raise ValueError("it has no rt_info named x3d_tf/card")
    return element.attrib["value"]


_READERS: dict[str, Callable[[Path], str | bytes]] = {
    ".tflite": card_in_zip,
    ".onnx": _card_in_onnx,
    ".xml": _card_in_openvino,
}
