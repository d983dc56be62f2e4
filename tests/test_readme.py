"""The README's example for applications, run as it stands, against our own predictions."""

import functools
import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from exported_model import random_network
from test_docs import blocks
from video_fixtures import write_video

import x3d_tf
from x3d_tf.data.sampling import input_contract
from x3d_tf.data.video.decode import probe
from x3d_tf.types import Storage

README = Path(__file__).parents[1] / "README.md"
NAMES = tuple("abcdef")


def moving_blocks(count: int, height: int, width: int) -> np.ndarray:
    """Frames of coloured blocks that move faster and faster."""
    side = -(-width // 8)
    picture = np.random.default_rng(0).integers(0, 256, (height // 8, side, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(picture[:, :width], number**2 // 16, axis=1) for number in range(count)])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Videos at three rates, upright and wide ones, one shorter than a clip."""
    folder = tmp_path_factory.mktemp("videos")
    return [
        write_video(folder / "wide.mp4", moving_blocks(50, 64, 112)),
        write_video(folder / "upright.mkv", moving_blocks(41, 120, 72), 25),
        write_video(folder / "small.avi", moving_blocks(60, 40, 56), 60),
        write_video(folder / "short.mp4", moving_blocks(6, 64, 80)),
    ]


@pytest.fixture
def real(request: pytest.FixtureRequest) -> list[Path]:
    """Real videos of constant rate that are to be shown as they are stored."""
    folder: Path = request.getfixturevalue("shared_data")
    interactions = sorted((folder / "ut_interaction" / "set1").glob("*/seq01_*.avi"))
    paths = [*sorted((folder / "clips").iterdir()), *interactions[:3]]
    infos = {path: probe(path) for path in paths}
    found = [path for path, info in infos.items() if not info.variable_rate]
    assert len(found) >= 5
    return found


SCALED = {"stored": Storage(60, 80)}
STRETCHED = {"stored": Storage(96, 95), "stretch": True, "frame_sampling": "exact", "test_views": 1}


@pytest.fixture
def network(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> x3d_tf.X3D:
    """A network whose probabilities differ from video to video, in a run's folder as the README names it."""
    keras.utils.set_random_seed(2)
    model = random_network()
    coarse = np.random.default_rng(1).integers(0, 256, (8, model.clip.frames, 6, 6, 3))
    logits = np.asarray(model(coarse.repeat(8, 2).repeat(8, 3).astype(np.float32)))
    fc2, scale = model.get_layer("fc2"), 3 / logits.std(axis=0)
    fc2.kernel.assign(fc2.kernel * scale)
    fc2.bias.assign(-logits.mean(axis=0) * scale)
    for name, value in request.param.items():
        setattr(model, name, value)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    x3d_tf.save(x3d_tf.portable(model, NAMES), run / "model.keras")
    (run / "labels.txt").write_text("".join(f"{name}\n" for name in NAMES), encoding="utf-8")
    (run / "input.json").write_text(json.dumps(input_contract(model)))
    return model


def example(change: tuple[str, str] = ("", "")) -> dict[str, Any]:
    """The names that the example defines, with another text in place of one of its."""
    line, code = next((line, code) for line, code in blocks(README) if "input.json" in code)
    assert change[0] in code
    code = code.replace(*change) if change[0] else code
    names: dict[str, Any] = {"__name__": "application"}
    exec(compile("\n" * line + code, str(README), "exec"), names)
    return names


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("network", "videos"),
    [(SCALED, "made"), (STRETCHED, "made"), (SCALED, "real")],
    indirect=["network"],
    ids=["scaled", "stretched", "real videos"],
)
def test_an_application_predicts_as_we_do(videos: str, network: x3d_tf.X3D, request: pytest.FixtureRequest) -> None:
    paths: list[Path] = request.getfixturevalue(videos)
    probabilities_of = example()["probabilities_of"]
    ours = list(x3d_tf.predict_videos(network, paths, progress=False))
    for path, result in zip(paths, ours, strict=True):
        assert isinstance(result, x3d_tf.Prediction), result
        np.testing.assert_allclose(probabilities_of(str(path)), result.probabilities, atol=1e-3, err_msg=path.name)
    spread = np.ptp([result.probabilities for result in ours if isinstance(result, x3d_tf.Prediction)], axis=0)
    assert spread.max() > 0.05  # else the bound above would mean little


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("network", [SCALED], indirect=True, ids=[""])
def test_no_step_of_the_example_can_be_left_out(
    network: x3d_tf.X3D, made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the comparison above would not see where one is wrong."""
    monkeypatch.setattr(tf.keras.models, "load_model", functools.cache(tf.keras.models.load_model))
    (ours,) = x3d_tf.predict_videos(network, made[0], progress=False)
    assert isinstance(ours, x3d_tf.Prediction)
    for change in (
        ('spec["stored"]["jpeg_quality"]', "95"),
        ('spec["decoded_short_side"]', "256"),
        ("* (span - 1) / max(frames - 1, 1)", '* spec["stride"] * fps / 30'),
        ("* (last // (clips - 1))", "* 0"),
        ("side - crop + 1", "side - crop - 5"),
        ("numbers.ravel()], shape)", "numbers.ravel()], shape, antialias=True)"),
        (".mean(axis=0)", "[0]"),
    ):
        found = example(change)["probabilities_of"](str(made[0]))
        assert np.abs(found - ours.probabilities).max() > 3e-3, change


def test_the_example_needs_few_packages_and_lines() -> None:
    code = next(code for _, code in blocks(README) if "input.json" in code)
    lines = [line for line in code.splitlines() if line.strip()]
    imported = {line.split()[1] for line in lines if line.startswith(("import ", "from "))}
    assert imported == {"io", "json", "av", "numpy", "tensorflow", "PIL"}
    assert len(lines) <= 36
