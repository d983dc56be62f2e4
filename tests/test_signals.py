"""SIGTERM and Ctrl-C in commands, each run in a separate process."""

import signal
import subprocess
import sys

import pytest

WAITING = "import time; print('ready', flush=True); time.sleep(60)"
SAVING = (
    "import time\n"
    "    try:\n"
    "        print('ready', flush=True); time.sleep(60)\n"
    "    except KeyboardInterrupt:\n"
    "        print('saving', flush=True); time.sleep(1); print('saved', flush=True); raise"
)


def start(body: str) -> subprocess.Popen[str]:
    code = f"from x3d_tf import commands\ndef main():\n    {body}\ncommands.run(main)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "status", "message"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_signals_are_one_line_and_a_status(number: int, status: int, message: str) -> None:
    process = start(WAITING)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors.strip()) == (status, message)


def test_a_second_signal_does_not_interrupt_saving() -> None:
    process = start(SAVING)
    process.send_signal(signal.SIGTERM)
    assert process.stdout and process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (143, "saved\n")
    assert errors.startswith("still stopping; a third signal exits immediately without saving")


def test_a_third_signal_exits_immediately() -> None:
    process = start(SAVING.replace("time.sleep(1)", "time.sleep(60)"))
    process.send_signal(signal.SIGTERM)
    assert process.stdout and process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr and process.stderr.readline().startswith("still stopping")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (143, "")
