"""Registries: objects of the package, of plugins and of installed packages, by name."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from x3d_tf import registry
from x3d_tf.errors import UserError
from x3d_tf.registry import Registry, load_plugin

FRUIT = 'from dataclasses import dataclass\n\n@dataclass\nclass Fruit:\n    name: str\n\nFRUITS = (Fruit("{name}"),)\n'


@dataclass
class Fruit:
    name: str


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to import from, with a package that has one fruit. Forgets the plugins and modules afterwards."""
    before = set(sys.modules)
    monkeypatch.setattr(registry, "_plugins", {})
    monkeypatch.setattr(registry, "PLUGIN_ATTRIBUTES", ("FRUITS",))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "orchard").mkdir()
    (tmp_path / "orchard" / "__init__.py").write_text("")
    (tmp_path / "orchard" / "tree.py").write_text(FRUIT.format(name="apple"))
    (tmp_path / "orchard" / "helpers.py").write_text("")  # has no fruits
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def fruits() -> Registry[Fruit]:
    return Registry("fruit", "orchard", "FRUITS")


def install(folder: Path, *points: str) -> None:
    """Installs a distribution whose entry points are fruits."""
    (folder / "basket-1.0.dist-info").mkdir()
    (folder / "basket-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: basket\nVersion: 1.0\n")
    (folder / "basket-1.0.dist-info" / "entry_points.txt").write_text("\n".join(("[orchard]", *points)))


def test_the_modules_of_a_package_are_found() -> None:
    assert fruits().names() == ("apple",)
    assert fruits().get("apple").name == "apple"


def test_a_plugin_adds_its_objects(folder: Path) -> None:
    (folder / "grove.py").write_text(FRUIT.format(name="pear"))
    assert fruits().names() == ("apple",)
    load_plugin("grove")
    assert fruits().names() == ("apple", "pear")
    assert fruits().get("pear").name == "pear"


def test_an_entry_point_is_imported_only_when_it_is_used(folder: Path) -> None:
    (folder / "basket.py").write_text(FRUIT.format(name="plum") + "PLUM = FRUITS[0]\n")
    install(folder, "plum = basket:PLUM")
    assert fruits().names() == ("apple", "plum")
    assert fruits().get("apple").name == "apple"
    assert "basket" not in sys.modules
    assert fruits().get("plum").name == "plum"


def test_an_entry_point_has_the_name_of_its_object(folder: Path) -> None:
    (folder / "basket.py").write_text(FRUIT.format(name="plum") + "PLUM = FRUITS[0]\n")
    install(folder, "pear = basket:PLUM", "list = basket:FRUITS")
    rule = "of an installed package must have the name of its entry point"
    with pytest.raises(UserError, match=f"the fruit basket:PLUM {rule}, 'pear', got 'plum'"):
        fruits().get("pear")
    with pytest.raises(UserError, match=f"the fruit basket:FRUITS {rule}, 'list', got None"):
        fruits().get("list")


def test_an_unknown_name_lists_the_names_and_how_to_add_one() -> None:
    with pytest.raises(UserError, match=r"no fruit 'fig': the names are apple\. .*--plugin=MODULE"):
        fruits().get("fig")


def test_a_name_that_is_used_twice_is_an_error(folder: Path) -> None:
    """Only for that name: a package must not be able to disable all others."""
    (folder / "grove.py").write_text(FRUIT.format(name="apple") + 'FRUITS += (Fruit("pear"),)\n')
    load_plugin("grove")
    install(folder, "apple = basket:APPLE")
    rule = "must be defined once, but several modules define it: orchard.tree, grove, basket:APPLE of basket"
    with pytest.raises(UserError, match=f"the fruit 'apple' {rule}"):
        fruits().get("apple")
    assert fruits().get("pear").name == "pear"


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("(Fruit,)", r"an object in grove\.FRUITS must be an object, not a class, got <class"),
        ("(object(),)", r"an object in grove\.FRUITS must be a fruit, which has name, got <object"),
        ('Fruit("pear")', r"grove\.FRUITS must be a tuple of fruits, got Fruit\(name='pear'\)"),
    ],
)
def test_a_module_lists_complete_objects(folder: Path, listed: str, message: str) -> None:
    (folder / "grove.py").write_text(FRUIT.format(name="pear") + f"FRUITS = {listed}\n")
    load_plugin("grove")
    with pytest.raises(UserError, match=message):
        fruits().get("apple")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grove.py.", "--plugin must be the name of a Python module, such as my_task, got 'grove.py.'"),
        ("/tmp/grove.py", "--plugin must be the name of a module, not of its file: --plugin=grove$"),
        ("/tmp/grove", "--plugin must be the name of a Python module, such as my_task, got"),
        ("no_such_module", "--plugin=no_such_module cannot be imported: ModuleNotFoundError: No module named"),
        ("broken.py", "--plugin must be the name of a module, not of its file: --plugin=broken$"),
        ("orchard.helpers", "--plugin=orchard.helpers \\(.*helpers.py\\) must list its objects in FRUITS"),
        ("broken", "--plugin=broken cannot be imported: ZeroDivisionError: division by zero"),
    ],
)
def test_a_wrong_plugin_is_an_error_in_one_line(folder: Path, name: str, message: str) -> None:
    (folder / "broken.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match="^" + message) as caught:
        load_plugin(name)
    assert "\n" not in str(caught.value)


def test_commands_load_plugins(folder: Path) -> None:
    (folder / "grove.py").write_text("raise RuntimeError('loaded')\n")
    done = subprocess.run(
        [sys.executable, "-m", "x3d_tf.complexity", "--plugin=grove"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "error: --plugin=grove cannot be imported: RuntimeError: loaded\n"
