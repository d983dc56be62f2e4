"""Checks the zip archive of a model file, and reads its weights. Imports no TensorFlow.

The file may be untrusted. Nothing is allocated, counted or built beyond the limits set by the file size and by
`Metadata`: members are stored without compression, each array has exactly the bytes that its shape requires, and the
network in the metadata has no more parameters than the file has weights.
"""

import hashlib
import io
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from x3d_tf.errors import UserError, first_line, require
from x3d_tf.modeling.cards import SAVED_MODEL, UNREADABLE, files_of, is_exported, read_exported_metadata
from x3d_tf.modeling.metadata import JSON_LIMIT, Metadata

MEMBER = "x3d_tf.json"
WEIGHTS = "model.weights.h5"
_LIMITS = {MEMBER: JSON_LIMIT, "metadata.json": 1024 * 1024, "config.json": 64 * 1024 * 1024}  # bytes
_BLOCK = 1 << 20  # bytes read at once
_WEIGHT_BYTES = 4  # Keras stores float32 weights for every dtype policy
_ENCRYPTED = 0x1  # flag bit of a zip member
_DEPTH = 8  # of groups; Keras needs 3


def read_metadata(path: Path) -> Metadata:
    """Reads the metadata of a `.keras` file and checks it against the size of the weights.

    Raises:
        UserError: the file was not saved by this package; it has members that are unknown, duplicate, compressed,
            encrypted or too large; the network exceeds the bounds or has more parameters than the file can hold.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            archive.getinfo(MEMBER)
            members = _checked_members(archive, path.stat().st_size)
            metadata = Metadata.from_json(archive.read(MEMBER))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except UNREADABLE as error:
        raise UserError(_not_a_model_file(path, error)) from error
    capacity = members[WEIGHTS].file_size // _WEIGHT_BYTES
    metadata.require_capacity(f"{path}: {WEIGHTS}", capacity)
    require(metadata.form != "exported", f"{path}: form", "be 'trainable' or 'portable'", metadata.form)
    return metadata


def describe(path: str | Path) -> Metadata:
    """Reads the metadata of a run folder or of a `.keras` file saved by this package.

    Raises:
        UserError: the file does not exist, was not saved by this package, or is too small for the network in its
            metadata.
    """
    return read_metadata(model_file(path))


def describe_any(path: str | Path) -> Metadata:
    """Reads the metadata of a model as `describe` does, or of a file that this package exported.

    Raises:
        UserError: see `describe` and `read_exported_metadata`.
    """
    return read_exported_metadata(path) if is_exported(path) else describe(path)


def require_classifier(path: str | Path) -> None:
    """Raises `UserError` unless a run folder or `.keras` file holds a classifier; see also `describe`."""
    read_classifier_metadata(path)


def read_classifier_metadata(path: str | Path) -> tuple[Path, Metadata]:
    """Returns the `.keras` file and its metadata; raises `UserError` as `require_classifier` does."""
    file = model_file(path)
    metadata = read_metadata(file)
    if metadata.detection_head is not None:
        raise UserError(f"{file} is a detector, which scores boxes; a network that classifies clips is required")
    return file, metadata


def model_file(path: str | Path) -> Path:
    """Returns the path of the `.keras` file in a run folder, or of the file itself.

    Raises:
        UserError: the file does not exist.
    """
    path = Path(path)
    if is_exported(path):
        advice = "give a run folder or a .keras file"
        raise UserError(f"{path} is an exported file, which only predict and evaluate accept; {advice}")
    file = path / "model.keras" if path.is_dir() else path
    if not file.is_file():
        versions = sorted(path.glob(f"*/{SAVED_MODEL}"), key=lambda file: (len(file.parent.name), file.parent.name))
        hint = "; a run writes its model when it is finished" if path.is_dir() else ""
        hint = f"; predict and evaluate accept a version of a SavedModel: {versions[-1].parent}" if versions else hint
        raise UserError(f"{file}: no such model file or run folder{hint}")
    return file


def weights_of(path: Path) -> dict[str, Any]:
    """Returns the name and SHA-256 of a model file, for an evaluation report.

    The hash of a SavedModel or an OpenVINO model is that of the contents of its files in the order of their names.
    """
    file = path if is_exported(path) else model_file(path)
    digest = hashlib.sha256()
    for part in files_of(file):
        with part.open("rb") as content:
            while block := content.read(_BLOCK):
                digest.update(block)
    return {"weights": str(file), "weights_sha256": digest.hexdigest()}


def check_weights(path: Path, metadata: Metadata) -> None:
    """Checks that the weights are plain arrays and enough of them for the network in the metadata.

    Raises:
        UserError: the weights have links, external or virtual arrays, arrays with fewer bytes than their shape
            requires, or too few arrays or parameters.
    """
    with _checked_weights(path, metadata):
        pass


def read_layers(path: Path, metadata: Metadata) -> dict[str, list[NDArray[np.float32]]]:
    """Reads the arrays of each layer of a `.keras` file, without building the network.

    Args:
        path: the file.
        metadata: its metadata, from `read_metadata`.

    Returns:
        The arrays by the names of the layers of the trainable network, in the order of `Layer.get_weights`, with the
        shapes of that network.

    Raises:
        UserError: see `check_weights`; or a layer of the network is missing, occurs twice, or has arrays of other
            shapes.
    """
    with _checked_weights(path, metadata) as groups:
        stored: dict[str, list[h5py.Dataset]] = {}
        for group, arrays in groups:
            name = group.attrs.get("name")
            if isinstance(name, str) and arrays:
                require(name not in stored, f"layer {name[:200]}", "occur once")
                stored[name] = [arrays[key] for key in sorted(arrays, key=lambda key: (len(key), key))]
        read = _portable_arrays if metadata.form == "portable" else _trainable_arrays
        return {name: read(name, stored, shapes) for name, shapes in metadata.weight_shapes().items()}


def _trainable_arrays(
    name: str, stored: dict[str, list[h5py.Dataset]], shapes: list[tuple[int, ...]]
) -> list[NDArray[np.float32]]:
    """Reads the arrays of a layer, which must have the given shapes."""
    found = [array.shape for array in stored.get(name, [])]
    require(found == shapes, f"layer {name}", f"have arrays of the shapes {shapes}, as in its metadata", found)
    return [array[()] for array in stored[name]]


def _portable_arrays(
    name: str, stored: dict[str, list[h5py.Dataset]], shapes: list[tuple[int, ...]]
) -> list[NDArray[np.float32]]:
    """Reads the arrays of a layer of the portable form, and converts them to the given shapes.

    A channel-wise kernel over space is stored by temporal taps, `NAME_0`, `NAME_1` and so on. Shapes may have other
    axes of length 1.
    """
    taps = [stored[f"{name}_{tap}"][0] for tap in range(shapes[0][0]) if f"{name}_{tap}" in stored]
    if name not in stored and len(taps) == shapes[0][0]:
        arrays = [np.stack([tap[()] for tap in taps])]
    else:
        arrays = [array[()] for array in stored.get(name, [])]
    found = [array.shape for array in arrays]
    fits = [_without_ones(shape) for shape in found] == [_without_ones(shape) for shape in shapes]
    require(fits, f"layer {name}", f"have arrays of the shapes {shapes}, except for axes of length 1", found)
    return [array.reshape(shape) for array, shape in zip(arrays, shapes)]


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


@contextmanager
def _checked_weights(path: Path, metadata: Metadata) -> Iterator[list[tuple[h5py.Group, dict[str, h5py.Dataset]]]]:
    """Opens the weights: all groups and their arrays, after the checks of `check_weights`, whose errors it raises."""
    where = f"{path}: {WEIGHTS}"
    try:
        with zipfile.ZipFile(path) as archive:
            content = archive.read(WEIGHTS)
        with h5py.File(io.BytesIO(content), "r") as file:
            groups = list(_iter_groups(file, len(content)))
            sizes = [array.size for _, arrays in groups for array in arrays.values()]
            metadata.require_capacity(where, sum(sizes), len(sizes))
            yield groups
    except UserError as error:
        raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from error
    except UNREADABLE as error:
        raise UserError(f"{where} cannot be read: {first_line(error)}") from error


def _checked_members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    known = (WEIGHTS, *_LIMITS)
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.filename
        require(name in known, "a member of a model file", f"be one of {', '.join(known)}", name[:200])
        require(name not in members, "a model file", "contain each member once", name)
        require(not member.flag_bits & _ENCRYPTED, name, "not be encrypted")
        stored = member.compress_type == zipfile.ZIP_STORED and member.compress_size == member.file_size
        require(stored, name, "be stored without compression, as Keras writes it", member.compress_type)
        limit = min(_LIMITS.get(name, size), size)
        require(member.file_size <= limit, name, f"have at most {limit} bytes", member.file_size)
        members[name] = member
    require(WEIGHTS in members, "a model file", f"contain {WEIGHTS}", [*members])
    return members


def _iter_groups(file: h5py.File, limit: int) -> Iterator[tuple[h5py.Group, dict[str, h5py.Dataset]]]:
    """Yields the groups of an HDF5 file that has `limit` bytes, each with its arrays by name, after checking them."""
    groups, visited, total = [(file["/"], 0)], set(), 0
    while groups:
        group, depth = groups.pop()
        require(depth <= _DEPTH, "the weights", f"have groups to a depth of at most {_DEPTH}", f"{group.name[:100]}...")
        _check_attributes(group)
        arrays: dict[str, h5py.Dataset] = {}
        for name in group:
            array_name = f"{group.name}/{name}"[:200]
            link = group.get(name, getlink=True)
            require(
                isinstance(link, h5py.HardLink), array_name, "be an array or a group, not a link", type(link).__name__
            )
            item = group[name]
            address = h5py.h5o.get_info(item.id).addr
            if address in visited:
                raise UserError(f"{array_name} must have a single name, but the file links to it several times")
            visited.add(address)
            if isinstance(item, h5py.Group):
                groups.append((item, depth + 1))
                continue
            total += _checked_num_bytes(item, array_name)
            require(total <= limit, "the arrays", f"have at most {limit} bytes in total", total)
            _check_attributes(item)
            arrays[name] = item
        yield group, arrays


def _check_attributes(item: h5py.Group | h5py.Dataset) -> None:
    """Raises `UserError` unless all attributes are scalars; arrays of texts can be much larger than the file."""
    for name in item.attrs:
        shape = item.attrs.get_id(name).shape
        require(shape == (), f"attribute {name[:100]} of {item.name[:100]}", "be a scalar", shape)


def _checked_num_bytes(item: Any, array_name: str) -> int:
    is_numeric = isinstance(item, h5py.Dataset) and item.dtype.kind in "fiu" and not item.dtype.shape
    require(is_numeric, array_name, "be an array of numbers", type(item).__name__)
    if item.external or item.is_virtual:
        raise UserError(f"{array_name} must be stored in the file itself, but refers to another file or array")
    size = math.prod(item.shape) * item.dtype.itemsize
    stored = item.id.get_storage_size()
    is_uncompressed = item.chunks is None and stored == size
    require(is_uncompressed, array_name, f"have the {size} bytes of its shape {item.shape}, uncompressed", stored)
    return size


def _not_a_model_file(path: Path, error: Exception) -> str:
    if path.suffix in (".pyth", ".pth", ".pt"):
        advice = f"convert PyTorch weights with python -m x3d_tf.import_weights {path} --variant=..."
        return f"{path} is not a .keras file; {advice}"
    if isinstance(error, KeyError):
        advice = "Save it again with x3d_tf.save(model, path) where the model was created"
        return f"{path} has no {MEMBER}, the metadata of a model file. {advice}"
    return f"{path} is not a .keras file: {first_line(error)}"
