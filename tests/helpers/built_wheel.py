"""Builds the wheel from a copy of the sources, so that the checkout is not changed."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACES = {"x3d_tf": Path("x3d_tf"), "export": Path("x3d_tf/export"), "gin": Path("x3d_tf/recipes")}  # in the wheel


def copied_tree(folder: Path) -> Path:
    """Copies the sources to `folder/tree` and returns that folder."""
    tree = folder / "tree"
    for name in PLACES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    return tree


def built_wheel(tree: Path) -> Path:
    """Builds the wheel in `out`, next to the tree, and returns its path."""
    folder = tree.parent
    options = ["--no-build-isolation", "--no-deps", "--no-index", "-w", "out"]
    command = [sys.executable, "-m", "pip", "wheel", *options, f"./{tree.name}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (folder / "out").glob("x3d_tf-*.whl")
    return built
