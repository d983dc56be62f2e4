"""Tests of PyTorch checkpoint files: reading and writing, compatibility with PyTorch, and rejection of hostile files.

The test files are created by Python's pickle with stand-ins for PyTorch's functions, or opcode by opcode.
"""

import io
import os
import pickle
import random
import re
import struct
import sys
import types
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from x3d_tf.errors import UserError
from x3d_tf.files import WriteError
from x3d_tf.modeling.pytorch import checkpoint_files
from x3d_tf.modeling.pytorch.checkpoint_files import Tensor, read_checkpoint, write_checkpoint

MAGIC = 0x1950A86A20F9469CFC6C
KINDS = {
    "DoubleStorage": ("float64", np.array([1 / 3, -1e300, np.inf])),
    "FloatStorage": ("float32", np.array([1 / 3, -1e30, np.nan], np.float32)),
    "HalfStorage": ("float16", np.array([1 / 3, -6e4, 6e-8], np.float16)),
    "LongStorage": ("int64", np.array([-(2**63), 2**53 + 1, 2**63 - 1])),
    "IntStorage": ("int32", np.array([-(2**31), 0, 2**31 - 1], np.int32)),
    "ShortStorage": ("int16", np.array([-(2**15), 0, 2**15 - 1], np.int16)),
    "CharStorage": ("int8", np.array([-128, 0, 127], np.int8)),
    "ByteStorage": ("uint8", np.array([0, 1, 255], np.uint8)),
}


# An independent writer: torch.save with stand-ins.


def stand_in(module: types.ModuleType, name: str) -> Callable[..., Any]:
    """Creates a function that a pickle refers to as `module.name`."""

    def function(*_: Any) -> None:
        raise AssertionError(f"{name} was called")

    function.__module__, function.__name__, function.__qualname__ = module.__name__, name, name
    setattr(module, name, function)
    return function


TORCH, UTILS = types.ModuleType("torch"), types.ModuleType("torch._utils")
STORAGES = {kind: stand_in(TORCH, kind) for kind in (*KINDS, "BFloat16Storage", "BoolStorage")}
REBUILD_TENSOR, REBUILD_PARAMETER = stand_in(UTILS, "_rebuild_tensor_v2"), stand_in(UTILS, "_rebuild_parameter")


@dataclass(eq=False)
class Storage:
    kind: str
    values: np.ndarray
    claimed: int | None = None  # false number of entries in the file
    key: str | None = None  # unusual key

    @property
    def entries(self) -> int:
        return self.values.size if self.claimed is None else self.claimed


@dataclass(eq=False)
class View:
    storage: Storage
    offset: Any
    shape: Any
    strides: Any

    def __reduce__(self) -> Any:
        arguments = (self.storage, self.offset, self.shape, self.strides, False, OrderedDict())
        return REBUILD_TENSOR, arguments


@dataclass(eq=False)
class Parameter:
    data: View

    def __reduce__(self) -> Any:
        return REBUILD_PARAMETER, (self.data, True, OrderedDict())


def tensor(kind: str, values: Any) -> View:
    array = np.asarray(values)
    strides = tuple(stride // array.itemsize for stride in np.empty(array.shape, array.dtype).strides)
    return View(Storage(kind, array.ravel()), 0, array.shape, strides)


class TorchPickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, protocol: int, old: bool) -> None:
        super().__init__(file, protocol)
        self.storages: dict[str, Storage] = {}
        self.old = old

    def persistent_id(self, item: Any) -> Any:
        if not isinstance(item, Storage):
            return None
        known = [key for key, storage in self.storages.items() if storage is item]
        key = known[0] if known else item.key or str(len(self.storages) + 94_000_000_000_000 * self.old)
        self.storages[key] = item
        return ("storage", STORAGES[item.kind], key, "cpu", item.entries, *([None] if self.old else []))


def pickled(content: Any, protocol: int, old: bool) -> tuple[bytes, dict[str, Storage]]:
    file = io.BytesIO()
    with mock.patch.dict(sys.modules, {"torch": TORCH, "torch._utils": UTILS}):
        pickler = TorchPickler(file, protocol, old)
        pickler.dump(content)
    return file.getvalue(), pickler.storages


def zip_of(path: Path, data: bytes, storages: Mapping[str, Storage] | None = None) -> Path:
    """Writes a pickle as a file of PyTorch 1.6 or later."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/data.pkl", data)
        archive.writestr("weights/byteorder", "little")
        for key, storage in (storages or {}).items():
            archive.writestr(f"weights/data/{key}", storage.values.tobytes())
        archive.writestr("weights/version", "3\n")
    return path


def old_of(path: Path, data: bytes, storages: Mapping[str, Storage] | None = None, little: bool = True) -> Path:
    """Writes a pickle as a file of PyTorch before 1.6."""
    storages = storages or {}
    system = {"protocol_version": 1001, "little_endian": little, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, system))
    keys = pickle.dumps(sorted(storages), 2)
    values = (
        struct.pack("<q", min(storages[key].entries, 2**63 - 1)) + storages[key].values.tobytes()
        for key in sorted(storages)
    )
    path.write_bytes(head + data + keys + b"".join(values))
    return path


def zip_file(path: Path, content: Any, protocol: int = 2) -> Path:
    return zip_of(path, *pickled(content, protocol, old=False))


def old_file(path: Path, content: Any, protocol: int = 2) -> Path:
    return old_of(path, *pickled(content, protocol, old=True))


both_forms = pytest.mark.parametrize("write", [zip_file, old_file])
around_a_pickle = pytest.mark.parametrize("around", [zip_of, old_of])
Write = Callable[..., Path]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.pyth"


def assert_rejected(path: Path, message: str) -> None:
    """Asserts that reading raises a printable `UserError` that names the file and matches `message`."""
    with pytest.raises(UserError, match=message) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < 1000 + len(str(path)) + 100


def assert_tensor(actual: Any, expected: Any, dtype: str = "float32") -> None:
    assert isinstance(actual, Tensor)
    assert actual.dtype == dtype
    assert actual.shape == np.shape(expected)
    np.testing.assert_array_equal(actual.array(), expected, strict=True)


def test_written_files_are_read_back(path: Path) -> None:
    draw = np.random.default_rng(0)
    state = {
        "head.projection.weight": draw.standard_normal((4, 3), np.float32),
        "s1.weight": draw.standard_normal((4, 1, 5, 3, 3), np.float32),
        "in another order": np.asfortranarray(draw.standard_normal((3, 5), np.float32)),
        "a view": draw.standard_normal((3, 8), np.float32)[:, ::2],
        "the bias β": np.array([1.5, np.nan, -np.inf], np.float32),
        "num_batches_tracked": np.array(2**40),
        "empty": np.zeros((0, 3), np.float32),
    }
    path.write_text("existing")
    write_checkpoint(path, state)
    read = read_checkpoint(path)
    assert list(read) == ["model_state"]
    assert list(read["model_state"]) == list(state)
    for name, array in state.items():
        assert_tensor(read["model_state"][name], array, str(array.dtype))
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"absent.*weights\.pyth"):
        write_checkpoint(tmp_path / "absent" / "weights.pyth", {})


@both_forms
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_training_checkpoint_is_read(write: Write, protocol: int, path: Path) -> None:
    weight, buffer = np.arange(6, dtype=np.float32).reshape(2, 3), np.full(3, 0.5, np.float32)
    state = OrderedDict([("fc.weight", tensor("FloatStorage", weight)), ("fc.steps", tensor("LongStorage", 7))])
    state._metadata = OrderedDict([("", {"version": 1}), ("fc", {"version": 2})])  # type: ignore[attr-defined]
    groups = [{"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "nesterov": True, "dampening": None, "params": [0, 1]}]
    buffers = {0: {"momentum_buffer": tensor("FloatStorage", buffer), "step": -5}, 1: {"momentum_buffer": None}}
    content = {
        "epoch": 299,
        "model_state": state,
        "optimizer_state": {"state": buffers, "param_groups": groups},
        "cfg": "MODEL:\n  ARCH: x3d\n" * 100,
        "ids": [2**31, 70_000, 300, (), (1,), (1, 2, 3, 4)],
    }
    read = read_checkpoint(write(path, content, protocol))
    assert list(read) == list(content)
    assert list(read["model_state"]) == ["fc.weight", "fc.steps"]
    assert_tensor(read["model_state"]["fc.weight"], weight)
    assert_tensor(read["model_state"]["fc.steps"], np.array(7), "int64")
    assert_tensor(read["optimizer_state"]["state"][0].pop("momentum_buffer"), buffer)
    assert read["optimizer_state"] == {"state": {0: {"step": -5}, 1: {"momentum_buffer": None}}, "param_groups": groups}
    for name in ("epoch", "cfg", "ids"):
        assert read[name] == content[name]


@both_forms
def test_number_types(write: Write, path: Path) -> None:
    floats = np.array([1.5, -2, 2**-130, np.inf, 3.3895314e38], np.float32)  # exact in bfloat16
    content = {kind: tensor(kind, values) for kind, (_, values) in KINDS.items()}
    content["BFloat16Storage"] = tensor("BFloat16Storage", (floats.view(np.uint32) >> 16).astype(np.uint16))
    content["BFloat16Storage of one"] = tensor("BFloat16Storage", np.array(0xC000, np.uint16))
    content["BoolStorage"] = tensor("BoolStorage", np.array([0, 1, 2, 255], np.uint8))  # 2 and 255 are never written
    read = read_checkpoint(write(path, content))
    for kind, (dtype, values) in KINDS.items():
        assert_tensor(read[kind], values, dtype)
    assert_tensor(read["BFloat16Storage"], floats, "bfloat16")
    assert_tensor(read["BFloat16Storage of one"], np.array(-2, np.float32), "bfloat16")
    assert_tensor(read["BoolStorage"], np.array([False, True, True, True]), "bool")
    assert read["BoolStorage"].array().tobytes() == b"\0\1\1\1"


@both_forms
def test_views_of_one_storage(write: Write, path: Path) -> None:
    values = np.arange(12, dtype=np.float32)
    shared, table = Storage("FloatStorage", values), values.reshape(3, 4)
    content = [
        View(shared, 0, (3, 4), (4, 1)),
        View(shared, 0, (4, 3), (1, 4)),
        View(shared, 5, (2, 3), (4, 1)),
        View(shared, 1, (4,), (3,)),
        Parameter(View(shared, 0, (4, 3), (1, 4))),
        View(shared, 11, (), ()),
        View(shared, 0, (2, 3), (0, 1)),
    ]
    read = read_checkpoint(write(path, content))
    expected = [table, table.T, table[1:, 1:], values[1::3], table.T, values[11], np.stack([values[:3]] * 2)]
    for actual, reference in zip(read, expected, strict=True):
        assert_tensor(actual, reference)
    assert not read[0].array().flags.writeable  # other tensors share the storage


@both_forms
def test_bfloat16_views_copy_only_their_values(write: Write, path: Path) -> None:
    shared = Storage("BFloat16Storage", np.arange(1000, dtype=np.uint16))
    array = read_checkpoint(write(path, View(shared, 990, (3, 2), (1, 3))))
    assert array.array().nbytes == 6 * 4
    bits = np.array([[990, 993], [991, 994], [992, 995]], np.uint32) << 16
    assert_tensor(array, bits.view(np.float32), "bfloat16")


@both_forms
def test_strides_without_effect_are_ignored(write: Write, path: Path) -> None:
    shared, far = Storage("FloatStorage", np.arange(3, dtype=np.float32)), 2**62
    content = [View(shared, 3, (0, 5), (far, far)), View(shared, 2, (1, 1), (far, far))]
    read = read_checkpoint(write(path, content))
    assert_tensor(read[0], np.empty((0, 5), np.float32))
    assert_tensor(read[1], np.array([[2]], np.float32))


@both_forms
@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (13,), (1,)),
        (0, (3, 5), (5, 1)),
        (0, (3, 4), (5, 1)),
        (0, (10**12,), (0,)),
        (0, (4, 4), (0, 1)),
        (12, (), ()),
        (13, (0,), (1,)),
        (6, (7,), (1,)),
        (2**63 - 1, (2,), (1,)),
        (2**64, (), ()),
        (-1, (3,), (1,)),
        (4, (3,), (-1,)),
        (0, (-3,), (1,)),
        (0, (-3, -4), (4, 1)),
        (0, (2**32, 2**32), (1, 1)),
        (0, (0, 2**62), (1, 1)),
        (0, (3,), ()),
        (0, (1,) * 9, (1,) * 9),
        (0, (1.5,), (1,)),
        (0.5, (1,), (1,)),
        (None, (1,), (1,)),
        (0, ("3",), (1,)),
        (0, [3], [1]),
        (0, 3, 1),
        (0, (((),),), (1,)),
    ],
    ids=str,
)
def test_tensors_beyond_their_storage_are_rejected(
    write: Write, offset: Any, shape: Any, strides: Any, path: Path
) -> None:
    storage = Storage("FloatStorage", np.zeros(12, np.float32))
    assert_rejected(
        write(path, {"w": View(storage, offset, shape, strides)}), "tensor of shape|invalid shape|contains a call"
    )


@pytest.mark.parametrize("claimed", [11, 13, 0, 2**31, 2**63, 2**200])
def test_members_of_another_size_than_claimed(claimed: int, path: Path) -> None:
    storage = Storage("FloatStorage", np.zeros(12, np.float32), claimed)
    assert_rejected(
        zip_file(path, View(storage, 0, (0,), (1,))), rf"'data/0' has 48 bytes, expected {claimed * 4} bytes"
    )


@pytest.mark.parametrize("counted", [11, 13, 0, -1, 2**62])
def test_old_values_of_another_size_than_claimed(counted: int, path: Path) -> None:
    old_file(path, tensor("FloatStorage", np.zeros(12, np.float32)))
    data = path.read_bytes()
    assert data.count(struct.pack("<q", 12)) == 1
    path.write_bytes(data.replace(struct.pack("<q", 12), struct.pack("<q", counted)))
    assert_rejected(path, "truncated")


@pytest.mark.parametrize("claimed", [13, 2**31, 2**63, 2**200])
def test_old_file_with_fewer_values_than_claimed(claimed: int, path: Path) -> None:
    storage = Storage("FloatStorage", np.zeros(12, np.float32), claimed)
    assert_rejected(old_file(path, View(storage, 0, (0,), (1,))), "damaged or not a")


@both_forms
@pytest.mark.parametrize("sizes", [(4, 2), (-1, -1)], ids=str)
def test_contradictory_storages_are_rejected(write: Write, sizes: tuple[int, int], path: Path) -> None:
    first, second = (Storage("FloatStorage", np.zeros(4, np.float32), size, key="0") for size in sizes)
    assert_rejected(write(path, [first, second]), "refers to a storage")


def test_missing_member(path: Path) -> None:
    data, _ = pickled(View(Storage("FloatStorage", np.zeros(4), 4, "\x1b[2J\udc80"), 0, (4,), (1,)), 2, old=False)
    assert_rejected(zip_of(path, data), r"'data/\\x1b\[2J\\udc80' is missing")


@pytest.mark.parametrize("keys", [[], ["0", "1"], ["0", "0"], ["1"], ["0", 1], [["0"]], {"0": 0}, "0", None], ids=str)
def test_old_file_with_another_list_of_storages(keys: Any, path: Path) -> None:
    storage = Storage("FloatStorage", np.zeros(4), 4, "['0']" if keys == [["0"]] else "0")
    data, storages = pickled(View(storage, 0, (4,), (1,)), 2, old=True)
    complete = old_of(path, data, storages).read_bytes()
    right = pickle.dumps(sorted(storages), 2)
    assert complete.count(right) == 1
    path.write_bytes(complete.replace(right, pickle.dumps(keys, 2)))
    assert_rejected(path, "does not match its tensors")


@dataclass(eq=False)
class Runs:
    """Runs a command when unpickled."""

    command: str

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


SYSTEM = f"{os.system.__module__}.system"
ATTACKS = {  # name that the error must contain
    "REDUCE": SYSTEM,
    "STACK_GLOBAL": SYSTEM,
    "metadata": SYSTEM,
    "eval": "builtins.eval",
    "INST": "INST",
    "OBJ": SYSTEM,
    "NEWOBJ": "builtins.tuple",
}


def attack(kind: str, command: str) -> bytes:
    """Creates a pickle that runs a command when unpickled."""
    argument, system = text(command), SYSTEM.replace(".", "\n").encode() + b"\n"
    state = OrderedDict(weight=1)
    state._metadata = Runs(command)  # type: ignore[attr-defined]
    if kind == "eval":
        code = text(f"__import__('os').system({command!r})")
        return b"\x80\x04" + text("builtins") + text("eval") + b"\x93" + code + b"\x85R."
    if kind == "NEWOBJ":  # tuple(map(system, [command]))
        called = b"cbuiltins\nmap\nc" + system + b"]" + argument + b"a\x86\x81"
        return b"\x80\x02cbuiltins\ntuple\n" + called + b"\x85\x81."
    return {
        "REDUCE": pickle.dumps({"model_state": Runs(command)}, 2),
        "STACK_GLOBAL": pickle.dumps({"model_state": Runs(command)}, 4),
        "metadata": pickle.dumps(state, 2),
        "INST": b"(" + argument + b"i" + system + b".",
        "OBJ": b"(c" + system + argument + b"o.",
    }[kind]


@around_a_pickle
@pytest.mark.parametrize("kind", ATTACKS)
def test_nothing_is_executed(around: Write, kind: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    data = attack(kind, f'echo > "{trace}"')
    pickle.loads(data)
    assert trace.exists()  # the attack works
    trace.unlink()
    assert_rejected(around(tmp_path / "weights.pyth", data), re.escape(ATTACKS[kind]))
    assert not trace.exists()


@pytest.mark.parametrize("position", range(5))
def test_nothing_is_executed_anywhere_in_an_old_file(position: int, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "weights.pyth"
    pickles = [pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": True}, {"epoch": 1}, [])]
    path.write_bytes(b"".join(pickles))
    assert read_checkpoint(path) == {"epoch": 1}
    pickles[position] = attack("REDUCE", f'echo > "{trace}"')
    path.write_bytes(b"".join(pickles))
    assert_rejected(path, "neither a zip file nor a PyTorch pickle" if position == 0 else re.escape(SYSTEM))
    assert not trace.exists()


STORAGE_0_OF_4 = text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\4"


@around_a_pickle
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x04)" + b"\x85" * 150_000 + text("x") + b"\x93.", "a name that is not a string"),
        (b"\x80\x04)\x94" + b"h\0h\0\x86q\0" * 20 + text("x") + b"\x93.", "a name that is not a string"),
        (
            b"\x80\x02}(" + b"".join(b"\x8a\x09" + (k << 61).to_bytes(9, "little") + b"N" for k in range(9)) + b"u.",
            "keys",
        ),
        (b"\x80\x02})Ns.", "keys"),
        (b"\x80\x02}Nb.", "expected OrderedDict"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "contains a call"),
        (b"\x80\x02ccollections\nOrderedDict\n](NeR.", "contains a call"),
        (b"\x80\x02ctorch\nFloatStorage\n" + text("0") + b"\x86Q.", "refers to a storage"),
        (b"\x80\x02NQ.", "refers to a storage"),
        (b"\x80\x02(" + STORAGE_0_OF_4 + b"(" + text("1") + b"K\0K\4ttQ.", "refers to a storage"),
        (b"\x80\x02h\5.", "damaged"),
        (b"\x80\x02Nt.", "damaged"),
        (b"\x80\x02(.", "got a mark"),
        (b"\x80\x02}(Nu.", "keys"),
        (b"\x80\x02)Na.", "expected list"),
        (b"\x80\x02\x82\1.", "EXT1"),
        (b"\x80\x02P7\n.", "PERSID"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "damaged"),
        (b"\x80\x04\x8d" + b"\xff" * 8 + b".", "damaged"),
        (b"\x80\x02X\4\0\0\0\xff\xff\xff\xff.", "damaged"),
        (b"\x80\x02F" + b"x" * 100_000 + b"\n.", "damaged"),
        (b"\x80\x02}", "damaged"),
        (b"", "damaged"),
    ],
    ids=lambda value: value[:12].hex() if isinstance(value, bytes) else "",
)
def test_malformed_pickles_are_rejected(around: Write, data: bytes, message: str, path: Path) -> None:
    assert_rejected(around(path, data), message)


@around_a_pickle
def test_self_references_and_deep_nesting(around: Write, path: Path) -> None:
    read = read_checkpoint(around(path, b"\x80\x02]q\0h\0a."))
    assert read[0] is read
    read = read_checkpoint(around(path, b"\x80\x02}q\0" + text("self") + b"h\0s."))
    assert read["self"] is read
    depth, read = 0, read_checkpoint(around(path, b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."))
    while read:
        depth, read = depth + 1, read[0]
    assert depth == 49_999


@around_a_pickle
def test_nesting_depth_is_limited(around: Write, path: Path) -> None:
    assert_rejected(
        around(path, b"\x80\x02" + b"]" * 50_001 + b"a" * 50_000 + b"."), "more than 50000 nested or unfinished values"
    )


@around_a_pickle
def test_number_of_instructions_is_limited(around: Write, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "_MAX_INSTRUCTIONS", 1000)
    assert read_checkpoint(around(path, b"\x80\x02" + b"]" * 999 + b".")) == []
    assert_rejected(around(path, b"\x80\x02" + b"]" * 1000 + b"."), "more than 1000 instructions")


@both_forms
def test_file_size_is_limited(write: Write, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = write(path, {"epoch": 1}).stat().st_size
    monkeypatch.setattr(checkpoint_files, "_MAX_FILE_SIZE", size)
    assert read_checkpoint(path) == {"epoch": 1}
    monkeypatch.setattr(checkpoint_files, "_MAX_FILE_SIZE", size - 1)
    assert_rejected(path, f"has {size} bytes")


@pytest.mark.parametrize("part", ["data.pkl", "data/0"])
def test_compressed_members_are_rejected(part: str, path: Path) -> None:
    data, _ = pickled(tensor("ByteStorage", np.zeros(2**22, np.uint8)), 2, old=False)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("data.pkl", data), ("data/0", bytes(2**22))):
            method = zipfile.ZIP_DEFLATED if name == part else zipfile.ZIP_STORED
            archive.writestr(f"weights/{name}", content, method)
    assert_rejected(path, f"'weights/{part}' must be stored without compression")


def test_overlapping_members_are_rejected(path: Path) -> None:
    """Each member contains all that follow, with their headers: together they are many times as large as the file."""
    body, members = bytes(1000), []
    for key in range(30):
        info = zipfile.ZipInfo(f"weights/data/{key}")
        info.file_size = info.compress_size = len(body)
        info.CRC = zlib.crc32(body)
        body = info.FileHeader() + body
        members.append((info, len(body)))
    content = [tensor("ByteStorage", np.zeros(info.file_size, np.uint8)) for info, _ in members]
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights/data.pkl", pickled(content, 2, old=False)[0])
        start = file.tell()
        file.write(body)
        for info, distance in members:
            info.header_offset = start + len(body) - distance
            archive.filelist.append(info)
        archive.start_dir = file.tell()
    with zipfile.ZipFile(path) as archive:
        assert sum(info.file_size for info in archive.infolist()) > 5 * path.stat().st_size
        assert len(archive.infolist()) == 31
    assert_rejected(path, "larger than the file")


def test_size_of_the_zip_directory_is_limited(path: Path) -> None:
    data = zip_of(path, b"\x80\x02}.").read_bytes()
    start, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    entries = data[start:end] * (2**24 // (end - start) + 1)
    tail = data[end : end + 12] + struct.pack("<II", len(entries), start) + data[end + 20 :]
    path.write_bytes(data[:start] + entries + tail)
    assert_rejected(path, f"zip directory has {len(entries)} bytes")


@pytest.mark.parametrize(
    "fields",
    [
        {"flag_bits": 1},
        {"flag_bits": 0x20},
        {"flag_bits": 0x40},
        {"header_offset": 7},
        {"header_offset": 2**31},
        {"header_offset": 2**63},
        {"header_offset": 2**64 - 1},
        {"file_size": 47},
        {"file_size": 47, "compress_size": 47},
        {"file_size": 60, "compress_size": 60},
        {"file_size": 2**40, "compress_size": 2**40},
        {"file_size": 2**64 - 1, "compress_size": 2**64 - 1},
        {"CRC": 1},
        {"filename": "weights/data/1"},
        {"filename": "weights/data.pkl"},
        {"filename": "weights/byteorder"},
        {"compress_type": 14},
        {"extract_version": 99},
        {"extra": b"\1\0\7\0"},
    ],
    ids=str,
)
def test_false_zip_directories_are_rejected(fields: dict[str, Any], path: Path) -> None:
    data, storages = pickled(tensor("FloatStorage", np.ones(12, np.float32)), 2, old=False)
    zip_of(path, data, storages)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("weights/more", "")  # makes zipfile rewrite the directory
        for field, value in fields.items():
            setattr(archive.getinfo("weights/data/0"), field, value)
    assert_rejected(path, "damaged or not a PyTorch checkpoint: .")


@pytest.mark.parametrize(("old", "new"), [(b"weights/data/0", b"weights/data/1"), (b"PK\3\4", b"PK\3\5")])
def test_false_local_headers_are_rejected(old: bytes, new: bytes, path: Path) -> None:
    data = zip_file(path, tensor("FloatStorage", np.ones(12, np.float32))).read_bytes()
    path.write_bytes(data.replace(old, new, 1))
    assert_rejected(path, "damaged or not a PyTorch checkpoint: .")


def test_long_local_header_is_rejected(path: Path) -> None:
    data = bytearray(zip_of(path, b"\x80\x02}.").read_bytes())
    data[28:30] = b"\xff\xff"  # length of the first extra field
    path.write_bytes(data)
    assert_rejected(path, "EOFError|Overlapped")  # depends on the version of Python


def test_bytes_before_the_archive_are_ignored(path: Path) -> None:
    data = zip_file(path, {"epoch": 1}).read_bytes()
    path.write_bytes(b"#!/bin/sh\n" + data)
    assert read_checkpoint(path) == {"epoch": 1}


def test_two_pickles_are_rejected(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("b/data.pkl", b"\x80\x02}.")
    assert_rejected(path, "must contain one data.pkl, got 2")


@pytest.mark.parametrize("byteorder", [b"big", b"", b"\xff"])
def test_other_byte_orders_are_rejected(byteorder: bytes, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/byteorder", byteorder)
    assert_rejected(path, "not little-endian")
    assert_rejected(old_of(path, b"\x80\x02}.", little=False), "not little-endian")


@both_forms
def test_truncated_files_are_rejected(write: Write, path: Path) -> None:
    complete = write(path, {"w": tensor("FloatStorage", np.ones(50, np.float32))}).read_bytes()
    lengths = {
        0,
        1,
        2,
        3,
        4,
        10,
        30,
        60,
        100,
        len(complete) // 4,
        len(complete) // 2,
        *(len(complete) - k for k in range(1, 30)),
    }
    for length in lengths:
        path.write_bytes(complete[:length])
        assert_rejected(path, "truncated" if write is zip_file and length > 1 else "damaged or not a")


@both_forms
def test_damaged_files(write: Write, path: Path) -> None:
    """Reads randomly damaged files: each must give a checkpoint or a `UserError`."""
    draw = random.Random(0)
    nested = {"step": 5, "buffer": Parameter(tensor("BFloat16Storage", np.zeros((2, 3), np.uint16)))}
    content = {"model_state": OrderedDict(w=tensor("FloatStorage", np.ones((2, 3), np.float32))), "state": [nested]}
    for protocol in (2, 4):
        data, storages = pickled(content, protocol, write is old_file)
        complete = write(path, content, protocol).read_bytes()
        for _ in range(150):
            path.write_bytes(damaged(complete, draw))
            read_completely(path)
            (zip_of if write is zip_file else old_of)(path, damaged(data, draw), storages)  # with a valid checksum
            read_completely(path)


def damaged(data: bytes, draw: random.Random) -> bytes:
    result = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        position, other, length = draw.randrange(len(data)), draw.randrange(len(data)), draw.randrange(1, 9)
        patterns = (draw.randbytes(1), draw.choice(b"()]}tsuabRQqhKJMNXc0.").to_bytes(1), b"\xff" * length, b"")
        result[position : position + length] = draw.choice((*patterns, data[other : other + length]))
    return bytes(result[: draw.randrange(len(data))]) if draw.random() < 0.1 else bytes(result)


def read_completely(path: Path) -> None:
    """Reads a file and all its tensors. A `UserError` is allowed."""
    try:
        pending, seen = [read_checkpoint(path)], set()
    except UserError:
        return
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            assert value.array().copy().shape == value.shape
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            pending.extend(value.values() if isinstance(value, dict) else value)


def test_other_files_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Two roads diverged in a yellow wood\n" * 100)
    assert_rejected(tmp_path / "notes.txt", "neither a zip file nor a PyTorch pickle")
    (tmp_path / "empty").touch()
    assert_rejected(tmp_path / "empty", "neither a zip file nor a PyTorch pickle")
    (tmp_path / "other.pkl").write_bytes(pickle.dumps({"weights": [1, 2]}))
    assert_rejected(tmp_path / "other.pkl", "not written by torch.save")
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        for name in ("metadata.json", "config.json", "model.weights.h5"):
            archive.writestr(name, "{}")
    assert_rejected(tmp_path / "model.keras", "must contain one data.pkl, got 0")
    assert_rejected(tmp_path, "is a folder")
    assert_rejected(tmp_path / "absent.pyth", "no such checkpoint")
    assert_rejected(tmp_path / "empty" / "weights.pyth", "damaged or not a")
    assert_rejected(tmp_path / ("long" * 100), "damaged or not a")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="requires named pipes")
def test_named_pipes_are_rejected(path: Path) -> None:
    os.mkfifo(path)
    assert_rejected(path, "not a regular file")


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_files_written_by_pytorch_are_read(old: bool, protocol: int, path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    table = torch.arange(12.0).reshape(3, 4)
    others = {
        "transposed": table.T,
        "slice": table[1:, 1::2],
        "parameter": torch.nn.Parameter(table.T),
        "bfloat16": table.to(torch.bfloat16).T,
        "half": table.half(),
        "bool": table > 5,
        "scalar": torch.tensor(2**40),
        "empty": torch.empty(0, 3),
        **{f"int{bits}": table.to(getattr(torch, f"int{bits}")) for bits in (8, 16, 32, 64)},
        "uint8": table.to(torch.uint8),
        "double": table.double(),
    }
    content = {
        "epoch": 3,
        "model_state": model.state_dict(),
        "optimizer_state": optimizer.state_dict(),
        "others": others,
    }
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not old)
    read = read_checkpoint(path)
    assert read["epoch"] == 3
    assert list(read["model_state"]) == list(model.state_dict())
    for name, value in {**model.state_dict(), **others}.items():
        wide = value.detach().float() if value.dtype == torch.bfloat16 else value.detach()
        actual = read["model_state" if name in model.state_dict() else "others"][name]
        assert_tensor(actual, wide.numpy(), str(value.dtype).removeprefix("torch."))
    momentum = read["optimizer_state"]["state"][0]["momentum_buffer"]
    assert_tensor(momentum, content["optimizer_state"]["state"][0]["momentum_buffer"].numpy())
    assert read["optimizer_state"]["param_groups"][0]["params"] == [0, 1, 2, 3]


def test_pytorch_reads_written_files(path: Path) -> None:
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(0)
    state = {
        "weight": draw.standard_normal((4, 3, 1, 3, 3), np.float32),
        "in another order": np.asfortranarray(draw.standard_normal((3, 5), np.float32)),
        "the bias β": np.array([1.5, np.nan, -np.inf], np.float32),
        "num_batches_tracked": np.array(2**40),
        "empty": np.zeros((0, 3), np.float32),
    }
    write_checkpoint(path, state)
    read = torch.load(path, weights_only=True)
    assert list(read) == ["model_state"]
    assert isinstance(read["model_state"], OrderedDict)
    assert list(read["model_state"]) == list(state)
    for name, array in state.items():
        np.testing.assert_array_equal(read["model_state"][name].numpy(), array, strict=True)
        assert read["model_state"][name].is_contiguous()
