"""What all commands do with errors and interruptions, in processes of their own."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest


def run(body: str, *arguments: str, positional: bool = False) -> subprocess.CompletedProcess[str]:
    code = (
        "from x3d_tf import _command\nfrom x3d_tf._checks import UserError\n"
        f"def main(*paths):\n    {body}\n_command.run(main, positional={positional})"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("raise UserError('--x must be 1, got 2')", 1, "error: --x must be 1, got 2"),
        ("open('/nothing/there')", 1, "error: [Errno 2] No such file or directory: '/nothing/there'"),
        ("pass", 0, ""),
    ],
)
def test_mistakes_are_one_line_and_a_status(body: str, status: int, message: str) -> None:
    done = run(body)
    assert (done.returncode, done.stderr.strip()) == (status, message)


def test_faults_of_the_package_keep_their_traceback() -> None:
    done = run("1 / 0")
    assert done.returncode == 1 and "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


def test_arguments_without_a_flag_are_for_commands_that_take_them() -> None:
    assert "error: unexpected argument 'file'" in run("pass", "file").stderr
    assert run("print(paths)", "file", positional=True).stdout == "(['file'],)\n"


WAITING = "import time; print('ready', flush=True); time.sleep(60)"
SAVING = (
    "import time\n"
    "    try:\n"
    "        print('ready', flush=True); time.sleep(60)\n"
    "    except KeyboardInterrupt:\n"
    "        print('saving', flush=True); time.sleep(1); print('saved', flush=True); raise"
)


def start(body: str) -> subprocess.Popen[str]:
    code = f"from x3d_tf import _command\ndef main():\n    {body}\n_command.run(main)"
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


def test_a_second_signal_does_not_cut_the_saving_short() -> None:
    process = start(SAVING)
    process.send_signal(signal.SIGTERM)
    assert process.stdout and process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (143, "saved\n")
    assert errors.startswith("still stopping; a third signal ends at once")


def test_a_third_signal_ends_at_once() -> None:
    process = start(SAVING.replace("time.sleep(1)", "time.sleep(60)"))
    process.send_signal(signal.SIGTERM)
    assert process.stdout and process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr and process.stderr.readline().startswith("still stopping")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (143, "")


def test_hostile_text_is_escaped_in_output_errors_and_warnings() -> None:
    body = (
        "import warnings, sys\n    name = 'a\\x1b[2J\\nb\\u202e\\udc80'\n    print(name)\n    warnings.warn(name)\n"
        "    raise UserError(name + ' is no video')"
    )
    done = run(body)
    assert done.stdout == "a\\x1b[2J\nb\\u202e\\udc80\n"
    name = r"a\x1b[2J\nb\u202e\udc80"
    assert done.stderr == f"warning: {name}\nerror: {name} is no video\n"


def test_an_error_is_the_last_line_after_a_progress_bar() -> None:
    body = (
        "from tqdm import tqdm\n    steps = (step for step in tqdm(range(9)))\n    next(steps)\n"
        "    raise UserError('--x must be 1, got 2')"
    )
    assert run(body).stderr.splitlines()[-1] == "error: --x must be 1, got 2"


def test_a_full_standard_output_is_one_line() -> None:
    code = "from x3d_tf import _command\ndef main():\n    print('a')\n_command.run(main)"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    message = "error: standard output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, message)


def test_a_closed_standard_output_is_quiet() -> None:
    code = "from x3d_tf import _command\ndef main():\n    while True: print('a' * 1000)\n_command.run(main)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert (process.wait(timeout=30), process.stderr.read()) == (141, "")
    process.stderr.close()
