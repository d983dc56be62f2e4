"""What the tests share: a quiet TensorFlow, and where the optional real data lies."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


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


@pytest.fixture
def flags_of_one_command() -> Iterator[None]:
    """Forgets the flags that a test defines: commands share names, and a process has one set of flags."""
    from absl import flags

    before = set(flags.FLAGS)
    yield
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
