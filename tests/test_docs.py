"""The python blocks of the documentation, run as they stand."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moving_square import write_records
from video_fixtures import numbered_frames, write_video

import x3d_tf
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.modeling import expansion

DOCS = Path(__file__).parents[1] / "docs"
TINY = x3d_tf.Expansion(gamma_tau=1, gamma_t=6, gamma_s=48 / 112, gamma_b=1, gamma_d=0.2)  # one block a stage


def blocks(page: Path) -> list[tuple[int, str]]:
    """Line number and text of each python block."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: match.start(1)].count("\n"), match.group(1)) for match in found]


def write_splits(folder: Path) -> None:
    """Eight small records, both to train and to test on."""
    write_records(folder, videos=8)
    manifest = Manifest.load(folder)
    replace(manifest, splits=dict.fromkeys(("train", "test"), manifest.splits["train"])).save()


@pytest.fixture(params=["eagerly", pytest.param("as graphs", marks=pytest.mark.slow)])
def functions(request: pytest.FixtureRequest) -> Iterator[None]:
    """TensorFlow's functions run line by line, which spares most of the time, or compiled as in real life."""
    if request.param == "eagerly":
        request.getfixturevalue("eager")
    yield


@pytest.mark.usefixtures("functions")
@pytest.mark.filterwarnings("ignore:.*tf.data functions are still traced", "error:.*shuffle=True")
def test_your_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a smaller network under the name of X3D-S."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(expansion.VARIANTS, "x3d_s", replace(expansion.VARIANTS["x3d_s"], expansion=TINY))
    write_splits(tmp_path / "data" / "mine")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    trained = x3d_tf.build_x3d(TINY, num_classes=2)
    x3d_tf.save(x3d_tf.portable(trained, ("left", "right")), tmp_path / "runs" / "mine" / "model.keras")
    write_video(tmp_path / "videos" / "a.mp4", numbered_frames(10))
    found = blocks(DOCS / "your-own-code.md")
    assert len(found) >= 10
    names: dict[str, Any] = {"__name__": "__main__"}
    for line, code in found:
        # The line numbers of errors are those of the page.
        exec(compile("\n" * line + code, str(DOCS / "your-own-code.md"), "exec"), names)
    assert names["history"].history.keys() >= {"loss", "accuracy", "val_loss", "val_accuracy"}
    assert np.asarray(names["encoder"](names["clips"])).shape == (8, names["encoder"].output.shape[-1])
    assert names["maps"].shape[:4] == (8, 6, 3, 3)
    assert names["outputs"].shape == (None, 3)
    np.testing.assert_allclose(np.asarray(names["probabilities"]).sum(axis=1), 1, atol=1e-5)
