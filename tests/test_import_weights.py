"""The command that brings weights over, from its flags to the file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import x3d_tf
from x3d_tf import import_weights as command
from x3d_tf.data.sources import kinetics_classes
from x3d_tf.modeling.archive import describe
from x3d_tf.modeling.conversion import export_checkpoint, import_checkpoint

pytestmark = pytest.mark.usefixtures("uncompiled_module")


@pytest.fixture
def run(flags_of_one_command: None) -> Iterator[Any]:
    command.define_flags()
    flags.FLAGS(["import_weights", "--output=unset"])

    def call(path: Path | str, **settings: Any) -> None:
        with flagsaver.flagsaver(**{name: str(v) if isinstance(v, Path) else v for name, v in settings.items()}):
            command.main([str(path)])

    yield call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of X2D with the classes of Kinetics, under PySlowFast's names."""
    path = tmp_path_factory.mktemp("slowfast") / "x2d.pyth"
    export_checkpoint(x3d_tf.build_x3d("x2d"), path, "slowfast")
    return path


def test_a_checkpoint_becomes_a_model_file_and_returns(
    run: Any, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "new" / "x2d.keras"
    run(checkpoint, variant="x2d", output=model)
    printed = capsys.readouterr().out
    assert "head.projection.weight" in printed
    assert "only there: nothing; only here: nothing" in printed
    assert "for clips of 1 frames of 112 x 112 pixels, one in 1 of 30 a second\n" in printed
    assert "named as those of Kinetics-400" in printed
    assert f"--gin_bindings='TrainConfig.init=\"{model}\"'" in printed
    description = describe(model)
    assert description.class_names == kinetics_classes()
    assert description.options.head_pool == "fixed_probabilities"

    run(model, to="slowfast", output=tmp_path / "back.pyth")
    first, second = (import_checkpoint(path, "x2d")[1] for path in (checkpoint, tmp_path / "back.pyth"))
    assert second.weights_sha256 == first.weights_sha256
    clips = np.random.default_rng(0).integers(0, 256, (1, 1, 112, 112, 3)).astype(np.uint8)
    np.testing.assert_array_equal(x3d_tf.load(model)(clips), import_checkpoint(checkpoint, "x2d")[0](clips))


def test_a_fresh_classifier_with_names(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("hug\nkick\n")
    settings = {"variant": "x2d", "keep_head": False, "num_classes": 2, "output": tmp_path / "a.keras"}
    run(checkpoint, **settings, classes=tmp_path / "classes.txt", head_pool="global")
    assert describe(tmp_path / "a.keras").class_names == ("hug", "kick")
    assert describe(tmp_path / "a.keras").options.head_pool == "global"
    with pytest.raises(ValueError, match="exists; give another --output, or replace it with --overwrite"):
        run(checkpoint, **settings)
    run(checkpoint, **settings, overwrite=True)
    assert describe(tmp_path / "a.keras").class_names == ("0", "1")
    (tmp_path / "classes.txt").write_text("hug\nkick\nrun\n")
    with pytest.raises(ValueError, match=r"classes\.txt must name 2 classes, got 3"):
        run(checkpoint, **settings, overwrite=True, classes=tmp_path / "classes.txt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": "a.keras"}, "--variant must name the checkpoint's network: x2d, x3d_xs"),
        ({"output": ".", "variant": "x3d_s"}, "--output must be a file, got 'the folder .'"),
        ({"output": "a.h5", "variant": "x3d_s"}, "--output must end in .keras, got 'a.h5'"),
        (
            {"output": "a.keras", "variant": "x3d_s", "keep_head": False},
            "--keep_head=false must come with --num_classes",
        ),
        ({"output": "a.pyth", "to": "slowfast", "variant": "x3d_s"}, "--variant must not stand beside --to"),
        ({"output": "a.pyth", "to": "slowfast", "keep_head": False}, "--keep_head must not stand beside --to"),
        ({"output": "a.keras", "variant": "x3d_s"}, r"missing\.pyth: no such checkpoint"),
        ({"output": "a.pyth", "to": "slowfast"}, r"missing\.pyth: no such model file or run folder"),
    ],
)
def test_the_command_says_what_is_wrong(
    run: Any, settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        run("missing.pyth", **settings)
    assert list(tmp_path.iterdir()) == []


def test_one_file_at_a_time(run: Any) -> None:
    with pytest.raises(ValueError, match="the command line must name one checkpoint"):
        command.main([])


def test_kinetics_has_400_classes_sorted() -> None:
    names = kinetics_classes()
    assert (len(names), names[0], names[-1]) == (400, "abseiling", "zumba")
    assert list(names) == sorted(names)
