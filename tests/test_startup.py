"""TensorFlow's start-up in commands: which messages are shown or hidden, and which errors are reported before it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from x3d_tf import startup
from x3d_tf.startup import why_no_gpu

ROOT = Path(__file__).resolve().parents[1]
NOISE = "import os; os.write(2, b'noise of a library\\n')"


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)


def command(body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command that prints noise while TensorFlow starts and then executes `body`."""
    return run(
        "from x3d_tf import commands, startup\nfrom x3d_tf.errors import UserError\n"
        f"def main():\n    with startup.starting_tensorflow(devices=False):\n        {NOISE}; {body}\n"
        "    os.write(2, b'after\\n')\ncommands.run(main)",
        *arguments,
    )


@pytest.mark.parametrize(
    ("body", "arguments", "shown"),
    [
        ("pass", (), "starting TensorFlow\nafter\n"),
        ("raise UserError('--x must be 1')", (), "starting TensorFlow\nerror: --x must be 1\n"),
        ("raise KeyboardInterrupt", (), "starting TensorFlow\n\ninterrupted\n"),
    ],
)
def test_noise_is_hidden_only_during_the_start(body: str, arguments: tuple[str, ...], shown: str) -> None:
    assert command(body, *arguments).stderr == shown


def test_noise_is_shown_in_verbose_mode() -> None:
    shown = command("pass", "--verbose").stderr
    assert shown.startswith("starting TensorFlow\n") and "noise of a library\n" in shown and shown.endswith("after\n")


def test_noise_is_shown_if_the_start_fails() -> None:
    _, found, rest = command("import not_there").stderr.partition("noise of a library\n")
    assert found and "ModuleNotFoundError: No module named 'not_there'" in rest


def test_optional_packages_are_not_imported_with_tensorflow_but_can_be_later() -> None:
    """Keras imports Matplotlib and scikit-learn, if they are installed, which takes longer than Keras itself."""
    body = "import sys, keras; print([name for name in ('matplotlib', 'sklearn') if name in sys.modules])"
    done = command(f"{body}; import matplotlib.pyplot, sklearn.metrics; print('imported')")
    assert done.stdout == "[]\nimported\n"


def test_a_crash_in_the_start_prints_a_traceback() -> None:
    assert "Fatal Python error: Aborted" in command("os.abort()").stderr


def test_without_standard_error_a_command_works() -> None:
    code = (
        "from x3d_tf import commands, startup\n"
        "def main():\n    with startup.starting_tensorflow(devices=False): pass\n    print('done')\ncommands.run(main)"
    )
    done = subprocess.run(["sh", "-c", f'exec {sys.executable} -c "$0" 2>&-', code], stdout=subprocess.PIPE, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, b"done\n")


def test_a_library_prints_and_redirects_nothing() -> None:
    code = f"from x3d_tf import startup\nwith startup.starting_tensorflow(): {NOISE}"
    assert run(code).stderr == "noise of a library\n"


def test_a_command_names_its_devices_and_hides_tensorflows_messages() -> None:
    body = (
        "from x3d_tf import commands, startup\n"
        "def main():\n"
        "    with startup.starting_tensorflow():\n        import tensorflow as tf\n"
        "    tf.function(lambda x: x * 2, jit_compile=True)(tf.ones(3))\n"  # TensorFlow logs the use of XLA
        "commands.run(main)"
    )
    first, devices = run(body).stderr.splitlines()
    assert first == "starting TensorFlow"
    assert devices.startswith(("using GPU", "no GPU found"))


@pytest.mark.parametrize(
    ("messages", "with_cuda", "devices", "hidden", "reason"),
    [
        ("failed call to cuInit: UNKNOWN ERROR", True, [], None, ""),
        (
            "E0 x.cc:1] failed call to cuInit: UNKNOWN ERROR (303)\n",
            True,
            ["/dev/nvidia0"],
            None,
            "UNKNOWN ERROR (303)",
        ),
        (
            "I0 Could not load dynamic library 'libcudnn.so.9'; dlerror: a",
            True,
            ["/dev/nvidia0"],
            None,
            "libcudnn.so.9",
        ),
        ("", False, ["/dev/nvidia0"], None, "built without CUDA"),
        ("", True, ["/dev/nvidia0"], None, r"pip install 'x3d_tf[cuda]'"),
        ("", True, ["/dev/nvidia0"], "", "CUDA_VISIBLE_DEVICES= hides /dev/nvidia0"),
        ("", True, ["/dev/nvidia0"], "-1", "CUDA_VISIBLE_DEVICES=-1 hides /dev/nvidia0"),
        ("failed call to cuInit: X", True, ["/dev/nvidia0"], "0", "failed call to cuInit: X"),
    ],
)
def test_the_reason_why_no_gpu_is_used(
    messages: str,
    with_cuda: bool,
    devices: list[str],
    hidden: str | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    found = why_no_gpu(messages, with_cuda, devices)
    assert (found == "") if not reason else reason in found


def test_messages_are_shown_if_they_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(startup, "_mode", "quiet")
    monkeypatch.setattr(startup.tempfile, "TemporaryFile", full)
    before = os.fstat(2)
    with startup.kept_back() as messages:
        assert messages is None and os.fstat(2) == before


RECORDS = ("--gin_file=gin/x3d_s.gin", "--gin_file=gin/data/records.gin", '--gin_bindings=DatasetSpec.records="nix"')
NETWORK = "--gin_file=gin/x3d_s.gin"


INVALID = [  # command, arguments, part of its error message
    ("x3d_tf.train", ["--gin_file=nix.gin"], "--gin_file=nix.gin: no such file or recipe"),
    ("x3d_tf.train", RECORDS, "nix/manifest.json does not exist"),
    ("x3d_tf.train", [NETWORK, '--gin_bindings=TrainConfig.init="nix"', "--workdir=nix"], "nix: no such model file"),
    ("x3d_tf.train", [NETWORK, "--workdir=tests"], "tests exists and is not a run folder"),
    ("x3d_tf.train", [NETWORK, "--gin_bindings=Recipe.steps=abc"], "'abc' is not a valid value"),
    ("x3d_tf.expand", [NETWORK, "--workdir=nix"], "ExpandConfig.budget_gmacs must be given, in GMACs"),
    ("x3d_tf.expand", [NETWORK, "--gin_bindings=ExpandConfig.budget_gmacs=1", "--workdir=tests"], "tests exists and"),
    ("x3d_tf.expand", ["--plot=nix"], "nix must hold trace.jsonl of a search"),
    ("x3d_tf.preview", [*RECORDS, "--output=nix.png"], "nix/manifest.json does not exist"),
    ("x3d_tf.preview", [NETWORK, "--output=nix.jpg"], "--output must end in .png"),
    ("x3d_tf.evaluate", ["--run=nix"], "nix: no such model file or run folder"),
    ("x3d_tf.evaluate", ["--run=nix", "--watch"], "nix is not a run folder"),
    ("x3d_tf.evaluate", ["--run=nix", "--sweep"], "nix: no such model file or run folder"),
    ("x3d_tf.evaluate", ["--model=nix", "--records=a", "--split=b", "--output=c"], "nix: no such model file"),
    ("x3d_tf.evaluate", ["--compare=nix"], "nix has no report"),
    ("x3d_tf.evaluate", ["--detections=nix", "--groundtruth=nix"], "nix cannot be read"),
    ("x3d_tf.predict", ["--model=nix", "tests"], "nix: no such model file or run folder"),
    ("x3d_tf.predict", ["--model=nix", "nix.mp4"], "nix: no such model file or run folder"),
    ("x3d_tf.predict", ["--model=nix", "tests", "--csv=README.md"], "README.md exists"),
    ("x3d_tf.build_records", ["--videos=nix", "--output=nix"], "videos: nix is not a folder"),
    ("x3d_tf.build_records", ["--csv=nix", "--output=nix"], "csv: nix cannot be read"),
    ("x3d_tf.build_records", ["--verify", "--output=nix"], "nix/manifest.json does not exist"),
    ("x3d_tf.import_weights", ["nix", "--variant=x3d_s", "--output=a.keras"], "nix: no such checkpoint"),
    ("x3d_tf.import_weights", ["nix", "--to=pytorchvideo", "--output=a.pyth"], "nix: no such model file"),
    ("x3d_tf.complexity", ["--gin_file=nix.gin"], "--gin_file=nix.gin: no such file or recipe"),
    ("export.saved_model", ["--model=nix", "--output=nix/a"], "nix: no such model file"),
    ("export.tflite", ["--model=nix", "--output=nix"], "nix: no such model file"),
    ("export.onnx", ["--model=nix", "--output=nix", "--formats=nix"], "--formats must be a list of onnx, openvino"),
    ("export.verify", ["--model=nix", "--artefacts=nix", "--clips=nix"], "--artefacts=nix: no such file or folder"),
    ("export.serving.client", ["--card=nix", "--grpc=localhost:1", "nix.mp4"], "no such file: nix.mp4"),
]
# Each case is forked from one process that has imported all slow modules except TensorFlow.
CASES = """
import json, os, runpy, sys
import absl.flags, av, gin, h5py, matplotlib.pyplot, numpy, tqdm
for number, (module, arguments) in enumerate(json.load(sys.stdin)):
    if os.fork() == 0:
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{sys.argv[1]}/{number}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv = [module, *arguments]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            print(ended, file=sys.stderr)
            print(json.dumps([bool(ended.code), [name for name in ("tensorflow", "keras") if name in sys.modules]]))
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the output of each case in `INVALID`: NUMBER.out and NUMBER.err."""
    folder = tmp_path_factory.mktemp("outcomes")
    cases = json.dumps([case[:2] for case in INVALID])
    subprocess.run([sys.executable, "-c", CASES, str(folder)], input=cases, text=True, cwd=ROOT, check=True)
    return folder


@pytest.mark.parametrize("number", range(len(INVALID)), ids=lambda number: f"{INVALID[number][0]} {INVALID[number][2]}")
def test_invalid_paths_and_values_are_reported_without_tensorflow(number: int, outcomes: Path) -> None:
    errors = (outcomes / f"{number}.err").read_text()
    outcome = (outcomes / f"{number}.out").read_text().splitlines()[-1:]
    assert outcome == ["[true, []]"], errors
    assert errors.startswith("error: ") and INVALID[number][2] in errors and len(errors.splitlines()) == 1
