"""Configuration files: the shipped recipes, syntax errors, and hostile files."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from x3d_tf import VARIANTS, Expansion, ModelOptions, gin_config
from x3d_tf.config import Detection, Recipe, TrainConfig
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.errors import UserError
from x3d_tf.search.config import ExpandConfig

ROOT = Path(__file__).parents[1]
NETWORKS = sorted(path.stem for path in (ROOT / "gin").glob("x*.gin"))
MOVING_SHAPES = DatasetSpec(name="moving_shapes", records="data/moving_shapes", flip=False)
SHORT = Recipe(batch=8, reference_batch=8, learning_rate=0.05, steps=320, warmup_fraction=0.1)


def test_there_is_a_recipe_for_each_network() -> None:
    assert sorted(VARIANTS) == NETWORKS


@pytest.mark.parametrize("name", NETWORKS)
def test_recipes_equal_their_python(name: str) -> None:
    expected = TrainConfig(VARIANTS[name].expansion, ModelOptions(), MOVING_SHAPES, SHORT, checkpoint_steps=80)
    assert gin_config.parse([str(ROOT / "gin" / f"{name}.gin")]).config == expected


@pytest.mark.parametrize("name", NETWORKS)
def test_recipes_spell_the_factors_out(name: str) -> None:
    text = (ROOT / "gin" / f"{name}.gin").read_text()
    assert all(f"Expansion.{factor} = " in text for factor in vars(Expansion()))
    assert f"--gin_file=gin/{name}.gin" in text  # the header gives the command


def test_the_recipe_for_few_videos_equals_its_python() -> None:
    expected = TrainConfig(
        Expansion(gamma_tau=7, gamma_t=17, gamma_s=64 / 112),
        ModelOptions(input="difference"),
        DatasetSpec(records="data/records", stretch=True),
        Recipe(batch=8, reference_batch=8, learning_rate=0.1, steps=900, warmup_fraction=0.022),
        checkpoint_steps=100,
    )
    assert gin_config.parse(["gin/few_videos.gin"]).config == expected
    assert expected.recipe.scaled_warmup_steps == 20  # as in docs/results.md


def test_the_recipe_for_fine_tuning_equals_its_python() -> None:
    files = ["gin/x3d_s.gin", "gin/data/records.gin", "gin/finetune.gin"]
    recipe = Recipe(
        batch=8,
        reference_batch=8,
        learning_rate=0.01,
        steps=200,
        warmup_fraction=0.05,
        backbone_lr_factor=0.1,
        batch_norm="frozen",
        class_weights="balanced",
        patience=4,
    )
    expected = TrainConfig(
        VARIANTS["x3d_s"].expansion,
        ModelOptions(),
        DatasetSpec(records="data/records", validation_fraction=0.1),
        recipe,
        init="runs/x3d_s",
        checkpoint_steps=20,
    )
    assert gin_config.parse(files, ['TrainConfig.init="runs/x3d_s"']).config == expected
    with pytest.raises(ValueError, match=r"TrainConfig\.init must be given if"):
        gin_config.parse(files)


@pytest.mark.parametrize("version", ["2.1", "2.2"])
@pytest.mark.parametrize("name", ["x3d_m", "x3d_xl"])
def test_the_recipes_for_ava_equal_their_python(name: str, version: str) -> None:
    expected = TrainConfig(
        VARIANTS[name].expansion,
        ModelOptions(drop_connect=0.1 if name == "x3d_xl" else 0.0),
        DatasetSpec(records=f"data/ava_v{version}", eval_split="val"),
        Recipe(steps=14000, warmup_fraction=1 / 14, schedule="steps", decay_fractions=(0.5, 0.75), weight_decay=1e-7),
        detection=Detection(),
        checkpoint_steps=500,
    )
    file = f"gin/ava/{name}_v{version}.gin"
    assert gin_config.parse([file]).config == expected
    assert TrainConfig.from_json(expected.to_json()) == expected
    assert f"--gin_file={file}" in (ROOT / file).read_text()


def test_the_recipe_for_the_expansion_search_equals_its_python() -> None:
    config, expand = gin_config.parse_expand(["gin/expand.gin"], ["ExpandConfig.budget_gmacs=0.6"])
    assert expand == ExpandConfig(budget_gmacs=0.6)
    assert config == TrainConfig(
        dataset=DatasetSpec(name="moving_shapes", records="data/moving_shapes", flip=False, validation_fraction=0.2),
        recipe=SHORT,
        checkpoint_steps=80,
    )
    assert "--gin_file=gin/expand.gin" in (ROOT / "gin/expand.gin").read_text()


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        ([], "ExpandConfig.budget_gmacs must be given, in GMACs"),
        (
            ["ExpandConfig.budget_gmacs=1", "ExpandConfig.axes=('width', 'dept')"],
            r"ExpandConfig.axes must have names from .*did you mean depth\?",
        ),
        (["ExpandConfig.budget=3", "ExpandConfig.cost='flops'"], "ExpandConfig.cost must be one of macs, params"),
        (["ExpandConfig.budgets=3"], "the setting of ExpandConfig must be one of budget_gmacs, .*, got 'budgets'"),
        (["ExpandConfig.budget_gmacs=1", "typo/ExpandConfig.seeds=2"], "unused bindings: typo/ExpandConfig.seeds"),
    ],
)
def test_settings_of_the_expansion_search_are_checked(bindings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        gin_config.parse_expand(["gin/x2d.gin"], bindings)


RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "gin").rglob("*.gin"))


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("file", RECIPES)
def test_a_recipe_can_be_shortened_by_its_steps_alone(file: str, steps: int) -> None:
    text = (ROOT / file).read_text()
    files = [file] if "Expansion." in text else ["gin/x3d_s.gin", file]
    bindings = [f"Recipe.steps={steps}", 'TrainConfig.init="runs/old"']
    if "\nExpandConfig." in text:
        recipe = gin_config.parse_expand(files, bindings)[0].recipe
    else:
        recipe = gin_config.parse(files, bindings).config.recipe
    assert recipe.scaled_steps == steps
    assert 0 <= recipe.scaled_warmup_steps < steps
    assert all(max(1, recipe.scaled_warmup_steps) <= step <= steps for step in recipe.scaled_decay_steps)


def test_later_files_and_bindings_override_earlier_ones() -> None:
    files = ["gin/x3d_s.gin", "gin/data/records.gin"]
    config = gin_config.parse(files, ['DatasetSpec.records="mine"', "Expansion.gamma_b=1.5"]).config
    assert config.dataset == DatasetSpec(records="mine")
    assert config.expansion == Expansion(6, 13, 160 / 112, 1, 1.5, 2.2)
    assert config.recipe == SHORT


def test_parsing_leaves_no_state() -> None:
    gin_config.parse(["gin/x3d_s.gin"], ["Expansion.gamma_b=1.5"])
    assert gin_config.parse(["gin/x3d_s.gin"]).config.expansion == VARIANTS["x3d_s"].expansion
    assert Expansion() == Expansion(gamma_b=1)


def test_the_texts_can_be_parsed_again(tmp_path: Path) -> None:
    parsed = gin_config.parse(["gin/x3d_m.gin"], ["TrainConfig.seed=3"])
    for text in (parsed.text, parsed.operative_text):
        (tmp_path / "again.gin").write_text(text)
        assert gin_config.parse([str(tmp_path / "again.gin")]).config == parsed.config


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        (
            "Expansion.gama_b=1.5",
            r"setting of Expansion must be one of gamma_tau, gamma_t.*, got 'gama_b'; did you mean gamma_b.*\?",
        ),
        (
            "Expansio.gamma_b=1.5",
            r"group of settings must be one of Expansion, ModelOptions.*, got 'Expansio'; did you mean Expansion\b",
        ),
        ("DatasetSpec.records=folder", "String values need their own quotes"),
        ("typo/Expansion.gamma_b=1.5", "unused bindings: typo/Expansion.gamma_b"),
        ("macro=3", "unused bindings: %macro"),
        (
            "ExpandConfig.budget_gmacs=0.6",
            "unused bindings: ExpandConfig.budget_gmacs; only python -m x3d_tf.expand uses ExpandConfig",
        ),
        ("TrainConfig.expansion=3", "unused bindings: TrainConfig.expansion"),
        ('Expansion.gamma_b="a"', "Expansion.gamma_b must be float, got 'a'"),
        ("Expansion.gamma_t=1.5", "Expansion.gamma_t must be int, got 1.5"),
        ("Expansion.gamma_b=-1", "Expansion.gamma_b must be positive, got -1"),
        ("Expansion.gamma_d=1e9", "Expansion.gamma_d must give at most 1000 blocks"),
        ("Expansion.gamma_s=160/112", "Expansion.gamma_s=160/112"),
        ("ModelOptions.se='some'", "ModelOptions.se must be one of alternate, all, none, got 'some'"),
        ("Recipe.warmup_fraction=32", r"Recipe.warmup_fraction must be in \[0, 1\), a fraction of the steps, got 32"),
        ("Expansion.gamma_b=%gin.REQUIRED", "the macro %gin.REQUIRED is not defined"),
        ("Expansion.gamma_b=@Expansion", "Expansion.gamma_b must be float"),
        ("Expansion.gamma_b=@Expansion()", "a configuration must not refer to itself"),
    ],
)
def test_an_invalid_binding_is_named(binding: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gin_config.parse(["gin/x3d_s.gin"], [binding])


EXECUTED = Path("executed")  # created in the working folder if the module below is imported
MODULE = f"from pathlib import Path\nPath({str(EXECUTED)!r}).touch()\ndef run(): Path({str(EXECUTED)!r}).touch()\n"
IMPORTS = ("import evilmod", "import evilmod as good", "from evilmod import run", "from evilmod import run as walk")
IMPORTS += ("from __gin__ import dynamic_registration", "  import evilmod", "import evilmod.run", "import\tevilmod")
IMPORTS += (
    "import evilmod  # harmless",
    "import \\\n evilmod",
    "\n\nimport evilmod",
    "Expansion.gamma_b = 1\nimport evilmod",
)


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yields the working folder, with a module that creates a file there when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evilmod.py").write_text(MODULE)
    yield tmp_path
    assert not EXECUTED.exists()
    assert "evilmod" not in sys.modules


@pytest.mark.parametrize("text", IMPORTS)
def test_imports_are_rejected_and_not_executed(text: str, evil: Path) -> None:
    line = next(number for number, content in enumerate(text.splitlines(), start=1) if "import" in content)
    Path("a.gin").write_text(text + "\n")
    with pytest.raises(ValueError, match=rf"^a\.gin, line {line}: .*must not import modules, got '(import|from) "):
        gin_config.parse(["gin/x3d_s.gin", "a.gin"])
    with pytest.raises(ValueError, match=r"--gin_bindings=.*must not import modules"):
        gin_config.parse(["gin/x3d_s.gin"], text.split("\n", 1) if "\\" not in text else [text])


def test_imports_are_rejected_in_included_files(evil: Path) -> None:
    (evil / "parts").mkdir()
    (evil / "a.gin").write_text("Expansion.gamma_b = 1.5\ninclude 'parts/b.gin'\n")
    (evil / "parts" / "b.gin").write_text("include 'c.gin'\n")
    (evil / "parts" / "c.gin").write_text("\nimport evilmod\n")
    with pytest.raises(ValueError, match=r"^parts/c\.gin, line 2: .* got 'import evilmod'"):
        gin_config.parse(["gin/x3d_s.gin", "a.gin"])


@pytest.mark.parametrize(
    "reference",
    [
        "@subprocess.getoutput()",
        "@evilmod.run()",
        "@os.system",
        "@gin.macro",
        "@gin.singleton()",
        "@gin.constant()",
        "@macro()",
        "@a/singleton()",
        "@theirs.Expansion()",
        "[@gin.singleton()]",
        "{@gin.singleton(): 1}",
    ],
)
def test_references_to_other_packages_are_rejected(reference: str, evil: Path) -> None:
    (evil / "a.gin").write_text(f"Expansion.gamma_tau = 1\nExpansion.gamma_b = {reference}\n")
    with pytest.raises(ValueError, match=r"^a\.gin, line 2: @.*must be one of Expansion, .*ExpandConfig, got '"):
        gin_config.parse(["a.gin"])


@pytest.mark.parametrize(
    "binding", ["gin.singleton.constructor=1", "gin.macro.value=1", "subprocess.getoutput.cmd='ls'"]
)
def test_bindings_of_other_packages_are_rejected(binding: str) -> None:
    with pytest.raises(ValueError, match=r"must be one of Expansion, .*ExpandConfig, got '"):
        gin_config.parse(["gin/x3d_s.gin"], [binding])


def test_an_include_is_found_in_its_files_folder_then_in_the_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "x3d_s.gin").write_text("Expansion.gamma_b = 9")  # the working folder is not searched
    (tmp_path / "mine.gin").write_text("include 'x3d_s.gin'\ninclude 'gin/data/records.gin'\ninclude 'sub/b.gin'")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.gin").write_text("include 'c.gin'")
    (tmp_path / "sub" / "c.gin").write_text("TrainConfig.seed = 5")
    (tmp_path / "c.gin").write_text("TrainConfig.seed = 6")
    config = gin_config.parse([str(tmp_path / "mine.gin")]).config
    assert config == gin_config.parse(["gin/x3d_s.gin", "gin/data/records.gin"], ["TrainConfig.seed=5"]).config
    assert config.expansion == VARIANTS["x3d_s"].expansion
    (tmp_path / "x3d_s.gin").write_text("Expansion.gamma_b = 1.5")  # now its own folder has one
    assert gin_config.parse([str(tmp_path / "mine.gin")]).config.expansion == Expansion(gamma_b=1.5)
    assert gin_config.parse([], ["include 'x3d_m.gin'"]).config == gin_config.parse(["gin/x3d_m.gin"]).config


@pytest.mark.parametrize(
    "where", ["{outside}", "../outside.gin", "sub/../../outside.gin", "link.gin", "folder/outside.gin"]
)
def test_an_include_from_another_folder_is_rejected(where: str, tmp_path: Path) -> None:
    import gin

    (tmp_path / "own").mkdir()
    (tmp_path / "outside.gin").write_text("TrainConfig.seed = 5")
    (tmp_path / "own" / "link.gin").symlink_to(tmp_path / "outside.gin")
    (tmp_path / "own" / "folder").symlink_to(tmp_path)
    (tmp_path / "own" / "a.gin").write_text(f"include '{where.format(outside=tmp_path / 'outside.gin')}'")
    with pytest.raises(
        ValueError, match=r"a\.gin, line 1: the (path of an included file must be relative|included .* must not)"
    ):
        gin_config.parse(["gin/x3d_s.gin", str(tmp_path / "own" / "a.gin")])
    (tmp_path / "own" / "a.gin").write_text("include 'outside.gin'")
    gin.add_config_file_search_path(str(tmp_path))
    with pytest.raises(
        ValueError, match=r"a\.gin, line 1: the included file 'outside.gin' is neither in .*gin/x3d_s\.gin"
    ):
        gin_config.parse(["gin/x3d_s.gin", str(tmp_path / "own" / "a.gin")])


def test_recursive_and_deep_includes_are_rejected(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number}.gin").write_text(f"include '{number + 1}.gin'")
    (tmp_path / "11.gin").write_text("TrainConfig.seed = 5")
    assert gin_config.parse(["gin/x3d_s.gin", str(tmp_path / "1.gin")]).config.seed == 5  # ten includes
    with pytest.raises(ValueError, match=r"11\.gin must not .*nested at most 10 deep, got '0\.gin > 1\.gin"):
        gin_config.parse(["gin/x3d_s.gin", str(tmp_path / "0.gin")])
    (tmp_path / "11.gin").write_text("include '10.gin'")
    with pytest.raises(ValueError, match=r"10\.gin must not include itself, .* > 10\.gin > 11\.gin > 10\.gin'$"):
        gin_config.parse(["gin/x3d_s.gin", str(tmp_path / "9.gin")])
    (tmp_path / "0.gin").write_text("include '1.gin'\n" * 20)
    for number in range(1, 9):
        (tmp_path / f"{number}.gin").write_text(f"include '{number + 1}.gin'\n" * 20)
    (tmp_path / "9.gin").write_text("")
    with pytest.raises(
        ValueError, match="the configuration must have at most 32768 characters, included files counted"
    ):
        gin_config.parse(["gin/x3d_s.gin", str(tmp_path / "0.gin")])


def test_macros_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "a.gin").write_text("rate = %target\nRecipe.learning_rate = %rate\ntarget = 0.25\na/b = 3")
    config = gin_config.parse(["gin/x3d_s.gin", str(tmp_path / "a.gin")], ["TrainConfig.seed=%a/b"]).config
    assert (config.recipe.learning_rate, config.seed) == (0.25, 3)


LAUGHS = "\n".join(f"m{i} = ({', '.join([f'%m{i + 1}'] * 50)})" for i in range(4)) + "\nm4 = 1\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a = %b\nb = %a\nExpansion.gamma_b = %a", "line 1: .*nested at most 10 deep, without recursion"),
        (b"a = [%a]", "line 1: .*without recursion"),
        (b"Expansion.gamma_b = %a", "line 1: the macro %a is not defined"),
        (LAUGHS.encode(), "line [1-8]: a configuration must have at most 10000 values"),
        (b"\nExpansion.gamma_b = " + b"[" * 12 + b"]" * 12, "line 2: brackets and macros must be nested"),
        (b"\nExpansion.gamma_b = " + b"(" * 5000, "line 2: brackets must be nested at most 10 deep"),
        (b"\nExpansion.gamma_b = (1,\n", "line 3: a bracket is not closed"),
        (b'\nExpansion.gamma_b = """1\n', "line 2: a triple-quoted string is not closed"),
        (b"Expansion:\n    gamma_b = 1\n  gamma_d = 2\n", "line 3: unindent does not match"),
        (b"Expansion.gamma_b =", "line 1: a setting must have a value after '='"),
        (b"Expansion.gamma_b", "line 1: a line must be a binding, such as"),
        (b"\nExpansion.gamma_b = 1 2", "line 2: a line must end after its value"),
        (b"\n$", "line 2: a line must be a binding"),
        (b"\nExpansion.gamma_b = name", "line 2: 'name' is not a valid value. String values need their own quotes"),
        (b"\nExpansion.gamma_b = __import__('evilmod')", "line 2: '__import__' is not a valid value"),
        (b"\nExpansion.gamma_b = f'{1}'", "line 2: .* is not a valid value"),
        (b"\nExpansion.gamma_b = {[]: 1}", "line 2: a dictionary key must be"),
        (b"\nExpansion.gamma_b = " + b"9" * 5000, "line 2: '9+...' is not a valid value"),
        (
            b"\nExpansion.gamma_b = 0x" + b"f" * 5000,
            "line 2: a value must have at most 63 bits, got 20000",
        ),
        (b"\nTrainConfig.init = '" + b"f" * 5000 + b"'", "line 2: a value must have at most 4096 characters, got 5000"),
        (b"\n\xff", r"line 2 must be UTF-8 text, got b'\\xff'"),
        (b"\nExpansion.gamma_b\0 = 1", "line 2 must be text without NUL bytes"),
        (b"#" * 32769, "must have at most 32768 bytes"),
        (b"include 'a.gin'", r"a.gin must not include itself"),
        (b"include 3", "line 1: include must be followed by a path in quotes"),
        (b"include 'folder'", "line 1: the included file 'folder' is neither in"),
        (b"include '" + b"f" * 5000 + b"'", "line 1: the included file 'fff"),
        (b"include 'a\\0b.gin'", "line 1: the path of an included file must be relative"),
    ],
)
def test_a_hostile_file_is_rejected_in_one_line(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.gin").write_bytes(text)
    with pytest.raises(UserError, match=message) as error:
        gin_config.parse(["gin/x3d_s.gin", str(tmp_path / "a.gin")])
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_the_error_for_a_missing_file_lists_the_recipes() -> None:
    with pytest.raises(
        ValueError, match=r"gin/nothing.gin: no such file.*gin/x3d_s.gin.* gin/data/, .*gin/kinetics400/"
    ):
        gin_config.parse(["gin/nothing.gin"])
    with pytest.raises(ValueError, match=r"; did you mean gin/kinetics400/x3d_m.gin or .*\?"):
        gin_config.parse(["gin/kinetics400/x3dm.gin"])


def test_recipes_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert gin_config.find_recipe("gin/x3d_s.gin").read_text() == (ROOT / "gin" / "x3d_s.gin").read_text()
    (tmp_path / "gin").mkdir()
    (tmp_path / "gin" / "x3d_s.gin").write_text("# mine")
    assert gin_config.find_recipe("gin/x3d_s.gin").read_text() == "# mine"


@pytest.mark.parametrize(
    "command", ["complexity", "train", "evaluate", "expand", "build_records", "predict", "preview"]
)
def test_help_has_an_example(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"x3d_tf.{command}", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert f"python -m x3d_tf.{command}" in done.stdout
    assert (done.returncode, done.stderr) == (0, "")
    listed = done.stdout.split("\nflags:\n")[1]
    assert "--[no]verbose" in listed and "pdb" not in listed  # pdb: a flag of absl


def test_the_names_of_files_and_changed_settings_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file beside the working folder is no recipe of this package, even if it has the name of one."""
    (tmp_path / "gin").mkdir()
    for name in ("x3d_s.gin", "mine.gin"):
        (tmp_path / "gin" / name).write_text("Recipe.steps = 7\n")
    monkeypatch.chdir(tmp_path)
    files = ["gin/kinetics400/pyslowfast/x3d_m.gin", "kinetics400/x3d_m.gin", "gin/x3d_s.gin"]
    files += [str(tmp_path / "gin" / "mine.gin"), str(ROOT / "gin" / "few_videos.gin")]
    bindings = ["Recipe.batch = 64\nRecipe.steps = 5", 'TrainConfig.init = "a"', "few = 8", "Recipe.batch = %few"]
    bindings += ["include 'gin/data/dominoes.gin'"]
    parsed = gin_config.parse(files, bindings)
    names = ["gin/kinetics400/pyslowfast/x3d_m.gin", "gin/kinetics400/x3d_m.gin", "./x3d_s.gin", "./mine.gin"]
    assert parsed.files == (*names, "gin/few_videos.gin")
    included = ("DatasetSpec.name", "DatasetSpec.records", "DatasetSpec.flip")
    assert parsed.changed == ("Recipe.batch", "Recipe.steps", "TrainConfig.init", "%few", *included)
    assert json.loads(parsed.recipe_json()) == {
        "gin_files": [*parsed.files],
        "changed_settings": [*parsed.changed],
    }
