"""What all commands do with errors and interruptions, in processes of their own."""

import subprocess
import sys

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
