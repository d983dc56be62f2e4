"""Requirements, and the contents of the wheel, which must work outside the checkout."""

import configparser
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from built_wheel import PLACES, ROOT, built_wheel, copied_tree
from packaging.requirements import Requirement
from packaging.version import Version
from x3d_tf.export import onnx

from x3d_tf.runtimes import runners

# The lowest releases without known vulnerabilities in the parts that this package uses.
FLOORS = {
    "keras": "3.15.1",  # earlier releases let a crafted .keras file read other files
    "onnx": "1.21",
    "pillow": "12.3",
    "scikit-learn": "1.5",
    "setuptools": "78.1.1",
    "tensorflow": "2.21",
    "torch": "2.6",  # earlier releases execute code in torch.load(weights_only=True)
    "tqdm": "4.66.3",
}
UNBOUNDED = {"setuptools"}  # setup.cfg gives the reason


def requirements() -> list[Requirement]:
    """Returns all requirements in setup.cfg and pyproject.toml."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    lists = [settings["options"]["install_requires"], *settings["options.extras_require"].values()]
    lines = [line for text in lists for line in text.splitlines() if line and not line.startswith("#")]
    lines += tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["build-system"]["requires"]
    return [Requirement(line) for line in lines]


def lowest(requirement: Requirement) -> Version:
    """Returns the lowest release that a requirement allows."""
    (floor,) = (entry.version for entry in requirement.specifier if entry.operator in (">=", "=="))
    return Version(floor)


def test_floors_are_without_known_vulnerabilities() -> None:
    all_requirements = requirements()
    assert set(FLOORS) <= {requirement.name for requirement in all_requirements}
    low = {
        str(entry) for entry in all_requirements if entry.name in FLOORS and lowest(entry) < Version(FLOORS[entry.name])
    }
    assert not low


def test_installed_releases_meet_the_requirements() -> None:
    for requirement in requirements():
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # belongs to an extra
        assert requirement.specifier.contains(installed, prereleases=True), f"{requirement}: {installed} is installed"


def test_requirements_have_upper_bounds() -> None:
    for requirement in requirements():
        bounded = any(entry.operator in ("<", "==") for entry in requirement.specifier)
        assert bounded != (requirement.name in UNBOUNDED), f"{requirement}"


def test_extras_include_the_packages_of_their_exporters() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    for extra, packages in onnx.PACKAGES.items():
        for name in (extra, "bench"):  # the benchmarks export both
            assert set(packages) <= set(re.findall(r"^[\w-]+", settings["options.extras_require"][name], re.MULTILINE))
    assert set(runners.EXTRAS.values()) <= set(settings["options.extras_require"])


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied_tree(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """Returns the folder of the unpacked wheel."""
    unpacked = tree.parent / "unpacked"
    with zipfile.ZipFile(built_wheel(tree)) as archive:
        archive.extractall(unpacked)
    return unpacked


def run(*module_and_flags: str, at: Path, path: Path) -> subprocess.CompletedProcess[str]:
    """Runs a module in the folder `at` with `path` on PYTHONPATH."""
    command = [sys.executable, "-m", *module_and_flags]
    return subprocess.run(command, cwd=at, env=os.environ | {"PYTHONPATH": str(path)}, capture_output=True, text=True)


def files(folder: Path, pattern: str) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob(pattern) if path.is_file()}


def test_the_wheel_has_every_module_and_recipe(wheel: Path) -> None:
    modules = {place / path for name, place in PLACES.items() for path in files(ROOT / name, "*.py")}
    assert files(wheel, "*.py") == modules
    assert files(wheel / "x3d_tf" / "recipes", "*.gin") == files(ROOT / "gin", "*.gin")


def test_the_wheel_has_the_other_files_of_the_exporters(wheel: Path) -> None:
    """The files for a server are stored next to the code: Dockerfile, settings and their documentation."""
    expected = {path for path in files(ROOT / "export", "*") if "__pycache__" not in path.parts}
    assert files(wheel / "x3d_tf" / "export", "*") == expected


def test_the_wheel_has_one_top_level_package(wheel: Path) -> None:
    assert sorted(path.name for path in wheel.iterdir() if not path.name.endswith(".dist-info")) == ["x3d_tf"]


@pytest.mark.parametrize(
    ("recipes", "network"),
    [(("gin/x3d_s.gin", "gin/data/records.gin"), "x3d_s"), (("gin/ava/x3d_xl_v2.2.gin",), "x3d_xl")],
    ids=["a network", "includes of includes"],
)
def test_recipes_are_found_from_an_empty_folder(
    recipes: tuple[str, ...], network: str, wheel: Path, tmp_path: Path
) -> None:
    done = run("x3d_tf.complexity", *(f"--gin_file={recipe}" for recipe in recipes), at=tmp_path, path=wheel)
    assert network in done.stdout, done.stderr


@pytest.mark.slow
def test_a_recipe_that_includes_others_trains_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    settings = ("Expansion.gamma_t=2", "Expansion.gamma_s=0.3", "Expansion.gamma_d=1.0", "Recipe.steps=2")
    flags = ("--gin_file=gin/x3d_s.gin", *(f"--gin_bindings={setting}" for setting in settings), "--workdir=run")
    done = run("x3d_tf.train", *flags, at=tmp_path, path=wheel)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model.keras").is_file()


COMMANDS = sorted(
    ".".join(path.with_suffix("").parts)
    for path in files(ROOT / "export", "*.py")
    if "commands.run(main" in (ROOT / "export" / path).read_text(encoding="utf-8")
)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_exporter_has_two_names_and_one_copy(command: str, tree: Path, wheel: Path, tmp_path: Path) -> None:
    """An exporter is `export.COMMAND` in a checkout and `x3d_tf.export.COMMAND` in a wheel."""
    in_checkout = run(f"export.{command}", "--help", at=tree, path=tree)
    installed = run(f"x3d_tf.export.{command}", "--help", at=tmp_path, path=wheel)
    for done in (in_checkout, installed):
        assert f"python -m export.{command}" in done.stdout, done.stderr
    missing = run(f"export.{command}", "--help", at=tmp_path, path=wheel)
    assert "ModuleNotFoundError" in missing.stderr and "'export'" in missing.stderr
    copies = (folder / "export" / f"{command.replace('.', '/')}.py" for folder in (tree, wheel / "x3d_tf"))
    assert len({copy.read_bytes() for copy in copies}) == 1
