"""ONNX and OpenVINO files, which are run if their runtimes are installed. Their graphs: `test_onnx_parts`."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported_model import three_classes
from x3d_tf.export import onnx as exporter
from x3d_tf.export.models import ExportableModel

import x3d_tf
from x3d_tf.files import WriteError
from x3d_tf.runtimes.runners import Artefact, import_openvino, open_artefact, probabilities

NAMES = ("hug", "kick", "wave")


def without(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed")


NEEDS_ONNX, NEEDS_OPENVINO = without("onnx", "onnxruntime"), without("onnx", "openvino")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ExportableModel:
    return three_classes(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("name", "runtime", "batch"),
    [
        pytest.param("onnx", "onnxruntime", None, marks=NEEDS_ONNX),
        pytest.param("onnx", "openvino", 1, marks=NEEDS_ONNX),
        pytest.param("openvino", "onnxruntime", None, marks=NEEDS_OPENVINO),
        pytest.param("openvino", "openvino", 2, marks=NEEDS_OPENVINO),
    ],
)
def test_outputs_match_the_network(
    name: str,
    runtime: Any,
    batch: int | None,
    source: ExportableModel,
    tmp_path: Path,
) -> None:
    written = exporter.export_formats(source, tmp_path / "new", [name], runtime=runtime, batch=batch)
    assert sorted(written) == sorted((tmp_path / "new").iterdir())  # no hidden files are left
    assert {path.stem for path in written} == {"model"}
    runner = open_artefact(Artefact(written[-1], {"onnx": "onnxruntime"}.get(name, name)), threads=1)
    assert (runner.batch, runner.clip) == (batch, (4, 64, 64, 3))
    clips = np.random.default_rng(1).integers(0, 256, (2, 4, 64, 64, 3), dtype=np.uint8)
    np.testing.assert_allclose(probabilities(runner, clips), x3d_tf.portable(source.model, NAMES)(clips), atol=1e-5)
    with pytest.raises(ValueError, match=r"already exists: .*; choose another --output, or replace with --overwrite"):
        exporter.export_formats(source, tmp_path / "new", [name], batch=batch)
    facts = {"onnx": onnx_facts, "openvino": openvino_facts}[name](written[-1])
    assert facts.pop("labels").split("\n") == list(NAMES)
    card, shape = json.loads(facts.pop("card")), [batch or "N", 4, 64, 64, 3]
    assert card["input"]["shape"] == shape and card["artefact"] == {"onnx": "ONNX", "openvino": "OpenVINO"}[name]
    fastest = runtime if name == "onnx" else "openvino"
    assert card["onnx"] == {
        "opset": 17,
        "form": {"onnxruntime": "taps", "openvino": "grouped"}[fastest],
        "runtime": fastest,
        "shapes": {"clips": shape, "probabilities": [shape[0], 3]},
    }
    assert facts == {
        "inputs": ["clips"],
        "outputs": ["probabilities"],
        "types": ["uint8", "float32"],
        "kernel": [24, 1, 3, 3, 3] if card["onnx"]["form"] == "grouped" else [24, 1, 3, 3],
    }


def onnx_facts(path: Path) -> dict:
    import onnx
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    tensors = [*session.get_inputs(), *session.get_outputs()]
    graph = onnx.load(path).graph
    (kernel,) = (list(w.dims) for w in graph.initializer if re.fullmatch("res2_0_conv_b(/1)?/kernel", w.name))
    types = [{"tensor(uint8)": "uint8", "tensor(float)": "float32"}[tensor.type] for tensor in tensors]
    names = {"inputs": [t.name for t in session.get_inputs()], "outputs": [t.name for t in session.get_outputs()]}
    return session.get_modelmeta().custom_metadata_map | names | {"types": types, "kernel": kernel}


@NEEDS_OPENVINO
def test_openvino_sends_no_usage_data(tmp_path: Path) -> None:
    """Its telemetry writes the identifier of the user into the home folder."""
    code = "from x3d_tf.runtimes.runners import import_openvino; import_openvino().Core()"
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    subprocess.run([sys.executable, "-c", code], env={**environment, "HOME": str(tmp_path)}, check=True)
    assert [*tmp_path.iterdir()] == []


def openvino_facts(path: Path) -> dict:
    openvino = import_openvino()

    model = openvino.Core().read_model(path)
    types = [port.get_element_type().to_dtype().name for port in (*model.inputs, *model.outputs)]
    names = {"inputs": [port.any_name for port in model.inputs], "outputs": [port.any_name for port in model.outputs]}
    facts = {name: model.get_rt_info(["x3d_tf", name]).astype(str) for name in ("labels", "card")}
    constants = [node for node in model.get_ordered_ops() if node.get_type_name() == "Constant"]
    assert {node.get_element_type().to_dtype().name for node in constants} <= {"float32", "int64", "int32"}
    shape = list(model.inputs[0].get_partial_shape())
    assert shape[0].is_dynamic or not any(node.get_type_name() == "ShapeOf" for node in model.get_ordered_ops())
    # (groups, outputs of a group, inputs of a group, frames, rows, columns)
    (kernel,) = (
        list(node.input_value(1).get_shape())
        for node in model.get_ordered_ops()
        if node.get_type_name() == "GroupConvolution" and node.get_friendly_name().startswith("res2_0_conv_b")
    )
    return facts | names | {"types": types, "kernel": [kernel[0] * kernel[1], *kernel[2:]]}


@functools.cache
def detector() -> x3d_tf.Detector:
    """A detector with a classifier layer that tells boxes apart."""
    network = x3d_tf.build_detector(x3d_tf.Expansion(gamma_tau=2, gamma_t=4, gamma_s=64 / 112, gamma_d=0.2), 3)
    kernel = network.get_layer("fc2").kernel
    kernel.assign(np.random.default_rng(0).normal(0, 1, kernel.shape))
    return network


@pytest.mark.parametrize(
    ("name", "runtime", "batch"),
    [
        pytest.param("onnx", "openvino", 1, marks=NEEDS_ONNX),
        pytest.param("openvino", "onnxruntime", None, marks=NEEDS_OPENVINO),
    ],
)
def test_a_detector_through_the_command(
    name: str,
    runtime: str,
    batch: int | None,
    tmp_path: Path,
    in_process: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    x3d_tf.save(detector(), tmp_path / "model.keras", NAMES)
    out = tmp_path / "out"
    out.mkdir()
    for suffix in exporter.SUFFIXES[name]:
        (out / f"model{suffix}").write_text("an earlier export")
    settings = [f"--formats={name}", f"--runtime={runtime}", f"--batch={batch or 0}", "--overwrite"]
    in_process(exporter, f"--model={tmp_path / 'model.keras'}", f"--output={out}", *settings)
    printed = capsys.readouterr().out
    assert "written: " in printed and "export.verify" not in printed  # which runs classifiers only
    (path,) = (path for path in out.iterdir() if path.suffix in (".onnx", ".xml"))
    side, draw = detector().eval_size, np.random.default_rng(1)
    clips = draw.integers(0, 256, (1, 4, side, side, 3), dtype=np.uint8)
    boxes = np.sort(draw.random((1, 5, 2, 2), np.float32), axis=2).reshape(1, 5, 4)
    expected = np.asarray(detector()({"clip": clips, "boxes": boxes}))
    assert np.ptp(expected, axis=1).max() > 1e-3
    np.testing.assert_allclose(scores(path)({"clips": clips, "boxes": boxes}), expected, atol=1e-5)
    card = json.loads({"onnx": onnx_facts, "openvino": openvino_facts}[name](path)["card"])["onnx"]
    size: int | str = batch or "N"
    assert (card["form"], card["runtime"]) == ("grouped", "openvino")
    assert card["shapes"] == {"clips": [size, 4, side, side, 3], "boxes": [size, "B", 4], "scores": [size, "B", 3]}
    with pytest.raises(ValueError, match=r"must have one input, clips, got \['clips', 'boxes'\]"):
        open_artefact(Artefact(path, {".onnx": "onnxruntime", ".xml": "openvino"}[path.suffix]), threads=1)


def scores(path: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        return lambda inputs: session.run(["scores"], inputs)[0]
    openvino = import_openvino()

    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda inputs: model(inputs)["scores"]


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter.importlib.util, "find_spec", lambda name: None if name == "onnx" else object())
    with pytest.raises(ValueError, match=r"--formats=onnx requires onnx, .* pip install 'x3d_tf\[onnx\]'"):
        exporter.require_formats(["onnx"])
    monkeypatch.setattr(exporter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"openvino requires onnx, openvino, .* pip install 'x3d_tf\[openvino\]'"):
        exporter.require_formats(["openvino"])
    with pytest.raises(ValueError, match="--formats must be a list of onnx, openvino, got 'onnx,coreml'"):
        exporter.require_formats(["onnx", "coreml"])
    with pytest.raises(ValueError, match="--formats must be a list of onnx, openvino, got ''"):
        exporter.require_formats([])


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_a_package_that_cannot_be_imported(
    name: str, source: ExportableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ImportError("DLL\nnot found")

    monkeypatch.setattr(exporter, "require_formats", lambda _: None)
    monkeypatch.setitem(exporter._WRITERS, name, fails)
    with pytest.raises(ValueError, match=rf"--formats={name} failed: DLL not found; pip install 'x3d_tf\[{name}\]'"):
        exporter.export_formats(source, tmp_path / "new" / "folder", [name])
    assert not list(tmp_path.iterdir())
    (tmp_path / "kept").mkdir()
    with pytest.raises(ValueError, match="DLL"):
        exporter.export_formats(source, tmp_path / "kept", [name])
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]


def test_a_failed_export_leaves_no_files(
    source: ExportableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path, *_: object) -> None:
        path.with_suffix(".onnx").write_bytes(b"incomplete")
        raise RuntimeError("in the last step")

    monkeypatch.setattr(exporter, "require_formats", lambda _: None)
    monkeypatch.setitem(exporter._WRITERS, "openvino", fails)
    with pytest.raises(RuntimeError, match="in the last step"):
        exporter.export_formats(source, tmp_path, ["openvino"])
    assert not list(tmp_path.iterdir())


def test_overwrite_leaves_no_xml_file_beside_other_weights(
    source: ExportableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(content: str) -> None:
        def write(path: Path, *_: object) -> None:
            for suffix in (".bin", ".xml"):
                path.with_suffix(suffix).write_text(content)

        monkeypatch.setitem(exporter._WRITERS, "openvino", write)
        exporter.export_formats(source, tmp_path, ["openvino"], overwrite=True)

    def files() -> dict[str, str]:
        return {path.name: path.read_text() for path in tmp_path.iterdir()}

    def interrupted(partial: Path, path: Path) -> None:
        if path.suffix == ".xml":
            raise KeyboardInterrupt
        partial.replace(path)

    monkeypatch.setattr(exporter, "require_formats", lambda _: None)
    export("old")
    export("new")
    assert files() == {"model.bin": "new", "model.xml": "new"}
    monkeypatch.setattr(exporter, "commit_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export("newer")
    assert files() == {"model.bin": "newer"}


def test_an_unknown_runtime_is_named(source: ExportableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "require_formats", lambda _: None)
    with pytest.raises(ValueError, match="runtime must be one of onnxruntime, openvino, got 'other'"):
        exporter.export_formats(source, tmp_path, ["onnx"], runtime="other")  # type: ignore[arg-type]


@NEEDS_OPENVINO
@pytest.mark.parametrize("fails", ["at once", "after half of the weights"])
def test_openvino_files_that_cannot_be_written(
    fails: str, source: ExportableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = import_openvino()

    save = openvino.save_model

    def save_partly(model: Any, path: Path, **options: Any) -> None:
        if fails == "at once":
            raise RuntimeError("disk\nfull")
        save(model, path, **options)
        weights = path.with_suffix(".bin")
        os.truncate(weights, weights.stat().st_size // 2)

    monkeypatch.setattr(openvino, "save_model", save_partly)
    reason = "disk full" if fails == "at once" else ".*bin"
    with pytest.raises(WriteError, match=f"{re.escape(str(tmp_path / 'model'))} cannot be written: {reason}"):
        exporter.export_formats(source, tmp_path, ["openvino"])
    assert not list(tmp_path.iterdir())


@NEEDS_OPENVINO
def test_the_example_in_the_readme(source: ExportableModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (
        (Path(__file__).parent.parent / "export" / "README.md").read_text("utf-8").split("\n## ONNX and OpenVINO\n")[1]
    )
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.M)
    file = exporter.export_formats(source, tmp_path, ["openvino"])[-1]
    exec(code.replace("exported/mine/mine.xml", str(file)), {})
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES)
