"""Tables and documents of predictions: whole, partial, and on a full disk."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from x3d_tf import csv_files
from x3d_tf.data.video.decode import VideoError
from x3d_tf.errors import UserError
from x3d_tf.files import WriteError, temporary_path
from x3d_tf.inference.prediction import Prediction
from x3d_tf.inference.writers import csv_table, json_document

NO_THUMBNAILS = np.zeros((0, 8, 8, 3), np.uint8), np.zeros(0)
RESULTS: list[Prediction | VideoError] = [
    Prediction(Path("a, b/дом.mp4"), 0.0, 1.5, np.float32([0.5, 0.25, 0.25]), *NO_THUMBNAILS),
    VideoError("x\udcff.mp4", "the file is empty"),
    Prediction(Path("c.mp4"), 0.5, 2.0, np.float32([0.2, 0.2, 0.6]), *NO_THUMBNAILS),
]


def test_the_table_and_the_document_hold_everything(tmp_path: Path) -> None:
    names = ("jump", "a,b", "дом")
    with (
        csv_table(tmp_path / "new" / "a.csv", names) as to_csv,
        json_document(tmp_path / "a.json", {"model": "m"}, names) as to_json,
    ):
        for result in RESULTS:
            to_csv(result)
            to_json(result)
        assert not (tmp_path / "a.json").exists()
    with (tmp_path / "new" / "a.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["video"] for row in rows] == ["a, b/дом.mp4", "x\\udcff.mp4", "c.mp4"]
    assert [row["predicted"] for row in rows] == ["jump", "", "дом"]
    assert [row["error"] for row in rows] == ["", "the file is empty", ""]
    assert (rows[2]["start"], rows[2]["end"], rows[2]["p(a,b)"]) == ("0.500", "2.000", "0.2")
    content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert (content["model"], content["classes"]) == ("m", list(names))
    first, failed, last = content["predictions"]
    assert (first["video"], first["start"], first["end"]) == ("a, b/дом.mp4", 0.0, 1.5)
    assert [entry["class"] for entry in first["top"]] == ["jump", "a,b", "дом"]  # of equal ones the lower first
    assert failed == {"video": "x\udcff.mp4", "error": "the file is empty"}
    assert last["top"][0] == {"class": "дом", "probability": 0.6}
    assert last["probabilities"] == [0.2, 0.2, 0.6]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_results_so_far_are_kept_under_another_name(tmp_path: Path, error: type[BaseException]) -> None:
    names = ("jump", "a,b", "дом")
    with (
        pytest.raises(error),
        csv_table(tmp_path / "a.csv", names) as to_csv,
        json_document(tmp_path / "a.json", {}, names) as to_json,
    ):
        to_csv(RESULTS[0])
        to_json(RESULTS[0])
        raise error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.partial.csv", "a.partial.json"]
    with (tmp_path / "a.partial.csv").open(newline="", encoding="utf-8") as file:
        assert [row["predicted"] for row in csv.DictReader(file)] == ["jump"]
    content = json.loads((tmp_path / "a.partial.json").read_text(encoding="utf-8"))
    assert [entry["video"] for entry in content["predictions"]] == ["a, b/дом.mp4"]


@pytest.mark.parametrize(
    "write", [csv_table, lambda path, names, **settings: json_document(path, {}, names, **settings)]
)
def test_results_on_a_full_disk_name_their_file(tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    real = Path.open
    full = {temporary_path(path): (Path("/dev/full"), "w")}
    monkeypatch.setattr(Path, "open", lambda self, mode="r", **named: real(*full.get(self, (self, mode)), **named))
    with pytest.raises(WriteError, match=r"a cannot be written: No space left on device$"), write(path, ("a",)) as add:
        for _ in range(10_000):  # more than a buffer holds
            add(VideoError("b.mp4", "the file is empty"))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_document_is_json(tmp_path: Path) -> None:
    with json_document(tmp_path / "a.json", {}, ("a",)):
        pass
    assert json.loads((tmp_path / "a.json").read_text()) == {"classes": ["a"], "predictions": []}


def test_names_in_the_table_are_no_formulas(tmp_path: Path) -> None:
    names = ("=run", "-jump")
    with csv_table(tmp_path / "a.csv", names) as add:
        add(Prediction(Path("=x.mp4"), 0.0, 1.0, np.float32([0.25, 0.75]), *NO_THUMBNAILS))
        add(VideoError("@y.mp4", "+bad"))
    text = (tmp_path / "a.csv").read_text()
    assert text.splitlines()[1:] == ["'=x.mp4,0.000,1.000,'-jump,,0.25,0.75", "'@y.mp4,,,,'+bad,,"]
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv_files.dicts(file))
    assert [(row["video"], row["predicted"], row["error"]) for row in rows] == [
        ("=x.mp4", "-jump", ""),
        ("@y.mp4", "", "+bad"),
    ]


@pytest.mark.parametrize(
    "write", [csv_table, lambda path, names, **settings: json_document(path, {}, names, **settings)]
)
def test_files_are_whole_and_not_replaced_silently(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "a"
    with pytest.raises(RuntimeError), write(path, ("a",)):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    path.write_text("mine")
    with pytest.raises(ValueError, match="exists; give another path, or overwrite=True"), write(path, "a"):
        pass
    assert path.read_text() == "mine"
    with write(path, ("a",), overwrite=True):
        pass
    assert path.read_text() != "mine"


def test_one_process_writes_a_file_of_predictions(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    message = r"another process is writing .*a\.csv \(process .*\); wait for it"
    with csv_table(path, ["one"]), pytest.raises(UserError, match=message), csv_table(path, ["other"]):
        pass
    assert path.read_text().startswith("video,start,end,predicted,error,p(one)")
    assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]
