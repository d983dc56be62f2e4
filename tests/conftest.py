"""What the tests share: a quiet TensorFlow, and where the optional real data lies."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest

# A shell that runs the tests in the background makes them, and the commands that they start, ignore Ctrl-C.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


# These begin first: a long file that begins last leaves the other process idle.
LONG_FILES = (
    *("test_loop.py", "test_forward.py", "test_step.py", "test_detector_training.py", "test_prediction.py"),
    *("test_classification.py", "test_verify.py", "test_tflite.py", "test_x3d.py", "test_saved_model.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, in the order of `LONG_FILES`; the rest keeps its order."""
    ranks = {name: rank for rank, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real videos and reference tensors, which is not part of the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder ../shared/data is absent")
    return SHARED_DATA


@pytest.fixture
def float64() -> Iterator[None]:
    """Keras in double precision, for comparisons with a reference."""
    import keras

    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@contextmanager
def plain_operations() -> Iterator[None]:
    """Layers as on a GPU: the forms for CPUs are compiled again for each shape, which takes seconds."""
    import x3d_tf
    from x3d_tf.modeling import kernels

    before = kernels._chosen
    x3d_tf.set_kernels("gpu")
    yield
    x3d_tf.set_kernels(before)


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """A test whose layers are plain operations."""
    with plain_operations():
        yield


@pytest.fixture(scope="module")
def uncompiled_module() -> Iterator[None]:
    """A file of tests, with its fixtures, whose layers are plain operations."""
    with plain_operations():
        yield


@pytest.fixture
def eager(uncompiled: None) -> Iterator[None]:
    """Operations one by one: tracing a step as a graph takes longer than a few steps."""
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture
def in_process(flags_of_one_command: None) -> Callable[..., None]:
    """Calls a command's `main` with its flags: a process of its own would import TensorFlow again."""
    from absl import flags

    others = set(flags.FLAGS)

    def call(command: ModuleType, *arguments: object, positional: bool = False) -> None:
        for name in set(flags.FLAGS) - others:  # of a call before
            delattr(flags.FLAGS, name)
        command.define_flags()
        flags.FLAGS.set_gnu_getopt(positional)
        rest = flags.FLAGS([command.__name__, *map(str, arguments)])[1:]
        command.main(rest) if positional else command.main()

    return call


@pytest.fixture
def flags_of_one_command() -> Iterator[None]:
    """Forgets the flags that a test defines: commands share names, and a process has one set of flags."""
    from absl import flags

    before = set(flags.FLAGS)
    yield
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
