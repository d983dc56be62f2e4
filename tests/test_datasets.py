"""Data sets by name: the choice from the inputs, a data set in one module of a user, and AVA's own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from video_fixtures import numbered_frames, write_video

from x3d_tf import registry, train
from x3d_tf.data.datasets.ava import Ava
from x3d_tf.data.datasets.base import DATA_SETS, Inputs, SyntheticDataSet, choose
from x3d_tf.data.datasets.spec import DatasetSpec, open_dataset
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"
FOLDER, BOXES = Path("videos"), {"train": Path("a.csv")}
TRAIN = """
Expansion.gamma_tau = 1
Expansion.gamma_t = 2
Expansion.gamma_s = 0.2857142857142857
Expansion.gamma_b = 1
Expansion.gamma_d = 0.2
Recipe.batch = 2
Recipe.reference_batch = 2
Recipe.steps = 2
Recipe.learning_rate = 0.01
Recipe.warmup_fraction = 0.5
TrainConfig.test_views = 1
DatasetSpec.name = "toy"
"""


def test_the_data_sets_of_the_package() -> None:
    names = ("ava", "ava_v2.1", "ava_v2.2", "charades", "csv", "dominoes", "folder", "hmdb51")
    names += ("kinetics400", "kinetics600", "kinetics700")
    assert DATA_SETS.names() == (
        *names,
        *("moving_shapes", "sequence_examples", "shaking_shapes", "something_something_v2", "ucf101"),
    )
    synthetic = [name for name in DATA_SETS.names() if isinstance(DATA_SETS.get(name), SyntheticDataSet)]
    assert synthetic == ["dominoes", "moving_shapes", "shaking_shapes"]


@pytest.mark.parametrize(
    ("name", "inputs", "expected"),
    [
        (None, Inputs(videos=FOLDER, split=0.2, classes=Path("c.txt")), "folder"),
        (None, Inputs(csv=Path("a.csv")), "csv"),
        (None, Inputs(videos=FOLDER, csv=Path("a.csv")), "csv"),
        (None, Inputs(videos=FOLDER, boxes=BOXES, label_map=Path("a.pbtxt"), starts_at=0.0), "ava"),
        ("ava_v2.2", Inputs(videos=FOLDER, boxes=BOXES, proposals=BOXES), "ava_v2.2"),
    ],
)
def test_inputs_select_a_data_set(name: str | None, inputs: Inputs, expected: str) -> None:
    assert choose(name, inputs).name == expected


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        (None, Inputs(), "the data set folder requires --videos"),
        ("csv", Inputs(videos=FOLDER), "the data set csv requires --csv"),
        ("ava", Inputs(), "the data set ava requires --videos and --boxes"),
        (
            None,
            Inputs(videos=FOLDER, boxes=BOXES, csv=Path("a")),
            "--csv must not be given for the data set ava",
        ),
        (
            None,
            Inputs(videos=FOLDER, lists=BOXES),
            "--lists must not be given for the data set folder",
        ),
        (
            "ava_v2.1",
            Inputs(videos=FOLDER, boxes=BOXES, label_map=Path("a")),
            "--label_map must not be given",
        ),
        ("nothing", Inputs(videos=FOLDER), "there is no data set 'nothing': the names are ava, "),
        ("moving_shapes", Inputs(), "the data set moving_shapes has no videos: it is created when DatasetSpec.name"),
    ],
)
def test_inputs_that_a_data_set_does_not_read(name: str | None, inputs: Inputs, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(name, inputs)


def test_ava_itself_expects_its_official_number_of_videos(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").touch()
    (tmp_path / "val.csv").write_text("film,0902,0.1,0.1,0.2,0.2,1,0\ngone,0902,0.1,0.1,0.2,0.2,1,0\n")
    inputs = Inputs(videos=tmp_path, boxes={"val": tmp_path / "val.csv"})
    found = {name: choose(name, inputs).sources(inputs) for name in ("ava", "ava_v2.1", "ava_v2.2")}
    expected = {name: sources.expected["val"] for name, sources in found.items()}
    assert expected == {"ava": 2, "ava_v2.1": 64, "ava_v2.2": 64}
    assert isinstance(DATA_SETS.get("ava_v2.2"), Ava)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_plugins", {})
    monkeypatch.syspath_prepend(FIXTURES)
    registry.load_plugin("toy_dataset")
    yield
    del sys.modules["toy_dataset"]


@pytest.mark.usefixtures("plugin", "eager", "untrained")
def test_a_data_set_in_one_module_is_built_and_trained_on(tmp_path: Path, in_process: Callable[..., None]) -> None:
    """Two of the listed videos do not exist; one video has two segments. The preview and the evaluation read them."""
    for name in ("a", "b", "c"):
        write_video(tmp_path / "videos" / f"{name}.mp4", numbered_frames(30))
    (tmp_path / "train.csv").write_text("a,run,0,0.5\na,jump,0.5,1\nb,jump,0,1\ngone,run,0,1\n")
    (tmp_path / "test.csv").write_text("c,run,0,1\nlost,run,0,1\n")
    records = tmp_path / "records"
    lists = [f"--lists={split}={tmp_path / split}.csv" for split in ("train", "test")]
    words = ["--plugin=toy_dataset", "--dataset=toy", *lists, f"--videos={tmp_path / 'videos'}", f"--output={records}"]
    line = [sys.executable, "-m", "x3d_tf.build_records", *words, "--short_side=32"]
    environment = os.environ | {"PYTHONPATH": f"{FIXTURES}:{FIXTURES.parents[1]}"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "train has records of 2 of the 3 videos that the data set lists" in done.stdout
    manifest = Manifest.load(records)
    assert (manifest.dataset, manifest.classes, manifest.task) == ("toy", ("jump", "run"), "single_label")
    counts = {name: (len(part.records), part.present, part.expected) for name, part in manifest.splits.items()}
    assert counts == {"train": (3, 2, 3), "test": (1, 1, 2)}
    assert {r.media_id for r in manifest.splits["train"].records} == {"a#0.0-0.5", "a#0.5-1.0", "b#0.0-1.0"}
    assert open_dataset(DatasetSpec(str(records), name="toy")) == manifest
    with pytest.raises(UserError, match=r"the data set of .*records must be csv \(DatasetSpec.name\), got 'toy'"):
        open_dataset(DatasetSpec(str(records), name="csv"))

    (tmp_path / "run.gin").write_text(f'{TRAIN}DatasetSpec.records = "{records}"\n')
    flags = [f"--gin_file={tmp_path / 'run.gin'}", "--gin_bindings=TrainConfig.seed=4", f"--workdir={tmp_path / 'run'}"]
    in_process(train, *flags)
    results = json.loads((tmp_path / "run" / "evaluation" / "records_test_1center" / "results.json").read_text())
    stated = {name: results[name] for name in ("dataset", "samples", "videos_expected", "videos_present", "combine")}
    assert stated == {"dataset": "toy", "samples": 1, "videos_expected": 2, "videos_present": 1, "combine": "mean"}
    recipe = {"gin_files": ["./run.gin"], "changed_settings": ["TrainConfig.seed"]}
    assert {name: results["training"][name] for name in recipe} == recipe
