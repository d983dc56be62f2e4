"""Reads the model cards in exported files, without their runtimes. For untrusted files. Imports no TensorFlow."""

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

CARD = "model_card.json"  # in the folder of a SavedModel, and the member of a .tflite file
SAVED_MODEL = "saved_model.pb"  # in the folder of a SavedModel

_METADATA = "network_metadata"  # entry of a card
_FILE_LIMIT = 512 * 1024 * 1024  # bytes
_XML_LIMIT = 64 * 1024 * 1024  # bytes, without the weights
_PROPERTIES, _KEY, _VALUE = 14, 1, 2  # fields of onnx.ModelProto.metadata_props


def is_exported(path: str | Path) -> bool:
    """Returns whether a path has the name of an exported file, or is the folder of a SavedModel."""
    path = Path(path)
    return (path / SAVED_MODEL).exists() if path.is_dir() else path.suffix in _READERS


def runs_in_tensorflow(path: str | Path) -> bool:
    """Returns whether a model runs in TensorFlow: run folders, `.keras` files and SavedModels do."""
    return not is_exported(path) or Path(path).is_dir()


def files_of(path: Path) -> list[Path]:
    """Returns the files of a model: all files in a folder, an OpenVINO `.xml` file and its `.bin` file, or the file."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
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
    require(path.exists(), str(path), "exist: no such file or folder")
    try:
        card = json.loads(_card_of(path))
        entry = card.get(_METADATA)
        writer = str(card.get("created_by", "another program"))[:100]
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except _UNREADABLE as error:
        raise UserError(f"{path} has no model card that can be read: {first_line(error)}") from error
    if entry is None:
        raise UserError(f"{path} was exported by {writer}, whose model card has no {_METADATA}; export the model again")
    try:
        metadata = Metadata.from_json(json.dumps(entry))
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
    return _READERS[path.suffix](path)


def card_in_zip(path: Path) -> bytes:
    """Returns the model card of a `.tflite` file, which is also a zip archive.

    Raises:
        UserError: the card is too large.
        KeyError, zipfile.BadZipFile: there is none.
    """
    with zipfile.ZipFile(path) as archive:
        size = archive.getinfo(CARD).file_size
        require(size <= JSON_LIMIT, CARD, f"have at most {JSON_LIMIT} bytes", size)
        with archive.open(CARD) as file:
            return file.read(JSON_LIMIT)  # the stated size may be wrong


def _card_in_onnx(path: Path) -> bytes:
    content = read_limited(path, _FILE_LIMIT)
    for begin, end in wire.fields(content, 0, len(content), _PROPERTIES):
        keys = [content[slice(*key)] for key in wire.fields(content, begin, end, _KEY)]
        if keys == [b"card"]:
            (value,) = wire.fields(content, begin, end, _VALUE)
            require(value[1] - value[0] <= JSON_LIMIT, "the card", f"have at most {JSON_LIMIT} bytes")
            return content[slice(*value)]
    raise KeyError("no metadata property named card")


def _card_in_openvino(path: Path) -> str:
    content = read_limited(path, _XML_LIMIT)
    require(b"<!DOCTYPE" not in content, "the XML", "have no document type")  # entities can expand without bound
    element = ElementTree.fromstring(content).find("rt_info/x3d_tf/card")
    if element is None:
        raise KeyError("no rt_info named x3d_tf/card")
    return element.attrib["value"]


_READERS: dict[str, Callable[[Path], str | bytes]] = {
    ".tflite": card_in_zip,
    ".onnx": _card_in_onnx,
    ".xml": _card_in_openvino,
}
_UNREADABLE = (
    *(ValueError, TypeError, LookupError, OSError, EOFError, AttributeError, RuntimeError, RecursionError),
    *(NotImplementedError, OverflowError, zipfile.BadZipFile, zlib.error, ElementTree.ParseError),
)
