"""The wheel holds what a user needs and nothing else, and works away from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, so that the checkout stays as it is; unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("x3d_tf", "gin"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        "out",
        "./tree",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (folder / "out").glob("x3d_tf-*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_every_module_and_recipe_is_in_it(wheel: Path) -> None:
    modules = {path.relative_to(ROOT) for path in (ROOT / "x3d_tf").rglob("*.py")}
    assert {path.relative_to(wheel) for path in wheel.rglob("*.py")} == modules
    recipes = {path.relative_to(ROOT / "gin") for path in (ROOT / "gin").rglob("*.gin")}
    assert {path.relative_to(wheel / "x3d_tf" / "recipes") for path in wheel.rglob("*.gin")} == recipes


def test_it_finds_its_recipes_from_a_foreign_folder(wheel: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "x3d_tf.complexity", "--gin_file=gin/x3d_s.gin", "--gin_file=gin/data/records.gin"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
    )
    assert "x3d_s" in done.stdout, done.stderr
