"""Warnings about records that do not fit a recipe: when they appear, their numbers, and the bindings that fix them."""

import csv
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from video_fixtures import noise_video, write_records

from x3d_tf import gin_config
from x3d_tf.data.records.index import Record, Split
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.runs.advice import advice, print_advice
from x3d_tf.tasks.base import find
from x3d_tf.types import AnnotationKind, Storage

X3D_S = ("gin/x3d_s.gin", "gin/data/records.gin")
X3D_L = ("gin/x3d_l.gin", "gin/data/records.gin")
FEW = ("gin/few_videos.gin",)
AVA = ("gin/ava/x3d_m_v2.2.gin",)


def records(
    lengths: list[tuple[float, int]],
    fps: float = 30.0,
    classes: tuple[int, ...] = (1, 1),
    stored: int = 256,
    task: AnnotationKind = "single_label",
) -> Manifest:
    """Returns the manifest of videos of the given (seconds, count); `classes` are the relative class frequencies."""
    labels = [label for label, share in enumerate(classes) for _ in range(share)]
    seconds = [length for length, count in lengths for _ in range(count)]
    videos = [
        Record(0, 0, 1, round(length * fps), fps, (labels[number % len(labels)],), f"{number}.mp4")
        for number, length in enumerate(seconds)
    ]
    names = tuple(f"class {label}" for label in range(len(classes)))
    return Manifest(Path("data"), "mine", names, {"train": Split((), tuple(videos))}, {}, Storage(stored, 95), task)


def bindings_in(text: str) -> tuple[str, ...]:
    """Returns the values of the --gin_bindings flags in a text, as a shell parses them."""
    flags = re.findall(r"--gin_bindings=(?:'[^']*'|\S)+", text)
    return tuple(shlex.split(flag)[0].removeprefix("--gin_bindings=") for flag in flags)


def advice_for(
    manifest: Manifest, files: tuple[str, ...], sides: list[int], bindings: tuple[str, ...] = ()
) -> list[str]:
    return advice(manifest, gin_config.parse(files, bindings).config, sides, find(manifest.task))


@pytest.mark.parametrize(
    ("manifest", "files", "sides", "bindings"),
    [
        (records([(4.0, 48)]), FEW, [96], ()),
        (records([(3.2, 25), (2.0, 23)]), FEW, [96], ()),  # most cover 80 % of the 3.97 s
        (records([(0.03, 48)]), ("gin/x2d.gin", "gin/data/records.gin"), [256], ()),  # a clip of one frame
        (records([(5.0, 48)]), FEW, [73, 72, 80], ()),
        (records([(5.0, 48)]), X3D_S, [182], ()),
        (records([(5.0, 24)]), FEW, [96], ()),  # 300 epochs
        (records([(5.0, 8)]), FEW, [96], ("Recipe.patience=4", "DatasetSpec.validation_fraction=0.1")),
        (records([(5.0, 50)], classes=(4, 1)), FEW, [96], ()),
        (records([(5.0, 60)], classes=(5, 1)), FEW, [96], ('Recipe.class_weights="balanced"',)),
        (records([(5.0, 60)], classes=(5, 1), task="multi_label"), FEW, [96], ()),
        (records([(2.7, 60_000)], classes=(5, 1), task="detection"), AVA, [256], ()),
        (records([(3.0, 8)], classes=(7, 1), stored=128), ("gin/x3d_l.gin",), [128], ("Recipe.steps=4000",)),
    ],
)
def test_no_advice_for_records_that_fit(
    manifest: Manifest, files: tuple[str, ...], sides: list[int], bindings: tuple[str, ...]
) -> None:
    assert advice_for(manifest, files, sides, bindings) == []


@pytest.mark.parametrize(
    ("manifest", "files", "sides", "numbers", "given"),
    [
        (
            records([(2.0, 47), (9.0, 1)]),
            FEW,
            [96],
            (
                "spans 3.97 s",
                "47 of the 48 training videos",
                "median 2.00 s",
                "50% of a clip repeats",
                "cover at least 80%",
            ),
            ("Expansion.gamma_tau=3.52",),
        ),
        (records([(3.0, 48)]), FEW, [96], ("median 3.00 s", "24% of a clip"), ("Expansion.gamma_tau=5.29",)),
        (
            records([(0.4, 48)], fps=25.0),
            FEW,
            [96],
            ("median 0.40 s",),
            ("Expansion.gamma_tau=1.2", "Expansion.gamma_t=10"),  # every frame
        ),
        (
            records([(5.0, 48)]),
            X3D_L,
            [256],
            ("short side of 256 pixels", "to 356 to 446", "crop of 312", "--short_side=446"),
            ("Expansion.gamma_s=2.0",),
        ),
        (
            records([(5.0, 48)]),
            X3D_S,
            [90, 96, 300],
            ("short side of 96 pixels", "3 records", "to 182 to 228"),
            ("Expansion.gamma_s=0.75",),
        ),
        (
            records([(2.7, 60_000)], task="detection"),
            AVA,
            [200],
            ("short side of 200", "to 256 to 320"),
            ("Expansion.gamma_s=1.5625",),
        ),
        (
            records([(5.0, 12)]),
            FEW,
            [96],
            ("900 steps with a batch of 8 clips", "12 training videos", "600 epochs"),
            ("Recipe.steps=450",),
        ),
        (records([(2.7, 12)], task="detection"), FEW, [96], ("12 training key frames",), ("Recipe.steps=450",)),
        (
            records([(5.0, 60)], classes=(5, 1)),
            FEW,
            [96],
            ("'class 1' has 10 training videos and class 'class 0' has 50", "a ratio of 5 or more"),
            ('Recipe.class_weights="balanced"',),
        ),
    ],
)
def test_advice_states_the_numbers_and_its_binding_fixes_them(
    manifest: Manifest, files: tuple[str, ...], sides: list[int], numbers: tuple[str, ...], given: tuple[str, ...]
) -> None:
    (text,) = advice_for(manifest, files, sides)
    assert "\n" not in text
    for number in numbers:
        assert number in text
    bindings = bindings_in(text)
    assert bindings == given
    assert advice_for(manifest, files, sides, bindings) == []


@pytest.mark.parametrize(
    ("files", "batch", "rate", "steps"),
    [
        (("gin/x3d_m.gin",), 1024, "6.4", "2 steps"),  # also synthetic data
        (("gin/x3d_m.gin",), 32, "0.2", "80 steps"),
        (("gin/x3d_m.gin", "gin/data/records.gin"), 1024, "6.4", "2 steps"),
        (("gin/kinetics400/pyslowfast/x3d_m.gin",), 65536, None, ""),  # in proportion, and enough steps
        (("gin/kinetics400/x3d_m.gin",), 1024, None, ""),
        (("gin/kinetics400/x3d_s.gin",), 8192, None, ""),
        (("gin/x3d_m.gin",), 16, None, ""),
        (("gin/x3d_m.gin",), 4, None, ""),
    ],
)
def test_a_recipe_that_is_scaled_too_far_is_reported(
    files: tuple[str, ...], batch: int, rate: str | None, steps: str
) -> None:
    manifest = records([(5.0, 200_000)], stored=320)
    texts = advice_for(manifest, files, [320], (f"Recipe.batch={batch}",))
    assert len(texts) == (rate is not None)
    if rate is not None:
        assert texts[0].startswith(f"Recipe.batch = {batch} scales Recipe.learning_rate = 0.05 and Recipe.steps = 320")
        assert f"for 8 clips, to a learning rate of {rate} for {steps}." in texts[0]
        fixed = bindings_in(texts[0])
        assert fixed == (f"Recipe.reference_batch={batch}",)
        assert advice_for(manifest, files, [320], (f"Recipe.batch={batch}", *fixed)) == []


def test_a_high_rate_alone_is_reported() -> None:
    bindings = ("Recipe.batch=64", "Recipe.learning_rate=1.0", "Recipe.steps=80000")
    (text,) = advice_for(records([(5.0, 200_000)], stored=320), X3D_S, [320], bindings)
    assert "a learning rate of 8 for 10000 steps" in text
    for bindings in (
        ("Recipe.learning_rate=6.4", "Recipe.steps=2"),
        ("Recipe.batch=1024", "Recipe.reference_batch=1024", "Recipe.learning_rate=6.4", "Recipe.steps=2"),
    ):
        (text,) = advice_for(records([(5.0, 200_000)], stored=320), X3D_S, [320], bindings)
        assert text.startswith("the learning rate is 6.4 for a batch of ") and "and 2 steps" in text


def test_one_class_is_reported() -> None:
    (text,) = advice_for(records([(5.0, 24)], classes=(24,)), FEW, [96])
    assert "only one class" in text


def test_every_problem_is_reported() -> None:
    texts = advice_for(records([(1.0, 12)], classes=(11, 1)), X3D_L, [128], ("Recipe.steps=4000",))
    assert [[binding.partition("=")[0] for binding in bindings_in(text)] for text in texts] == [
        ["Expansion.gamma_s"],
        ["Recipe.steps"],
        ["Expansion.gamma_tau"],
        ["Recipe.class_weights"],
    ]


@pytest.mark.parametrize(
    ("names", "warned"),
    [
        (("turn left", "turn right"), True),
        (("stop", "Swipe_Left_hand", "Swipe_Right_hand"), True),
        (("left to right", "right to left"), True),
        (("left-handed", "stop"), False),  # its mirror image is not a class
        (("leftovers", "rights"), False),
    ],
)
def test_mirror_image_classes_are_reported(names: tuple[str, ...], warned: bool) -> None:
    manifest = replace(records([(5.0, 48)]), classes=names)
    texts = advice_for(manifest, FEW, [96])
    assert len(texts) == warned
    if warned:
        assert repr(names[-1]) in texts[0] and bindings_in(texts[0]) == ("DatasetSpec.flip=False",)
        assert advice_for(manifest, FEW, [96], bindings_in(texts[0])) == []


def test_videos_of_one_frame_get_no_binding() -> None:
    (text,) = advice_for(records([(1 / 30, 48)]), FEW, [96])
    assert text.endswith("use longer videos")


def test_no_advice_for_the_worked_example(shared_data: Path) -> None:
    with (shared_data / "ut_interaction" / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("1", "2"):
        videos = [(int(row["frames"]) / float(row["fps"]), 1) for row in rows if row["set"] == name]
        assert len(videos) == 60
        assert advice_for(records(videos, classes=(1,) * 6, stored=96), FEW, [96]) == []


def test_the_frames_of_records_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [(40, 52), (48, 44), (64, 80)]
    manifest = write_records(tmp_path, {"train": [noise_video(seed, 150, *size) for seed, size in enumerate(sizes)]})
    bindings = ["Recipe.batch=3", "Recipe.reference_batch=3", f'DatasetSpec.records="{tmp_path}"']
    config: Any = gin_config.parse(FEW, bindings).config
    print_advice(manifest, config, find(manifest.task))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "pixels" in line]
    assert line.startswith("warning: the training frames have a short side of 44 pixels (median of 3 records)")
