"""Reading and writing AVA's files, and errors in them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from x3d_tf.data.ava_files import (
    NO_ACTION,
    BoxTable,
    KeyFrame,
    ava_actions,
    evaluated_actions,
    read_boxes,
    read_exclusions,
    read_label_map,
    write_detections,
)
from x3d_tf.errors import UserError

LABELS = Path(__file__).parents[2] / "shared" / "data" / "labels"
ACTIONS = {1: "sit", 3: "wave"}
ROW = "film,0902,0.1,0.2,0.3,0.4,1,0.5\n"


def write_file(path: Path, text: str) -> Path:
    path.write_bytes(text.encode("latin-1"))
    return path


def test_rows_become_columns(tmp_path: Path) -> None:
    text = "b,1000,0.1,0.2,0.3,0.4,3,17\na,0902,0,0,1,1,,0\n\nb,1000,0.1,0.2,0.3,0.4,1,17\n"
    table = read_boxes(write_file(tmp_path / "a.csv", text), "ground truth", ACTIONS)
    assert table.key_frames == (KeyFrame("b", 1000), KeyFrame("a", 902))
    assert table.frames.tolist() == [0, 1, 0]
    assert table.actions.tolist() == [3, NO_ACTION, 1]
    np.testing.assert_array_equal(table.boxes, [[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4]])
    assert table.scores.tolist() == [1, 1, 1]


def test_detections_have_scores(tmp_path: Path) -> None:
    table = read_boxes(write_file(tmp_path / "a.csv", ROW + ROW.replace("0.5", "-2e-3")), "detections", ACTIONS)
    assert table.scores.tolist() == [0.5, -0.002]
    write_detections(tmp_path / "b.csv", table)
    assert (tmp_path / "b.csv").read_text() == (
        "film,0902,0.100,0.200,0.300,0.400,1,0.5000\nfilm,0902,0.100,0.200,0.300,0.400,1,-0.0020\n"
    )


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    table = read_boxes(write_file(tmp_path / "a.csv", ""), "detections", ACTIONS)
    assert len(table) == 0 and table.boxes.shape == (0, 4)


@pytest.mark.parametrize("kind", ["ground truth", "detections"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("film,0902,0.1,0.2,0.3,0.4,1\n", "have the 8 columns video_id,timestamp,x1,y1,x2,y2,action_id,"),
        ("film,0902,0.1,0.2,0.3,0.4,1,0.5,6\n", "have the 8 columns"),
        (",0902,0.1,0.2,0.3,0.4,1,0.5\n", "name a video, got ''"),
        (ROW.replace("0902", "901"), "have an integer timestamp in 902..1798 seconds, got '901'"),
        (ROW.replace("0902", "1799"), "have an integer timestamp in 902..1798 seconds, got '1799'"),
        (ROW.replace("0902", "1e3"), "have an integer timestamp in"),
        (ROW.replace("0902", "1_000"), "have an integer timestamp in"),
        (ROW.replace("0902", "9" * 5000), "have an integer timestamp in"),
        (ROW.replace("0.1", "0_0.1"), "have a box inside the frame"),
        (ROW.replace("0.4", "1e999"), "have a box inside the frame"),
        (ROW.replace("0902", "٣٣٣٣".encode().decode("latin-1")), "have an integer timestamp in"),
        (ROW.replace("0.3", "1.3"), "have a box inside the frame, with x1,y1,x2,y2 in 0..1"),
        (ROW.replace("0.2", "-0.2"), "have a box inside the frame"),
        (ROW.replace("0.2", "nan"), "have a box inside the frame"),
        (ROW.replace("0.2", "left"), "have a box inside the frame"),
        (ROW.replace("0.1", "0.9"), "have a box with x1 <"),
        (ROW.replace("0.2", "0.5"), "have a box with x1 <"),
        (ROW.replace(",1,", ",2,"), "have an action_id from the label map, got '2'"),
        (ROW.replace(",1,", ",wave,"), "have an action_id from the label map, got 'wave'"),
        ("film,0902,\xff\n", "must be UTF-8"),
    ],
)
def test_invalid_lines_are_reported(tmp_path: Path, kind: Any, line: str, message: str) -> None:
    path = write_file(tmp_path / "a.csv", ROW + ROW + line + ROW)
    with pytest.raises(UserError) as error:
        read_boxes(path, kind, ACTIONS)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "UTF-8" in message or f"{path}, line 3 must" in str(error.value)


@pytest.mark.parametrize("score", ["nan", "inf", "", "high"])
def test_scores_are_numbers(tmp_path: Path, score: str) -> None:
    path = write_file(tmp_path / "a.csv", ROW.replace("0.5", score))
    with pytest.raises(UserError, match=rf"line 1 must have a finite number as score, got '{score}'"):
        read_boxes(path, "detections", ACTIONS)


def test_detections_may_be_empty_after_rounding(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.csv", ROW.replace("0.1", "0.3"))
    assert len(read_boxes(path, "detections", ACTIONS)) == 1
    with pytest.raises(UserError, match="x1 < x2"):
        read_boxes(path, "ground truth", ACTIONS)


def test_other_ranges_of_seconds(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.csv", ROW.replace("0902", "0"))
    assert read_boxes(path, "detections", ACTIONS, seconds=(0, 10**9)).key_frames == (KeyFrame("film", 0),)


def test_missing_files(tmp_path: Path) -> None:
    for read in (lambda path: read_boxes(path, "detections", ACTIONS), read_exclusions, read_label_map):
        with pytest.raises(UserError, match=r"none\.csv cannot be read: No such file"):
            read(tmp_path / "none.csv")


def test_a_byte_order_mark_is_not_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("film,0902\n", encoding="utf-8-sig")
    assert read_exclusions(tmp_path / "a.csv") == {KeyFrame("film", 902)}


def test_exclusions(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.csv", "film,0902\nfilm,1798\n")
    assert read_exclusions(path) == {KeyFrame("film", 902), KeyFrame("film", 1798)}
    with pytest.raises(UserError, match=r"line 1 must have the 2 columns video_id,timestamp"):
        read_exclusions(write_file(tmp_path / "b.csv", "film,0902,1\n"))


@pytest.mark.parametrize("key", ["id", "label_id"])
def test_label_maps_of_both_spellings(tmp_path: Path, key: str) -> None:
    first = 'item {\n  name: "sit {down}"\n  KEY: 12\n  label_type: PERSON_MOVEMENT\n}\n'
    text = (first + "item { KEY: 3 name: 'id: 4' }").replace("KEY", key)
    assert read_label_map(write_file(tmp_path / "a.pbtxt", text)) == {12: "sit {down}", 3: "id: 4"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must contain items"),
        ("1: sit\n2: wave\n", "line 1 must contain only items"),
        ('item {\n name: "a"\n id: 1\n}\nitem {\n name: "b"\n', "line 5 must contain only items"),
        ('item { name: "a" }', "line 1 must have one name:"),
        ("item { id: 1 }", "line 1 must have one name:"),
        ('item { name: "a" id: 0 }', "line 1 must have an id in 1..100000, got '0'"),
        ('item { name: "a" id: -1 }', "line 1 must have an id in 1..100000, got '-1'"),
        ('item { name: "a" id: 1_0 }', "line 1 must have an id in 1..100000, got '1_0'"),
        ('item { name: "a" id: 1e1 }', "line 1 must have an id in 1..100000, got '1e1'"),
        ('item { name: "a" id: }', "line 1 must have an id in 1..100000, got "),
        (
            'item { name: "a" id: 1 }\nitem {\n name: "b" id: ' + "9" * 5000 + " }",
            "line 2 must have an id in 1..100000",
        ),
        ('item { name: "a" id: 1 }\nitem { name: "a\rb" id: 2 }', "line 2 must name a class in one line of text"),
        ('item { name: "" id: 2 }', "line 1 must name a class in one line of text"),
        ("item { " * 100_000, "line 1 must contain only items"),
        ('item { name: "a" id: 1 }\n' + " " * 100_000 + "x", "line 2 must contain only items"),
        ('item { name: "a" ' + "x " * 300_000, "line 1 must contain only items"),
        ('item { name: "a" id: 1 }\nitem { name: "b" id: 1 }', "line 2 must not repeat an id, got 1"),
        ('item { name: "a" id: 1 }\nitem { name: "a" id: 2 }', "line 2 must not repeat a name, got 'a'"),
    ],
)
def test_invalid_label_maps(tmp_path: Path, text: str, message: str) -> None:
    path = write_file(tmp_path / "a.pbtxt", text)
    with pytest.raises(UserError) as error:
        read_label_map(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_a_hundred_thousand_actions(tmp_path: Path) -> None:
    """Takes minutes if each item scans all previous lines or names."""
    text = "".join(f'item {{\n  name: "action {n}"\n  id: {n}\n}}\n' for n in range(1, 100_001))
    with pytest.raises(UserError, match="line 400001 must not repeat an id, got 7"):
        read_label_map(write_file(tmp_path / "a.pbtxt", text + "item { name: 'more' id: 7 }"))


@pytest.mark.parametrize(
    "video", ["-5KQ66BBWC4", "=cmd|' /C calc'!A0", "'-abc", "'=x", "a,b", "+1", "@x", "c\rd", 'q"']
)
def test_video_names_are_read_back_unchanged(tmp_path: Path, video: str) -> None:
    table = BoxTable(
        (KeyFrame(video, 902),),
        np.zeros(1, np.int32),
        np.array([[0.1, 0.2, 0.3, 0.4]]),
        np.ones(1, np.int32),
        np.array([-0.25]),
        np.zeros(1, np.int32),
    )
    write_detections(tmp_path / "a.csv", table)
    text = (tmp_path / "a.csv").read_bytes().decode()
    assert text.startswith("-5KQ66BBWC4,") == (video == "-5KQ66BBWC4")  # AVA's evaluators look for the name
    assert text.endswith(("1,-0.2500\n", '"1","-0.2500"\n'))
    assert (text[0], text[:2]) not in {("=", text[:2]), ("+", text[:2]), ("@", text[:2])}
    assert read_boxes(tmp_path / "a.csv", "detections", ACTIONS).key_frames == table.key_frames


def test_ava_actions_that_the_label_map_lacks_are_left_out(tmp_path: Path) -> None:
    part = {number: name for number, name in ava_actions().items() if number != 2}
    path = write_file(tmp_path / "a.csv", ROW + ROW.replace(",1,", ",2,") + ROW.replace(",1,", ",80,"))
    assert read_boxes(path, "detections", part).actions.tolist() == [1, 80]
    with pytest.raises(UserError, match="'81'"):
        read_boxes(write_file(tmp_path / "b.csv", ROW.replace(",1,", ",81,")), "detections", part)
    with pytest.raises(UserError, match="'2'"):
        read_boxes(path, "detections", {**part, 3: "something else"})


@pytest.mark.skipif(not LABELS.is_dir(), reason="AVA's own label map does not exist")
def test_the_actions_are_avas() -> None:
    evaluated = read_label_map(LABELS / "ava_v2.2_60classes.pbtxt")
    assert len(evaluated) == 60 and len(ava_actions()) == 80
    assert evaluated == evaluated_actions()
