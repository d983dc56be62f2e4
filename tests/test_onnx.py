"""ONNX and OpenVINO files, which are run if their runtimes are installed."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from exported_model import three_classes
from x3d_tf.export import onnx as exporter
from x3d_tf.export.models import ExportableModel
from x3d_tf.export.runtimes import Artefact, open_artefact

import x3d_tf

NAMES = ("hug", "kick", "wave")


def without(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed")


NEEDS_ONNX, NEEDS_OPENVINO = without("onnx", "tf2onnx", "onnxruntime"), without("openvino")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ExportableModel:
    return three_classes(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        pytest.param("onnx", None, marks=NEEDS_ONNX),
        pytest.param("openvino", None, marks=NEEDS_OPENVINO),
        pytest.param("openvino", 2, marks=NEEDS_OPENVINO),
    ],
)
def test_outputs_match_the_network(name: str, batch: int | None, source: ExportableModel, tmp_path: Path) -> None:
    written = exporter.export_formats(source, tmp_path / "new", [name], batch=batch)
    assert sorted(written) == sorted((tmp_path / "new").iterdir())  # no hidden files are left
    assert {path.stem for path in written} == {"model"}
    runner = open_artefact(Artefact(written[-1], {"onnx": "onnxruntime"}.get(name, name)), threads=1)
    assert (runner.batch, runner.clip) == (batch, (4, 64, 64, 3))
    clips = np.random.default_rng(1).integers(0, 256, (2, 4, 64, 64, 3), dtype=np.uint8)
    expected = x3d_tf.portable(source.model, NAMES)(clips)
    np.testing.assert_allclose(runner(clips), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"already exists: .*; choose another --output, or replace with --overwrite"):
        exporter.export_formats(source, tmp_path / "new", [name], batch=batch)
    facts = {"onnx": onnx_facts, "openvino": openvino_facts}[name](written[-1])
    assert facts.pop("labels").split("\n") == list(NAMES)
    assert json.loads(facts.pop("card"))["input"]["shape"] == [batch or "N", 4, 64, 64, 3]
    assert facts == {"inputs": ["clips"], "outputs": ["probabilities"], "types": ["uint8", "float32"]}


def onnx_facts(path: Path) -> dict:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    tensors = [*session.get_inputs(), *session.get_outputs()]
    assert [tensor.shape[0] for tensor in tensors] == ["N", "N"]
    types = [{"tensor(uint8)": "uint8", "tensor(float)": "float32"}[tensor.type] for tensor in tensors]
    names = {"inputs": [t.name for t in session.get_inputs()], "outputs": [t.name for t in session.get_outputs()]}
    return session.get_modelmeta().custom_metadata_map | names | {"types": types}


def openvino_facts(path: Path) -> dict:
    import openvino

    model = openvino.Core().read_model(path)
    types = [port.get_element_type().to_dtype().name for port in (*model.inputs, *model.outputs)]
    names = {"inputs": [port.any_name for port in model.inputs], "outputs": [port.any_name for port in model.outputs]}
    facts = {name: model.get_rt_info(["x3d_tf", name]).astype(str) for name in ("labels", "card")}
    return facts | names | {"types": types}


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter.importlib.util, "find_spec", lambda name: None if name == "tf2onnx" else object())
    with pytest.raises(ValueError, match=r"--formats=onnx requires tf2onnx, .* pip install 'x3d_tf\[onnx\]'"):
        exporter.require_formats(["onnx"])
    monkeypatch.setattr(exporter.importlib.util, "find_spec", lambda name: None if name == "scipy" else object())
    with pytest.raises(ValueError, match=r"--formats=openvino requires scipy, .* pip install 'x3d_tf\[openvino\]'"):
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
    monkeypatch.setattr("keras.Model.export", fails)
    with pytest.raises(ValueError, match=rf"--formats={name} failed: DLL not found; pip install 'x3d_tf\[{name}\]'"):
        exporter.export_formats(source, tmp_path / "new" / "folder", [name])
    assert not list(tmp_path.iterdir())
    (tmp_path / "kept").mkdir()
    with pytest.raises(ValueError, match="DLL"):
        exporter.export_formats(source, tmp_path / "kept", [name])
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]


@NEEDS_OPENVINO
def test_a_failed_export_leaves_no_files(
    source: ExportableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path, *_: object) -> None:
        assert path.is_file()
        raise RuntimeError("in the last step")

    monkeypatch.setitem(exporter._FINISHERS, "openvino", fails)
    with pytest.raises(RuntimeError, match="in the last step"):
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
