"""mypy sees the networks, their parts and their options: it rejects each of these programs, and accepts the first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CORRECT = """
import keras
from x3d_tf import ModelOptions, build_detector, build_x3d
from x3d_tf.modeling.keras_parts import TrainableParts
from x3d_tf.modeling.x3d import Network

def rebuild(model: Network) -> keras.Model:
    return model.with_parts(keras.Input((4, 64, 64, 3)), TrainableParts(8))

rebuild(build_x3d("x3d_s", options=ModelOptions(se="all")))
rebuild(build_detector("x3d_s"))
"""
WRONG = {
    "a detector where a classifier is required": (
        """
from x3d_tf import build_detector
from x3d_tf.evaluation.multiview import probabilities_of

probabilities_of(build_detector("x3d_s"), 160)
""",
        'Argument 1 to "probabilities_of" has incompatible type "Detector"; expected "X3D"',
    ),
    "parts without convolutions": (
        """
import keras
from x3d_tf import build_x3d
from x3d_tf.modeling.keras_parts import ClipParts

build_x3d("x3d_s").with_parts(keras.Input((13, 160, 160, 3)), ClipParts())
""",
        'Argument 2 to "with_parts" of "Network" has incompatible type "ClipParts"; expected "Parts[Any]"',
    ),
    "an option as a keyword": (
        """
from x3d_tf import build_x3d

build_x3d("x3d_s", drop_connect=0.1)
""",
        'Unexpected keyword argument "drop_connect" for "build_x3d"',
    ),
    "an option of the wrong type": (
        """
from x3d_tf import ModelOptions, build_detector

build_detector("x3d_s", options=ModelOptions(se="some"))
""",
        'Argument "se" to "ModelOptions" has incompatible type "Literal[\'some\']"',
    ),
    "a task without methods": (
        """
from x3d_tf.tasks.base import Task

class Ranking:
    name = "ranking"

task: Task = Ranking()
""",
        'Incompatible types in assignment (expression has type "Ranking", variable has type "Task")',
    ),
    "a graph that reads a shape": (
        """
from x3d_tf.modeling.parts import Parts, Tensor

def head(x: Tensor, parts: Parts[Tensor]) -> Tensor:
    return parts.dense(x, x.shape[-1], "fc2")
""",
        '"Tensor" has no attribute "shape"',
    ),
}


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The errors that mypy reports in each program, with the project's settings."""
    folder = tmp_path_factory.mktemp("programs")
    programs = {"correct": CORRECT, **{name: program for name, (program, _) in WRONG.items()}}
    paths = {name: folder / f"program{number}.py" for number, name in enumerate(programs)}
    for name, program in programs.items():
        paths[name].write_text(program, "utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "setup.cfg"), "--cache-dir", str(folder)]
    done = subprocess.run(
        [*command, *map(str, paths.values())],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if ": error: " in line]
    found = {name: [line for line in lines if line.startswith(f"{path.name}:")] for name, path in paths.items()}
    assert sum(map(len, found.values())) == len(lines), done.stdout
    return found


def test_a_correct_program_is_accepted(messages: dict[str, list[str]]) -> None:
    assert messages["correct"] == []


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_program_is_rejected(name: str, messages: dict[str, list[str]]) -> None:
    (message,) = messages[name]
    assert WRONG[name][1] in message
