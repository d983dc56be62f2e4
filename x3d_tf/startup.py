"""TensorFlow's start-up in commands: hides its messages and prints one line that names the devices.

Does not import TensorFlow at module level, and has no effect outside commands and their worker processes.
"""

import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from x3d_tf.errors import UserError
from x3d_tf.processes import available_cpus
from x3d_tf.terminal import one_line, tell
from x3d_tf.text import counted

_STDERR = 2  # TensorFlow's C++ code writes to the file descriptor, not to `sys.stderr`
_OPTIONAL = ("IPython", "matplotlib", "pandas", "sklearn")  # packages that Keras and TensorFlow import if installed
_GPU_ERRORS = (  # messages of TensorFlow that explain why it does not use a GPU
    re.compile(r"Could not load dynamic library '[^'\n]+'"),
    re.compile(r"Could not find cuda drivers on your machine"),
    re.compile(r"failed call to cuInit: [^\n]+"),
    re.compile(r"Cannot dlopen some GPU libraries"),
)

Mode = Literal["plain", "quiet", "verbose"]

_mode: Mode = "plain"


def set_mode(mode: Mode) -> None:
    """Sets how messages are handled while TensorFlow starts. Must be called before TensorFlow is imported.

    Args:
        mode: "plain", the default, changes nothing; "quiet" hides messages unless the start fails; "verbose" shows them
            immediately, including those before a crash of the process.
    """
    global _mode
    _mode = mode
    if mode != "plain":
        # TensorFlow reads this on import. "2" hides the messages about XLA and cuDNN that it prints later.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if mode == "verbose" else "2")
    if mode == "verbose":
        os.environ.setdefault("TF_CPP_VMODULE", "dso_loader=1")  # logs the libraries that cannot be loaded


def mode() -> Mode:
    """Returns the mode that `set_mode` has set, so that worker processes can use the same."""
    return _mode


@contextmanager
def starting_tensorflow(*, devices: bool | None = True) -> Iterator[None]:
    """Context in which a command imports TensorFlow and configures its threads and visible devices.

    When the block succeeds, TensorFlow initialises its devices, and one line on standard error names them. Has no
    effect in "plain" mode or if TensorFlow was imported before.

    Args:
        devices: False for commands that compute nothing with TensorFlow: GPUs stay unused and no line is printed. None
            leaves the devices to a distribution strategy that must be created before they are initialised.
    """
    if _mode == "plain" or "tensorflow" in sys.modules:
        yield
        return
    tell("starting TensorFlow")
    if devices is None and os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "2":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # hides the messages about a worker that ends; our error names it
    with kept_back() as messages:
        _import_tensorflow()
        yield
        line = None
        if devices:
            line = _initialize_devices(messages)
        elif devices is not None:
            _hide_gpus()
    if line:
        tell(line)


def _import_tensorflow() -> None:
    """Imports TensorFlow and Keras without the optional packages, which take longer to import than Keras itself.

    Only functions that commands do not use, such as those of `keras.visualization`, need them. Other modules can import
    the packages later; Keras itself does not use them in this process.
    """
    hidden = [name for name in _OPTIONAL if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # importing None raises an ImportError
    try:
        importlib.import_module("tensorflow")
        importlib.import_module("keras")
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def kept_back(*, show_on_failure: bool = True) -> Iterator[Any]:
    """Captures what libraries write to standard error within the block.

    Only has an effect in "quiet" mode. If the process crashes within the block, the messages are lost; use "verbose"
    mode to see them.

    Args:
        show_on_failure: print the captured messages if the block raises an error other than `UserError`.

    Yields:
        The binary file with the captured messages, or None if nothing is captured.
    """
    with ExitStack() as files:
        capture = _redirect_stderr(files) if _mode == "quiet" else None
        if capture is None:
            yield None
            return
        file, terminal = capture
        failed = False
        try:
            yield file
        except Exception as error:
            failed = show_on_failure and not isinstance(error, UserError)
            raise
        finally:
            sys.stderr.flush()
            os.dup2(terminal, _STDERR)
            os.close(terminal)
            if failed:
                print(_read_messages(file), end="", file=sys.stderr)


def _redirect_stderr(files: ExitStack) -> tuple[Any, int] | None:
    """Redirects standard error to a file; returns the file and the original descriptor, or None on failure."""
    try:
        # not a pipe: it could fill up while an import holds the GIL
        file = files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        terminal = os.dup(_STDERR)
    except OSError:  # no temporary folder, or standard error is closed
        return None
    sys.stderr.flush()
    os.dup2(file.fileno(), _STDERR)
    return file, terminal


def _read_messages(file: Any) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def _initialize_devices(messages: Any) -> str:
    """Initialises the visible devices, as the first TensorFlow op would, and returns a line that names them."""
    import tensorflow as tf

    visible = tf.config.get_visible_devices("GPU")
    tf.config.list_logical_devices()
    if visible:
        return "using " + ", ".join(_gpu_name(tf, gpu) for gpu in visible)
    cores = counted(available_cpus(), "CPU core")
    if tf.config.list_physical_devices("GPU"):
        return f"using {cores}"
    reason = why_no_gpu(_read_messages(messages) if messages else "", tf.test.is_built_with_cuda(), _nvidia_devices())
    return f"no GPU found{f' ({reason})' if reason else ''}: using {cores}"


def tell_devices() -> None:
    """Prints the devices that TensorFlow uses, for a process that left them to its distribution strategy."""
    if _mode != "plain":
        tell(_initialize_devices(None))


def _hide_gpus() -> None:
    """Restricts TensorFlow to the CPU; otherwise a later operation would initialise GPUs and print messages."""
    tf = sys.modules.get("tensorflow")
    if tf is not None:
        tf.config.set_visible_devices([], "GPU")
        tf.config.list_logical_devices()


def _gpu_name(tf: Any, gpu: Any) -> str:
    details = tf.config.experimental.get_device_details(gpu)
    return f"GPU {gpu.name.rpartition(':')[2]}: {details.get('device_name', 'unknown name')}"


def _nvidia_devices() -> list[str]:
    return sorted(map(str, Path("/dev").glob("nvidia[0-9]*")))


def why_no_gpu(messages: str, with_cuda: bool, nvidia_devices: Sequence[str]) -> str:
    """Returns the likely reason why TensorFlow uses no NVIDIA GPU; empty if the machine has none.

    Args:
        messages: messages that TensorFlow printed while it started.
        with_cuda: True if TensorFlow is built with CUDA.
        nvidia_devices: device files of the GPUs.
    """
    if not nvidia_devices:
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and re.fullmatch(r"\s*(-\d.*)?", visible):
        return f"CUDA_VISIBLE_DEVICES={one_line(visible)} hides {nvidia_devices[0]}"
    found = [match.group() for pattern in _GPU_ERRORS if (match := pattern.search(messages))]
    if not with_cuda:
        reason = "this TensorFlow is built without CUDA"
    elif found:
        reason = one_line(found[0])
    else:
        reason = "TensorFlow cannot load all CUDA libraries: pip install 'x3d_tf[cuda]'"
    return f"{nvidia_devices[0]} exists, but {reason}; --verbose shows all messages"
