"""Errors, flags and output of commands, each run in a separate process."""

import subprocess
import sys
from pathlib import Path

import pytest


def run(body: str, *arguments: str, positional: bool = False) -> subprocess.CompletedProcess[str]:
    code = (
        "from x3d_tf import commands\nfrom x3d_tf.errors import UserError\n"
        f"def main(*paths):\n    {body}\ncommands.run(main, positional={positional})"
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
def test_user_errors_are_one_line_and_a_status(body: str, status: int, message: str) -> None:
    done = run(body)
    assert (done.returncode, done.stderr.strip()) == (status, message)


def test_bugs_keep_their_traceback() -> None:
    done = run("1 / 0")
    assert done.returncode == 1 and "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


def test_positional_arguments_require_positional() -> None:
    assert "error: unexpected argument 'file'" in run("pass", "file").stderr
    assert run("print(paths)", "file", positional=True).stdout == "(['file'],)\n"


FLAGS = (
    "from absl import flags\n"
    "flags.DEFINE_string('model', None, 'A run folder. Or a file.', required=True)\n"
    "flags.DEFINE_multi_string('gin_file', None, 'A .gin file.', required=True)\n"
    "flags.DEFINE_integer('views', None, 'Clips.', lower_bound=1)\n"
    "flags.DEFINE_integer('clips', 8, 'Rows.', lower_bound=1, upper_bound=64)\n"
    "flags.DEFINE_float('hop', None, 'Seconds. Defaults to 5.', upper_bound=0.0)\n"
    "flags.DEFINE_enum('crops', '1', ['1', '3'], 'Crops.')\n"
    "flags.DEFINE_bool('sweep', False, 'All.')\n"
)
REQUIRED = ("--model=a", "--gin_file=b")


def run_with_flags(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"'Does something.'\n{FLAGS}from x3d_tf import commands\ndef main(): pass\ncommands.run(main)"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gin_file=b",), "--model (a run folder) is required"),
        ((), "these flags are required: --model (a run folder), --gin_file (a .gin file)"),
        ((*REQUIRED, "--model"), "--model requires a value"),
        ((*REQUIRED, "--viws=3"), "--viws is not a flag of this command; did you mean --views?"),
        ((*REQUIRED, "--run_with_pdbs"), "--run_with_pdbs is not a flag of this command; see --help"),
        ((*REQUIRED, "--views=0"), "--views must be an integer, at least 1, got '0'"),
        ((*REQUIRED, "--views=1: 2"), "--views must be an integer, at least 1, got '1: 2'"),
        ((*REQUIRED, "--views="), "--views must be an integer, at least 1, got ''"),
        ((*REQUIRED, "--clips=65"), "--clips must be an integer in 1..64, got '65'"),
        ((*REQUIRED, "--hop=fast"), "--hop must be a number, at most 0.0, got 'fast'"),
        ((*REQUIRED, "--crops=2"), "--crops must be one of 1, 3, got '2'"),
        ((*REQUIRED, "--sweep=perhaps"), "--sweep must be true or false, got 'perhaps'"),
        ((*REQUIRED, "--verbose=perhaps"), "--verbose must be true or false, got 'perhaps'"),
    ],
)
def test_an_invalid_flag_is_reported_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = run_with_flags(*arguments)
    assert (done.returncode, done.stderr, done.stdout) == (1, f"error: {message}\n", "")


@pytest.mark.parametrize(
    ("message", "printed"),
    [
        ("views must be at least 1", "--views must be at least 1"),
        ("model: a.keras is not a file", "--model: a.keras is not a file"),
        ("Config.number must be at least 1, got 0", "--crops must be at least 1, got 0"),
        ("Recipe.views must be at least 1", "Recipe.views must be at least 1"),
        ("model a must be a file", "model a must be a file"),
        ("views.csv must be a file", "views.csv must be a file"),
        ("steps must be at least 1", "steps must be at least 1"),
        ("must be 3", "must be 3"),
    ],
)
def test_errors_of_the_library_name_the_flag(message: str, printed: str) -> None:
    code = (
        f"{FLAGS}from x3d_tf import commands, errors\ndef main(): raise errors.UserError({message!r})\n"
        "commands.run(main, settings={'Config.number': 'crops'})"
    )
    done = subprocess.run([sys.executable, "-c", code, *REQUIRED], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"error: {printed}\n")


@pytest.mark.parametrize("arguments", [("--help",), ("--model=a", "-h"), ("--viws=3", "--help")])
def test_help_lists_the_flags_of_the_command(arguments: tuple[str, ...]) -> None:
    done = run_with_flags(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Does something.\n\nflags:\n  --clips=INTEGER\n      Rows. Defaults to 8.\n")
    assert "--crops=1|3" in done.stdout and "--[no]verbose" in done.stdout and "pdb" not in done.stdout
    assert done.stdout.count("Defaults to 5") == 1


def test_help_after_two_dashes_is_a_positional_argument() -> None:
    assert run("print(paths)", "--", "--help", positional=True).stdout == "(['--help'],)\n"


def test_hostile_text_is_escaped_in_output_errors_and_warnings() -> None:
    body = (
        "import warnings, sys\n    name = 'a\\x1b[2J\\nb\\u202e\\udc80'\n    print(name)\n    warnings.warn(name)\n"
        "    raise UserError(name + ' is not a video')"
    )
    done = run(body)
    assert done.stdout == "a\\x1b[2J\nb\\u202e\\udc80\n"
    name = r"a\x1b[2J\nb\u202e\udc80"
    assert done.stderr == f"warning: {name}\nerror: {name} is not a video\n"


def test_an_error_is_the_last_line_after_a_progress_bar() -> None:
    body = (
        "from tqdm import tqdm\n    steps = (step for step in tqdm(range(9)))\n    next(steps)\n"
        "    raise UserError('--x must be 1, got 2')"
    )
    assert run(body).stderr.splitlines()[-1] == "error: --x must be 1, got 2"


def test_a_full_standard_output_is_one_line() -> None:
    code = "from x3d_tf import commands\ndef main():\n    print('a')\ncommands.run(main)"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    message = "error: standard output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, message)


def test_a_closed_standard_output_is_quiet() -> None:
    code = "from x3d_tf import commands\ndef main():\n    while True: print('a' * 1000)\ncommands.run(main)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert (process.wait(timeout=30), process.stderr.read()) == (141, "")
    process.stderr.close()
