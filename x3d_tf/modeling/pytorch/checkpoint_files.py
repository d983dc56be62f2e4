"""PyTorch's checkpoint files, read and written without PyTorch. Imports no TensorFlow.

A checkpoint is a pickle, and unpickling runs whatever the file says. So nothing is unpickled here: the opcodes are read
one by one, those that make numbers, texts, lists, dicts and tensors are carried out, and any other is an error. Reading
takes about as much memory as the file has bytes, whatever the file claims.
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

_MAGIC = 0x1950A86A20F9469CFC6C  # begins a file of PyTorch before 1.6
_LIMIT = 8 * 2**30  # bytes of a file; ten times the training checkpoint of the largest network
_INSTRUCTIONS = 1_000_000  # of a pickle; a training checkpoint of X3D-XXL has two fifths of that
_STACK = 50_000  # values that a pickle leaves open at once; pickle itself closes lists and dicts every 1,000 entries
_DIRECTORY = 16 * 2**20  # bytes of a zip file's list of its parts; a training checkpoint of X3D-XXL has half a million

_DTYPES: dict[str, np.dtype[Any]] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype("<u2"),  # the upper halves of float32
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
_KNOWN = _STORAGES | {_ORDERED_DICT, _TENSOR, _PARAMETER}


class _Malformed(ValueError):
    """What a file says makes no sense; without the file's name, which the caller adds."""


# What the readers of zip files, numbers and texts raise on damaged ones.
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
    """Numbers that tensors are views of; `data` is set once the file's values are read."""

    kind: str
    entries: int
    data: memoryview | None = None

    @property
    def size(self) -> int:
        return self.entries * _DTYPES[self.kind].itemsize


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, checked to lie within its storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """The name of its type, as PyTorch has it."""
        return "bfloat16" if self.storage.kind == "BFloat16Storage" else str(_DTYPES[self.storage.kind])

    def array(self) -> np.ndarray:
        """Its values; bfloat16 as float32, which holds them exactly."""
        assert self.storage.data is not None
        flat = np.frombuffer(self.storage.data, _DTYPES[self.storage.kind])
        strides = tuple(stride * flat.itemsize for stride in self.strides)
        values = np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides, writeable=False)
        if self.storage.kind == "BFloat16Storage":
            wide = values.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        if self.storage.kind == "BoolStorage":  # any byte but 0 is true; NumPy trusts its own to be 0 or 1
            return values.view(np.uint8).astype(bool)
        return values


def read_checkpoint(path: str | Path) -> Any:
    """Reads what `torch.save` wrote, in the form of PyTorch 1.6 and later or the one before.

    Nothing in the file is executed.

    Returns:
        Dicts, lists, tuples, texts, numbers and, for tensors and parameters, `Tensor`s. As in any pickle a list or
        dict may contain itself, or one thing many times: who walks through it has to bound the depth.

    Raises:
        UserError: not such a file; a damaged one; or one with anything else in it.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > _LIMIT:
            raise _Malformed(f"it has {size} bytes, and no checkpoint of X3D has more than {_LIMIT}")
        if path.is_dir():
            raise IsADirectoryError
        if not path.is_file():  # a pipe or device, which has no size
            raise _Malformed("it is no regular file")
        if zipfile.is_zipfile(path):
            return _read_zip(path, size)
        return _read_legacy(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder, not a checkpoint file") from error
    except _DAMAGED as error:
        reason = str(error)[:1000] or type(error).__name__  # it may quote the file
        raise UserError(f"{path} is damaged or no PyTorch checkpoint: {reason}") from error


class _BoundedFile(io.FileIO):
    """A file of which no more than `piece` bytes can be asked for at once.

    A zip file's list of its parts is read at once, and makes objects of ten times its size.
    """

    def __init__(self, path: Path, piece: int) -> None:
        super().__init__(path)
        self.piece = piece

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self.piece:
            raise _Malformed(f"its list of parts has {size} bytes, and no checkpoint of X3D has more than {self.piece}")
        return super().read(size)


def _read_zip(path: Path, size: int) -> Any:
    with _BoundedFile(path, _DIRECTORY) as file, zipfile.ZipFile(file) as archive:
        file.piece = _LIMIT  # below, no part is larger than the file
        members = archive.infolist()
        for member in members:
            stored = member.compress_type == zipfile.ZIP_STORED and member.compress_size == member.file_size
            if not stored:
                raise _Malformed(f"its part {member.filename!r} is compressed, which PyTorch never does")
        if sum(member.file_size for member in members) > size:  # parts that overlap: a zip bomb
            raise _Malformed("its parts are larger than the file")
        roots = [member.filename[: -len("data.pkl")] for member in members if member.filename.endswith("/data.pkl")]
        if len(roots) != 1:
            raise _Malformed(f"it is a zip file with {len(roots) or 'no'} data.pkl")
        by_name = {member.filename: member for member in members}
        byteorder = by_name.get(f"{roots[0]}byteorder")
        if byteorder and archive.read(byteorder).strip() != b"little":
            raise _Malformed("its numbers are not little-endian")
        storages = _Storages()
        content = _unpickle(io.BytesIO(archive.read(by_name[f"{roots[0]}data.pkl"])), storages.of)
        for key, storage in storages.items():
            part = by_name.get(f"{roots[0]}data/{key}")
            if part is None or part.file_size != storage.size:
                found = "is missing" if part is None else f"has {part.file_size} bytes"
                raise _Malformed(f"its part {f'data/{key}'!r} {found}, and {storage.size} are announced")
            storage.data = memoryview(archive.read(part))
        return content


def _read_legacy(path: Path) -> Any:
    data = path.read_bytes()
    if data.startswith(b"PK"):
        raise _Malformed("it begins like a zip file and does not end like one: it was cut off")
    stream = io.BytesIO(data)
    storages = _Storages()
    try:
        magic = _unpickle(stream, storages.of)
    except _Malformed as error:
        raise _Malformed("it is neither a zip file nor a pickle of PyTorch's") from error
    if magic != _MAGIC:
        raise _Malformed("it is a pickle, but not one that torch.save wrote")
    _unpickle(stream, storages.of)  # the version of the format
    system = _unpickle(stream, storages.of)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _Malformed("its numbers are not little-endian")
    content = _unpickle(stream, storages.of)
    keys = _unpickle(stream, storages.of)
    known = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not known or sorted(keys) != sorted(storages):
        raise _Malformed("its tensors and its list of their values do not agree")
    position = stream.tell()
    for key in keys:
        storage = storages[key]
        start = position + 8  # after the number of entries
        if data[position:start] != struct.pack("<q", storage.entries) or start + storage.size > len(data):
            raise _Malformed(f"the values of its tensor {key!r} are cut off")
        storage.data = memoryview(data)[start : start + storage.size]
        position = start + storage.size
    return content


class _Storages(dict[str, _Storage]):
    """The storages of a file by their keys, made as the pickle mentions them."""

    def of(self, identity: Any) -> _Storage:
        """The storage of a persistent id: ("storage", type, key, device, entries), and a view in old files."""
        match identity:
            case ("storage", ("torch", str(kind)), str(key), str(), int(entries), *view) if view in ([], [None]):
                storage = self.setdefault(key, _Storage(kind, entries))
                if entries >= 0 and (storage.kind, storage.entries) == (kind, entries):
                    return storage
        raise _Malformed("it names values of its tensors in a way that PyTorch does not")


_MARK = object()  # separates what belongs together on the stack of the pickle machine


@dataclass(frozen=True)
class _Global:
    """A name of Python's that the pickle mentions. It is never looked up."""

    name: tuple[str, str]


class _OrderedDict(dict[Any, Any]):
    """Stands for an OrderedDict; a state dict is one, with an attribute that says nothing of the weights."""


def _unpickle(stream: io.BytesIO, storage_of: Callable[[Any], _Storage]) -> Any:
    """Carries out the harmless opcodes of the pickle that begins at the stream's position; any other is an error."""
    machine = _Machine(storage_of)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if opcode.name == "STOP":
                return machine.pop()
            if count >= _INSTRUCTIONS:
                raise _Malformed(f"its pickle has more than {_INSTRUCTIONS} instructions")
            machine.step(opcode.name, argument)
            if len(machine.stack) > _STACK:  # each is a level of nesting, or waits for its list or dict
                raise _Malformed(f"its pickle nests or leaves open more than {_STACK} values")
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        if isinstance(error, _Malformed):
            raise
        raise _Malformed(f"its pickle is damaged: {error}") from error
    raise _Malformed("its pickle has no end")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_EMPTY: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The stack machine of pickles, without the instructions that run anything."""

    def __init__(self, storage_of: Callable[[Any], _Storage]) -> None:
        self.storage_of = storage_of
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise _Malformed("its pickle is damaged: a mark where a value should be")
        return value

    def pop_to_mark(self) -> list[Any]:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def step(self, opcode: str, argument: Any) -> None:
        """Carries out one instruction."""
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
            self._last(list).extend(values)
        elif opcode in ("SETITEM", "SETITEMS"):
            values = self.pop_to_mark() if opcode == "SETITEMS" else [self.pop(), self.pop()][::-1]
            self._set(self._last(dict), values)
        elif opcode in ("GLOBAL", "STACK_GLOBAL"):
            push(self._global(argument.split(" ", 1) if opcode == "GLOBAL" else [self.pop(), self.pop()][::-1]))
        elif opcode == "BINPERSID":
            identity = self.pop()
            push(self.storage_of(_without_globals(identity)))
        elif opcode == "REDUCE":
            arguments, function = self.pop(), self.pop()
            push(self._reduce(function, arguments))
        elif opcode == "BUILD":  # attributes of a state dict: the versions of its modules
            self.pop()
            self._last(_OrderedDict)
        else:
            raise _Malformed(f"its pickle has the instruction {opcode}, which no checkpoint of tensors needs")

    def _last(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise _Malformed(f"its pickle is damaged: no {kind.__name__.removeprefix('_')} where one should be")
        return self.stack[-1]

    @staticmethod
    def _set(target: dict[Any, Any], values: list[Any]) -> None:
        if len(values) % 2 or not all(map(_is_key, values[::2])):
            raise _Malformed("its pickle has dicts whose keys are neither texts nor numbers")
        target.update(zip(values[::2], values[1::2]))

    @staticmethod
    def _global(name: list[Any]) -> _Global:
        if not all(isinstance(part, str) for part in name):  # to hash or print what nests deeply ends Python
            raise _Malformed("its pickle is damaged: a name that is no text")
        if tuple(name) not in _KNOWN:
            raise _Malformed(
                f"it refers to {'.'.join(name)[:100]!r}, which is no number, text, list, dict or tensor. "
                "Nothing of it was run. Where you trust the file, save its state dict alone: "
                'torch.save({"model_state": state_dict}, "weights.pyth")'
            )
        return _Global((name[0], name[1]))

    @staticmethod
    def _reduce(function: Any, arguments: Any) -> Any:
        match function, arguments:
            case _Global(name), () if name == _ORDERED_DICT:
                return _OrderedDict()
            case _Global(name), (_Storage() as storage, offset, tuple(shape), tuple(strides), *_) if name == _TENSOR:
                return _tensor(storage, offset, shape, strides)
            case _Global(name), (Tensor() as tensor, *_) if name == _PARAMETER:
                return tensor
        raise _Malformed("its pickle calls something in a way that PyTorch does not")


def _is_key(key: Any) -> bool:
    """Texts and numbers, but no huge ones: any number of those can be made with one hash, and a dict slow."""
    return abs(key) < 2**60 if isinstance(key, int) else isinstance(key, str | float | None)


def _without_globals(identity: Any) -> Any:
    parts = identity if isinstance(identity, tuple) else ()
    return tuple(part.name if isinstance(part, _Global) else part for part in parts)


def _tensor(storage: _Storage, offset: Any, shape: tuple[Any, ...], strides: tuple[Any, ...]) -> Tensor:
    numbers = (offset, *shape, *strides)
    whole = all(isinstance(number, int) and 0 <= number < 2**63 for number in numbers)
    if not whole or len(shape) != len(strides) or len(shape) > 8:
        raise _Malformed("it has a tensor whose shape is none")
    entries = math.prod(shape)
    strides = tuple(stride if entries and side > 1 else 0 for side, stride in zip(shape, strides))  # others say nothing
    last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides)) if entries else offset - 1
    if last >= storage.entries or entries > storage.entries or math.prod(filter(None, shape)) > _LIMIT:
        raise _Malformed(f"it has a tensor of shape {shape} in a storage of {storage.entries} numbers")
    return Tensor(storage, offset, shape, strides)


def write_checkpoint(path: str | Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes `{"model_state": state}` as `torch.save` does, for `torch.load`.

    Args:
        path: the file; replaced if it is there.
        state: float32 or int64 arrays by name.

    Raises:
        WriteError: it cannot be written.
    """
    assert sys.byteorder == "little"
    arrays = [np.ascontiguousarray(array) for array in state.values()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", b"".join(_pickle(state)))
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(arrays):
            archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/version", "3\n")
    atomic_write(Path(path), buffer.getvalue())


def _pickle(state: Mapping[str, np.ndarray]) -> Iterator[bytes]:
    ordered_dict = _global_code(*_ORDERED_DICT) + b")R"  # called without arguments
    yield b"\x80\x02}" + _text_code("model_state") + ordered_dict + b"("  # protocol 2, a dict, its key, its value, mark
    for key, (name, array) in enumerate(state.items()):
        storage = {np.dtype(np.float32): "FloatStorage", np.dtype(np.int64): "LongStorage"}[array.dtype]
        strides = [stride // array.itemsize for stride in np.empty(array.shape, array.dtype).strides]
        yield _text_code(name) + _global_code(*_TENSOR) + b"("
        yield b"(" + _text_code("storage") + _global_code("torch", storage) + _text_code(str(key)) + _text_code("cpu")
        yield _int_code(array.size) + b"tQ"  # tuple, persistent id
        yield _int_code(0) + _tuple_code(array.shape) + _tuple_code(strides) + b"\x89" + ordered_dict + b"tR"
    yield b"us."  # the entries of the state dict, those of the dict, stop


def _global_code(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text_code(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int_code(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def _tuple_code(numbers: Any) -> bytes:
    return b"(" + b"".join(map(_int_code, numbers)) + b"t"
