"""Reports on csv files of detections."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from x3d_tf.errors import UserError
from x3d_tf.evaluation.detection_reports import evaluate_files

ROOT = Path(__file__).parents[1]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "x3d_tf.evaluate", *arguments]
    return subprocess.run(run, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Files with three annotated boxes, two of them detected, and one more on an excluded key frame."""
    rows = [f"film,{second},0.1,0.1,0.5,0.5" for second in (902, 903, 904)]
    truth = [f"{rows[0]},1,0", f"{rows[1]},1,0", f"{rows[1]},2,0", f"{rows[2]},1,0"]
    found = [f"{rows[0]},1,0.9", f"{rows[1]},2,0.8", f"{rows[2]},2,0.99"]
    named = 'item { name: "sit" id: 1 }\nitem { name: "wave" id: 2 }\nitem { name: "run" id: 3 }\n'
    content = {"groundtruth": truth, "detections": found, "exclusions": ["film,904"], "label_map": [named]}
    for name, lines in content.items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    return {name: f"--{name}={tmp_path / name}" for name in content}


def test_the_command_evaluates_files(files: dict[str, str], tmp_path: Path) -> None:
    done = command(*files.values(), f"--output={tmp_path / 'report'}")
    assert done.returncode == 0, done.stderr
    assert "frame mAP at IoU 0.5: 75.0000% over 2 actions on 2 key frames, 2 detections" in done.stdout
    assert "ignored: 1 detection (" in done.stdout and "ignored: 1 action of the label map" in done.stdout
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["map"] == 0.75 and results["classes_with_positives"] == 2
    assert (tmp_path / "report" / "per_class.csv").read_text().splitlines() == [
        "action_id,action,positives,average_precision",
        "1,sit,2,0.5",
        "2,wave,1,1",
        "3,run,0,",
    ]
    assert (tmp_path / "report" / "per_class.png").read_bytes().startswith(b"\x89PNG")
    again = command(*files.values(), f"--output={tmp_path / 'report'}")
    assert again.returncode == 1 and "already has a report" in again.stderr


def test_ignored_rows_are_counted(files: dict[str, str], tmp_path: Path) -> None:
    """Rows of actions that AVA does not evaluate and rows on excluded key frames are ignored."""
    paths = {name: value.partition("=")[2] for name, value in files.items()}
    with Path(paths["detections"]).open("a") as file:
        file.write("film,905,0.1,0.1,0.5,0.5,2,0.5\n" * 3)  # "crouch/kneel"
    Path(paths["groundtruth"]).write_text("film,902,0.1,0.1,0.5,0.5,1,0\n")
    _, scores = evaluate_files(paths["detections"], paths["groundtruth"], None, paths["exclusions"])
    assert (scores.boxes, scores.left_out) == (1, 5)
    Path(paths["exclusions"]).write_text("other,904\n")
    with pytest.raises(UserError, match=r"exclusions must have key frames of videos in .*truth"):
        evaluate_files(paths["detections"], paths["groundtruth"], None, paths["exclusions"])


def test_conflicting_flags(files: dict[str, str]) -> None:
    assert "requires --groundtruth" in command(files["detections"]).stderr
    assert "--groundtruth must not be given without --detections" in command("--run=x", files["groundtruth"]).stderr
    done = command(files["detections"], files["groundtruth"], "--views=3")
    assert done.returncode == 1 and "--views must not be given with --detections" in done.stderr
