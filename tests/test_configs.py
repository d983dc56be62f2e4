import subprocess
import sys
from pathlib import Path

import pytest

from x3d_tf import VARIANTS, Expansion, ModelOptions, configs
from x3d_tf.data.datasets import DatasetSpec
from x3d_tf.runs.recipe import Detection, Recipe, TrainConfig

ROOT = Path(__file__).parents[1]
NETWORKS = sorted(path.stem for path in (ROOT / "gin").glob("x*.gin"))
MOVING_SHAPES = DatasetSpec(name="moving_shapes", records="data/moving_shapes", flip=False)
SHORT = Recipe(batch=8, reference_batch=8, learning_rate=0.05, steps=320, warmup_steps=32)


def test_there_is_a_recipe_for_each_network() -> None:
    assert sorted(VARIANTS) == NETWORKS


@pytest.mark.parametrize("name", NETWORKS)
def test_recipes_equal_their_python(name: str) -> None:
    expected = TrainConfig(VARIANTS[name].expansion, ModelOptions(), MOVING_SHAPES, SHORT, checkpoint_steps=80)
    assert configs.parse([str(ROOT / "gin" / f"{name}.gin")]).config == expected


@pytest.mark.parametrize("name", NETWORKS)
def test_recipes_spell_the_factors_out(name: str) -> None:
    text = (ROOT / "gin" / f"{name}.gin").read_text()
    assert all(f"Expansion.{factor} = " in text for factor in vars(Expansion()))
    assert f"--gin_file=gin/{name}.gin" in text  # the header says how to run it


def test_the_recipe_for_few_videos_equals_its_python() -> None:
    expected = TrainConfig(
        Expansion(gamma_tau=7, gamma_t=17, gamma_s=64 / 112),
        ModelOptions(input="difference"),
        DatasetSpec(records="data/records", squeeze=True),
        Recipe(batch=8, reference_batch=8, learning_rate=0.1, steps=900, warmup_steps=20),
        checkpoint_steps=100,
    )
    assert configs.parse(["gin/few_videos.gin"]).config == expected


def test_the_recipe_for_fine_tuning_equals_its_python() -> None:
    files = ["gin/x3d_s.gin", "gin/data/records.gin", "gin/finetune.gin"]
    recipe = Recipe(
        batch=8,
        reference_batch=8,
        learning_rate=0.01,
        steps=200,
        warmup_steps=10,
        trunk_rate=0.1,
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
    assert configs.parse(files, ['TrainConfig.init="runs/x3d_s"']).config == expected
    with pytest.raises(ValueError, match=r"TrainConfig\.init must be given where"):
        configs.parse(files)


@pytest.mark.parametrize("version", ["2.1", "2.2"])
@pytest.mark.parametrize("name", ["x3d_m", "x3d_xl"])
def test_the_recipes_for_ava_equal_their_python(name: str, version: str) -> None:
    expected = TrainConfig(
        VARIANTS[name].expansion,
        ModelOptions(),
        DatasetSpec(records=f"data/ava_v{version}", eval_split="val"),
        Recipe(steps=14000, warmup_steps=1000, schedule="steps", decay_steps=(7000, 10500), weight_decay=1e-7),
        detection=Detection(),
        checkpoint_steps=500,
    )
    file = f"gin/ava/{name}_v{version}.gin"
    assert configs.parse([file]).config == expected
    assert TrainConfig.from_json(expected.to_json()) == expected
    assert f"--gin_file={file}" in (ROOT / file).read_text()


def test_later_files_and_bindings_win() -> None:
    files = ["gin/x3d_s.gin", "gin/data/records.gin"]
    config = configs.parse(files, ['DatasetSpec.records="mine"', "Expansion.gamma_b=1.5"]).config
    assert config.dataset == DatasetSpec(records="mine")
    assert config.expansion == Expansion(6, 13, 160 / 112, 1, 1.5, 2.2)
    assert config.recipe == SHORT


def test_parsing_leaves_nothing_behind() -> None:
    configs.parse(["gin/x3d_s.gin"], ["Expansion.gamma_b=1.5"])
    assert configs.parse(["gin/x3d_s.gin"]).config.expansion == VARIANTS["x3d_s"].expansion
    assert Expansion() == Expansion(gamma_b=1)


def test_the_texts_can_be_parsed_again(tmp_path: Path) -> None:
    parsed = configs.parse(["gin/x3d_m.gin"], ["TrainConfig.seed=3"])
    for text in (parsed.text, parsed.operative_text):
        (tmp_path / "again.gin").write_text(text)
        assert configs.parse([str(tmp_path / "again.gin")]).config == parsed.config


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("Expansion.gama_b=1.5", "doesn't have a parameter named 'gama_b'.* It has: gamma_tau, gamma_t"),
        ("Expansio.gamma_b=1.5", "No configurable matching 'Expansio'.* There are: Expansion, ModelOptions"),
        ("DatasetSpec.records=folder", "Text takes quotes of its own"),
        ("typo/Expansion.gamma_b=1.5", "nothing uses typo/Expansion.gamma_b"),
        ("macro=3", "nothing uses %macro"),
        ("TrainConfig.expansion=3", "nothing uses TrainConfig.expansion"),
        ('Expansion.gamma_b="a"', "Expansion.gamma_b must be float, got 'a'"),
        ("Expansion.gamma_t=1.5", "Expansion.gamma_t must be int, got 1.5"),
        ("Expansion.gamma_b=-1", "Expansion.gamma_b must be positive, got -1"),
        ("Expansion.gamma_s=160/112", "Expansion.gamma_s=160/112"),
        ("ModelOptions.se='some'", "ModelOptions.se must be .*'alternate'.*, got 'some'"),
        ("Recipe.warmup_steps=400", r"warmup_steps must be in \[0, steps = 320\), got 400"),
        ("Expansion.gamma_b=%gin.REQUIRED", "Expansion.gamma_b must be float"),
    ],
)
def test_a_mistake_is_named(binding: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configs.parse(["gin/x3d_s.gin"], [binding])


def test_a_missing_file_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"gin/nothing.gin: no such file.*gin/data/records.gin.*gin/x3d_s.gin"):
        configs.parse(["gin/nothing.gin"])


def test_recipes_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert configs.find_recipe("gin/x3d_s.gin").read_text() == (ROOT / "gin" / "x3d_s.gin").read_text()
    (tmp_path / "gin").mkdir()
    (tmp_path / "gin" / "x3d_s.gin").write_text("# mine")
    assert configs.find_recipe("gin/x3d_s.gin").read_text() == "# mine"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "x3d_tf.complexity", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_complexity_prints_every_variant_beside_the_paper() -> None:
    lines = run().stdout.splitlines()
    rows = {line.split()[0]: line for line in lines[2:]}
    assert list(rows) == list(VARIANTS)
    assert all(text in rows["x3d_m"] for text in ("4.7325", "4.73", "+0.05%", "3.7943", "3.7612", "3.76", "6.1806"))


def test_complexity_follows_a_binding() -> None:
    done = run("--gin_file=gin/x3d_s.gin", "--gin_bindings=Expansion.gamma_b=1.5", "--layers")
    assert "x3d(tau=6,t=13,s=1.429,w=1,b=1.5,d=2.2)" in done.stdout
    assert "1.3401" in done.stdout and "res5_6_conv_c" in done.stdout


def test_complexity_says_what_is_wrong_in_one_line() -> None:
    done = run("--gin_file=gin/x3d_s.gin", "--gin_bindings=Expansion.gamma_b=0")
    assert (done.returncode, done.stderr) == (1, "error: Expansion.gamma_b must be positive, got 0\n")
    assert "error: unexpected argument 'x'" in run("x").stderr


@pytest.mark.parametrize("command", ["complexity", "train", "evaluate", "build_records", "predict", "preview"])
def test_help_has_an_example(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"x3d_tf.{command}", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert f"python -m x3d_tf.{command}" in done.stdout
    assert "/x3d_tf/" in done.stdout and "--" in done.stdout.split("flags:")[1]
