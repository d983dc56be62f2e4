"""Charades: its official lists, actions with times in records, and the targets of clips and of complete videos."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import commands
from PIL import Image
from video_fixtures import number_of, numbered_frames, write_video

from x3d_tf.data.building.encoding import encode_or_error
from x3d_tf.data.building.sources import Sources
from x3d_tf.data.datasets.base import Inputs, choose
from x3d_tf.data.video.decode import VideoError
from x3d_tf.errors import UserError
from x3d_tf.modeling.expansion import Expansion
from x3d_tf.types import TimedLabel

HEADER = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length\n"
CLASSES = "c000 Holding some clothes\nc001 Putting clothes somewhere\nc002 Opening a door\nc003 Smiling\n"


def row(video: str, actions: str, length: float = 30.0) -> str:
    return f'{video},HR43,Kitchen,6,7,Yes,"A person, cooking.",stove;food,"One; two",{actions},{length}\n'


def charades(root: Path, rate: float | None = None, classes: str = CLASSES, **texts: str) -> tuple[Inputs, Sources]:
    (root / "videos").mkdir(exist_ok=True)
    for split, text in texts.items():
        (root / f"{split}.csv").write_text(HEADER + text)
    (root / "classes.txt").write_text(classes)
    lists = {split: root / f"{split}.csv" for split in texts}
    inputs = Inputs(videos=root / "videos", lists=lists, classes=root / "classes.txt", frame_rate=rate)
    return inputs, choose("charades", inputs).sources(inputs)


def test_actions_have_times(tmp_path: Path) -> None:
    (tmp_path / "videos" / "AAAAA").mkdir(parents=True)  # a folder of frames
    (tmp_path / "videos" / "BBBBB.mp4").touch()
    text = row("AAAAA", "c002 11.90 21.20;c000 0.00 12.60;c002 1 2") + row("BBBBB", "") + row("CCCCC", "c001 0 1")
    _, sources = charades(tmp_path, train=text)
    videos = {video.name: video for video in sources.splits["train"]}
    assert set(videos) == {"AAAAA", "BBBBB"} and sources.expected == {"train": 3}
    first = videos["AAAAA"]
    assert first.classes == ("Holding some clothes", "Opening a door")
    assert first.timed == (TimedLabel(2, 11.9, 21.2), TimedLabel(0, 0.0, 12.6), TimedLabel(2, 1.0, 2.0))
    assert (first.path, first.frame_rate) == (tmp_path / "videos" / "AAAAA", 24.0)
    assert (videos["BBBBB"].classes, videos["BBBBB"].timed) == ((), ())
    assert (sources.task, len(sources.classes)) == ("multi_label", 4)
    assert [error.reason for error in sources.unusable] == [
        f"does not exist ({tmp_path}/train.csv, line 4, class Putting clothes somewhere)"
    ]
    _, sources = charades(tmp_path, 12.0, train=text)
    assert {video.frame_rate for video in sources.splits["train"]} == {12.0}


@pytest.mark.parametrize(
    ("text", "classes", "message"),
    [
        (
            row("AAAAA", "c000 0 1;c004 0 1"),
            CLASSES,
            r"line 2, column actions: the class must be a number in 0\.\.3",
        ),
        (row("AAAAA", "c000 0"), CLASSES, "train.csv, line 2, column actions must be actions such as c092 11.90 21.20"),
        (row("AAAAA", "c000 5 4"), CLASSES, "train.csv, line 2, column actions must have actions that start at 0"),
        (row("AAAAA", "c000 -1 4"), CLASSES, "train.csv, line 2, column actions must have actions that start at 0"),
        (row("AAAAA", "c000 nan 4"), CLASSES, "train.csv, line 2, column actions must have actions"),
        (row("../AA", "c000 0 1"), CLASSES, "train.csv, line 2, column id must be letters and digits"),
        (row("AAAAA", "c000 0 1,"), CLASSES, "train.csv, line 2 must have 11 values, like the header, got 12"),
        (row("AAAAA", "c000 0 1"), "c000 a\nc002 b\n", "classes.txt, line 2 must be c001 and a class name"),
        (row("AAAAA", "c000 0 1"), "c000 a\nc001 a\n", "classes.txt, line 2 must not repeat a class"),
        (row("AAAAA", "c000 0 1"), CLASSES, "no video of split train can be used"),
    ],
)
def test_errors_in_lists_of_charades(tmp_path: Path, text: str, classes: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        charades(tmp_path, classes=classes, train=text)


def test_files_beside_the_videos_are_ignored(tmp_path: Path) -> None:
    """Only a listed video must have one file."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("AAAAA.mp4", "AAAAA.json", "README.md", "README.txt", "other.mp4", "other.mkv"):
        (videos / name).touch()
    (videos / "loop").symlink_to("loop")
    _, sources = charades(tmp_path, train=row("AAAAA", "c000 0 1"))
    (video,) = sources.splits["train"]
    assert video.path == videos / "AAAAA.mp4"
    (videos / "AAAAA").mkdir()
    with pytest.raises(UserError, match=r"videos must hold one file for AAAAA \(.*/train.csv, line 2\), got \["):
        charades(tmp_path, train=row("AAAAA", "c000 0 1"))


def test_other_columns_are_an_error(tmp_path: Path) -> None:
    for header in ("id,labels\n", "id,actions,label\n", "id,actions,id\n"):
        (tmp_path / "train.csv").write_text(header)
        (tmp_path / "classes.txt").write_text(CLASSES)
        inputs = Inputs(videos=tmp_path, lists={"train": tmp_path / "train.csv"}, classes=tmp_path / "classes.txt")
        with pytest.raises(UserError, match=r"train.csv, line 1 must have the columns id,subject,"):
            choose("charades", inputs).sources(inputs)


def test_an_annotation_longer_than_its_video_is_unusable(tmp_path: Path) -> None:
    write_video(tmp_path / "videos" / "AAAAA.mp4", numbered_frames(40), fps=10)
    for times, reason in (
        ("0 4", ""),
        ("3.9 5.9", ""),
        ("0 6.1", "the end of an annotation, 6.1 s"),
        ("4 5", "the start"),
    ):
        _, sources = charades(tmp_path, train=row("AAAAA", f"c000 {times}"))
        encoded = encode_or_error(sources.splits["train"][0], 32, 90)
        assert isinstance(encoded, VideoError) == bool(reason)
        assert not reason or f"ends at 4.0 s, before {reason}" in str(encoded)


# Of the official Charades_v1_test.csv: an action, and the length of its video in seconds. The end is rounded up.
OFFICIAL = {
    "YSKX3": ("c077 12.10 18.00", 16.62),
    "ZBBOO": ("c040 0.00 23.00", 21.67),
    "AF8I2": ("c145 26.20 35.00", 33.96),
}


@pytest.mark.parametrize("video", OFFICIAL)
def test_official_annotations_that_end_after_their_video(video: str, tmp_path: Path) -> None:
    action, length = OFFICIAL[video]
    write_video(tmp_path / "videos" / f"{video}.mp4", numbered_frames(round(5 * length)), fps=5)
    classes = "".join(f"c{number:03d} action {number}\n" for number in range(157))
    _, sources = charades(tmp_path, classes=classes, test=row(video, action))
    encoded = encode_or_error(sources.splits["test"][0], 32, 90)
    assert not isinstance(encoded, VideoError)


@pytest.mark.parametrize("fps", [24.0, 30.0, 23.976])
def test_labels_of_frames_equal_a_loop(fps: float) -> None:
    import tensorflow as tf

    from x3d_tf.data.records.format import ParsedTimes
    from x3d_tf.data.records.table import visible_labels

    rng = np.random.default_rng(0)
    starts = np.concatenate([np.arange(0, 40, 4) / fps, rng.uniform(-0.5, 2, 30)])  # on frames, and between them
    ends = starts + np.concatenate([np.repeat([0, 4 / fps], 5), rng.uniform(0, 1, 30)])
    microseconds = [tf.constant([round(value * 1e6) for value in values], tf.int64) for values in (starts, ends)]
    timed = ParsedTimes(tf.range(40, dtype=tf.int64), *microseconds)
    for first, last in ((0, 0), (0, 40), (8, 20), (9, 11), (39, 60)):
        expected = [
            label
            for label in range(40)
            if any(starts[label] * fps - 1e-3 <= frame <= ends[label] * fps + 1e-3 for frame in range(first, last + 1))
        ]
        bounds = tf.constant([first, last], tf.int64)
        found = visible_labels(timed, bounds[0], bounds[1], tf.constant(fps, tf.float32))
        assert found.numpy().tolist() == expected and 0 < len(expected) < 40


def test_clips_have_the_actions_of_their_frames(tmp_path: Path) -> None:
    """Trains on a video and on a folder of frames; in evaluation, a video has all its actions."""
    import tensorflow as tf

    from x3d_tf.data.building.builder import build_records
    from x3d_tf.data.input_pipeline import evaluation_dataset, sample_position, training_dataset
    from x3d_tf.types import ClipSpec, ViewSpec

    frames, rate = numbered_frames(48), 24
    write_video(tmp_path / "videos" / "AAAAA.mp4", frames, fps=rate)
    write_video(tmp_path / "videos" / "CCCCC.mp4", frames, fps=rate)
    (tmp_path / "videos" / "BBBBB").mkdir()
    for number, pixels in enumerate(frames, 1):
        Image.fromarray(pixels).save(tmp_path / "videos" / "BBBBB" / f"BBBBB-{number:06d}.jpg", quality=95)
    actions = {
        "AAAAA": [(0, 0.0, 0.5), (2, 0.52, 0.9), (0, 1.51, 2.0), (1, 1.01, 1.02)],  # the last is between two frames
        "BBBBB": [(3, 0.6, 1.7)],
        "CCCCC": [],
    }
    texts = {name: ";".join(f"c{label:03d} {start} {end}" for label, start, end in actions[name]) for name in actions}
    text = "".join(row(name, texts[name]) for name in actions)
    inputs, _ = charades(tmp_path, train=text)
    manifest = build_records(inputs, tmp_path / "records", dataset="charades", short_side=48, progress=False).manifest
    records = manifest.splits["train"].records
    assert {record.video: record.labels for record in records} == {
        "AAAAA": (0, 1, 2),
        "BBBBB": (3,),
        "CCCCC": (),
    }
    assert {record.fps for record in records} == {24.0}

    def expected(name: str, first: int, last: int) -> list[float]:
        seconds = [frame / rate for frame in range(first, last + 1)]
        visible = {label for label, start, end in actions[name] if any(start <= second <= end for second in seconds)}
        return [float(number in visible) for number in range(4)]

    clip = ClipSpec(4, 4.0, 32)
    settings: Any = {"jitter": (40, 40), "flip": False, "batch": 3, "seed": 1, "frame_sampling": "exact"}
    stream = training_dataset(manifest, "train", clip, **settings, replica_batch=1)
    kinds = set()
    for number, (clips, labels) in enumerate(stream.take(60).as_numpy_iterator()):
        step, member = (tf.constant(value, tf.int64) for value in divmod(number, 3))
        name = records[int(sample_position(step, member, records=3, batch=3, seed=1).record)].video
        assert labels[0].tolist() == expected(name, number_of(clips[0, 0]), number_of(clips[0, -1]))
        kinds.add((name, *labels[0]))
    assert len(kinds) == 7  # A: 0, 2, none, both, or 0 after 1.5 s; B: with and without its action; C
    views = evaluation_dataset(manifest, "train", clip, ViewSpec(temporal_views=2, resize=32, crop=32))
    tested = {
        manifest.splits["train"].records[index[0]].video: labels[0] for _, labels, index in views.as_numpy_iterator()
    }
    assert {name: labels.tolist() for name, labels in tested.items()} == {
        "AAAAA": [1, 1, 1, 0],
        "BBBBB": [0, 0, 0, 1],
        "CCCCC": [0, 0, 0, 0],
    }


def test_changed_actions_are_another_build(tmp_path: Path) -> None:
    from x3d_tf.data.building.builder import build_records

    write_video(tmp_path / "videos" / "AAAAA.mp4", numbered_frames(24), fps=24)
    inputs, _ = charades(tmp_path, train=row("AAAAA", "c000 0 1"))
    build_records(inputs, tmp_path / "records", dataset="charades", short_side=48, progress=False)
    inputs, _ = charades(tmp_path, train=row("AAAAA", "c000 0.5 1"))
    with pytest.raises(UserError, match="holds a build of another video: AAAAA of split train has changed since"):
        build_records(inputs, tmp_path / "records", dataset="charades", short_side=48, progress=False)


ROOT = Path(__file__).parents[1]
TINY = Expansion(gamma_t=4, gamma_tau=1.25, gamma_s=32 / 112, gamma_b=1, gamma_d=0.2)
BINDINGS = [f"Expansion.{name}={value}" for name, value in vars(TINY).items()]
BINDINGS += ["Recipe.steps=4", "Recipe.batch=4", "Recipe.reference_batch=4", "TrainConfig.checkpoint_steps=1"]


def write_official_files(root: Path) -> None:
    """Writes twelve short videos, the lists and Kinetics networks, under the names that docs/charades.md uses."""
    import x3d_tf

    for split, names in (("train", "ABCDEFGH"), ("test", "IJKL")):
        texts = [row(5 * name, f"c00{ord(name) % 3} 0.00 1.20;c001 0.50 1.00") for name in names]
        (root / f"Charades_v1_{split}.csv").write_text(HEADER + "".join(texts))
        for name in names:
            write_video(root / "Charades_v1_480" / f"{5 * name}.mp4", numbered_frames(36), fps=24)
    (root / "Charades_v1_classes.txt").write_text(CLASSES)
    model = x3d_tf.build_x3d(TINY, 5)
    for classes in (400, 600):
        (root / "runs" / f"x3d_xl_kinetics{classes}").mkdir(parents=True)
        x3d_tf.save(model, root / "runs" / f"x3d_xl_kinetics{classes}" / "model.keras", list("abcde"))


@pytest.mark.slow
def test_the_commands_of_the_page_run_on_tiny_data(tmp_path: Path) -> None:
    """With a small network and four steps."""
    write_official_files(tmp_path)
    (tmp_path / "gin").symlink_to(ROOT / "gin")
    page = commands("charades.md")
    assert len(page) == 6
    printed = {}
    for command in page:
        words = [sys.executable, *shlex.split(command)[1:]]
        if "x3d_tf.train" in command:
            words += [f"--gin_bindings={binding}" for binding in BINDINGS]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        printed[command] = done.stdout
    report = tmp_path / "runs/charades_k400/evaluation/charades_test_10leftcenterright_fixed_probabilities"
    results = json.loads((report / "results.json").read_text())
    assert (results["views"], results["combine"], results["samples"]) == ("10-LeftCenterRight", "max", 4)
    assert results["classes_without_positives"] == ["Smiling"]
    assert 0 < results["map"] <= 1
    assert all("newly initialised: fc2" in text for command, text in printed.items() if "x3d_tf.train" in command)
    assert "10-LeftCenterRight" in printed[page[-1]]
    rows = (tmp_path / "runs/charades_plateau/history.csv").read_text().splitlines()
    assert "validation_map" in rows[0] and len(rows) == 5
