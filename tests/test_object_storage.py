"""Addresses of object stores are refused by every command, before it creates a folder of that name."""

import ast
from pathlib import Path

import pytest
from no_tensorflow import without_tensorflow

from x3d_tf.config import TrainConfig
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.errors import UserError
from x3d_tf.files import require_local

ROOT = Path(__file__).parents[1]
GIN = "--gin_file=gin/few_videos.gin"

FLAGS = {  # flags that make each command read or write an address, and the flag that its error must name
    "train": ((GIN, "--workdir=gs://bucket/run"), "--workdir"),
    "evaluate": (("--model=a.keras", "--records=r", "--split=test", "--output=s3://bucket/report"), "--output"),
    "build_records": (("--videos=v", "--output=gs://bucket/records"), "--output"),
    "expand": ((GIN, "--workdir=gs://bucket/search"), "--workdir"),
    "predict": (("--model=gs://bucket/run", "party.mp4"), "--model"),
    "preview": ((GIN, "--output=GS://bucket/preview.png"), "--output"),
    "import_weights": (("s3://bucket/x3d_m.pyth", "--variant=x3d_m", "--output=a.keras"), "the path of a file"),
    "complexity": (("--gin_file=gs://bucket/a.gin",), "--gin_file"),
    "export.onnx": (("--model=m", "--output=gs://bucket/exported"), "--output"),
    "export.saved_model": (("--model=m", "--output=gs://bucket/exported"), "--output"),
    "export.tflite": (("--model=m", "--output=gs://bucket/exported"), "--output"),
    "export.verify": (("--model=m", "--artefacts=gs://bucket/exported", "--clips=c"), "--artefacts"),
    "export.serving.client": (("--card=gs://bucket/card.json", "--rest=http://127.0.0.1:1", "a.mp4"), "--card"),
}


def commands() -> set[str]:
    """Returns the names of all modules that call `commands.run`."""
    found = set()
    for folder, prefix in (("x3d_tf", ""), ("export", "export.")):
        for path in (ROOT / folder).rglob("*.py"):
            calls = (node.func for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call))
            if any(ast.unparse(call) == "commands.run" for call in calls):
                found.add(prefix + ".".join(path.relative_to(ROOT / folder).with_suffix("").parts))
    return found


def test_every_command_is_tested_here() -> None:
    assert set(FLAGS) == commands()


@pytest.mark.parametrize("command", FLAGS)
def test_a_command_refuses_an_address(command: str, tmp_path: Path) -> None:
    flags, named = FLAGS[command]
    done = without_tensorflow(command, *flags, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {named}")
    assert "must be a path of a mounted file system" in done.stderr and "://bucket/" in done.stderr
    assert done.stderr.count("\n") == 1 and [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("command", ["train", "expand", "preview"])
def test_records_in_a_configuration(command: str, tmp_path: Path) -> None:
    binding = "--gin_bindings=DatasetSpec.records='gs://bucket/records'"
    done = without_tensorflow(command, GIN, binding, cwd=tmp_path)
    assert done.stderr.startswith("error: DatasetSpec.records must be a path of a mounted file system, because")
    assert [*tmp_path.iterdir()] == []


def test_a_file_of_a_split(tmp_path: Path) -> None:
    done = without_tensorflow("build_records", "--lists=train=gs://bucket/train.csv", "--output=r", cwd=tmp_path)
    assert done.stderr.startswith("error: --lists must be a path of a mounted file system")


def test_an_address_of_a_server_is_accepted(tmp_path: Path) -> None:
    flags = ("--card=card.json", "--rest=http://127.0.0.1:1", "a.mp4")
    done = without_tensorflow("export.serving.client", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "error: no such file: a.mp4\n")


def test_settings_of_the_library() -> None:
    with pytest.raises(UserError, match=r"DatasetSpec\.records must be a path of a mounted .*, got 's3://bucket/r'"):
        DatasetSpec("s3://bucket/r")
    with pytest.raises(UserError, match=r"TrainConfig\.init must be a path of a mounted"):
        TrainConfig(init="gs://bucket/run")


@pytest.mark.parametrize("path", ["runs/a", "/data/a:b//c", "C:\\data", "c://data", "gs:", "a b://c", ""])
def test_other_paths_are_accepted(path: str) -> None:
    require_local(path, "the path")
