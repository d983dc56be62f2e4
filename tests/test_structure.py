"""Import rules: what module docstrings and the table of CONTRIBUTING.md promise is what the code does."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from moving_square import write_records
from video_fixtures import numbered_frames, write_video

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "x3d_tf").rglob("*.py"), *(ROOT / "export").rglob("*.py")])
PROMISE = re.compile(r"imports? no tensorflow|does not import tensorflow", re.IGNORECASE)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): ast.parse(path.read_text("utf-8")) for path in FILES}


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(node: ast.AST, *, lazily: bool) -> Iterator[str]:
    """Yields the modules of this project that a module imports, also within functions if `lazily`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom) and child.module and not child.level:
            for alias in child.names:
                name = f"{child.module}.{alias.name}"
                yield name if name in MODULES else child.module
        elif not type_checking(child) and (lazily or not isinstance(child, ast.FunctionDef)):
            yield from imported(child, lazily=lazily)


def loaded_by(statement: str, *names: str) -> list[str]:
    """Returns those of `names` that a fresh process has loaded after the statement."""
    code = f"{statement}\nimport sys\nprint(*[name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


LIGHT = [
    name
    for name, tree in MODULES.items()
    if name.startswith("x3d_tf") and PROMISE.search(" ".join((ast.get_docstring(tree) or "").split()))
]


def test_modules_that_promise_it_import_no_tensorflow() -> None:
    assert len(LIGHT) > 40
    assert loaded_by("import " + ", ".join(LIGHT), "tensorflow", "keras") == []


def test_counting_imports_no_tensorflow() -> None:
    assert loaded_by("import x3d_tf; x3d_tf.cost('x3d_m')", "tensorflow", "keras", "gin") == []


def test_only_one_module_imports_gin() -> None:
    importers = {
        name
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "gin" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gin")
    }
    assert importers == {"x3d_tf.gin_config"}


def test_no_two_modules_import_each_other() -> None:
    graph = {
        name: {other for other in imported(tree, lazily=False) if other in MODULES} for name, tree in MODULES.items()
    }
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def table() -> dict[str, set[str]]:
    """Returns what each row of the table of CONTRIBUTING.md imports, in its order."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \|[^|\n]*\|([^|\n]*)\|$", text, re.MULTILINE)
    return {name: set(re.findall(r"\w+", imports)) for name, imports in rows}


def row_of(module: str) -> str | None:
    """Returns the row that a module belongs to; None for the commands and for the lazy `x3d_tf`."""
    first, _, rest = module.partition(".")
    name = first if first == "export" else rest.split(".")[0]
    if name in table():
        return name
    path = ROOT / "x3d_tf" / f"{name}.py"
    command = not name or "__main__" in path.read_text("utf-8")
    return None if command else "shared"


def test_the_table_of_imports_is_what_the_code_does() -> None:
    rows = table()
    found: dict[str, set[str]] = {name: set() for name in rows}
    for module, tree in MODULES.items():
        if row := row_of(module):
            others = {row_of(other) for other in imported(tree, lazily=True) if other.startswith("x3d_tf.")}
            found[row] |= {other for other in others if other and other != row}
    assert found == rows
    order = list(rows)
    assert all(order.index(other) < order.index(row) for row, others in rows.items() for other in others)


@pytest.mark.usefixtures("uncompiled")
def test_public_functions_are_not_shadowed_by_commands(tmp_path: Path) -> None:
    """Imported modules become attributes of the package, so all are imported before the functions are called."""
    import x3d_tf

    for name in MODULES:
        if re.fullmatch(r"x3d_tf\.[a-z]\w*", name):
            importlib.import_module(name)
    tiny, file = (
        x3d_tf.Expansion(gamma_tau=1, gamma_t=2, gamma_s=32 / 112, gamma_b=1, gamma_d=0.2),
        tmp_path / "m.keras",
    )
    write_records(tmp_path / "records", videos=2)
    video = write_video(tmp_path / "a.mp4", numbered_frames(6))
    model = x3d_tf.build_x3d(tiny, num_classes=2)
    assert model.num_classes == x3d_tf.build_detector(tiny, num_classes=2).num_classes == 2
    assert x3d_tf.cost(tiny).macs > 0
    assert x3d_tf.dataset(tmp_path / "records", tiny.clip, training=True, batch=2) is not None
    portable = x3d_tf.portable(model, ("a", "b"))
    assert portable.output_shape == (None, 2)
    x3d_tf.save(portable, file)
    assert x3d_tf.load(file).class_names == ("a", "b")
    (result,) = x3d_tf.predict_videos(model, video, progress=False)
    assert isinstance(result, x3d_tf.Prediction) and result.probabilities.shape == (2,)
    x3d_tf.set_kernels("gpu")
    called = {
        "build_detector",
        "build_x3d",
        "cost",
        "dataset",
        "load",
        "portable",
        "predict_videos",
        "save",
        "set_kernels",
    }
    assert {name for name in x3d_tf.__all__ if inspect.isfunction(getattr(x3d_tf, name))} == called


def test_public_names() -> None:
    import x3d_tf

    assert {name for name in x3d_tf.__all__ if getattr(x3d_tf, name) is not None} == set(x3d_tf.__all__)
    assert set(x3d_tf.__all__) <= set(dir(x3d_tf))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = x3d_tf.nothing
