"""PyTorch's checkpoint files: what others wrote is read, what is written others read, and nothing in a file is run.

The files are made here by Python's own pickle, with stand-ins for what PyTorch's name, or opcode by opcode.
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


# A writer of its own: torch.save with stand-ins.


def stand_in(module: types.ModuleType, name: str) -> Callable[..., Any]:
    """A function that a pickle mentions as `module.name`."""

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
    announced: int | None = None  # its number of entries, where the file lies about it
    key: str | None = None  # its name, where it is an odd one

    @property
    def entries(self) -> int:
        return self.values.size if self.announced is None else self.announced


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
    """A file of PyTorch 1.6 and later around a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/data.pkl", data)
        archive.writestr("weights/byteorder", "little")
        for key, storage in (storages or {}).items():
            archive.writestr(f"weights/data/{key}", storage.values.tobytes())
        archive.writestr("weights/version", "3\n")
    return path


def old_of(path: Path, data: bytes, storages: Mapping[str, Storage] | None = None, little: bool = True) -> Path:
    """A file of PyTorch before 1.6 around a pickle."""
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


def refused(path: Path, why: str) -> None:
    """Reading ends in a `UserError` that names the file, matches `why` and can be shown in a terminal."""
    with pytest.raises(UserError, match=why) as caught:
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


def test_what_was_written_is_read(path: Path) -> None:
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
    path.write_text("what was there before")
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
    floats = np.array([1.5, -2, 2**-130, np.inf, 3.3895314e38], np.float32)  # bfloat16 holds them
    content = {kind: tensor(kind, values) for kind, (_, values) in KINDS.items()}
    content["BFloat16Storage"] = tensor("BFloat16Storage", (floats.view(np.uint32) >> 16).astype(np.uint16))
    content["BFloat16Storage of one"] = tensor("BFloat16Storage", np.array(0xC000, np.uint16))
    content["BoolStorage"] = tensor("BoolStorage", np.array([0, 1, 2, 255], np.uint8))  # two bytes no one wrote
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
    for actual, wanted in zip(read, expected, strict=True):
        assert_tensor(actual, wanted)
    assert not read[0].array().flags.writeable  # the other tensors lie there, too


@both_forms
def test_views_in_half_precision_are_of_their_own_size(write: Write, path: Path) -> None:
    shared = Storage("BFloat16Storage", np.arange(1000, dtype=np.uint16))
    array = read_checkpoint(write(path, View(shared, 990, (3, 2), (1, 3))))
    assert array.array().nbytes == 6 * 4
    bits = np.array([[990, 993], [991, 994], [992, 995]], np.uint32) << 16
    assert_tensor(array, bits.view(np.float32), "bfloat16")


@both_forms
def test_strides_that_say_nothing(write: Write, path: Path) -> None:
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
def test_tensors_beyond_their_storage(write: Write, offset: Any, shape: Any, strides: Any, path: Path) -> None:
    storage = Storage("FloatStorage", np.zeros(12, np.float32))
    refused(write(path, {"w": View(storage, offset, shape, strides)}), "tensor of shape|whose shape|calls something")


@pytest.mark.parametrize("announced", [11, 13, 0, 2**31, 2**63, 2**200])
def test_parts_of_another_size_than_announced(announced: int, path: Path) -> None:
    storage = Storage("FloatStorage", np.zeros(12, np.float32), announced)
    refused(zip_file(path, View(storage, 0, (0,), (1,))), rf"'data/0' has 48 bytes, and {announced * 4} are announced")


@pytest.mark.parametrize("counted", [11, 13, 0, -1, 2**62])
def test_old_values_of_another_size_than_announced(counted: int, path: Path) -> None:
    old_file(path, tensor("FloatStorage", np.zeros(12, np.float32)))
    data = path.read_bytes()
    assert data.count(struct.pack("<q", 12)) == 1
    path.write_bytes(data.replace(struct.pack("<q", 12), struct.pack("<q", counted)))
    refused(path, "cut off")


@pytest.mark.parametrize("announced", [13, 2**31, 2**63, 2**200])
def test_an_old_file_that_announces_more_than_it_has(announced: int, path: Path) -> None:
    storage = Storage("FloatStorage", np.zeros(12, np.float32), announced)
    refused(old_file(path, View(storage, 0, (0,), (1,))), "damaged or no")


@both_forms
@pytest.mark.parametrize("sizes", [(4, 2), (-1, -1)], ids=str)
def test_storages_that_contradict_themselves(write: Write, sizes: tuple[int, int], path: Path) -> None:
    first, second = (Storage("FloatStorage", np.zeros(4, np.float32), size, key="0") for size in sizes)
    refused(write(path, [first, second]), "names values")


def test_a_part_that_is_missing(path: Path) -> None:
    data, _ = pickled(View(Storage("FloatStorage", np.zeros(4), 4, "\x1b[2J\udc80"), 0, (4,), (1,)), 2, old=False)
    refused(zip_of(path, data), r"'data/\\x1b\[2J\\udc80' is missing")


@pytest.mark.parametrize("keys", [[], ["0", "1"], ["0", "0"], ["1"], ["0", 1], [["0"]], {"0": 0}, "0", None], ids=str)
def test_an_old_file_whose_list_of_values_is_another(keys: Any, path: Path) -> None:
    storage = Storage("FloatStorage", np.zeros(4), 4, "['0']" if keys == [["0"]] else "0")
    data, storages = pickled(View(storage, 0, (4,), (1,)), 2, old=True)
    whole = old_of(path, data, storages).read_bytes()
    right = pickle.dumps(sorted(storages), 2)
    assert whole.count(right) == 1
    path.write_bytes(whole.replace(right, pickle.dumps(keys, 2)))
    refused(path, "do not agree")


@dataclass(eq=False)
class Runs:
    """Unpickled, it runs a command."""

    command: str

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


SYSTEM = f"{os.system.__module__}.system"
ATTACKS = {  # what the error names
    "REDUCE": SYSTEM,
    "STACK_GLOBAL": SYSTEM,
    "metadata": SYSTEM,
    "eval": "builtins.eval",
    "INST": "INST",
    "OBJ": SYSTEM,
    "NEWOBJ": "builtins.tuple",
}


def attack(kind: str, command: str) -> bytes:
    """A pickle that runs a command where it is unpickled."""
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
def test_nothing_is_run(around: Write, kind: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    data = attack(kind, f'echo > "{trace}"')
    pickle.loads(data)
    assert trace.exists()  # so the attack is a real one
    trace.unlink()
    refused(around(tmp_path / "weights.pyth", data), re.escape(ATTACKS[kind]))
    assert not trace.exists()


@pytest.mark.parametrize("place", range(5))
def test_nothing_is_run_anywhere_in_an_old_file(place: int, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "weights.pyth"
    pickles = [pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": True}, {"epoch": 1}, [])]
    path.write_bytes(b"".join(pickles))
    assert read_checkpoint(path) == {"epoch": 1}
    pickles[place] = attack("REDUCE", f'echo > "{trace}"')
    path.write_bytes(b"".join(pickles))
    refused(path, "neither a zip file nor a pickle" if place == 0 else re.escape(SYSTEM))
    assert not trace.exists()


STORAGE_0_OF_4 = text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\4"


@around_a_pickle
@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x80\x04)" + b"\x85" * 150_000 + text("x") + b"\x93.", "a name that is no text"),
        (b"\x80\x04)\x94" + b"h\0h\0\x86q\0" * 20 + text("x") + b"\x93.", "a name that is no text"),
        (
            b"\x80\x02}(" + b"".join(b"\x8a\x09" + (k << 61).to_bytes(9, "little") + b"N" for k in range(9)) + b"u.",
            "keys",
        ),
        (b"\x80\x02})Ns.", "keys"),
        (b"\x80\x02}Nb.", "no OrderedDict where"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls something"),
        (b"\x80\x02ccollections\nOrderedDict\n](NeR.", "calls something"),
        (b"\x80\x02ctorch\nFloatStorage\n" + text("0") + b"\x86Q.", "names values"),
        (b"\x80\x02NQ.", "names values"),
        (b"\x80\x02(" + STORAGE_0_OF_4 + b"(" + text("1") + b"K\0K\4ttQ.", "names values"),
        (b"\x80\x02h\5.", "damaged"),
        (b"\x80\x02Nt.", "damaged"),
        (b"\x80\x02(.", "a mark where a value"),
        (b"\x80\x02}(Nu.", "keys"),
        (b"\x80\x02)Na.", "no list where"),
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
def test_pickles_that_make_no_sense(around: Write, data: bytes, why: str, path: Path) -> None:
    refused(around(path, data), why)


@around_a_pickle
def test_what_contains_itself(around: Write, path: Path) -> None:
    read = read_checkpoint(around(path, b"\x80\x02]q\0h\0a."))
    assert read[0] is read
    read = read_checkpoint(around(path, b"\x80\x02}q\0" + text("self") + b"h\0s."))
    assert read["self"] is read
    depth, read = 0, read_checkpoint(around(path, b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."))
    while read:
        depth, read = depth + 1, read[0]
    assert depth == 49_999


@around_a_pickle
def test_lists_in_lists_end_at_a_bound(around: Write, path: Path) -> None:
    refused(around(path, b"\x80\x02" + b"]" * 50_001 + b"a" * 50_000 + b"."), "leaves open more than 50000 values")


@around_a_pickle
def test_a_pickle_without_end(around: Write, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "_INSTRUCTIONS", 1000)
    assert read_checkpoint(around(path, b"\x80\x02" + b"]" * 999 + b".")) == []
    refused(around(path, b"\x80\x02" + b"]" * 1000 + b"."), "more than 1000 instructions")


@both_forms
def test_a_file_that_is_too_large(write: Write, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = write(path, {"epoch": 1}).stat().st_size
    monkeypatch.setattr(checkpoint_files, "_LIMIT", size)
    assert read_checkpoint(path) == {"epoch": 1}
    monkeypatch.setattr(checkpoint_files, "_LIMIT", size - 1)
    refused(path, f"has {size} bytes")


@pytest.mark.parametrize("part", ["data.pkl", "data/0"])
def test_compressed_parts(part: str, path: Path) -> None:
    data, _ = pickled(tensor("ByteStorage", np.zeros(2**22, np.uint8)), 2, old=False)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("data.pkl", data), ("data/0", bytes(2**22))):
            method = zipfile.ZIP_DEFLATED if name == part else zipfile.ZIP_STORED
            archive.writestr(f"weights/{name}", content, method)
    refused(path, f"'weights/{part}' is compressed")


def test_parts_within_parts(path: Path) -> None:
    """Each part holds all that follow, the next one's header included: all can be read, and are many times the file."""
    body, parts = bytes(1000), []
    for key in range(30):
        info = zipfile.ZipInfo(f"weights/data/{key}")
        info.file_size = info.compress_size = len(body)
        info.CRC = zlib.crc32(body)
        body = info.FileHeader() + body
        parts.append((info, len(body)))
    content = [tensor("ByteStorage", np.zeros(info.file_size, np.uint8)) for info, _ in parts]
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights/data.pkl", pickled(content, 2, old=False)[0])
        start = file.tell()
        file.write(body)
        for info, distance in parts:
            info.header_offset = start + len(body) - distance
            archive.filelist.append(info)
        archive.start_dir = file.tell()
    with zipfile.ZipFile(path) as archive:
        assert sum(info.file_size for info in archive.infolist()) > 5 * path.stat().st_size
        assert len(archive.infolist()) == 31
    refused(path, "larger than the file")


def test_a_zip_file_of_nothing_but_its_directory(path: Path) -> None:
    data = zip_of(path, b"\x80\x02}.").read_bytes()
    start, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    entries = data[start:end] * (2**24 // (end - start) + 1)
    tail = data[end : end + 12] + struct.pack("<II", len(entries), start) + data[end + 20 :]
    path.write_bytes(data[:start] + entries + tail)
    refused(path, f"list of parts has {len(entries)} bytes")


@pytest.mark.parametrize(
    "lie",
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
def test_directories_that_lie(lie: dict[str, Any], path: Path) -> None:
    data, storages = pickled(tensor("FloatStorage", np.ones(12, np.float32)), 2, old=False)
    zip_of(path, data, storages)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("weights/more", "")  # so that the directory is written anew
        for field, value in lie.items():
            setattr(archive.getinfo("weights/data/0"), field, value)
    refused(path, "damaged or no PyTorch checkpoint: .")


@pytest.mark.parametrize(("old", "new"), [(b"weights/data/0", b"weights/data/1"), (b"PK\3\4", b"PK\3\5")])
def test_local_headers_that_lie(old: bytes, new: bytes, path: Path) -> None:
    data = zip_file(path, tensor("FloatStorage", np.ones(12, np.float32))).read_bytes()
    path.write_bytes(data.replace(old, new, 1))
    refused(path, "damaged or no PyTorch checkpoint: .")


def test_a_local_header_that_claims_to_be_long(path: Path) -> None:
    data = bytearray(zip_of(path, b"\x80\x02}.").read_bytes())
    data[28:30] = b"\xff\xff"  # length of the first extra field
    path.write_bytes(data)
    refused(path, "EOFError|Overlapped")  # by the version of Python


def test_parts_before_and_after_which_there_is_more(path: Path) -> None:
    data = zip_file(path, {"epoch": 1}).read_bytes()
    path.write_bytes(b"#!/bin/sh\n" + data)
    assert read_checkpoint(path) == {"epoch": 1}


def test_two_pickles_in_one_file(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("b/data.pkl", b"\x80\x02}.")
    refused(path, "with 2 data.pkl")


@pytest.mark.parametrize("byteorder", [b"big", b"", b"\xff"])
def test_numbers_of_another_order(byteorder: bytes, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/byteorder", byteorder)
    refused(path, "not little-endian")
    refused(old_of(path, b"\x80\x02}.", little=False), "not little-endian")


@both_forms
def test_files_that_were_cut_off(write: Write, path: Path) -> None:
    whole = write(path, {"w": tensor("FloatStorage", np.ones(50, np.float32))}).read_bytes()
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
        len(whole) // 4,
        len(whole) // 2,
        *(len(whole) - k for k in range(1, 30)),
    }
    for length in lengths:
        path.write_bytes(whole[:length])
        refused(path, "cut off" if write is zip_file and length > 1 else "damaged or no")


@both_forms
def test_files_that_were_damaged(write: Write, path: Path) -> None:
    """Whatever the bytes, the end is a checkpoint or a `UserError`."""
    draw = random.Random(0)
    nested = {"step": 5, "buffer": Parameter(tensor("BFloat16Storage", np.zeros((2, 3), np.uint16)))}
    content = {"model_state": OrderedDict(w=tensor("FloatStorage", np.ones((2, 3), np.float32))), "state": [nested]}
    for protocol in (2, 4):
        data, storages = pickled(content, protocol, write is old_file)
        whole = write(path, content, protocol).read_bytes()
        for _ in range(150):
            path.write_bytes(damaged(whole, draw))
            read_whole(path)
            (zip_of if write is zip_file else old_of)(path, damaged(data, draw), storages)  # with its checksum right
            read_whole(path)


def damaged(data: bytes, draw: random.Random) -> bytes:
    spoilt = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place, other, length = draw.randrange(len(data)), draw.randrange(len(data)), draw.randrange(1, 9)
        pieces = (draw.randbytes(1), draw.choice(b"()]}tsuabRQqhKJMNXc0.").to_bytes(1), b"\xff" * length, b"")
        spoilt[place : place + length] = draw.choice((*pieces, data[other : other + length]))
    return bytes(spoilt[: draw.randrange(len(data))]) if draw.random() < 0.1 else bytes(spoilt)


def read_whole(path: Path) -> None:
    """Reads a file with all tensors in it, or fails as it may."""
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


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Two roads diverged in a yellow wood\n" * 100)
    refused(tmp_path / "notes.txt", "neither a zip file nor a pickle")
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty", "neither a zip file nor a pickle")
    (tmp_path / "other.pkl").write_bytes(pickle.dumps({"weights": [1, 2]}))
    refused(tmp_path / "other.pkl", "not one that torch.save wrote")
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        for name in ("metadata.json", "config.json", "model.weights.h5"):
            archive.writestr(name, "{}")
    refused(tmp_path / "model.keras", "a zip file with no data.pkl")
    refused(tmp_path, "is a folder")
    refused(tmp_path / "absent.pyth", "no such checkpoint")
    refused(tmp_path / "empty" / "weights.pyth", "damaged or no")
    refused(tmp_path / ("long" * 100), "damaged or no")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_is_not_waited_for(path: Path) -> None:
    os.mkfifo(path)
    refused(path, "no regular file")


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_pytorch_writes_is_read(old: bool, protocol: int, path: Path) -> None:
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


def test_pytorch_reads_what_was_written(path: Path) -> None:
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
