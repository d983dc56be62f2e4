"""The data sets of Kinetics: official csv files, PySlowFast's lists, spellings of classes, and errors in them."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from video_fixtures import numbered_frames, write_video

from x3d_tf.data.building import listed
from x3d_tf.data.building.encoding import encode_or_error
from x3d_tf.data.building.listed import ClassNames, VideoFiles, plain
from x3d_tf.data.building.sources import Sources
from x3d_tf.data.class_lists import kinetics_classes
from x3d_tf.data.datasets.base import Inputs, choose
from x3d_tf.data.video.decode import EncodedVideo, VideoError
from x3d_tf.errors import UserError

HEADER = "label,youtube_id,time_start,time_end,split\n"
IDS = [f"-{number:02d}_abcdefg" for number in range(20)]  # 11 characters; some begin with - in Kinetics


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def sources(root: Path, name: str = "kinetics400", classes: Path | None = None, **texts: str) -> Sources:
    """Writes the text of each list and returns the sources of the videos in `root / "videos"`."""
    (root / "videos").mkdir(exist_ok=True)
    for split, text in texts.items():
        (root / f"{split}.csv").write_text(text, encoding="utf-8")
    lists = {split: root / f"{split}.csv" for split in texts}
    inputs = Inputs(videos=root / "videos", lists=lists, classes=classes)
    return choose(name, inputs).sources(inputs)


def names(found: Sources, split: str) -> list[str]:
    return sorted(video.name for video in found.splits[split])


def test_clips_are_found_in_any_folder_by_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Clips lie in class folders or not, complete videos are cut, and missing ones are counted by class."""
    clips = [f"{youtube_id}_000010_000020" for youtube_id in IDS]
    touch(
        tmp_path / "videos",
        f"{clips[0]}.mp4",
        f"train/air_drumming/{clips[1]}.webm",
        f"{IDS[2]}.MKV",  # a complete video
        *(f"{IDS[0]}.mp4", f"{clips[0]}.json", f"{clips[4]}.jpg", f"{clips[5]}.part", f".trash/{clips[3]}.mp4"),
    )
    rows = [f"air drumming,{youtube_id},10,20,train\n" for youtube_id in IDS[:5]]
    found = sources(tmp_path, train=HEADER + "".join(rows) + f"zumba,{IDS[5]},10,20,train\n")
    assert names(found, "train") == clips[:3]
    by_name = {video.name: video for video in found.splits["train"]}
    assert (by_name[clips[0]].start, by_name[clips[0]].end) == (0.0, None)
    assert by_name[clips[1]].path == tmp_path / "videos" / "train" / "air_drumming" / f"{clips[1]}.webm"
    assert (by_name[clips[2]].path.name, by_name[clips[2]].start, by_name[clips[2]].end) == (f"{IDS[2]}.MKV", 10, 20)
    assert found.expected == {"train": 6}
    assert found.classes == kinetics_classes() and found.task == "single_label"
    assert [error.path for error in found.unusable] == [str(tmp_path / "videos" / clips[i]) for i in (3, 4, 5)]
    assert found.unusable[0].reason == f"does not exist ({tmp_path}/train.csv, line 5, class air drumming)"
    assert capsys.readouterr().out == (
        "3 of the 6 listed videos of split train do not exist; by class: air drumming 2 of 5, zumba 1 of 1\n"
    )


def test_one_scan_finds_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "videos", *(f"class_{number % 3}/{youtube_id}.mp4" for number, youtube_id in enumerate(IDS)))
    files = VideoFiles(tmp_path / "videos")
    monkeypatch.setattr(Path, "stat", lambda _: pytest.fail("one stat per video"))
    monkeypatch.setattr("os.stat", lambda _: pytest.fail("one stat per video"))
    assert all(len(files.named(youtube_id)) == 1 for youtube_id in IDS)
    assert files.at(f"class_0/{IDS[0]}.mp4") and not files.at(f"class_1/{IDS[0]}.mp4")


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path / "disk", "a.mp4", "deep/b.mp4")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "loop").symlink_to(tmp_path / "disk")
    files = VideoFiles(tmp_path / "videos")
    assert files.named("a") == (tmp_path / "videos" / "link" / "a.mp4",)
    assert files.named("b") == (tmp_path / "videos" / "link" / "deep" / "b.mp4",)


def test_stray_links_are_ignored_and_unreadable_folders_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.mp4", "closed/b.mp4")
    (tmp_path / "loop").symlink_to("loop")
    assert VideoFiles(tmp_path).named("a") == (tmp_path / "a.mp4",)
    scan = os.scandir

    def scandir(folder: Path) -> Any:
        if Path(folder).name == "closed":  # tests may run as root, who can read all folders
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=rf"^videos: the folder {tmp_path}/closed cannot be read: Permission denied"):
        VideoFiles(tmp_path)


@pytest.mark.parametrize("count", [400, 600])
def test_official_classes_are_found_in_any_spelling(count: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    official = kinetics_classes(count)
    monkeypatch.setattr(listed, "did_you_mean", lambda *_: pytest.fail("slow, and a list has 240,000 names"))
    assert len(set(map(plain, official))) == len(official) == count
    classes = ClassNames(official, "the classes")
    for name in official:
        for spelling in (name, name.replace(" ", "_"), name.title(), f'"{name}"', name.replace("'", "")):
            assert classes.find(spelling, "here") == name
    assert classes.find("massaging_person’s_head", "here") == "massaging person's head"


def test_the_numbers_of_classes_are_the_standard_ones() -> None:
    assert [kinetics_classes(400).index(name) for name in ("abseiling", "zumba")] == [0, 399]
    assert [kinetics_classes(600).index(name) for name in ("abseiling", "acting in play", "zumba")] == [0, 1, 599]


@pytest.mark.parametrize("separator", [" ", ",", "\t", ";", ", "])
def test_lists_of_pyslowfast(tmp_path: Path, separator: str) -> None:
    """A line is a path and a class number, or a path, another name and a class number. Paths may have spaces."""
    touch(tmp_path / "videos", "air drumming/a b.mp4", "zumba/c.avi", "d.mp4")
    lines = ["air drumming/a b.mp4", f"{tmp_path}/videos/zumba/c.avi", f"d.mp4{separator}other", "gone.mp4"]
    text = "".join(f"{line}{separator}{label}\n" for line, label in zip(lines, (2, 399, 0, 1), strict=True))
    found = sources(tmp_path, val=text)
    classes = {video.name: video.classes for video in found.splits["val"]}
    assert classes == {
        "air drumming/a b.mp4": ("answering questions",),
        "zumba/c.avi": ("zumba",),
        "d.mp4": ("abseiling",),
    }
    assert found.expected == {"val": 4}
    assert [Path(error.path).name for error in found.unusable] == ["gone.mp4"]


def test_kinetics_700_takes_its_classes_from_its_lists_or_a_file(tmp_path: Path) -> None:
    """A class whose videos are all missing keeps its number."""
    touch(tmp_path / "videos", *(f"{youtube_id}.mp4" for youtube_id in IDS[:2]))
    text = HEADER + f"zumba,{IDS[0]},0,1,train\nyoga,{IDS[1]},0,1,train\nabseiling,{IDS[2]},0,1,train\n"
    assert sources(tmp_path, "kinetics700", train=text).classes == ("abseiling", "yoga", "zumba")
    (tmp_path / "classes.txt").write_text("zumba\nyoga\nabseiling\nrunning\n")
    found = sources(tmp_path, "kinetics700", tmp_path / "classes.txt", train=text)
    assert found.classes == ("zumba", "yoga", "abseiling", "running")
    with pytest.raises(UserError, match=r"^--classes must be given for the data set kinetics700 if a list has class"):
        sources(tmp_path, "kinetics700", train=f"{IDS[0]}.mp4 0\n")
    with pytest.raises(UserError, match="--classes must not be given for the data set kinetics400"):
        sources(tmp_path, "kinetics400", tmp_path / "classes.txt", train=text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("youtube_id,time_start,time_end,split\n", "line 1 must have a column label, .* test lists have no labels"),
        ("label,youtube_id,start,end,split\n", "line 1 must have the columns label,youtube_id,time_start,"),
        (HEADER.replace("\n", ",note\n"), "line 1 must have the columns label,"),
        (HEADER.replace("split", "label"), "line 1 must have the columns label,"),
        (HEADER + "zumba,-00_abcdefg,0,10\n", "line 2 must have 5 values, like the header"),
        (
            HEADER + "zumbo,-00_abcdefg,0,10,train\n",
            r"line 2, column label must .*classes of kinetics400 \(did you mean zum",
        ),
        (HEADER + ",-00_abcdefg,0,10,train\n", "line 2, column label must name a class; lists without labels"),
        (
            HEADER + "zumba,-00_abcdefg,0,10,val\n",
            "line 2, column split must be train, the split in --lists, got 'val'",
        ),
        (HEADER + "zumba,../x,0,10,train\n", "line 2, column youtube_id must be letters, digits"),
        (HEADER + "zumba,-00_abcdefg,-1,10,train\n", "line 2, column time_start must be a time in seconds from 0"),
        (HEADER + "zumba,-00_abcdefg,nan,10,train\n", "line 2, column time_start must be a time"),
        (
            HEADER + "zumba,-00_abcdefg,0,1e9,train\n",
            "line 2, column time_end must be a time in seconds from 0 to 999999",
        ),
        (HEADER + "zumba,-00_abcdefg,10,10,train\n", "line 2, column time_end must be greater than time_start, 10"),
        (HEADER, "the list of split train must name at least one video"),
        (HEADER + '"zumba,-00_abcdefg\n', "line 2 is not valid csv"),
        ("\na.mp4 400\n", r"line 2 must be a number in 0\.\.399, of the classes of kinetics400, got '400'"),
        ("a.mp4 zumba\n", r"line 1 must be a number in 0\.\.399"),
        pytest.param(f"a{' ' * 10**6},;\n", r"line 1 must have a path .*\.\.\. \(1000005 characters\)", id="long line"),
        ("a.mp4\n", "line 1 must have a path and a class number, or the first line must name the columns label,"),
        (
            HEADER + "zumba,-00_abcdefg,0,10,train\n",
            r"no video of split train can be used \(1 listed\).*does not exist",
        ),
    ],
)
def test_errors_in_a_list_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        sources(tmp_path, train=text)
    assert "line" not in message or f"{tmp_path}/train.csv, line" in str(error.value)


def test_two_files_of_a_video_are_an_error_unless_one_is_in_its_class_folder(tmp_path: Path) -> None:
    text = HEADER + f"air drumming,{IDS[0]},0,10,train\n"
    touch(tmp_path / "videos", f"a/{IDS[0]}.mp4", f"b/{IDS[0]}.mkv")
    with pytest.raises(UserError, match=rf"hold one file for {IDS[0]}_000000_000010 \(.*train.csv, line 2\), got \["):
        sources(tmp_path, train=text)
    touch(tmp_path / "videos", f"Air_Drumming/{IDS[0]}.mp4")
    (video,) = sources(tmp_path, train=text).splits["train"]
    assert video.path.parent.name == "Air_Drumming"


def test_a_video_that_is_listed_again_is_left_out(tmp_path: Path) -> None:
    """The same clip twice, in one split or two, and another segment of a recording that another split has."""
    touch(tmp_path / "videos", *(f"{youtube_id}.mp4" for youtube_id in IDS[:3]))
    train = "".join(f"zumba,{youtube_id},0,10,train\n" for youtube_id in (IDS[0], IDS[1], IDS[0]))
    train += f"zumba,{IDS[1]},20,30,train\n"  # another segment in the same split
    val = f"zumba,{IDS[0]},0,10,val\nzumba,{IDS[1]},40,50,val\nzumba,{IDS[2]},0,10,val\n"
    found = sources(tmp_path, train=HEADER + train, val=HEADER + val)
    segments = [f"{IDS[0]}_000000_000010", f"{IDS[1]}_000000_000010", f"{IDS[1]}_000020_000030"]
    assert names(found, "train") == segments and names(found, "val") == [f"{IDS[2]}_000000_000010"]
    first, second = tmp_path / "train.csv", tmp_path / "val.csv"
    assert [error.reason for error in found.unusable] == [
        f"is listed twice: in {first}, line 2 and in {first}, line 4",
        f"is listed twice: in {first}, line 2 and in {second}, line 2",
        f"is in two splits: {IDS[1]} is in train ({first}, line 3) and in val ({second}, line 3)",
    ]
    assert found.expected == {"train": 3, "val": 3}


def test_a_missing_segment_claims_no_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "videos", f"{IDS[0]}_000020_000030.mp4", f"{IDS[1]}.mp4")
    train = f"zumba,{IDS[0]},0,10,train\n" + f"zumba,{IDS[1]},0,10,train\n" * 2
    found = sources(tmp_path, train=HEADER + train, val=HEADER + f"zumba,{IDS[0]},20,30,val\n")
    assert names(found, "val") == [f"{IDS[0]}_000020_000030"]
    printed = capsys.readouterr().out
    assert "1 of the 3 listed videos of split train do not exist; by class: zumba 1 of 3\n" in printed


@pytest.mark.parametrize(
    ("start", "end", "frames", "reason"),
    [
        (1, 3, 20, ""),
        (1, 4.5, 30, ""),  # lists state whole seconds
        (1, 6, 0, "ends at 4.0 s, before the end of its segment, 6 s"),
        (5, 6, 0, "has no frame between|ends before the start time 5"),
    ],
)
def test_a_segment_outside_of_its_video_is_unusable(
    tmp_path: Path, start: float, end: float, frames: int, reason: str
) -> None:
    write_video(tmp_path / "videos" / f"{IDS[0]}.mp4", numbered_frames(40), fps=10)
    (video,) = sources(tmp_path, train=HEADER + f"zumba,{IDS[0]},{start},{end},train\n").splits["train"]
    encoded = encode_or_error(video, 32, 90)
    if reason:
        assert isinstance(encoded, VideoError) and any(part in encoded.reason for part in reason.split("|"))
    else:
        assert isinstance(encoded, EncodedVideo) and len(encoded.frames) == frames


def rows_of(path: Path) -> Iterable[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_records_of_kinetics(tmp_path: Path) -> None:
    """The manifest has what the comparison with the paper needs; missing and short videos are in failures.csv."""
    from x3d_tf.build_records import summary
    from x3d_tf.data.building.builder import build_records
    from x3d_tf.data.records.manifest import Manifest

    root = tmp_path / "videos"
    write_video(root / "air_drumming" / f"{IDS[0]}_000010_000020.mp4", numbered_frames(20), fps=10)
    for youtube_id in IDS[1:4]:
        write_video(root / f"{youtube_id}.mp4", numbered_frames(40), fps=10)
    (tmp_path / "train.csv").write_text(HEADER + f"air drumming,{IDS[0]},10,20,train\nzumba,{IDS[1]},1,3,train\n")
    rows = f"zumba,{IDS[2]},0,3,val\nzumba,{IDS[3]},2,12,val\nyoga,{IDS[4]},0,10,val\n"
    (tmp_path / "val.csv").write_text(HEADER + rows)
    inputs = Inputs(videos=root, lists={"train": tmp_path / "train.csv", "val": tmp_path / "val.csv"})
    result = build_records(inputs, tmp_path / "records", dataset="kinetics400", short_side=32, progress=False)
    manifest = result.manifest
    assert (manifest.dataset, manifest.classes, manifest.task) == ("kinetics400", kinetics_classes(), "single_label")
    counts = {name: (part.present, part.expected) for name, part in manifest.splits.items()}
    assert counts == {"train": (2, 2), "val": (1, 3)}
    found = {record.media_id: (record.labels, record.frames) for record in manifest.splits["train"].records}
    drumming, zumba = manifest.classes.index("air drumming"), manifest.classes.index("zumba")
    assert found == {f"{IDS[0]}_000010_000020": ((drumming,), 20), f"{IDS[1]}_000001_000003#1.0-3.0": ((zumba,), 20)}
    assert [record.recording for record in Manifest.load(tmp_path / "records").splits["val"].records] == [IDS[2]]
    reasons = {Path(path).name: reason for path, reason in list(rows_of(tmp_path / "records" / "failures.csv"))[1:]}
    assert reasons == {
        f"{IDS[4]}_000000_000010": f"does not exist ({tmp_path}/val.csv, line 4, class yoga)",
        f"{IDS[3]}.mp4": "ends at 4.0 s, before the end of its segment, 12 s",
    }
    text = "\n".join(summary(result))
    assert "val has records of 1 of the 3 videos that the data set lists" in text
    command = "python -m x3d_tf.train --gin_file=gin/kinetics400/x3d_s.gin --gin_bindings='DatasetSpec.records="
    assert command in text and "--gin_bindings=Recipe.batch=2 --workdir" in text
