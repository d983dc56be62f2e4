"""Reads and writes PyTorch checkpoint files without PyTorch. Imports no TensorFlow.

A checkpoint is a pickle, and unpickling can execute arbitrary code. This module therefore never unpickles: it
interprets the opcodes itself, supports only those that create numbers, strings, lists, dicts and tensors, and rejects
all others. Reading needs about as much memory as the file has bytes, whatever sizes the file claims.
"""

import io
import math
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from x3d_tf.errors import UserError
from x3d_tf.files import atomic_write

_MAGIC = 0x1950A86A20F9469CFC6C  # start of files written by PyTorch before 1.6
_MAX_FILE_SIZE = 8 * 2**30  # bytes; ten times the training checkpoint of the largest network
_MAX_INSTRUCTIONS = 1_000_000  # opcodes per pickle; a training checkpoint of X3D-XXL has 40 % of that
_MAX_STACK = 50_000  # unfinished values at once; Python's pickle completes lists and dicts every 1,000 entries
_MAX_DIRECTORY = 16 * 2**20  # bytes of the zip directory; a training checkpoint of X3D-XXL has half a million

_DTYPES: dict[str, np.dtype[Any]] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype("<u2"),  # upper halves of float32 values
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_STORAGES = {("torch", name) for name in _DTYPES}
_ORDERED_DICT = ("collections", "OrderedDict")
_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = ("torch._utils", "_rebuild_parameter")
_ALLOWED_GLOBALS = _STORAGES | {_ORDERED_DICT, _TENSOR, _PARAMETER}


class _Malformed(ValueError):
    """Raised for invalid contents. The message omits the name of the file, which the caller adds."""


# Errors that reading damaged zip files, numbers and strings can raise.
_DAMAGED = (
    ValueError,
    OSError,
    RuntimeError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
)


@dataclass
class _Storage:
    """The buffer that tensors are views of. `data` is set when the values are read."""

    kind: str
    entries: int
    data: memoryview | None = None

    @property
    def size(self) -> int:
        return self.entries * _DTYPES[self.kind].itemsize


@dataclass(frozen=True)
class Tensor:
    """A tensor in a checkpoint. Its values are known to lie within its storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """Name of the dtype in PyTorch."""
        return "bfloat16" if self.storage.kind == "BFloat16Storage" else str(_DTYPES[self.storage.kind])

    def array(self) -> np.ndarray:
        """Returns the values; bfloat16 as float32, which represents them exactly."""
        assert self.storage.data is not None
        flat = np.frombuffer(self.storage.data, _DTYPES[self.storage.kind])
        strides = tuple(stride * flat.itemsize for stride in self.strides)
        values = np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides, writeable=False)
        if self.storage.kind == "BFloat16Storage":
            wide = values.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        if self.storage.kind == "BoolStorage":  # nonzero bytes are true, but NumPy expects 0 or 1
            return values.view(np.uint8).astype(bool)
        return values


def read_checkpoint(path: str | Path) -> Any:
    """Reads a file written by `torch.save`, in the format of PyTorch 1.6 and later or in the older one.

    Nothing in the file is executed.

    Returns:
        Dicts, lists, tuples, strings, numbers and, for tensors and parameters, `Tensor`s. As in any pickle, a list or
        dict may contain itself, or contain an object many times: limit the depth when traversing it.

    Raises:
        UserError: the file is not a PyTorch checkpoint, is damaged, or contains other objects.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_SIZE:
            raise _Malformed(f"it has {size} bytes, more than the limit of {_MAX_FILE_SIZE}")
        if path.is_dir():
            raise IsADirectoryError
        if not path.is_file():  # a pipe or device, which has no size
            raise _Malformed("it is not a regular file")
        if zipfile.is_zipfile(path):
            return _read_zip(path, size)
        return _read_legacy(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder, not a checkpoint file") from error
    except _DAMAGED as error:
        reason = str(error)[:1000] or type(error).__name__  # it may quote contents of the file
        raise UserError(f"{path} is damaged or not a PyTorch checkpoint: {reason}") from error


class _BoundedFile(io.FileIO):
    """A file that rejects reads of more than `max_read` bytes.

    `zipfile` reads the directory of an archive at once and creates objects of ten times its size.
    """

    def __init__(self, path: Path, max_read: int) -> None:
        super().__init__(path)
        self.max_read = max_read

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self.max_read:
            raise _Malformed(f"its zip directory has {size} bytes, more than the limit of {self.max_read}")
        return super().read(size)


def _read_zip(path: Path, size: int) -> Any:
    with _BoundedFile(path, _MAX_DIRECTORY) as file, zipfile.ZipFile(file) as archive:
        file.max_read = _MAX_FILE_SIZE  # the check below bounds the members by the file size
        members = archive.infolist()
        for member in members:
            stored = member.compress_type == zipfile.ZIP_STORED and member.compress_size == member.file_size
            if not stored:
                raise _Malformed(f"its member {member.filename!r} must be stored without compression")
        if sum(member.file_size for member in members) > size:  # overlapping members: a zip bomb
            raise _Malformed("its members are larger than the file")
        roots = [member.filename[: -len("data.pkl")] for member in members if member.filename.endswith("/data.pkl")]
        if len(roots) != 1:
            raise _Malformed(f"it is a zip file that must contain one data.pkl, got {len(roots)}")
        by_name = {member.filename: member for member in members}
        byteorder = by_name.get(f"{roots[0]}byteorder")
        if byteorder and archive.read(byteorder).strip() != b"little":
            raise _Malformed("its byte order is not little-endian")
        storages = _Storages()
        content = _unpickle(io.BytesIO(archive.read(by_name[f"{roots[0]}data.pkl"])), storages.get_by_id)
        for key, storage in storages.items():
            values = by_name.get(f"{roots[0]}data/{key}")
            if values is None or values.file_size != storage.size:
                problem = "is missing" if values is None else f"has {values.file_size} bytes"
                raise _Malformed(f"its member {f'data/{key}'!r} {problem}, expected {storage.size} bytes")
            storage.data = memoryview(archive.read(values))
        return content


def _read_legacy(path: Path) -> Any:
    data = path.read_bytes()
    if data.startswith(b"PK"):
        raise _Malformed("it starts like a zip file, but its end is missing: the file is truncated")
    stream = io.BytesIO(data)
    storages = _Storages()
    try:
        magic = _unpickle(stream, storages.get_by_id)
    except _Malformed as error:
        raise _Malformed("it is neither a zip file nor a PyTorch pickle") from error
    if magic != _MAGIC:
        raise _Malformed("it is a pickle that was not written by torch.save")
    _unpickle(stream, storages.get_by_id)  # the format version
    system = _unpickle(stream, storages.get_by_id)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _Malformed("its byte order is not little-endian")
    content = _unpickle(stream, storages.get_by_id)
    keys = _unpickle(stream, storages.get_by_id)
    is_valid = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not is_valid or sorted(keys) != sorted(storages):
        raise _Malformed("its list of storages does not match its tensors")
    position = stream.tell()
    for key in keys:
        storage = storages[key]
        start = position + 8  # after the number of entries
        if data[position:start] != struct.pack("<q", storage.entries) or start + storage.size > len(data):
            raise _Malformed(f"the values of its storage {key!r} are truncated")
        storage.data = memoryview(data)[start : start + storage.size]
        position = start + storage.size
    return content


class _Storages(dict[str, _Storage]):
    """The storages of a file by key, created when the pickle refers to them."""

    def get_by_id(self, identity: Any) -> _Storage:
        """Returns the storage for a persistent id: ("storage", type, key, device, entries[, view])."""
        match identity:
            case ("storage", ("torch", str(kind)), str(key), str(), int(entries), *view) if view in ([], [None]):
                storage = self.setdefault(key, _Storage(kind, entries))
                if entries >= 0 and (storage.kind, storage.entries) == (kind, entries):
                    return storage
        raise _Malformed("it refers to a storage in a form that PyTorch does not write")


_MARK = object()  # start of a group of values on the stack


@dataclass(frozen=True)
class _Global:
    """A Python name that the pickle refers to. It is never imported."""

    name: tuple[str, str]


class _OrderedDict(dict[Any, Any]):
    """Represents an OrderedDict, the type of state dicts. Their `_metadata` attribute is ignored."""


def _unpickle(stream: io.BytesIO, get_storage: Callable[[Any], _Storage]) -> Any:
    """Interprets the pickle at the stream's position. Opcodes that could execute code are an error."""
    machine = _PickleMachine(get_storage)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if opcode.name == "STOP":
                return machine.pop()
            if count >= _MAX_INSTRUCTIONS:
                raise _Malformed(f"its pickle has more than {_MAX_INSTRUCTIONS} instructions")
            machine.step(opcode.name, argument)
            if len(machine.stack) > _MAX_STACK:  # each is a nesting level, or waits for its list or dict
                raise _Malformed(f"its pickle has more than {_MAX_STACK} nested or unfinished values")
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        if isinstance(error, _Malformed):
            raise
        raise _Malformed(f"its pickle is damaged: {error}") from error
    raise _Malformed("its pickle is truncated")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_EMPTY: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _PickleMachine:
    """A stack machine for pickles, without the opcodes that execute code."""

    def __init__(self, get_storage: Callable[[Any], _Storage]) -> None:
        self.get_storage = get_storage
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise _Malformed("its pickle is damaged: expected a value, got a mark")
        return value

    def pop_to_mark(self) -> list[Any]:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def step(self, opcode: str, argument: Any) -> None:
        """Executes one opcode."""
        push = self.stack.append
        if opcode in _VALUES:
            push(argument)
        elif opcode in _CONSTANTS:
            push(_CONSTANTS[opcode])
        elif opcode in _EMPTY:
            push(_EMPTY[opcode]())
        elif opcode in _TUPLES:
            push(tuple([self.pop() for _ in range(_TUPLES[opcode])][::-1]))
        elif opcode == "TUPLE":
            push(tuple(self.pop_to_mark()))
        elif opcode == "MARK":
            push(_MARK)
        elif opcode in ("PROTO", "FRAME"):
            pass
        elif opcode in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if opcode == "MEMOIZE" else argument] = self.stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            push(self.memo[argument])
        elif opcode in ("APPEND", "APPENDS"):
            values = self.pop_to_mark() if opcode == "APPENDS" else [self.pop()]
            self._require_top(list).extend(values)
        elif opcode in ("SETITEM", "SETITEMS"):
            values = self.pop_to_mark() if opcode == "SETITEMS" else [self.pop(), self.pop()][::-1]
            self._update_dict(self._require_top(dict), values)
        elif opcode in ("GLOBAL", "STACK_GLOBAL"):
            push(self._make_global(argument.split(" ", 1) if opcode == "GLOBAL" else [self.pop(), self.pop()][::-1]))
        elif opcode == "BINPERSID":
            identity = self.pop()
            push(self.get_storage(_resolve_globals(identity)))
        elif opcode == "REDUCE":
            arguments, function = self.pop(), self.pop()
            push(self._call(function, arguments))
        elif opcode == "BUILD":  # attributes of a state dict, which hold the versions of its modules
            self.pop()
            self._require_top(_OrderedDict)
        else:
            raise _Malformed(f"its pickle has the opcode {opcode}, which is not allowed because tensors do not need it")

    def _require_top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise _Malformed(f"its pickle is damaged: expected {kind.__name__.removeprefix('_')}")
        return self.stack[-1]

    @staticmethod
    def _update_dict(target: dict[Any, Any], values: list[Any]) -> None:
        if len(values) % 2 or not all(map(_is_valid_key, values[::2])):
            raise _Malformed("its pickle has dicts with keys other than strings and numbers")
        target.update(zip(values[::2], values[1::2]))

    @staticmethod
    def _make_global(name: list[Any]) -> _Global:
        if not all(isinstance(part, str) for part in name):  # hashing or printing deep nesting crashes Python
            raise _Malformed("its pickle is damaged: a name that is not a string")
        if tuple(name) not in _ALLOWED_GLOBALS:
            raise _Malformed(
                f"it refers to {'.'.join(name)[:100]!r}, which is not a number, string, list, dict or tensor. "
                "Nothing in it was executed. If you trust the file, save only its state dict: "
                'torch.save({"model_state": state_dict}, "weights.pyth")'
            )
        return _Global((name[0], name[1]))

    @staticmethod
    def _call(function: Any, arguments: Any) -> Any:
        match function, arguments:
            case _Global(name), () if name == _ORDERED_DICT:
                return _OrderedDict()
            case _Global(name), (_Storage() as storage, offset, tuple(shape), tuple(strides), *_) if name == _TENSOR:
                return _make_tensor(storage, offset, shape, strides)
            case _Global(name), (Tensor() as tensor, *_) if name == _PARAMETER:
                return tensor
        raise _Malformed("its pickle contains a call that PyTorch does not write")


def _is_valid_key(key: Any) -> bool:
    """Accepts strings and numbers, except huge integers, which can share one hash and make dicts slow."""
    return abs(key) < 2**60 if isinstance(key, int) else isinstance(key, str | float | None)


def _resolve_globals(identity: Any) -> Any:
    parts = identity if isinstance(identity, tuple) else ()
    return tuple(part.name if isinstance(part, _Global) else part for part in parts)


def _make_tensor(storage: _Storage, offset: Any, shape: tuple[Any, ...], strides: tuple[Any, ...]) -> Tensor:
    numbers = (offset, *shape, *strides)
    are_indices = all(isinstance(number, int) and 0 <= number < 2**63 for number in numbers)
    if not are_indices or len(shape) != len(strides) or len(shape) > 8:
        raise _Malformed("it has a tensor with an invalid shape")
    entries = math.prod(shape)
    strides = tuple(
        stride if entries and side > 1 else 0 for side, stride in zip(shape, strides)
    )  # other strides have no effect
    last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides)) if entries else offset - 1
    if last >= storage.entries or entries > storage.entries or math.prod(filter(None, shape)) > _MAX_FILE_SIZE:
        raise _Malformed(f"it has a tensor of shape {shape} that does not fit its storage of {storage.entries} values")
    return Tensor(storage, offset, shape, strides)


def write_checkpoint(path: str | Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes `{"model_state": state}` in the format of `torch.save`, for `torch.load`.

    Args:
        path: output file. An existing file is replaced.
        state: float32 or int64 arrays by name.

    Raises:
        WriteError: the file cannot be written.
    """
    assert sys.byteorder == "little"
    arrays = [np.ascontiguousarray(array) for array in state.values()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", b"".join(_pickle_chunks(state)))
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(arrays):
            archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/version", "3\n")
    atomic_write(Path(path), buffer.getvalue())


def _pickle_chunks(state: Mapping[str, np.ndarray]) -> Iterator[bytes]:
    ordered_dict = _global_code(*_ORDERED_DICT) + b")R"  # called without arguments
    yield b"\x80\x02}" + _text_code("model_state") + ordered_dict + b"("  # protocol 2, dict, key, value, mark
    for key, (name, array) in enumerate(state.items()):
        storage = {np.dtype(np.float32): "FloatStorage", np.dtype(np.int64): "LongStorage"}[array.dtype]
        strides = [stride // array.itemsize for stride in np.empty(array.shape, array.dtype).strides]
        yield _text_code(name) + _global_code(*_TENSOR) + b"("
        yield b"(" + _text_code("storage") + _global_code("torch", storage) + _text_code(str(key)) + _text_code("cpu")
        yield _int_code(array.size) + b"tQ"  # tuple, persistent id
        yield _int_code(0) + _tuple_code(array.shape) + _tuple_code(strides) + b"\x89" + ordered_dict + b"tR"
    yield b"us."  # set the items of the state dict, then of the dict; stop


def _global_code(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text_code(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int_code(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def _tuple_code(numbers: Any) -> bytes:
    return b"(" + b"".join(map(_int_code, numbers)) + b"t"
