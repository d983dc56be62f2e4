"""Every extra works alone in a new environment. Each takes minutes and downloads packages."""

import configparser
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built_wheel import ROOT, built_wheel, copied_tree
from exported_model import NAMES, model_file
from video_fixtures import write_video

TORCH = "torch==2.13.0"  # the version that parity and benchmarks compare with

Trial = Callable[["Fresh"], Any]


@dataclass(frozen=True)
class Fresh:
    """A virtual environment with one extra.

    Attributes:
        python: interpreter of the environment.
        folder: working folder of the commands.
        tree: copy of the checkout with tests and benchmarks.
    """

    python: Path
    folder: Path
    tree: Path

    def run(self, *line: object, at: Path | None = None) -> str:
        """Runs Python with the given arguments, requires exit status 0 and returns the output."""
        text = [str(part) for part in line]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [str(self.python), *text], cwd=at or self.folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, (text, done.stdout[-2000:], done.stderr[-4000:])
        return done.stdout

    def command(self, name: str, *arguments: object) -> str:
        return self.run("-m", f"x3d_tf.{name}", *arguments)

    def verified(self, form: str) -> None:
        """Verifies the exported artefact; every row of the table must be OK."""
        flags = (f"--model={model_file()}", "--artefacts=out", f"--clips={self.folder / 'videos'}", "--rounds=1")
        self.command("export.verify", *flags, "--json=table.json")
        rows = json.loads((self.folder / "table.json").read_text("utf-8"))["rows"]
        assert [(row["form"], row["verdict"]) for row in rows] == [("Keras", "OK"), (form, "OK")]


def exports(command: str, formats: str, form: str) -> Trial:
    def trial(fresh: Fresh) -> None:
        fresh.command(f"export.{command}", f"--model={model_file()}", "--output=out", f"--formats={formats}")
        fresh.verified(form)

    return trial


def serving(fresh: Fresh) -> None:
    """Runs the client with a gRPC server in this process."""
    pytest.importorskip("tensorflow_serving")
    from test_serving import floats, grpc_serving

    fed = {"frames": 4, "stride": 4, "crop": 54, "resize": 60, "frame_sampling": "slowfast"}
    (fresh.folder / "card.json").write_text(json.dumps({"input": fed, "classes": NAMES}), encoding="utf-8")
    with grpc_serving(lambda _: floats(0.5, 0.25, 0.25, 0, 0, 0)) as address:
        flags = ("--card=card.json", "--model=tiny", f"--grpc={address}", "--views=2")
        printed = fresh.command("export.serving.client", *flags, "videos/a.mp4")
    assert printed.splitlines()[1] == f"   50.0%  {NAMES[0]}"


# Ray rewrites 127.0.0.1 to the machine's own address.
CLUSTER = """
import subprocess, sys
from ray.cluster_utils import Cluster
settings = {"object_store_memory": 80 * 2**20, "node_ip_address": "127.0.0.2"}
cluster = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False, **settings})
cluster.add_node(num_cpus=1, **settings)
flags = ["--videos=classes", "--output=records", "--short_side=32", f"--ray={cluster.address}"]
done = subprocess.run([sys.executable, "-m", "x3d_tf.build_records", *flags])
cluster.shutdown()
sys.exit(done.returncode)
"""


def cluster(fresh: Fresh) -> None:
    """Builds records on a Ray cluster of one node."""
    for name in ("one", "two"):
        (fresh.folder / "classes" / name).mkdir(parents=True)
        shutil.copy(fresh.folder / "videos" / "a.mp4", fresh.folder / "classes" / name / f"{name}.mp4")
    fresh.run("-c", CLUSTER)
    assert len(json.loads((fresh.folder / "records" / "manifest.json").read_text("utf-8"))["classes"]) == 2


def benchmarks(fresh: Fresh) -> None:
    """Runs one round of all forms except torch.compile, which takes minutes; no package may be missing."""
    forms = ("--forms", "@ours", "torch eager", "torch ONNX*")
    flags = (*forms, "--networks", "x3d_xs", "--batches", "1", "--rounds", "1", "--json", fresh.folder / "figures.json")
    fresh.run("benchmarks/forward.py", *flags, at=fresh.tree)
    (table,) = json.loads((fresh.folder / "figures.json").read_text("utf-8"))["tables"]
    missing = [row for row in table["forms"] if "not installed" in json.dumps(row)]
    assert not missing


def parity(fresh: Fresh) -> None:
    """Runs pytorchvideo's network; comparing it with ours also requires [test]."""
    code = "import torch, pytorchvideo_models as p; m = p.standard('x3d_xs').model.eval()"
    fresh.run("-c", f"{code}; print(m(torch.zeros(1, 3, 4, 160, 160)).shape)", at=fresh.tree / "tests" / "helpers")


def linters_and_fast_tests(fresh: Fresh) -> None:
    """Runs the linters and some fast tests, as CI does."""
    for line in (("ruff", "check", "."), ("mypy",), ("pytest", "-q", "tests/test_cost.py", "tests/test_packaging.py")):
        fresh.run("-m", *line, at=fresh.tree)


TRIALS: dict[str, Trial | str] = {
    "bench": benchmarks,
    "cluster": cluster,
    "cuda": "needs many GB and a GPU",
    "onnx": exports("onnx", "onnx", "ONNX"),
    "openvino": exports("onnx", "openvino", "OpenVINO"),
    "parity": parity,
    "serving": serving,
    "test": linters_and_fast_tests,
    "tflite": exports("tflite", "float32", "TFLite float32"),
}


def test_every_extra_has_a_trial() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    assert set(TRIALS) == set(settings["options.extras_require"])


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = copied_tree(tmp_path_factory.mktemp("extras"))
    for name in ("tests", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    return built_wheel(tree)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Path]:
    """Yields the interpreter of a new virtual environment and deletes the environment, which takes GB, afterwards."""
    subprocess.run([sys.executable, "-m", "venv", "venv"], cwd=tmp_path, check=True)
    yield tmp_path / "venv" / "bin" / "python"
    shutil.rmtree(tmp_path / "venv")


def install(python: Path, *packages: str) -> None:
    """Installs packages, or skips the test if pip reaches no index."""
    done = subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], capture_output=True, text=True)
    if "No matching distribution found" in done.stderr or "Could not find a version" in done.stderr:
        # pip prints the same error if no release meets a requirement; a known package tells the cases apart.
        index = subprocess.run([str(python), "-m", "pip", "download", "-q", "--no-deps", "-d", python.parent, "six"])
        if index.returncode:
            pytest.skip("pip reaches no package index")
    assert done.returncode == 0, done.stderr[-4000:]


def install_torch(python: Path) -> None:
    """Installs the CPU build of PyTorch, or skips the test if pip would install the GPU build of many GB."""
    report = [str(python), "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", "--report", "-", TORCH]
    done = subprocess.run(report, capture_output=True, text=True)
    names = [entry["metadata"]["name"] for entry in json.loads(done.stdout)["install"]] if done.returncode == 0 else []
    if not names or any(name.startswith("nvidia") for name in names):
        pytest.skip(f"pip finds no build of {TORCH} for CPUs")
    install(python, TORCH)


@pytest.mark.slow
@pytest.mark.parametrize("extra", TRIALS)
def test_an_extra_alone(extra: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    trial = TRIALS[extra]
    if isinstance(trial, str):
        pytest.skip(trial)
    python, wheel = request.getfixturevalue("environment"), request.getfixturevalue("wheel")
    if extra in ("bench", "parity"):
        install_torch(python)
    tree = request.getfixturevalue("tree")
    install(python, "-e", f"{tree}[test]") if extra == "test" else install(python, f"{wheel}[{extra}]")
    (tmp_path / "videos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 60, 80, 3), dtype=np.uint8)
    write_video(tmp_path / "videos" / "a.mp4", pixels)
    trial(Fresh(python, tmp_path, tree))
