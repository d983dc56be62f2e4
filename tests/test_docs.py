"""The Python blocks of docs/your-own-code.md run unchanged."""

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
TINY = x3d_tf.Expansion(gamma_tau=1, gamma_t=4, gamma_s=32 / 112, gamma_b=1, gamma_d=0.2)  # one block a stage


def blocks(page: Path) -> list[tuple[int, str]]:
    """Returns the line number and the text of each Python block."""
    text = page.read_text(encoding="utf-8")
    matches = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: match.start(1)].count("\n"), match.group(1)) for match in matches]


def write_splits(folder: Path) -> None:
    """Writes eight small records that serve as training and test split."""
    write_records(folder, videos=8)
    manifest = Manifest.load(folder)
    replace(manifest, splits=dict.fromkeys(("train", "test"), manifest.splits["train"])).save()


@pytest.fixture(params=["eagerly", pytest.param("as graphs", marks=pytest.mark.slow)])
def functions(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs `tf.function`s eagerly, which is much faster here, or compiled as users do."""
    if request.param == "eagerly":
        request.getfixturevalue("eager")
    yield


@pytest.mark.usefixtures("functions")
@pytest.mark.filterwarnings("ignore:.*tf.data functions are still traced", "error:.*shuffle=True")
def test_your_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces X3D-S by a smaller network to save time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(expansion.VARIANTS, "x3d_s", replace(expansion.VARIANTS["x3d_s"], expansion=TINY))
    write_splits(tmp_path / "data" / "mine")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    trained = x3d_tf.build_x3d(TINY, num_classes=2)
    x3d_tf.save(x3d_tf.portable(trained, ("left", "right")), tmp_path / "runs" / "mine" / "model.keras")
    write_video(tmp_path / "videos" / "a.mp4", numbered_frames(10))
    page_blocks = [block for block in blocks(DOCS / "your-own-code.md") if "KERAS_BACKEND" not in block[1]]
    assert len(page_blocks) >= 10
    names: dict[str, Any] = {"__name__": "__main__"}
    for line, code in page_blocks:
        # Leading newlines make the line numbers in errors those of the page.
        exec(compile("\n" * line + code, str(DOCS / "your-own-code.md"), "exec"), names)
    assert names["history"].history.keys() >= {"loss", "accuracy", "val_loss", "val_accuracy"}
    assert np.asarray(names["encoder"](names["clips"])).shape == (8, names["encoder"].output.shape[-1])
    assert names["macs"] == 4732468736
    assert names["maps"].shape[:4] == (8, 4, 2, 2)
    assert names["outputs"].shape == (None, len(names["manifest"].classes))
    np.testing.assert_allclose(np.asarray(names["probabilities"]).sum(axis=1), 1, atol=1e-5)
