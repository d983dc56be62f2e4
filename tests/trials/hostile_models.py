"""Loads hostile .keras and .pyth files: huge numbers, zip and HDF5 attacks, code in pickles, random damage.

Each file must load or be rejected in one line, within 20 seconds and 2.2 GB (of which TensorFlow takes 0.6 GB). No file
may execute code, which a canary file detects, or read another file. A model with changed metadata may only load if its
weights match. --count random mutants of a .keras and a .pyth file follow the named cases. Finally, hostile files are
given to each command that reads a model.

  python tests/trials/hostile_models.py --count=200 --seed=0
"""

import io
import json
import os
import pickle
import random
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from harness import (
    Broke,
    Report,
    Worker,
    arguments,
    damaged,
    make_records,
    make_videos,
    outcome_of,
    recipe,
    refused,
    run,
    save_model,
    scratch,
)

Write = Callable[..., Any]  # writes a file to a path
Change = Callable[[Any], Any]  # changes an open HDF5 file

MEMBER, WEIGHTS, CONFIG = "x3d_tf.json", "model.weights.h5", "config.json"
SECRET = 1234.5
NUMBERS: dict[str, Any] = {
    "0": 0,
    "-1": -1,
    "500": 500,
    "5e3": 5000,
    "1e6": 10**6,
    "1e9": 10**9,
    "1e30": 10**30,
    "5,000 digits": "DIGITS",
    "1e308": 1e308,
    "tiny": 1e-300,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "true": True,
    "null": None,
    "text": "x\x1b[2J",
    "list": [],
    "nested": {"a": [[[[]]]]},
}


# ---- In the worker


def loader(folder: str) -> Callable[[str], tuple[str, str]]:
    """Saves a tiny model to `folder`; returns a function that loads a file and returns a hash of its weights."""
    import hashlib

    import x3d_tf

    good = Path(folder) / "good.keras"
    if not good.exists():
        save_model(good)

    def digest(path: str) -> str:
        model = x3d_tf.load(path)
        content = b"".join(array.tobytes() for array in model.get_weights())
        return hashlib.sha256(content).hexdigest()

    x3d_tf.load(good)
    return lambda path: outcome_of(lambda: digest(path))


def torch_reader(folder: str) -> Callable[[str], tuple[str, str]]:
    """Writes a small PyTorch checkpoint to `folder`; returns a function that reads a file."""
    import numpy as np

    from x3d_tf.modeling.pytorch.checkpoint_files import read_checkpoint, write_checkpoint

    rng = np.random.default_rng(0)
    state = {f"s{number}.weight": rng.standard_normal((4, 3, 3), np.float32) for number in range(5)}
    write_checkpoint(Path(folder) / "good.pyth", state)

    def read(path: str) -> str:
        content = read_checkpoint(Path(path))
        state = content.get("model_state") if isinstance(content, dict) else None
        tensors = state.values() if isinstance(state, dict) else ()
        return ", ".join(str(tensor.array().sum()) for tensor in tensors if hasattr(tensor, "array"))

    return lambda path: outcome_of(lambda: read(path))


# ---- .keras files


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(path: Path, content: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def changed_descriptions(description: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields metadata with each value replaced by each of `NUMBERS`, and texts that are not metadata."""
    fields = [
        (key, inner) for key, value in description.items() for inner in (value if isinstance(value, dict) else [""])
    ]
    for key, inner in fields:
        for label, number in NUMBERS.items():
            changed = json.loads(json.dumps(description))
            (changed[key] if inner else changed)[inner or key] = number
            text = json.dumps(changed).replace('"DIGITS"', "9" * 5000)
            yield f"{key}{'.' if inner else ''}{inner} = {label}", text
    many = {**description, "num_classes": 100_001, "class_names": [str(number) for number in range(100_001)]}
    yield "100,001 classes", json.dumps(many)
    yield "deep nesting", "[" * 100_000
    yield "deep nesting of a field", json.dumps(description)[:-1] + ', "size": ' + "[" * 100_000 + "]" * 100_000 + "}"
    yield "not JSON", "\x00\xff"
    yield "a list", "[]"
    yield "nothing", ""


def strange_archives(good: dict[str, bytes]) -> Iterator[tuple[str, Write]]:
    """Yields zip files with false metadata, or that expand to large sizes."""
    zeros = b"\0" * 100_000_000

    def expanded(path: Path, name: str, times: int) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, data in good.items():
                if member != name:
                    archive.writestr(member, data)
            with archive.open(name, "w", force_zip64=True) as file:
                for _ in range(times):
                    file.write(zeros)

    for name in (MEMBER, WEIGHTS, CONFIG):
        yield f"{name} expands to 1.5 GB", partial(expanded, name=name, times=15)
        yield (
            f"{name} is missing",
            partial(_write_without, good, name),
        )
        yield f"{name} is empty", partial(_write_with, good, {name: b""})
    more = {f"{number}.json": b"" for number in range(100_000)}
    yield "100,000 further members", lambda path: write_zip(path, {**good, **more})
    yield "a path to a parent folder", lambda path: write_zip(path, {**good, "../canary": b"x"})
    yield "false sizes", lambda path: path.write_bytes(_with_sizes(good, 2**32 - 2))
    yield "zero sizes", lambda path: path.write_bytes(_with_sizes(good, 0))
    yield "an empty file", lambda path: path.write_bytes(b"")
    yield "an endless file", lambda path: path.symlink_to("/dev/zero")
    yield "a circle of links", lambda path: path.symlink_to(path.name)
    yield "a folder", lambda path: path.mkdir()
    yield "a lambda in config.json", lambda path: write_zip(path, {**good, CONFIG: _lambda_config()})


def _write_with(good: dict[str, bytes], other: dict[str, bytes], path: Path) -> None:
    write_zip(path, {**good, **other})


def _write_without(good: dict[str, bytes], name: str, path: Path) -> None:
    write_zip(path, {member: data for member, data in good.items() if member != name})


def _with_sizes(good: dict[str, bytes], size: int) -> bytes:
    """Returns the archive with a false uncompressed size for each member in its central directory."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in good.items():
            archive.writestr(name, data)
    content, offset = bytearray(buffer.getvalue()), 0
    while (offset := content.find(b"PK\x01\x02", offset)) >= 0:
        content[offset + 24 : offset + 28] = struct.pack("<I", size)
        offset += 4
    return bytes(content)


def _lambda_config() -> bytes:
    """Returns a config with a layer that would execute Python code when it is deserialised."""
    code = {"class_name": "__lambda__", "config": {"code": "4wAAAA==", "defaults": None, "closure": None}}
    layer = {"class_name": "Lambda", "module": "keras.layers", "config": {"name": "evil", "function": code}}
    return json.dumps({"class_name": "Sequential", "module": "keras", "config": {"layers": [layer]}}).encode()


def strange_weights(secret: Path) -> Iterator[tuple[str, Change]]:
    """Yields changes of an open HDF5 file whose datasets then read other files or allocate huge arrays."""
    import h5py  # type: ignore[import-untyped]
    import numpy as np

    def names(file: Any) -> list[str]:
        datasets: list[str] = []
        file.visititems(lambda name, item: datasets.append(name) if isinstance(item, h5py.Dataset) else None)
        return datasets

    def each(replace: Callable[[Any, str, Any], None]) -> Change:
        def change(file: Any) -> None:
            for name in names(file):
                old = file[name]
                shape, dtype = old.shape, old.dtype
                del file[name]
                replace(file, name, (shape, dtype))

        return change

    def external_storage(file: Any, name: str, kind: Any) -> None:
        size = int(np.prod(kind[0])) * kind[1].itemsize
        file.create_dataset(name, kind[0], kind[1], external=[(str(secret), 0, max(size, 1))])

    def virtual(file: Any, name: str, kind: Any) -> None:
        layout = h5py.VirtualLayout(kind[0], kind[1])
        if kind[0]:
            layout[...] = h5py.VirtualSource(str(secret.with_suffix(".h5")), "data", kind[0])
        file.create_virtual_dataset(name, layout)

    def external_link(file: Any, name: str, kind: Any) -> None:
        file[name] = h5py.ExternalLink(str(secret.with_suffix(".h5")), "data")

    def huge(file: Any, name: str, kind: Any) -> None:
        file.create_dataset(name, (10**12,), "f4", chunks=(1024,))

    def other_shape(file: Any, name: str, kind: Any) -> None:
        file.create_dataset(name, (*kind[0], 2**30), "f4", chunks=(*((1,) * len(kind[0])), 1024))

    yield "external storage", each(external_storage)
    yield "virtual datasets", each(virtual)
    yield "external links", each(external_link)
    yield "a soft link to itself", each(lambda file, name, kind: file.__setitem__(name, h5py.SoftLink(f"/{name}")))
    yield "datasets of 4 TB", each(huge)
    yield "another axis of 2^30", each(other_shape)
    yield "text instead of numbers", each(lambda file, name, kind: file.__setitem__(name, b"x"))
    yield "groups instead of datasets", each(lambda file, name, kind: file.create_group(name))
    yield (
        "NaN",
        lambda file: [file[name].__setitem__(..., np.nan) for name in names(file) if file[name].dtype.kind == "f"],
    )


def changed_weights(weights: bytes, change: Change) -> bytes:
    import h5py

    buffer = io.BytesIO(weights)
    with h5py.File(buffer, "r+") as file:
        change(file)
    return buffer.getvalue()


def write_secrets(secret: Path) -> None:
    """Writes files that a model must not read, filled with one value."""
    import h5py
    import numpy as np

    secret.write_bytes(np.full(200_000, SECRET, np.float32).tobytes())
    with h5py.File(secret.with_suffix(".h5"), "w") as file:
        file["data"] = np.full(200_000, SECRET, np.float32)


def keras_files(folder: Path) -> Iterator[tuple[str, Write]]:
    """Yields named hostile .keras files, as functions that write them to a path."""
    good = members(folder / "good.keras")
    for words, text in changed_descriptions(json.loads(good[MEMBER])):
        data = text.encode("utf-8", "surrogateescape")
        yield words, partial(_write_with, good, {MEMBER: data})
    yield from strange_archives(good)
    write_secrets(folder / "secret")
    for words, change in strange_weights(folder / "secret"):
        yield f"weights: {words}", partial(_write_changed, good, change)


def _write_changed(good: dict[str, bytes], change: Change, path: Path) -> None:
    write_zip(path, {**good, WEIGHTS: changed_weights(good[WEIGHTS], change)})


def try_keras(report: Report, folder: Path) -> None:
    """Loads all .keras files in the worker."""
    reader = Worker(loader, str(folder), seconds=20, megabytes=2200)
    kind, intact = reader.ask(str(folder / "good.keras"))
    assert kind == "gives", intact
    path = folder / "evil.keras"
    for name, write in keras_files(folder):
        if report.chosen.only in f"keras {name}":
            _clear(path)
            write(path)
            report.add(f"keras {name}", _problem(report, reader, path, None if "= " in name else intact, name))
    good = (folder / "good.keras").read_bytes()
    for number in range(report.chosen.count):
        name = f"keras mutant {number}"
        if report.chosen.only in name:
            _clear(path)
            words, content = _mutant(good, random.Random(f"{report.chosen.seed}/keras/{number}"))
            path.write_bytes(content)
            report.add(f"{name}: {words}", _problem(report, reader, path, intact, name))
    reader.close()


def _mutant(good: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Damages a .keras file, or one member that is then stored with a valid checksum."""
    kind = rng.choice(("flip", "cut"))
    name = rng.choice((None, MEMBER, WEIGHTS))
    if name is None:
        return damaged(good, kind, rng)
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        content = {member: archive.read(member) for member in archive.namelist()}
    words, content[name] = damaged(content[name], kind, rng)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, data in content.items():
            archive.writestr(member, data)
    return f"{name} {words}", buffer.getvalue()


def _problem(report: Report, reader: Worker, path: Path, intact: str | None, name: str) -> str | None:
    """Returns the problem with the outcome for a file, or None. Files that load with other weights are only counted."""
    try:
        kind, text = reader.ask(str(path))
    except Broke as error:
        return f"the reader {error}"
    if kind == "breaks":
        return f"ends in a traceback: {text}"
    if kind == "refuses":
        return "the error is not one line" if "\n" in text.strip() or not text.isprintable() else None
    if any(word in name for word in ("external", "virtual")):
        return "ANOTHER FILE WAS READ, or initial weights were kept without an error"
    report.note("files that load" if intact in (None, text) else "files that load, with other weights")
    return None


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


# ---- .pyth files


class Call:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def pickles(canary: Path) -> Iterator[tuple[str, bytes]]:
    """Yields pickles that execute code or exhaust memory."""
    touch = f"touch {canary}"
    for words, item in {
        "os.system": Call(os.system, touch),
        "subprocess.getoutput": Call(subprocess.getoutput, touch),
        "eval": Call(eval, f"__import__('os').system({touch!r})"),
        "exec": Call(exec, f"import os; os.system({touch!r})"),
        "getattr": Call(getattr, os, "system"),
        "open": Call(open, str(canary), "w"),
        "bytearray of 10 GB": Call(bytearray, 10**10),
    }.items():
        for protocol in (2, 4):
            with_code = item
            if words == "getattr":
                with_code = Call(getattr, "", "join")
            yield f"{words}, protocol {protocol}", pickle.dumps({"model_state": with_code}, protocol)
    yield "a list in lists", b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b"."
    yield "a tuple in tuples", b"\x80\x02)" + b"\x85" * 1_900_000 + b"."
    yield "a number of 1 GB", b"\x80\x02\x8b" + struct.pack("<i", 10**9) + b"."
    yield "a text of 2^62 bytes", b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"."
    yield "memo 2^31", b"\x80\x02N" + b"r" + struct.pack("<I", 2**31) + b"."
    yield "doubling lists", b"\x80\x02]" + b"q\x00" + b"(h\x00h\x00e" * 10 + b"." + b"2l" * 10
    yield "nothing", b""
    yield "a digit", b"I" + b"9" * 100_000 + b"\n."


def as_torch_zip(path: Path, data: bytes) -> None:
    write_zip(path, {"weights/data.pkl": data, "weights/byteorder": b"little", "weights/version": b"3\n"})


def try_torch(report: Report, folder: Path) -> None:
    """Reads all .pyth files in the worker."""
    reader = Worker(torch_reader, str(folder), seconds=10, megabytes=1500)
    path, canary = folder / "evil.pyth", folder / "canary"
    good = (folder / "good.pyth").read_bytes()

    def attempt(name: str) -> None:
        problem = _problem(report, reader, path, None, "")
        report.add(name, "CODE WAS EXECUTED: the canary exists" if canary.exists() else problem)
        canary.unlink(missing_ok=True)

    for words, data in pickles(canary):
        for form in ("zip", "plain"):
            name = f"pyth {words}, {form}"
            if report.chosen.only in name:
                as_torch_zip(path, data) if form == "zip" else path.write_bytes(data)
                attempt(name)
    for number in range(report.chosen.count):
        if report.chosen.only in (name := f"pyth mutant {number}"):
            rng = random.Random(f"{report.chosen.seed}/pyth/{number}")
            words, content = damaged(good, rng.choice(("flip", "cut")), rng)
            path.write_bytes(content)
            attempt(f"{name}: {words}")
    reader.close()


# ---- The commands


def try_commands(report: Report, folder: Path) -> None:
    """Gives hostile files to each command that reads a model."""
    good = members(folder / "good.keras")
    description = json.loads(good[MEMBER])
    description["expansion"]["gamma_w"] = 500.0
    bomb = folder / "bomb.keras"
    write_zip(bomb, {**good, MEMBER: json.dumps(description).encode()})
    records, videos = make_records(folder / "records"), make_videos(folder / "videos", 1)
    config = folder / "tiny.gin"
    config.write_text(recipe(records, steps=3, others={"TrainConfig.init": str(bomb)}))
    pickled = folder / "code.pyth"
    as_torch_zip(pickled, pickle.dumps({"model_state": Call(os.system, f"touch {folder / 'canary'}")}, 2))
    words = {
        "predict": ("x3d_tf.predict", f"--model={bomb}", str(videos)),
        "train from it": ("x3d_tf.train", f"--gin_file={config}", f"--workdir={folder / 'run'}"),
        "export.saved_model": ("export.saved_model", f"--model={bomb}", f"--output={folder / 'served'}"),
        "export.tflite": ("export.tflite", f"--model={bomb}", f"--output={folder / 'exported'}"),
        "import_weights --to": ("x3d_tf.import_weights", str(bomb), "--to=slowfast", f"--output={folder / 'o.pyth'}"),
        "import_weights of code": (
            "x3d_tf.import_weights",
            str(pickled),
            "--variant=x3d_s",
            f"--output={folder / 'o.keras'}",
        ),
    }

    def attempt(line: tuple[str, ...]) -> str | None:
        ended = run(*line, folder=folder, seconds=report.chosen.seconds, megabytes=2200)
        return "CODE WAS EXECUTED" if (folder / "canary").exists() else refused(ended)

    report.run((f"command {name}", partial(attempt, line)) for name, line in words.items())


def main() -> None:
    """Runs the trials."""
    report = Report("hostile_models", arguments(__doc__ or "", count=200, seconds=60))
    with scratch() as folder:
        try_torch(report, folder)
        try_keras(report, folder)
        try_commands(report, folder)
    report.close()


if __name__ == "__main__":
    main()
