"""The wheel holds what a user needs and nothing else, and works away from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = {"x3d_tf": Path("x3d_tf"), "export": Path("x3d_tf/export"), "gin": Path("x3d_tf/recipes")}  # in the wheel


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the wheel is made of, so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("wheel") / "tree"
    for name in PLACES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """Built from the copy, and unpacked."""
    folder = tree.parent
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


def run(*module_and_flags: str, at: Path, path: Path) -> subprocess.CompletedProcess[str]:
    """Runs a module in a folder, with another one on Python's path."""
    command = [sys.executable, "-m", *module_and_flags]
    return subprocess.run(command, cwd=at, env=os.environ | {"PYTHONPATH": str(path)}, capture_output=True, text=True)


def files(folder: Path, pattern: str) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob(pattern) if path.is_file()}


def test_every_module_and_recipe_is_in_it(wheel: Path) -> None:
    modules = {place / path for name, place in PLACES.items() for path in files(ROOT / name, "*.py")}
    assert files(wheel, "*.py") == modules
    assert files(wheel / "x3d_tf" / "recipes", "*.gin") == files(ROOT / "gin", "*.gin")


def test_the_exporters_other_files_are_in_it(wheel: Path) -> None:
    """What a server needs lies beside the code: Dockerfile, settings, the page that explains them."""
    wanted = {path for path in files(ROOT / "export", "*") if "__pycache__" not in path.parts}
    assert files(wheel / "x3d_tf" / "export", "*") == wanted


def test_nothing_goes_by_another_name(wheel: Path) -> None:
    assert sorted(path.name for path in wheel.iterdir() if not path.name.endswith(".dist-info")) == ["x3d_tf"]


def test_it_finds_its_recipes_from_a_foreign_folder(wheel: Path, tmp_path: Path) -> None:
    flags = ("--gin_file=gin/x3d_s.gin", "--gin_file=gin/data/records.gin")
    done = run("x3d_tf.complexity", *flags, at=tmp_path, path=wheel)
    assert "x3d_s" in done.stdout, done.stderr


COMMANDS = sorted(
    ".".join(path.with_suffix("").parts)
    for path in files(ROOT / "export", "*.py")
    if "_command.run(main" in (ROOT / "export" / path).read_text(encoding="utf-8")
)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_exporter_has_two_names_and_one_copy(command: str, tree: Path, wheel: Path, tmp_path: Path) -> None:
    """`export.COMMAND` in a checkout, `x3d_tf.export.COMMAND` from a wheel; each from where the other is not."""
    in_checkout = run(f"export.{command}", "--help", at=tree, path=tree)
    installed = run(f"x3d_tf.export.{command}", "--help", at=tmp_path, path=wheel)
    for done in (in_checkout, installed):
        assert f"python -m export.{command}" in done.stdout, done.stderr
    missing = run(f"export.{command}", "--help", at=tmp_path, path=wheel)
    assert "ModuleNotFoundError" in missing.stderr and "'export'" in missing.stderr
    copies = (folder / "export" / f"{command.replace('.', '/')}.py" for folder in (tree, wheel / "x3d_tf"))
    assert len({copy.read_bytes() for copy in copies}) == 1
