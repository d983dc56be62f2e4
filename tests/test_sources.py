"""Videos found in class folders and csv files, and errors about invalid csv files."""

from pathlib import Path

import pytest

from x3d_tf.data.building.sources import Sources, Video
from x3d_tf.data.class_lists import read_classes
from x3d_tf.data.datasets.csv import read_csv
from x3d_tf.data.datasets.folder import find_videos
from x3d_tf.errors import UserError


def touch(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def write_csv(folder: Path, content: str | bytes, name: str = "list.csv") -> Path:
    """Writes a csv file beside a.mp4, b.mp4 and c.mp4."""
    touch(folder, "a.mp4", "b.mp4", "c.mp4")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def media_ids_and_classes(sources: Sources) -> dict[str, set[tuple[str, ...]]]:
    return {split: {(video.media_id, *video.classes) for video in videos} for split, videos in sources.splits.items()}


def test_a_csv_file_lists_videos(tmp_path: Path) -> None:
    table = write_csv(tmp_path, "label,path, split\nrun,a.mp4,train\n\njump , b.mp4,test\nrun,c.mp4,test\n")
    (tmp_path / " b.mp4").touch()
    sources = read_csv(table)
    assert media_ids_and_classes(sources) == {
        "train": {("a.mp4", "run")},
        "test": {(" b.mp4", "jump"), ("c.mp4", "run")},
    }
    assert (sources.classes, sources.task, sources.unusable) == (("jump", "run"), "single_label", [])
    assert list(sources.splits) == ["train", "test"]
    assert sources.splits["train"] == [Video(tmp_path / "a.mp4", "a.mp4", ("run",))]


def test_several_labels_make_the_task_multi_label(tmp_path: Path) -> None:
    sources = read_csv(write_csv(tmp_path, "path,label\na.mp4,run;jump\nb.mp4,sit\nc.mp4, jump ; sit\n"))
    assert media_ids_and_classes(sources) == {
        "train": {("a.mp4", "run", "jump"), ("b.mp4", "sit"), ("c.mp4", "jump", "sit")}
    }
    assert (sources.classes, sources.task) == (("jump", "run", "sit"), "multi_label")


def test_segments_of_a_video_have_distinct_names(tmp_path: Path) -> None:
    lines = "path,label,start,end\na.mp4,run,12.5,15\na.mp4,jump,,3\na.mp4,sit,20,\na.mp4,run,,\na.mp4,run,0,1\n"
    videos = read_csv(write_csv(tmp_path, lines)).splits["train"]
    assert {video.media_id: (video.start, video.end) for video in videos} == {
        "a.mp4#12.5-15.0": (12.5, 15.0),
        "a.mp4#0.0-3.0": (0.0, 3.0),
        "a.mp4#20.0-": (20.0, None),
        "a.mp4": (0.0, None),
        "a.mp4#0.0-1.0": (0.0, 1.0),
    }


def test_links_to_a_file_are_in_its_split(tmp_path: Path) -> None:
    table = write_csv(tmp_path, "path,label,split\na.mp4,run,train\nlink.mp4,run,test\n")
    (tmp_path / "link.mp4").symlink_to("a.mp4")
    with pytest.raises(UserError, match=r"line 3, column split must be train, like line 2, .*got 'test'"):
        read_csv(table)


def test_names_with_quotes_commas_and_non_ascii_letters(tmp_path: Path) -> None:
    names = ["with space.mp4", 'quo"ted.mp4', "a, b.mp4", "прыжок.mp4", "跳 #1.mp4", "new\nline.mp4"]
    touch(tmp_path / "in", *names)
    rows = "".join('"{}","{}"\r\n'.format(name.replace('"', '""'), "bücken, „tief“") for name in names)
    sources = read_csv(write_csv(tmp_path, f"path,label\r\n{rows}".encode("utf-8-sig")), videos=tmp_path / "in")
    assert media_ids_and_classes(sources) == {"train": {(name, "bücken, „tief“") for name in names}}


def test_paths_are_relative_to_the_videos_or_the_csv_file(tmp_path: Path) -> None:
    touch(tmp_path / "else", "x.mp4", "sub/y.mp4")
    table = write_csv(tmp_path, f"path,label\n{tmp_path}/else/x.mp4,run\n./sub//y.mp4,run\n")
    assert media_ids_and_classes(read_csv(table, videos=tmp_path / "else")) == {
        "train": {("x.mp4", "run"), ("sub/y.mp4", "run")}
    }
    table = write_csv(tmp_path, f"path,label\n{tmp_path}/else/x.mp4,run\n../{tmp_path.name}/a.mp4,run\n")
    assert media_ids_and_classes(read_csv(table)) == {
        "train": {("else/x.mp4", "run"), (f"../{tmp_path.name}/a.mp4", "run")}
    }


def test_missing_files_are_reported(tmp_path: Path) -> None:
    name = "n" * 300  # longer than file systems allow
    table = write_csv(tmp_path, f"path,label,split\na.mp4,run,train\ngone.mp4,jump,train\n{name},jump,test\n")
    sources = read_csv(table)
    assert media_ids_and_classes(sources) == {"train": {("a.mp4", "run")}, "test": set()}
    assert [(e.path, e.reason) for e in sources.unusable] == [
        (str(tmp_path / "gone.mp4"), f"does not exist ({table}, line 3)"),
        (str(tmp_path / name), f"does not exist ({table}, line 4)"),
    ]


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("", {}, r"list\.csv, line 1 must have a column path, got \[\]"),
        ("path\na.mp4\n", {}, r"list\.csv, line 1 must have a column label, got \['path'\]"),
        ("path|label\na.mp4|run\n", {}, r"line 1 must have a column path, got \['path\|label'\]"),
        ("path;split\na.mp4;train\n", {}, r"line 1 must have a column label, got \['path', 'split'\]"),
        ("path,label,start\na.mp4,run,'1,5'\n".replace("'", '"'), {}, "line 2, column start must be .*got '1,5'"),
        ("path,label,fps\na.mp4,run,3\n", {}, "line 1 must have only the columns path, .*, end, got 'fps'"),
        ("path,label,label\na.mp4,run,run\n", {}, "line 1 must not repeat a column"),
        ("path,label\n", {}, r"list\.csv must list at least one video below its header$"),
        ("path,label\na.mp4\n", {}, r"line 2 must have 2 values, like the header, got \['a.mp4'\]"),
        ("path,label\na.mp4,run,1\n", {}, "line 2 must have 2 values"),
        ('path,label\n"a.mp4,run\n', {}, "line 2 is not valid csv: unexpected end of data"),
        ('path,label\n"a"b,run\n', {}, "line 2 is not valid csv"),
        ("path,label\n\n\n ,run\n", {}, "line 4, column path must be a file path, got ' '"),
        ("path,label\na\0.mp4,run\n", {}, r"line 2, column path must be a file path, got 'a\\x00.mp4'"),
        ("path,label\na.mp4,\n", {}, "line 2, column label must be one class name, or several separated by ;, got ''"),
        ("path,label\na.mp4,run;\n", {}, "line 2, column label must be one class name, .*got 'run;'"),
        ("path,label\na.mp4,run;jump;run\n", {}, "column label must not repeat a class, got 'run;jump;run'"),
        ('path,label\na.mp4,"ru\nn"\n', {}, "line 2, column label must name a class in one line of text"),
        ('path,label\na.mp4,"run;ru\u2028n"\n', {}, "line 2, column label must name a class in one line of text"),
        ("path,label\na.mp4,ru\0n\n", {}, r"must name a class in one line of text, .*got 'ru\\x00n'"),
        ("path,label,start\na.mp4,run,1_0\n", {}, "line 2, column start must be a time in seconds .*got '1_0'"),
        ("path,label,start\na.mp4,run,１\n", {}, "line 2, column start must be a time in seconds .*got '１'"),
        ("path,label,start\na.mp4,run,1e999\n", {}, "line 2, column start must be a time in seconds .*got '1e999'"),
        ("path,label,end\na.mp4,run,1e300\n", {}, "line 2, column end must be a time in seconds .*got '1e300'"),
        ("path,label,split\na.mp4,run,tran\n", {}, r"column split must be one of train, val, test; .*got 'tran'"),
        ("path,label,split\na.mp4,run,\n", {}, "line 2, column split must be one of train, val, test; .*got ''"),
        ("path,label,split\na.mp4,run,test\n", {"splits": ["a", "b"]}, "split must be one of a, b; .*got 'test'"),
        (
            "path,label,split\na.mp4,run,a\n",
            {"splits": ["a", "b"]},
            "splits must occur in the column split of .*got 'b'",
        ),
        ("path,label\na.mp4,run\n", {"splits": ["a"]}, "line 1 must have a column split, for --splits"),
        ("path,label,split\na.mp4,run,train\n", {"split": 0.5}, "split must be omitted, because .* has a column split"),
        ("path,label\na.mp4,run\n", {"split": 1.5}, "split must be between 0 and 1, got 1.5"),
        ("path,label,start\na.mp4,run,soon\n", {}, "line 2, column start must be a time in seconds .*got 'soon'"),
        ("path,label,start\na.mp4,run,-1\n", {}, "line 2, column start must be a time in seconds .*got '-1'"),
        ("path,label,start\na.mp4,run,nan\n", {}, "line 2, column start must be a time in seconds .*got 'nan'"),
        ("path,label,end\na.mp4,run,inf\n", {}, "line 2, column end must be a time in seconds .*got 'inf'"),
        ("path,label,end\na.mp4,run,0\n", {}, r"line 2, column end must be greater than the start, 0\.0 s, got '0'"),
        (
            "path,label,start,end\na.mp4,run,2,2.0\n",
            {},
            r"column end must be greater than the start, 2\.0 s, got '2.0'",
        ),
        ("path,label\na.mp4,run\nb.mp4,run\n./a.mp4,jump\n", {}, "line 4, column path must not be .*first in line 2"),
        (
            "path,label,split,start\na.mp4,run,train,3\na.mp4,run,test,3.0\n",
            {},
            "line 3, column path must not be listed twice with the same times \\(first in line 2\\), got 'a.mp4'",
        ),
        (
            "path,label,split,start,end\na.mp4,run,train,0,10\nb.mp4,run,test,,\n./a.mp4,run,test,5,15\n",
            {},
            r"line 4, column split must be train, like line 2, because a file may be in one split only, got 'test'",
        ),
        (
            "path,label\nx/a.mp4,run\ny.mp4,run\n",
            {},
            "no file listed in .* exists \\(2 listed\\); the first is .*x/a.mp4",
        ),
        (b"path,label\na.mp4,run\nb.mp4,h\xfcpfen\n", {}, "list.csv, line 3 must be UTF-8, got the byte 0xfc"),
        ("path,label\n".encode("utf-16"), {}, "list.csv, line 1 must be UTF-8, got the byte 0xff"),
    ],
)
def test_an_invalid_csv_file_is_reported_with_its_line(
    tmp_path: Path, content: str | bytes, settings: dict[str, object], message: str
) -> None:
    table = write_csv(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        read_csv(table, **settings)  # type: ignore[arg-type]
    if not isinstance(content, bytes) and "line" in message:
        assert str(table) in str(caught.value)


def test_a_csv_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"csv: .*list\.csv cannot be read: No such file"):
        read_csv(tmp_path / "list.csv")
    with pytest.raises(ValueError, match=r"must be a regular file, not a folder, pipe or device"):
        read_csv(tmp_path)


def test_a_file_of_classes_orders_them(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("sit\nrun \njump\n\n", "utf-8-sig")
    assert read_classes(tmp_path / "classes.txt") == ("sit", "run", "jump")
    table = write_csv(tmp_path, "path,label\na.mp4,2\nb.mp4,run;0\nc.mp4,run\n")
    sources = read_csv(table, classes=tmp_path / "classes.txt")
    assert media_ids_and_classes(sources) == {"train": {("a.mp4", "jump"), ("b.mp4", "run", "sit"), ("c.mp4", "run")}}
    assert sources.classes == ("sit", "run", "jump")
    folders = find_videos(touch(tmp_path / "in", "1/x", "jump/y"), classes=tmp_path / "classes.txt")
    assert media_ids_and_classes(folders) == {"train": {("1/x", "run"), ("jump/y", "jump")}}
    assert folders.classes == ("sit", "run", "jump")


@pytest.mark.parametrize("label", ["3", "-1", "walk", "1.0", "²", "1_0", "9" * 400])
def test_labels_without_a_class(tmp_path: Path, label: str) -> None:
    (tmp_path / "classes.txt").write_text("sit\nrun\njump\n")
    rule = r"must be one of the 3 names in the class file, or a number in 0\.\.2, got"
    with pytest.raises(ValueError, match=f"list.csv, line 2, column label {rule} '{label}'"):
        read_csv(write_csv(tmp_path, f"path,label\na.mp4,{label}\n"), classes=tmp_path / "classes.txt")
    with pytest.raises(ValueError, match=f"the name of .*in/walk {rule} 'walk'"):
        find_videos(touch(tmp_path / "in", "walk/x"), classes=tmp_path / "classes.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1 must name a class: line numbers are labels"),
        ("a\n\nb\n", "line 2 must name a class: .* none may be empty, got ''"),
        ("a\nb\na\n", "line 3 must not repeat line 1, got 'a'"),
        ("a\nb\rc\n", r"line 2 must name a class in one line of text, .*got 'b\\rc'"),
        ("a\nb\u0085c\n", "line 2 must name a class in one line of text"),
    ],
)
def test_an_invalid_class_file(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "classes.txt").write_text(content, newline="")
    with pytest.raises(ValueError, match=f"classes.txt, {message}"):
        read_classes(tmp_path / "classes.txt")


def test_segments_of_a_file_go_to_the_same_split(tmp_path: Path) -> None:
    files = touch(tmp_path, *(f"{number}.mp4" for number in range(20)))
    rows = [f"{n}.mp4,{'run' if (n + start) % 3 else 'jump'},{start}" for start in range(3) for n in range(20)]
    table = write_csv(files, "path,label,start\n" + "\n".join(rows))
    splits = read_csv(table, split=0.25).splits
    parts = [{video.path for video in splits[name]} for name in ("train", "test")]
    assert [len(part) for part in parts] == [15, 5]
    assert not parts[0] & parts[1]
    assert [len(splits[name]) for name in ("train", "test")] == [45, 15]
    assert splits != read_csv(table, split=0.25, seed=1).splits


def test_csv_files_and_folders_of_the_same_videos_are_split_equally(tmp_path: Path) -> None:
    names = [f"{name}/{number}.mp4" for name in ("jump", "run") for number in range(6)]
    touch(tmp_path, *names)
    rows = "".join(f"{name},{name.split('/')[0]}\n" for name in reversed(names))
    table = write_csv(tmp_path.parent, f"path,label\n{rows}", f"{tmp_path.name}.csv")
    assert read_csv(table, videos=tmp_path, split=0.3) == find_videos(tmp_path, split=0.3)


def test_folders_without_videos_and_loops(tmp_path: Path) -> None:
    touch(tmp_path, "run/a", "notes").joinpath("jump").mkdir()
    sources = find_videos(tmp_path)
    assert media_ids_and_classes(sources) == {"train": {("run/a", "run")}}
    assert sources.classes == ("run",)
    assert {(Path(e.path).name, e.reason) for e in sources.unusable} == {
        ("jump", "is a class folder without videos"),
        ("notes", "is not in a class folder"),
    }
    (tmp_path / "run" / "loop").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="run/loop is a folder, but class folders must hold video files"):
        find_videos(tmp_path)
    (tmp_path / "run" / "loop").unlink()
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"loop/.* is a folder, but class folders must hold video files"):
        find_videos(tmp_path)
    (tmp_path / "loop").unlink()
    (tmp_path / "run" / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "run" / "round").symlink_to("round")
    assert len(find_videos(tmp_path).splits["train"]) == 3  # of which two will fail


@pytest.mark.parametrize("separator", ["\n", "\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"])
def test_class_folders_with_line_breaks_in_their_names(tmp_path: Path, separator: str) -> None:
    for number, name in enumerate((f"ru{separator}n", f"run{separator}")):
        folder = tmp_path / str(number)
        touch(folder, "jump/a", f"{name}/b")
        with pytest.raises(ValueError, match=r"the name of (?s:.*) must name a class in one line of text") as caught:
            find_videos(folder)
        assert repr(name) in str(caught.value)


def test_a_hundred_thousand_classes_and_labels(tmp_path: Path) -> None:
    """Takes minutes if labels are looked up by linear search."""
    names = [f"class {number}" for number in range(100_000)]
    (tmp_path / "classes.txt").write_text("\n".join(names))
    labels = ";".join(reversed(names))
    table = write_csv(tmp_path, f"path,label\na.mp4,{labels[:120_000].rpartition(';')[0]}\nb.mp4,99999\n")
    sources = read_csv(table, classes=tmp_path / "classes.txt")
    (several,) = (video for video in sources.splits["train"] if len(video.classes) > 1)
    assert several.classes[0] == "class 99999" and len(several.classes) > 9_000


def test_cells_guarded_against_spreadsheets_are_read_back(tmp_path: Path) -> None:
    touch(tmp_path, "=a.mp4", "'=b.mp4")
    sources = read_csv(write_csv(tmp_path, "path,label\n'=a.mp4,'@run\n''=b.mp4,'jump\n"))
    assert media_ids_and_classes(sources) == {"train": {("=a.mp4", "@run"), ("'=b.mp4", "'jump")}}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters_are_detected(tmp_path: Path, delimiter: str, encoding: str) -> None:
    rows = [("path", "label", "start", "split"), ("a.mp4", '"run;jump"', "1.5", "train"), ("b.mp4", "run", "", "test")]
    content = "".join(delimiter.join(row) + "\r\n" for row in rows).encode(encoding)
    sources = read_csv(write_csv(tmp_path, content))
    assert media_ids_and_classes(sources) == {"train": {("a.mp4#1.5-", "run", "jump")}, "test": {("b.mp4", "run")}}
    if delimiter != ",":
        assert read_csv(write_csv(tmp_path, content.replace(b"1.5", b"1,5"))) == sources


def test_a_quoted_header_and_names_with_other_separators(tmp_path: Path) -> None:
    (tmp_path / "a,b\t.mp4").touch()
    sources = read_csv(write_csv(tmp_path, '\n"label";"path"\nrun, fast;"a,b\t.mp4"\n'))
    assert media_ids_and_classes(sources) == {"train": {("a,b\t.mp4", "run, fast")}}


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("train", "val", "test"), {"train": "train", "val": "val", "test": "test"}),
        (("test", "train"), {"train": "train", "test": "test"}),
        (("Training", "VALIDATION"), {"train": "Training", "val": "VALIDATION"}),
        (("train", "valid", "Testing"), {"train": "train", "val": "valid", "test": "Testing"}),
    ],
)
def test_folders_with_usual_split_names_are_splits(
    tmp_path: Path, folders: tuple[str, ...], expected: dict[str, str]
) -> None:
    touch(tmp_path, *(f"{folder}/run/{number}" for number, folder in enumerate(folders)), "notes.txt", "extra/run/9")
    sources = find_videos(tmp_path)
    assert list(sources.splits) == list(expected)
    assert media_ids_and_classes(sources) == {
        split: {(f"{folder}/run/{folders.index(folder)}", "run")} for split, folder in expected.items()
    }
    names = ", ".join(expected.values())
    assert {(Path(e.path).name, e.reason) for e in sources.unusable} == {
        (name, f"is outside the split folders {names}") for name in ("extra", "notes.txt")
    }


@pytest.mark.parametrize("folders", [("train", "test"), ("val", "test", "hug"), ("train", "Test", "testing")])
def test_classes_may_have_the_names_of_splits(tmp_path: Path, folders: tuple[str, ...]) -> None:
    sources = find_videos(touch(tmp_path, *(f"{folder}/1" for folder in folders)))
    assert media_ids_and_classes(sources) == {"train": {(f"{folder}/1", folder) for folder in folders}}


def test_a_split_has_one_folder(tmp_path: Path) -> None:
    touch(tmp_path, "train/run/1", "val/run/2", "Validation/run/3")
    with pytest.raises(ValueError, match=r"Validation and .*val both stand for split val. .*--splits"):
        find_videos(tmp_path)
    assert list(find_videos(tmp_path, splits=["train", "val"]).splits) == ["train", "val"]


def test_a_csv_file_may_use_other_spellings_of_splits(tmp_path: Path) -> None:
    table = write_csv(tmp_path, "path,label,split\na.mp4,run,Training\nb.mp4,run,validate\nc.mp4,run,TEST\n")
    assert media_ids_and_classes(read_csv(table)) == {
        "train": {("a.mp4", "run")},
        "val": {("b.mp4", "run")},
        "test": {("c.mp4", "run")},
    }


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("10", "9", "0"), ("0", "9", "10")),
        (("1", "10", "01", "2"), ("01", "1", "2", "10")),
        (("9" * 200, "1" + "0" * 200, "7"), ("7", "9" * 200, "1" + "0" * 200)),
        (("10", "9", "run"), ("10", "9", "run")),
        (("10", "9", "-1"), ("-1", "10", "9")),
        (("10", "9", "٣"), ("10", "9", "٣")),
        (("10", "9", "1.5"), ("1.5", "10", "9")),
    ],
)
def test_numbers_as_classes_are_in_their_order(
    tmp_path: Path, names: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    assert find_videos(touch(tmp_path / "in", *(f"{name}/x" for name in names))).classes == expected
    table = write_csv(tmp_path, "path,label\na.mp4," + ";".join(names))
    assert read_csv(table).classes == expected
