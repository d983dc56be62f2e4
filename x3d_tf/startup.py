"""TensorFlow's start in a command: what it prints is kept back, and one line tells the devices.

Imports no TensorFlow itself. In other processes than commands and their workers nothing here has any effect.
"""

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

_STDERR = 2  # TensorFlow's libraries write to the descriptor, past `sys.stderr`
_REASONS = (  # of a GPU that is not used, in TensorFlow's words
    re.compile(r"Could not load dynamic library '[^'\n]+'"),
    re.compile(r"Could not find cuda drivers on your machine"),
    re.compile(r"failed call to cuInit: [^\n]+"),
    re.compile(r"Cannot dlopen some GPU libraries"),
)

Mode = Literal["plain", "quiet", "verbose"]

_mode: Mode = "plain"


def set_mode(mode: Mode) -> None:
    """Chooses what becomes of the messages of TensorFlow's start; to be called before that.

    Args:
        mode: "plain", the default, leaves all as it is; "quiet" keeps messages back unless the start fails; "verbose"
            shows them as they come, also those before a crash of the process.
    """
    global _mode
    _mode = mode
    if mode != "plain":
        # Read once, when TensorFlow is imported: "2" leaves out its accounts of XLA and cuDNN, which come much later.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if mode == "verbose" else "2")
    if mode == "verbose":
        os.environ.setdefault("TF_CPP_VMODULE", "dso_loader=1")  # names the libraries that cannot be loaded


def mode() -> Mode:
    """What `set_mode` chose, for worker processes to choose the same."""
    return _mode


@contextmanager
def starting_tensorflow(*, devices: bool = True) -> Iterator[None]:
    """A block in which a command imports whatever needs TensorFlow, and settles its threads and visible devices.

    Where the block ends well, TensorFlow takes its devices, and one line on standard error names them. No effect in
    "plain" mode, and where TensorFlow has been imported before.

    Args:
        devices: False for a command that computes nothing by TensorFlow: it takes no GPU, and there is no line.
    """
    if _mode == "plain" or "tensorflow" in sys.modules:
        yield
        return
    tell("starting TensorFlow")
    with kept_back() as messages:
        yield
        line = None
        if devices:
            line = _devices(messages)
        else:
            _leave_gpus()
    if line:
        tell(line)


@contextmanager
def kept_back(*, show_on_failure: bool = True) -> Iterator[Any]:
    """Keeps what libraries write to standard error within the block.

    No effect but in "quiet" mode. Where the process crashes within the block the messages are lost; "verbose" mode
    shows them.

    Args:
        show_on_failure: whether the messages are shown where the block raises another error than a `UserError`.

    Yields:
        The binary file that they are written to; None where they are not kept.
    """
    with ExitStack() as files:
        kept = _redirected(files) if _mode == "quiet" else None
        if kept is None:
            yield None
            return
        file, terminal = kept
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
                print(_content(file), end="", file=sys.stderr)


def _redirected(files: ExitStack) -> tuple[Any, int] | None:
    """Sends standard error to a file from now on; gives that and the descriptor of what it was, None if that fails."""
    try:
        # no pipe, which could fill up while an import holds Python's lock
        file = files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        terminal = os.dup(_STDERR)
    except OSError:  # no folder for it, or no standard error
        return None
    sys.stderr.flush()
    os.dup2(file.fileno(), _STDERR)
    return file, terminal


def _content(file: Any) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def _devices(messages: Any) -> str:
    """Takes the devices that are visible, which TensorFlow does with its first operation, and names them."""
    import tensorflow as tf

    visible = tf.config.get_visible_devices("GPU")
    tf.config.list_logical_devices()
    if visible:
        return "using " + ", ".join(_name(tf, gpu) for gpu in visible)
    cores = counted(available_cpus(), "CPU core")
    if tf.config.list_physical_devices("GPU"):
        return f"using {cores}"
    reason = why_no_gpu(_content(messages) if messages else "", tf.test.is_built_with_cuda(), _nvidia_devices())
    return f"no GPU found{f' ({reason})' if reason else ''}: using {cores}"


def _leave_gpus() -> None:
    """Takes the CPU alone: an operation that runs later would look for GPUs then, and tell of it."""
    tf = sys.modules.get("tensorflow")
    if tf is not None:
        tf.config.set_visible_devices([], "GPU")
        tf.config.list_logical_devices()


def _name(tf: Any, gpu: Any) -> str:
    details = tf.config.experimental.get_device_details(gpu)
    return f"GPU {gpu.name.rpartition(':')[2]}: {details.get('device_name', 'of unknown name')}"


def _nvidia_devices() -> list[str]:
    return sorted(map(str, Path("/dev").glob("nvidia[0-9]*")))


def why_no_gpu(messages: str, with_cuda: bool, nvidia_devices: Sequence[str]) -> str:
    """Why TensorFlow uses no NVIDIA GPU, as far as it can be told; empty where the machine has none.

    Args:
        messages: of TensorFlow's start.
        with_cuda: whether TensorFlow is built for CUDA.
        nvidia_devices: device files of GPUs.
    """
    if not nvidia_devices:
        return ""
    hiding = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hiding is not None and re.fullmatch(r"\s*(-\d.*)?", hiding):
        return f"CUDA_VISIBLE_DEVICES={one_line(hiding)} hides {nvidia_devices[0]}"
    found = [match.group() for pattern in _REASONS if (match := pattern.search(messages))]
    if not with_cuda:
        reason = "this TensorFlow is built without CUDA"
    elif found:
        reason = one_line(found[0])
    else:
        reason = "TensorFlow cannot load all libraries of CUDA: pip install 'x3d_tf[cuda]'"
    return f"{nvidia_devices[0]} exists, but {reason}; --verbose shows all messages"
