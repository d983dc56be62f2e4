"""The network on Keras' backends: outputs and a training step from one file of weights, and the page's loop on JAX."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from test_docs import DOCS, blocks, write_splits

# Dropout draws other elements on each backend.
SCRIPT = """
import sys
import keras, numpy as np, x3d_tf
folder, backend = sys.argv[1:]
expansion = x3d_tf.Expansion(gamma_tau=2, gamma_t=4, gamma_s=48 / 112, gamma_b=1, gamma_d=0.2)
model = x3d_tf.build_x3d(expansion, num_classes=6, options=x3d_tf.ModelOptions(dropout=0.0))
if backend == "tensorflow":
    model.save_weights(f"{folder}/given.weights.h5")
model.load_weights(f"{folder}/given.weights.h5")
draw = np.random.default_rng(0)
clips, labels = draw.uniform(0, 255, (8, 4, 48, 48, 3)).astype(np.float32), np.arange(8) % 6
before = model.predict(clips, verbose=0)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(optimizer=keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True), loss=loss)
value = model.train_on_batch(clips, labels)
np.savez(f"{folder}/{backend}.npz", before=before, loss=value, after=model.predict(clips, verbose=0))
assert keras.backend.backend() == backend
dropped = x3d_tf.build_x3d(expansion, num_classes=6)  # with dropout
assert np.isfinite(np.asarray(keras.ops.convert_to_numpy(dropped(clips, training=True)))).all()
"""


def run(backend: str, code: str, *arguments: str, folder: Path | None = None) -> None:
    environment = {**os.environ, "KERAS_BACKEND": backend}
    command = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


TORCH = pytest.param("torch", marks=[needs("torch"), pytest.mark.parity])  # parity: where CI has PyTorch


@pytest.mark.parametrize("backend", [pytest.param("jax", marks=needs("jax")), TORCH])
def test_a_backend_computes_what_tensorflow_does(backend: str, tmp_path: Path) -> None:
    for name in ("tensorflow", backend):
        run(name, SCRIPT, str(tmp_path), name)
    expected, found = (np.load(tmp_path / f"{name}.npz") for name in ("tensorflow", backend))
    for key in ("before", "loss", "after"):
        np.testing.assert_allclose(found[key], expected[key], atol=1e-4, err_msg=key)
    assert np.abs(expected["after"] - expected["before"]).max() > 0.01  # else the step would mean nothing


@needs("jax")
def test_the_loop_of_the_page_trains_on_jax(tmp_path: Path) -> None:
    """Replaces X3D-S by a smaller network to save time."""
    write_splits(tmp_path / "data" / "mine")
    ((_, code),) = (block for block in blocks(DOCS / "your-own-code.md") if "KERAS_BACKEND" in block[1])
    smaller = (
        "from dataclasses import replace\nfrom x3d_tf.modeling import expansion\n"
        "tiny = expansion.Expansion(gamma_tau=1, gamma_t=4, gamma_s=32 / 112, gamma_b=1, gamma_d=0.2)\n"
        'expansion.VARIANTS["x3d_s"] = replace(expansion.VARIANTS["x3d_s"], expansion=tiny)\n'
    )
    run("jax", smaller + code, folder=tmp_path)
    assert (tmp_path / "mine.weights.h5").is_file()
