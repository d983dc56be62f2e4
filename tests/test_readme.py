"""The README's example application gives the same probabilities as `x3d_tf.predict_videos`."""

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
from video_fixtures import with_cover, write_video

import x3d_tf
from x3d_tf.data.sampling import clip_contract
from x3d_tf.data.video.decode import probe
from x3d_tf.types import Storage

README = Path(__file__).parents[1] / "README.md"
NAMES = tuple("abcdef")


def moving_blocks(count: int, height: int, width: int) -> np.ndarray:
    """Frames of coloured blocks that move with increasing speed."""
    side = -(-width // 8)
    picture = np.random.default_rng(0).integers(0, 256, (height // 8, side, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(picture[:, :width], number**2 // 16, axis=1) for number in range(count)])


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Videos in landscape and portrait format at three frame rates; one is short, one has a cover picture."""
    folder = tmp_path_factory.mktemp("videos")
    return [
        write_video(folder / "wide.mp4", moving_blocks(50, 64, 112)),
        write_video(folder / "upright.mkv", moving_blocks(41, 120, 72), 25),
        write_video(folder / "small.avi", moving_blocks(60, 40, 56), 60),
        write_video(folder / "short.mp4", moving_blocks(6, 64, 80)),
        with_cover(write_video(folder / "cover.mp4", moving_blocks(45, 64, 96))),
    ]


@pytest.fixture
def real(request: pytest.FixtureRequest) -> list[Path]:
    """Real videos of constant rate and without rotation: three frame rates, landscape and portrait, three formats."""
    folder: Path = request.getfixturevalue("shared_data")
    names = ("apply_eye_makeup.avi", "arm_wrestling.mp4", "deadlifting.mp4", "flipping_pancake.mkv")
    paths = [*(folder / "clips" / name for name in names)]
    paths += sorted((folder / "ut_interaction" / "set1").glob("*/seq01_*.avi"))[:1]
    assert len(paths) == 5 and not any(probe(path).variable_rate for path in paths)
    return paths


SCALED = {"stored": Storage(60, 80)}
STRETCHED = {"stored": Storage(96, 95), "stretch": True, "frame_sampling": "exact", "test_views": 1}


@functools.cache
def varied_network() -> x3d_tf.X3D:
    """Returns a network whose probabilities differ between videos."""
    keras.utils.set_random_seed(2)
    model = random_network()
    coarse = np.random.default_rng(1).integers(0, 256, (8, model.clip.frames, 6, 6, 3))
    logits = np.asarray(model(coarse.repeat(8, 2).repeat(8, 3).astype(np.float32)))
    fc2, scale = model.get_layer("fc2"), 3 / logits.std(axis=0)
    fc2.kernel.assign(fc2.kernel * scale)
    fc2.bias.assign(-logits.mean(axis=0) * scale)
    return model


@pytest.fixture
def network(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> x3d_tf.X3D:
    """The `varied_network`, saved in the run folder that the README names."""
    model = varied_network()
    for name, value in request.param.items():
        monkeypatch.setattr(model, name, value)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    x3d_tf.save(x3d_tf.portable(model, NAMES), run / "model.keras")
    (run / "labels.txt").write_text("".join(f"{name}\n" for name in NAMES), encoding="utf-8")
    (run / "input.json").write_text(json.dumps(clip_contract(model)))
    return model


def run_example(replacement: tuple[str, str] = ("", "")) -> dict[str, Any]:
    """Runs the example, with one part of its text replaced, and returns the names that it defines."""
    line, code = next((line, code) for line, code in blocks(README) if "input.json" in code)
    assert replacement[0] in code
    code = code.replace(*replacement) if replacement[0] else code
    names: dict[str, Any] = {"__name__": "application"}
    exec(compile("\n" * line + code, str(README), "exec"), names)
    return names


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("network", "videos"),
    [(SCALED, "synthetic"), (STRETCHED, "synthetic"), pytest.param(SCALED, "real", marks=pytest.mark.slow)],
    indirect=["network"],
    ids=["scaled", "stretched", "real videos"],
)
def test_the_example_equals_predict_videos(videos: str, network: x3d_tf.X3D, request: pytest.FixtureRequest) -> None:
    paths: list[Path] = request.getfixturevalue(videos)
    probabilities_of = run_example()["probabilities_of"]
    expected = list(x3d_tf.predict_videos(network, paths, progress=False))
    for path, result in zip(paths, expected, strict=True):
        assert isinstance(result, x3d_tf.Prediction), result
        np.testing.assert_allclose(probabilities_of(str(path)), result.probabilities, atol=1e-3, err_msg=path.name)
    spread = np.ptp([result.probabilities for result in expected if isinstance(result, x3d_tf.Prediction)], axis=0)
    assert spread.max() > 0.05  # otherwise the tolerance above would be too loose


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("network", [SCALED], indirect=True, ids=[""])
def test_every_step_of_the_example_is_needed(
    network: x3d_tf.X3D, synthetic: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ensures that the comparison above would detect an error in any step."""
    monkeypatch.setattr(tf.keras.models, "load_model", functools.cache(tf.keras.models.load_model))
    (expected,) = x3d_tf.predict_videos(network, synthetic[0], progress=False)
    assert isinstance(expected, x3d_tf.Prediction)
    for replacement in (
        ('spec["stored"]["jpeg_quality"]', "95"),
        ('spec["decoded_short_side"]', "256"),
        ("* (span - 1) / max(frames - 1, 1)", '* spec["stride"] * fps / 30'),
        ("* (last // (clips - 1))", "* 0"),
        ("side - crop + 1", "side - crop - 5"),
        ("numbers.ravel()], shape)", "numbers.ravel()], shape, antialias=True)"),
        ('getattr(found, spec["combine"])(axis=0)', "found[0]"),
    ):
        probabilities = run_example(replacement)["probabilities_of"](str(synthetic[0]))
        assert np.abs(probabilities - expected.probabilities).max() > 3e-3, replacement


def test_the_example_needs_few_packages_and_lines() -> None:
    code = next(code for _, code in blocks(README) if "input.json" in code)
    lines = [line for line in code.splitlines() if line.strip()]
    imported = {line.split()[1] for line in lines if line.startswith(("import ", "from "))}
    assert imported == {"io", "json", "av", "numpy", "tensorflow", "PIL"}
    assert len(lines) <= 32
