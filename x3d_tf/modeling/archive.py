"""The zip file that a model is in, checked before anything is built of it. Imports no TensorFlow.

The file may come from anyone. Nothing is allocated, counted or built beyond what its size and the bounds of a
`Metadata` allow: members are stored without compression, arrays are as large as their bytes, and the network that is
described has no more parameters than there are weights.
"""

import hashlib
import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

from x3d_tf.errors import UserError, first_line, require
from x3d_tf.modeling.metadata import JSON_LIMIT, Metadata

MEMBER = "x3d_tf.json"
WEIGHTS = "model.weights.h5"
UNREADABLE = (  # what zipfile and h5py make of damaged files
    ValueError,
    TypeError,
    LookupError,
    OSError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    OverflowError,
    zipfile.BadZipFile,
    zlib.error,
)
_LIMITS = {MEMBER: JSON_LIMIT, "metadata.json": 1024 * 1024, "config.json": 64 * 1024 * 1024}  # bytes
_WEIGHT_BYTES = 4  # Keras stores float32, whatever precision a network computes in
_ENCRYPTED = 0x1  # flag of a member


def read_description(path: Path) -> Metadata:
    """What a `.keras` file says of itself, which fits the size of its weights.

    Raises:
        UserError: not a file of this package; members that are unknown, doubled, compressed, encrypted or too large; a
            network outside the bounds, or with more parameters than the file has room for.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            archive.getinfo(MEMBER)
            members = _members(archive, path.stat().st_size)
            description = Metadata.from_json(archive.read(MEMBER))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except UNREADABLE as error:
        raise UserError(_not_ours(path, error)) from error
    room = members[WEIGHTS].file_size // _WEIGHT_BYTES
    description.require_fit(f"{path}: the {members[WEIGHTS].file_size} bytes of {WEIGHTS}", room)
    return description


def describe(path: str | Path) -> Metadata:
    """What a `.keras` file of ours says of itself.

    Raises:
        UserError: no such file, one that this package did not save, or a network that it cannot hold.
    """
    return read_description(model_file(path))


def require_classifier(path: str | Path) -> None:
    """Raises `UserError` where a run folder or `.keras` file holds a detector, or nothing of ours; see `describe`."""
    file = model_file(path)
    if read_description(file).task == "detection":
        raise UserError(f"{file} is a detector, which gives scores of boxes; a network that classifies clips is needed")


def model_file(path: str | Path) -> Path:
    """The `.keras` file of a run folder, or the file itself.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    file = path / "model.keras" if path.is_dir() else path
    if not file.is_file():
        hint = "; a run writes its model when it is finished" if path.is_dir() else ""
        raise UserError(f"{file}: no such model file or run folder{hint}")
    return file


def weights_of(path: Path) -> dict[str, Any]:
    """Name and SHA-256 of a model file, for the report."""
    file = model_file(path)
    with file.open("rb") as content:
        return {"weights": str(file), "weights_sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def check_weights(path: Path, description: Metadata) -> None:
    """Refuses weights that cannot be those of the network that is described, or that are more than plain arrays.

    Raises:
        UserError: links, external or virtual arrays, arrays that are larger than their bytes, too few of them.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            content = archive.read(WEIGHTS)
        with h5py.File(io.BytesIO(content), "r") as file:
            sizes = list(_array_sizes(file, len(content)))
    except UserError as error:
        raise UserError(f"{path}: {WEIGHTS}: {error}") from error
    except UNREADABLE as error:
        raise UserError(f"{path}: {WEIGHTS} cannot be read: {first_line(error)}") from error
    description.require_fit(f"{path}: {WEIGHTS}", sum(sizes), len(sizes))


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    known = (WEIGHTS, *_LIMITS)
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.filename
        require(name in known, "the members of a model file", f"be {', '.join(known)}", name[:200])
        require(name not in members, "a model file", "hold each member once", name)
        require(not member.flag_bits & _ENCRYPTED, name, "not be encrypted", member.flag_bits)
        stored = member.compress_type == zipfile.ZIP_STORED and member.compress_size == member.file_size
        require(stored, name, "be stored without compression, as Keras writes it", member.compress_type)
        limit = min(_LIMITS.get(name, size), size)
        require(member.file_size <= limit, name, f"have at most {limit} bytes", member.file_size)
        members[name] = member
    require(WEIGHTS in members, "a model file", f"hold {WEIGHTS}", [*members])
    return members


def _array_sizes(file: h5py.File, limit: int) -> Iterator[int]:
    """Elements of each array of an HDF5 file of `limit` bytes."""
    groups, seen, total = [file["/"]], set(), 0
    while groups:
        group = groups.pop()
        for name in group:
            what = f"{group.name}/{name}"[:200]
            link = group.get(name, getlink=True)
            require(isinstance(link, h5py.HardLink), what, "be an array or a group, not a link", type(link).__name__)
            item = group[name]
            address = h5py.h5o.get_info(item.id).addr
            if address in seen:
                raise UserError(f"{what} must have one name, and the file gives it several")
            seen.add(address)
            if isinstance(item, h5py.Group):
                groups.append(item)
                continue
            size = _bytes_of(item, what)
            total += size
            require(total <= limit, "all arrays together", f"have at most {limit} bytes", total)
            yield size // item.dtype.itemsize


def _bytes_of(item: Any, what: str) -> int:
    array = isinstance(item, h5py.Dataset) and item.dtype.kind in "fiu" and not item.dtype.shape
    require(array, what, "be an array of numbers", type(item).__name__)
    if item.external or item.is_virtual:
        raise UserError(f"{what} must be stored in the file itself, and is stored in another file or array")
    size = math.prod(item.shape) * item.dtype.itemsize
    stored = item.id.get_storage_size()
    plain = item.chunks is None and stored == size
    require(plain, what, f"have the {size} bytes of its shape {item.shape}, uncompressed", stored)
    return size


def _not_ours(path: Path, error: Exception) -> str:
    if path.suffix in (".pyth", ".pth", ".pt"):
        advice = f"python -m x3d_tf.import_weights {path} --variant=... makes a model file of PyTorch's weights"
        return f"{path} is not a .keras file; {advice}"
    if isinstance(error, KeyError):
        advice = "Save it so where the model is at hand"
        return f"{path} has no {MEMBER}: it was not written by x3d_tf.save(model, path). {advice}"
    return f"{path} is not a .keras file: {first_line(error)}"
