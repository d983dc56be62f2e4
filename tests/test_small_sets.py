"""The data sets UCF101, HMDB51 and Something-Something V2: their official lists, and errors in them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from video_fixtures import numbered_frames, write_video

from x3d_tf.data.building.sources import Sources
from x3d_tf.data.datasets.base import Inputs, choose
from x3d_tf.data.datasets.csv import Csv
from x3d_tf.errors import UserError

CLASSES = {
    "Approaching something with your camera": "0",
    "Pushing something from left to right": "1",
    "Turning the camera left": "2",
}
PUSHED = {
    "id": "78687",
    "label": "pushing cup from left to right",
    "template": "Pushing [something] from left to right",
}


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def build(root: Path, name: str, texts: dict[str, str], lists: dict[str, str], classes: str | None = None) -> Sources:
    """Writes files and returns the sources of a data set whose videos are in `root / "videos"`."""
    (root / "videos").mkdir(exist_ok=True)
    for file, text in texts.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text, encoding="utf-8")
    paths = {split: root / file for split, file in lists.items()}
    inputs = Inputs(videos=root / "videos", lists=paths, classes=root / classes if classes else None)
    return choose(name, inputs).sources(inputs)


def found(sources: Sources) -> dict[str, dict[str, str]]:
    """Returns the class of each video by split and name."""
    return {split: {v.name: v.classes[0] for v in sorted(videos)} for split, videos in sources.splits.items()}


def ucf101(root: Path, train: str, test: str, classes: str = "1 Basketball\n2 HandstandPushups\n") -> Sources:
    texts = {"trainlist01.txt": train, "testlist01.txt": test, "classInd.txt": classes}
    return build(root, "ucf101", texts, {"train": "trainlist01.txt", "test": "testlist01.txt"}, "classInd.txt")


def test_ucf101(tmp_path: Path) -> None:
    """Videos lie in class folders or not; a folder may be spelled differently."""
    touch(tmp_path / "videos", "HandStandPushups/v_HandStandPushups_g01_c01.avi", "v_Basketball_g01_c01.mp4")
    train = "Basketball/v_Basketball_g01_c01.avi 1\r\nHandstandPushups/v_HandStandPushups_g01_c01.avi 2\r\n"
    touch(tmp_path / "videos", "Basketball/v_Basketball_g02_c01.avi")
    sources = ucf101(tmp_path, train, "Basketball/v_Basketball_g02_c01.avi\nBasketball/v_Basketball_g03_c01.avi\n")
    assert found(sources) == {
        "train": {
            "Basketball/v_Basketball_g01_c01": "Basketball",
            "HandstandPushups/v_HandStandPushups_g01_c01": "HandstandPushups",
        },
        "test": {"Basketball/v_Basketball_g02_c01": "Basketball"},
    }
    assert sources.classes == ("Basketball", "HandstandPushups")
    assert sources.expected == {"train": 2, "test": 2} and len(sources.unusable) == 1
    assert sources.official_split == (1, 3)
    assert {video.recording for videos in sources.splits.values() for video in videos} == {
        "Basketball/v_Basketball_g01",
        "HandstandPushups/v_HandStandPushups_g01",
        "Basketball/v_Basketball_g02",
    }


@pytest.mark.parametrize(
    ("names", "official"),
    [(("trainlist03.txt", "testlist03.txt"), (3, 3)), (("mine.txt", "testlist02.txt"), None)],
)
def test_the_names_of_the_lists_state_the_official_split(
    tmp_path: Path, names: tuple[str, str], official: tuple[int, int] | None
) -> None:
    touch(tmp_path / "videos", "a.avi", "b.avi")
    texts = dict(zip(names, ("Basketball/a.avi 1\n", "Basketball/b.avi\n")), classes="1 Basketball\n")
    sources = build(tmp_path, "ucf101", texts, dict(zip(("train", "test"), names)), "classes")
    assert sources.official_split == official


@pytest.mark.parametrize("official", [True, False])
def test_the_manifest_states_the_official_split(tmp_path: Path, official: bool) -> None:
    from x3d_tf.data.building.builder import build_records
    from x3d_tf.data.records.manifest import Manifest

    names = ("trainlist02.txt", "testlist02.txt" if official else "mine.txt")
    for name, video in zip(names, "ab"):
        write_video(tmp_path / "videos" / f"{video}.mp4", numbered_frames(3))
        (tmp_path / name).write_text(f"Basketball/{video}.avi\n")
    (tmp_path / "classes").write_text("1 Basketball\n")
    lists = {split: tmp_path / name for split, name in zip(("train", "test"), names)}
    inputs = Inputs(videos=tmp_path / "videos", lists=lists, classes=tmp_path / "classes")
    build_records(inputs, tmp_path / "records", dataset="ucf101", short_side=32, progress=False)
    manifest = Manifest.load(tmp_path / "records")
    assert manifest.official_split == ((2, 3) if official else None)
    for wrong in ({"official_split": 4}, {"official_splits": "3"}, {"official_splits": 10**9}):  # untrusted
        assert replace(manifest, settings=manifest.settings | wrong).official_split is None


def test_official_lists_keep_their_split(tmp_path: Path) -> None:
    lists = {"train": "testlist01.txt", "test": "trainlist01.txt"}
    with pytest.raises(UserError, match=r"^--lists must give testlist01\.txt as the list of test, got 'train'"):
        build(tmp_path, "ucf101", {}, lists, "classes")


def test_a_build_is_of_one_official_split(tmp_path: Path) -> None:
    """The finished build would keep the number that it has, or none."""
    from x3d_tf.data.building.builder import build_records

    texts = {"trainlist01.txt": "Basketball/a.avi 1\n", "mine.txt": "Basketball/a.avi 1\n", "classes": "1 Basketball\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    write_video(tmp_path / "videos" / "a.mp4", numbered_frames(3))
    inputs = Inputs(videos=tmp_path / "videos", lists={"train": tmp_path / "mine.txt"}, classes=tmp_path / "classes")
    settings: dict[str, Any] = {"dataset": "ucf101", "short_side": 32, "workers": 1, "progress": False}
    build_records(inputs, tmp_path / "records", **settings)
    official = replace(inputs, lists={"train": tmp_path / "trainlist01.txt"})
    with pytest.raises(UserError, match=r"official_split = None, not \[1, 3\]"):
        build_records(official, tmp_path / "records", **settings)


def test_lists_of_different_official_splits_are_refused(tmp_path: Path) -> None:
    """Their training and test videos overlap."""
    lists = {"train": "trainlist01.txt", "test": "testlist02.txt"}
    message = r"--lists must be of one of the three official splits, got \['trainlist01.txt', 'testlist02.txt'\]"
    with pytest.raises(UserError, match=message):
        build(tmp_path, "ucf101", {}, lists, "classes")


@pytest.mark.parametrize(
    ("train", "classes", "message"),
    [
        (
            "Basketball/a.avi 1\nBaseball/b.avi 1\n",
            None,
            r"trainlist01.txt, line 2: the class must be one of the classes in",
        ),
        ("Basketball/a.avi 2\n", None, "trainlist01.txt, line 1: the class number must be that of Basketball, got '2'"),
        ("Basketball/a.avi\t2\n", None, "line 1: the class number must be that of Basketball, got '2'"),
        ("Basketball/a.avi 3\n", None, r"trainlist01.txt, line 1: the class number must be a number in 1\.\.2"),
        ("a.avi 1\n", None, "trainlist01.txt, line 1 must be CLASS/VIDEO"),
        ("Basketball/a.avi 1\n", "1 Basketball\n3 Skiing\n", "classInd.txt, line 2 must be 2 and a class name"),
        ("Basketball/a.avi 1\n", "1 Basketball\n2 Basketball\n", "classInd.txt, line 2 must not repeat a class"),
        ("Basketball/a.avi 1\n", "Basketball\n", "classInd.txt, line 1 must be 1 and a class name"),
        ("Basketball/a.avi 1\n", "", "classInd.txt must list at least one class"),
    ],
)
def test_errors_in_lists_of_ucf101(tmp_path: Path, train: str, classes: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ucf101(tmp_path, train, "Basketball/b.avi\n", *([] if classes is None else [classes]))


def hmdb51(root: Path, texts: dict[str, str], split: str = "split1") -> Sources:
    return build(root, "hmdb51", {f"lists/{name}": text for name, text in texts.items()}, {split: "lists"})


def test_hmdb51(tmp_path: Path) -> None:
    """The number beside a video is its split. Files in two class folders may have one name."""
    touch(
        tmp_path / "videos",
        "wave/#20_Rhythm_0.avi",
        "wave/b.avi",
        "brush_hair/b.avi",
        "brush_hair/[c] d.avi",
        "wave/e.avi",
    )
    texts = {
        "wave_test_split1.txt": "#20_Rhythm_0.avi 1 \nb.avi 2 \ne.avi 0 \n",
        "wave_test_split2.txt": "#20_Rhythm_0.avi 2 \nb.avi 1 \ne.avi 0 \n",
        "brush_hair_test_split1.txt": "b.avi 1 \n[c] d.avi 2 \ngone.avi 2 \n",
        "brush_hair_test_split2.txt": "b.avi 1 \n[c] d.avi 1 \ngone.avi 2 \n",
    }
    sources = hmdb51(tmp_path, texts)
    assert found(sources) == {
        "train": {"brush_hair/b": "brush_hair", "wave/#20_Rhythm_0": "wave"},
        "test": {"brush_hair/[c] d": "brush_hair", "wave/b": "wave"},
    }
    assert {v.name: v.path.parent.name for v in sources.splits["train"]}["brush_hair/b"] == "brush_hair"
    assert sources.classes == ("brush_hair", "wave") and sources.expected == {"train": 2, "test": 3}
    second = hmdb51(tmp_path, {}, "split2")
    assert set(found(second)["test"]) == {"wave/#20_Rhythm_0"}
    assert (sources.official_split, second.official_split) == ((1, 3), (2, 3))


def test_clips_of_a_film_of_hmdb51_state_it(tmp_path: Path) -> None:
    """The official splits decide where they are, so a film may be in both."""
    names = ("a_wave_tape_wave_u_cm_np1_fr_med_1", "a_wave_tape_wave_u_cm_np1_fr_med_2")
    touch(tmp_path / "videos", *(f"{name}.avi" for name in names))
    sources = hmdb51(tmp_path, {"wave_test_split1.txt": f"{names[0]}.avi 1\n{names[1]}.avi 2\n"})
    recordings = {split: [video.recording for video in videos] for split, videos in sources.splits.items()}
    assert recordings == {"train": ["a_wave_tape"], "test": ["a_wave_tape"]} and not sources.unusable


def test_hidden_files_are_no_lists_of_hmdb51(tmp_path: Path) -> None:
    """Such as those that macOS writes into archives."""
    touch(tmp_path / "videos", "clap/a.avi", "clap/b.avi")
    texts = {"clap_test_split1.txt": "a.avi 1\nb.avi 2\n", "._clap_test_split1.txt": "\0"}
    assert hmdb51(tmp_path, texts).classes == ("clap",)


def test_a_file_in_the_folder_of_another_class_is_another_video(tmp_path: Path) -> None:
    touch(tmp_path / "videos", "clap/same_0.avi", "wave/b.avi", "all/flat_0.avi")
    texts = {
        "clap_test_split1.txt": "same_0.avi 1\nflat_0.avi 1\n",
        "wave_test_split1.txt": "same_0.avi 2\nflat_0.avi 2\nb.avi 2\n",
    }
    sources = hmdb51(tmp_path, texts)
    assert found(sources) == {"train": {"clap/same_0": "clap", "clap/flat_0": "clap"}, "test": {"wave/b": "wave"}}
    clap, wave = (tmp_path / "lists" / name for name in texts)
    assert [(Path(error.path).name, error.reason) for error in sources.unusable] == [
        ("same_0", f"does not exist ({wave}, line 1, class wave)"),
        ("flat_0.avi", f"is listed twice, with other names or classes: in {clap}, line 2 and in {wave}, line 2"),
    ]


@pytest.mark.parametrize(
    ("texts", "split", "message"),
    [
        (
            {"wave_test_split1.txt": "a.avi 1\nb.avi 3\n"},
            "split1",
            "wave_test_split1.txt, line 2 must be a file name and 0, 1",
        ),
        (
            {"wave_test_split1.txt": f"a{' ' * 10**6}\n"},
            "split1",
            r"line 1 must be a .* \.\.\. \(1000003 characters\)",
        ),
        ({"wave_test_split1.txt": "a.avi\n"}, "split1", "wave_test_split1.txt, line 1 must be a file name and 0, 1"),
        ({"wave_test_split1.txt": "a.avi 1\n"}, "split2", r"lists must hold files CLASS_test_split2\.txt"),
        (
            {"wave_test_split1.txt": "a.avi 1\n"},
            "train",
            r"--lists must name one split, one of split1, .*, got \['train'\]",
        ),
        ({"wave_test_split1.txt": "a.avi 1\n"}, "split1", "no video of split train can be used"),
    ],
)
def test_errors_in_lists_of_hmdb51(tmp_path: Path, texts: dict[str, str], split: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        hmdb51(tmp_path, texts, split)


def something(root: Path, train: Any, classes: Any = CLASSES) -> Sources:
    texts = {"train.json": train if isinstance(train, str) else json.dumps(train), "labels.json": json.dumps(classes)}
    return build(root, "something_something_v2", texts, {"train": "train.json"}, "labels.json")


def test_something_something(tmp_path: Path) -> None:
    touch(tmp_path / "videos", "78687.webm")
    sources = something(tmp_path, [PUSHED, PUSHED | {"id": "5"}])
    assert found(sources) == {"train": {"78687": "Pushing something from left to right"}}
    assert sources.classes == tuple(CLASSES)
    assert sources.unusable[0].reason == (
        f"does not exist ({tmp_path}/train.json, entry 2, class Pushing something from left to right)"
    )


@pytest.mark.parametrize(
    ("train", "classes", "message"),
    [
        ([PUSHED, {"id": "1"}], CLASSES, "train.json, entry 2 must have a template. The official test list has none"),
        (
            [PUSHED | {"template": "Eating [something]"}],
            CLASSES,
            "train.json, entry 1: the template must be one of the templ",
        ),
        (
            [PUSHED | {"id": 5}],
            CLASSES,
            r"entry 1 must be an object with an id that is a text such as \"1\", got \{.*'id': 5",
        ),
        (["78687"], CLASSES, "train.json, entry 1 must be an object"),
        ({}, CLASSES, "train.json must be an array of videos"),
        ("[\n{,}]", CLASSES, "train.json, line 2 is not JSON"),
        ("[" * 100_000, CLASSES, "train.json is not JSON: brackets"),
        ('[{"id": "1", "id": "2"}]', CLASSES, r"train.json must not repeat a key of an object, got \['id'\]"),
        (f"[{'1' * 5000}]", CLASSES, "train.json must not have a number with thousands of digits"),
        (
            [PUSHED],
            CLASSES | {"Other": "4"},
            "the number of 'Other' must be a text with a number from 0 to 3, .*got '4'",
        ),
        ([PUSHED], CLASSES | {"Other": 3}, "the number of 'Other' must be a text with a number from 0 to 3, .*got 3"),
        ([PUSHED], CLASSES | {"Other": "2"}, "the number of 'Other' must not be that of 'Turning the camera left'"),
        ([PUSHED], [], "labels.json must be an object of class numbers"),
    ],
)
def test_errors_in_lists_of_something_something(tmp_path: Path, train: Any, classes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        something(tmp_path, train, classes)


def test_training_must_not_flip_something_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from x3d_tf.build_records import summary
    from x3d_tf.data.building.builder import build_records
    from x3d_tf.data.datasets.spec import DatasetSpec, open_for_training

    name, text = "something_something_v2", json.dumps([PUSHED])
    for split, video in (("train", "78687"), ("val", "5")):
        write_video(tmp_path / "videos" / f"{video}.webm", numbered_frames(12), codec="libvpx")
        (tmp_path / f"{split}.json").write_text(text.replace("78687", video))
    (tmp_path / "labels.json").write_text(json.dumps(CLASSES))
    lists = {split: tmp_path / f"{split}.json" for split in ("train", "val")}
    inputs = Inputs(videos=tmp_path / "videos", lists=lists, classes=tmp_path / "labels.json")
    records = tmp_path / "records"
    result = build_records(inputs, records, dataset=name, short_side=32, progress=False)
    assert f"--gin_file=gin/x3d_s.gin --gin_file=gin/data/{name}.gin " in summary(result)[-1]
    monkeypatch.setattr(Csv, "flips", False)  # as a data set of a plugin, for which there is no recipe
    unknown = replace(result, manifest=replace(result.manifest, dataset="csv"))
    assert "--gin_bindings=DatasetSpec.flip=False " in summary(unknown)[-1]
    rule = f"^DatasetSpec.flip must be False for {name}: flipping would change the classes of its videos, got True$"
    with pytest.raises(UserError, match=rule):
        DatasetSpec(str(records), name=name)
    with pytest.raises(UserError, match=rule):  # the records are of the data set, whatever the settings call them
        open_for_training(DatasetSpec(str(records)))
    _, spec = open_for_training(DatasetSpec(str(records), flip=False, name=name))
    assert spec.eval_split == "val"
