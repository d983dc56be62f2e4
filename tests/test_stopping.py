"""Commands stopped by signals, in separate processes: partial results are saved and no process is left."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from video_fixtures import numbered_frames, write_video

pytestmark = pytest.mark.slow


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    frames = numbered_frames(300, 120, 160)
    for number in range(24):
        write_video(tmp_path / "videos" / "ab"[number % 2] / f"{number}.mp4", frames)
    return tmp_path / "videos"


def stopped(command: list[str], sign: str, number: int, group: bool) -> tuple[int, str]:
    """Sends a signal to a command once it has printed `sign`; returns its exit status and output.

    With `group` its child processes get the signal, too, as from schedulers and terminals.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout is not None
    output = ""
    while sign not in output:
        character = process.stdout.read(1)
        assert character, output
        output += character
    (os.killpg if group else os.kill)(process.pid, number)
    output += process.communicate(timeout=60)[0]  # returns when the last process with the pipe has ended
    return process.returncode, output


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_build_stops_with_its_workers_and_resumes(
    videos: Path, tmp_path: Path, number: int, status: int, group: bool
) -> None:
    command = ["x3d_tf.build_records", f"--videos={videos}", f"--output={tmp_path / 'records'}", "--split=0.25"]
    returned, output = stopped(command, "0/24", number, group)
    assert returned == status and "Traceback" not in output
    assert "Run the same command again to resume after the last finished shard." in output
    subprocess.run([sys.executable, "-m", *command], check=True, cwd=Path(__file__).parents[1])
    assert (tmp_path / "records" / "manifest.json").is_file()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_partial_predictions_are_saved(videos: Path, tmp_path: Path, number: int, status: int) -> None:
    from x3d_tf import build_x3d, save

    save(build_x3d("x3d_xs", 2), tmp_path / "model.keras", ["a", "b"])
    out = [f"--csv={tmp_path / 'out.csv'}", f"--json={tmp_path / 'out.json'}"]
    command = ["x3d_tf.predict", f"--model={tmp_path / 'model.keras'}", *out, str(videos)]
    returned, output = stopped(command, "(10.0 s)", number, group=False)
    assert returned == status and "Traceback" not in output
    with (tmp_path / "out.partial.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    saved = json.loads((tmp_path / "out.partial.json").read_text())["predictions"]
    assert [row["video"] for row in rows] == [entry["video"] for entry in saved]
    assert 1 <= len(rows) < 24 and f"predictions for {len(rows)} of 24 videos" in output
    assert not (tmp_path / "out.csv").exists() and not (tmp_path / "out.json").exists()


def test_a_failed_write_is_reported_below_the_progress_bar(videos: Path, tmp_path: Path) -> None:
    from x3d_tf import build_x3d, save

    save(build_x3d("x3d_xs", 1000), tmp_path / "model.keras", [f"class {number}" for number in range(1000)])
    command = ["x3d_tf.predict", f"--model={tmp_path / 'model.keras'}", f"--csv={tmp_path / 'out.csv'}", str(videos)]
    # The limit is 128 blocks of 512 bytes; a row has about 10 kB, so that only the first rows can be written.
    line = ["sh", "-c", 'ulimit -f 128 && exec "$@"', "sh", sys.executable, "-m", *command]
    ended = subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    last = ended.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert last == f"error: {tmp_path / 'out.csv'} cannot be written: File too large"
