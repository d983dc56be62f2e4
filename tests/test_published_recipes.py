"""The recipes for published data sets, read through their files, compared with the paper's and PySlowFast's numbers."""

from dataclasses import replace
from pathlib import Path

import pytest

from x3d_tf import VARIANTS, ModelOptions, gin_config
from x3d_tf.config import Recipe, TrainConfig
from x3d_tf.data.datasets.base import DATA_SETS
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.data.sampling import frame_indices
from x3d_tf.evaluation.published import TABLE_A1, Ablation
from x3d_tf.training.checks import check_batch

ROOT = Path(__file__).parents[1]
NETWORKS = ("x3d_xs", "x3d_s", "x3d_m", "x3d_l", "x3d_xl", "x3d_xxl")
SMALL, LARGE = NETWORKS[:2], NETWORKS[3:]
DROP_CONNECT = {"x3d_xl": 0.1, "x3d_xxl": 0.2}


def parse(file: str) -> TrainConfig:
    return gin_config.parse([file]).config


def kinetics(name: str, classes: int, recipe: Recipe, group: int) -> TrainConfig:
    data_set = f"kinetics{classes}"
    records = f"data/{data_set}" + ("_446" if name in LARGE else "")
    dataset = DatasetSpec(records, eval_split="val", validation_split="val", name=data_set)
    options = ModelOptions(bn_group=group, drop_connect=DROP_CONNECT.get(name, 0.0))
    return TrainConfig(VARIANTS[name].expansion, options, dataset, recipe, checkpoint_steps=2000)


@pytest.mark.parametrize("classes", [400, 600])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_papers_recipes_equal_their_python(name: str, classes: int) -> None:
    recipe = Recipe(precise_bn_batches=200)  # the defaults are the paper's
    if name in SMALL:
        recipe = replace(recipe, batch=2048, reference_batch=2048, learning_rate=3.2, steps=30_000)
    if classes == 600:
        recipe = replace(recipe, steps=2 * recipe.steps)
    file = f"gin/kinetics{classes}/{name}.gin"
    assert parse(file) == kinetics(name, classes, recipe, 16 if name in SMALL else 8)
    assert f"--gin_file={file}" in (ROOT / file).read_text()


@pytest.mark.parametrize("classes", [400, 600])
@pytest.mark.parametrize("name", NETWORKS[:4])
def test_the_recipes_of_pyslowfast_equal_their_python(name: str, classes: int) -> None:
    batch, rate, epochs, start = (64, 0.05, 256, 0.2) if name == "x3d_l" else (128, 0.1, 300, 0.1)
    recipe = Recipe(
        batch=batch,
        reference_batch=batch,
        learning_rate=rate,
        steps=epochs * 240_000 // batch * (classes // 300),
        warmup_fraction=35 / epochs,
        warmup_start=start,
        precise_bn_batches=200,
    )
    file = f"gin/kinetics{classes}/pyslowfast/{name}.gin"
    assert parse(file) == kinetics(name, classes, recipe, 8 if name == "x3d_l" else 16)
    assert f"--gin_file={file}" in (ROOT / file).read_text()


ABLATIONS = {"dense, equal GMACs": "dense_equal_cost", "dense": "dense", "ReLU for swish": "relu", "no SE": "no_se"}


@pytest.mark.parametrize("row", TABLE_A1, ids=lambda row: f"{row.network} {row.change}")
def test_the_ablations_are_those_of_appendix_b(row: Ablation) -> None:
    file = f"gin/ablations/{row.network}_{ABLATIONS[row.change]}.gin"
    plain = parse(f"gin/kinetics400/{row.network}.gin")
    gamma_b = row.gamma_b or plain.expansion.gamma_b
    options = replace(row.options, bn_group=plain.model.bn_group, drop_connect=plain.model.drop_connect)
    assert parse(file) == replace(plain, model=options, expansion=replace(plain.expansion, gamma_b=gamma_b))
    difference = f"{abs(row.difference)} points {'above' if row.difference > 0 else 'below'}"
    text = (ROOT / file).read_text()
    assert difference in text and f"--gin_file={file}" in text


@pytest.mark.parametrize(
    ("file", "rate", "steps", "warmup", "group", "drop_connect"),
    [  # of the paper's appendix A.3, with a learning rate in proportion to the batch
        ("kinetics400/x3d_xs", 3.2, 30_000, 4_000, 16, 0.0),
        ("kinetics400/x3d_s", 3.2, 30_000, 4_000, 16, 0.0),
        ("kinetics400/x3d_m", 1.6, 60_000, 8_000, 8, 0.0),
        ("kinetics400/x3d_l", 1.6, 60_000, 8_000, 8, 0.0),
        ("kinetics400/x3d_xl", 1.6, 60_000, 8_000, 8, 0.1),
        ("kinetics400/x3d_xxl", 1.6, 60_000, 8_000, 8, 0.2),
        ("kinetics600/x3d_s", 3.2, 60_000, 8_000, 16, 0.0),
        ("kinetics600/x3d_xl", 1.6, 120_000, 16_000, 8, 0.1),
        ("kinetics400/pyslowfast/x3d_s", 0.1, 562_500, 65_625, 16, 0.0),
        ("kinetics400/pyslowfast/x3d_l", 0.05, 960_000, 131_250, 8, 0.0),
    ],
)
def test_the_numbers_of_the_recipes(
    file: str, rate: float, steps: int, warmup: int, group: int, drop_connect: float
) -> None:
    config = parse(f"gin/{file}.gin")
    recipe = config.recipe
    assert (recipe.scaled_learning_rate, recipe.scaled_steps, recipe.scaled_warmup_steps) == (rate, steps, warmup)
    assert (config.model.bn_group, config.model.drop_connect) == (group, drop_connect)
    assert (recipe.momentum, recipe.weight_decay, recipe.schedule) == (0.9, 5e-5, "cosine")
    assert recipe.precise_bn_batches == 200
    devices = recipe.batch // group
    check_batch(config, devices)  # one batch-norm group per device, as published


@pytest.mark.parametrize("file", ["kinetics400/x3d_m", "kinetics600/x3d_xs", "kinetics400/pyslowfast/x3d_m"])
def test_a_smaller_batch_keeps_the_epochs(file: str) -> None:
    published = parse(f"gin/{file}.gin").recipe
    recipe = gin_config.parse([f"gin/{file}.gin"], ["Recipe.batch=64"]).config.recipe
    assert recipe.scaled_steps * recipe.batch == published.scaled_steps * published.batch
    assert recipe.scaled_learning_rate / recipe.batch == published.scaled_learning_rate / published.batch
    assert recipe.scaled_warmup_steps * recipe.batch == published.scaled_warmup_steps * published.batch


@pytest.mark.parametrize("name", ["ucf101", "hmdb51", "something_something_v2"])
def test_the_recipes_of_small_data_sets(name: str) -> None:
    files = ["gin/x3d_s.gin", f"gin/data/{name}.gin", "gin/finetune.gin"]
    config = gin_config.parse(files, ['TrainConfig.init="runs/x3d_s"']).config
    assert config.dataset.name == name and config.dataset.flip == DATA_SETS.get(name).flips
    assert config.recipe.batch_norm == "frozen"
    text = (ROOT / files[1]).read_text()
    assert all(f"--gin_file={file}" in text for file in files)


@pytest.mark.parametrize(("classes", "figure"), [(400, 43.4), (600, 47.1)])
def test_the_recipes_of_charades_equal_their_python(classes: int, figure: float) -> None:
    recipe = Recipe(
        batch=16,
        reference_batch=16,
        learning_rate=0.02,
        steps=24_000,
        warmup_fraction=4 / 57,
        warmup_start=1e-4 / 0.02,
        schedule="steps",
        decay_fractions=(41 / 57, 49 / 57),
        weight_decay=1e-5,
    )
    expected = TrainConfig(
        replace(VARIANTS["x3d_xl"].expansion, gamma_tau=12.5),
        ModelOptions(drop_connect=0.1),
        DatasetSpec("data/charades", frame_sampling="exact", name="charades"),
        recipe,
        init=f"runs/x3d_xl_kinetics{classes}",
        combine="max",
        checkpoint_steps=1000,
    )
    file = f"gin/charades/x3d_xl_k{classes}.gin"
    assert parse(file) == expected
    text = (ROOT / file).read_text()
    assert f"--gin_file={file}" in text and f"{figure} % mAP in the paper (Table 6)" in text
    assert expected.init in (ROOT / f"gin/kinetics{classes}/x3d_xl.gin").read_text()  # the folder of its command
    assert (expected.model.bn_group, recipe.batch) == (8, 16)
    check_batch(expected, 2)  # two batch-norm groups of 8 clips, on one device or on two
    clip = expected.expansion.clip
    spaced = frame_indices(0.0, 1000, 24.0, clip, "exact")
    assert spaced.tolist() == [10 * number for number in range(16)]  # 16 frames with a stride of 10


@pytest.mark.parametrize("classes", [400, 600])
def test_headers_state_the_papers_figures_as_the_papers(classes: int) -> None:
    figures = {  # Tables 2, 4 and 5
        400: {"xs": "68.6 87.9", "s": "72.9 90.5", "m": "74.6 91.7 76.0 92.3", "l": "76.8 92.5 77.5 92.9"}
        | {"xl": "78.4 93.6 79.1 93.9", "xxl": "80.0 94.5 80.4 94.6"},
        600: {"m": "78.8 94.5", "xl": "81.9 95.5"},
    }
    for name in NETWORKS:
        text = (ROOT / "gin" / f"kinetics{classes}" / f"{name}.gin").read_text()
        expected = figures[classes].get(name.removeprefix("x3d_"), "")
        assert all(f"{figure} %" in text for figure in expected.split())
        assert ("in the paper (Table" in text) == bool(expected)
        assert "nobody has trained it with this package" in text
