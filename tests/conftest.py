"""Shared fixtures: quiet TensorFlow, kernels, eager mode, commands, and the folder of optional real data."""

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")  # threads of small operations mostly wait, which takes CPU time

import pytest

# Background jobs of a shell ignore Ctrl-C, and so would the commands that the tests start.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


# These start first: a long file that starts last leaves the other test processes idle.
LONG_FILES = (
    *("test_loop.py", "test_forward.py", "test_step.py", "test_detector_training.py", "test_prediction.py"),
    *(
        "test_classification.py",
        "test_expand.py",
        "test_verify.py",
        "test_tflite.py",
        "test_x3d.py",
        "test_saved_model.py",
    ),
    *("test_tasks.py", "test_input_pipeline.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, in the order of `LONG_FILES`; the other files keep their order."""
    ranks = {name: rank for rank, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


def pytest_collection_finish() -> None:
    """Excludes what is imported from garbage collection: TensorFlow's objects stay, and searching them takes long."""
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Returns the folder of real videos and reference tensors, which is not part of the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder ../shared/data is absent")
    return SHARED_DATA


@pytest.fixture
def float64() -> Iterator[None]:
    """Switches Keras to double precision, for comparisons with a reference."""
    import keras

    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@contextmanager
def plain_operations() -> Iterator[None]:
    """Uses the GPU kernels, because the CPU kernels are compiled for each shape, which takes seconds."""
    import x3d_tf
    from x3d_tf.modeling import kernels

    before = kernels._chosen
    x3d_tf.set_kernels("gpu")
    yield
    x3d_tf.set_kernels(before)


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Uses plain ops in the layers of one test."""
    with plain_operations():
        yield


@pytest.fixture(scope="module")
def uncompiled_module() -> Iterator[None]:
    """Uses plain ops in the layers of all tests and fixtures of a file."""
    with plain_operations():
        yield


@pytest.fixture(scope="module")
def unoptimized_module(uncompiled_module: None) -> Iterator[None]:
    """Does not optimize graphs either, because optimizing one takes longer than running it a few times."""
    import tensorflow as tf

    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    yield
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})


@pytest.fixture
def chosen(request: pytest.FixtureRequest) -> Iterator[None]:
    """Selects the kernels by name for one test."""
    import x3d_tf

    x3d_tf.set_kernels(request.param)
    yield
    x3d_tf.set_kernels("auto")


@pytest.fixture
def eager(uncompiled: None) -> Iterator[None]:
    """Runs functions eagerly, because tracing a step takes longer than a few steps."""
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws neither learning curves nor previews, which takes a second for each picture."""
    from x3d_tf import plots

    for name in ("save_curves", "save_clips"):
        monkeypatch.setattr(plots, name, lambda *_, **__: None)


@pytest.fixture
def untrained(undrawn: None, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replaces training steps by a count of them; returns the loss of each, 1 / step."""
    import tensorflow as tf

    from x3d_tf.training.step import TrainStep

    losses: list[float] = []

    def step(self: TrainStep, batches: object, steps: int) -> dict[str, object]:
        self.optimizer.iterations.assign_add(steps)
        losses.append(1 / (len(losses) + 1))
        return {"loss": tf.constant(losses[-1:]), "top1": tf.constant([0.5])}

    monkeypatch.setattr(TrainStep, "trace", lambda *_: None)
    monkeypatch.setattr(TrainStep, "__call__", step)
    return losses


@pytest.fixture
def without_modules(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Returns a function that makes packages impossible to import for the rest of a test, as if not installed."""

    class Blocked:
        def __init__(self, packages: tuple[str, ...]) -> None:
            self.packages = packages

        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.split(".")[0] in self.packages:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def block(*packages: str) -> None:
        for name in [name for name in sys.modules if name.split(".")[0] in packages]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [Blocked(packages), *sys.meta_path])

    return block


@pytest.fixture
def in_process(flags_of_one_command: None) -> Callable[..., None]:
    """Returns a function that calls a command's `main` with flags, without importing TensorFlow in a new process."""
    from absl import flags

    defined_before = set(flags.FLAGS)

    def call(command: ModuleType, *arguments: object, positional: bool = False) -> None:
        for name in set(flags.FLAGS) - defined_before:  # of an earlier call
            delattr(flags.FLAGS, name)
        command.define_flags()
        flags.FLAGS.set_gnu_getopt(positional)
        rest = flags.FLAGS([command.__name__, *map(str, arguments)])[1:]
        command.main(rest) if positional else command.main()

    return call


@pytest.fixture
def flags_of_one_command() -> Iterator[None]:
    """Removes the flags that a test defines, because commands share flag names."""
    from absl import flags

    before = set(flags.FLAGS)
    yield
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
