"""The import_weights command, from its flags to the written files."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from no_tensorflow import without_tensorflow

import x3d_tf
from x3d_tf import gin_config
from x3d_tf import import_weights as command
from x3d_tf.data.class_lists import kinetics_classes
from x3d_tf.modeling.archive import describe
from x3d_tf.modeling.expansion import VARIANTS, Expansion
from x3d_tf.modeling.pytorch.checkpoint_files import write_checkpoint
from x3d_tf.modeling.pytorch.convert import export_checkpoint, import_checkpoint
from x3d_tf.modeling.pytorch.state_dicts import MismatchError, read_state_dict
from x3d_tf.modeling.pytorch.weight_names import source_shapes
from x3d_tf.training.transfer import load_pretrained

pytestmark = pytest.mark.usefixtures("uncompiled_module")

DEPTH = 0.2  # gamma_d of networks with one block a stage
SHALLOW = (  # gives x2d that depth in another process
    "import dataclasses; from x3d_tf.modeling.expansion import VARIANTS; x2d = VARIANTS['x2d']; "
    f"VARIANTS['x2d'] = dataclasses.replace(x2d, expansion=dataclasses.replace(x2d.expansion, gamma_d={DEPTH}))"
)


@pytest.fixture
def run(flags_of_one_command: None) -> Iterator[Any]:
    command.define_flags()
    flags.FLAGS(["import_weights", "--output=unset"])

    def call(path: Path | str, **settings: Any) -> None:
        with flagsaver.flagsaver(**{name: str(v) if isinstance(v, Path) else v for name, v in settings.items()}):
            command.main([str(path)])

    yield call


@pytest.fixture(scope="module", autouse=True)
def small_x2d() -> Iterator[None]:
    """Replaces X2D by a network with one block a stage to save time."""
    x2d = VARIANTS["x2d"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "x2d", replace(x2d, expansion=replace(x2d.expansion, gamma_d=DEPTH)))
        yield


@pytest.fixture(scope="module")
def checkpoint(small_x2d: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the path of an X2D checkpoint for Kinetics' classes with PySlowFast's names."""
    path = tmp_path_factory.mktemp("slowfast") / "x2d.pyth"
    export_checkpoint(x3d_tf.build_x3d("x2d"), path, "slowfast")
    return path


def test_a_checkpoint_is_imported_and_exported_again(
    run: Any, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "new" / "x2d.keras"
    run(checkpoint, variant="x2d", output=model)
    printed = capsys.readouterr().out
    assert printed.index("To fine-tune it") < 1500 and printed.count("\n", 0, printed.index("To fine-tune")) <= 10
    assert "head.projection.weight" not in printed
    table = (tmp_path / "new" / "x2d.tensors.txt").read_text()
    assert re.search(r"^head\.projection\.weight +400x2048 +fc2/kernel +2048x400$", table, re.MULTILINE)
    imported, report = import_checkpoint(checkpoint, "x2d")
    assert len(table.splitlines()) > len(report.rows)
    assert "only in the checkpoint: none; only in x3d_tf: none" in printed
    assert "only in the checkpoint: none; only in x3d_tf: none" in table
    assert "input clips: 1 frames of 112 x 112 pixels, stride 1 at 30 fps\n" in printed
    assert "assumed to be those of Kinetics-400" in printed
    assert f"--gin_bindings='TrainConfig.init=\"{model}\"'" in printed
    description = describe(model)
    assert description.class_names == kinetics_classes()
    assert description.options.head_pool == "fixed_probabilities"

    run(model, to="slowfast", output=tmp_path / "back.pyth")
    assert import_checkpoint(tmp_path / "back.pyth", "x2d")[1].weights_sha256 == report.weights_sha256
    clips = np.random.default_rng(0).integers(0, 256, (1, 1, 112, 112, 3)).astype(np.uint8)
    np.testing.assert_array_equal(x3d_tf.load(model)(clips), imported(clips))


def test_a_new_classifier_with_names(
    run: Any, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "classes.txt").write_text("hug\nkick\n")
    settings = {"variant": "x2d", "keep_head": False, "num_classes": 2, "output": tmp_path / "a.keras"}
    run(checkpoint, **settings, classes=tmp_path / "classes.txt", head_pool="global")
    assert describe(tmp_path / "a.keras").class_names == ("hug", "kick")
    assert describe(tmp_path / "a.keras").options.head_pool == "global"
    for name in ("a.keras", "a.tensors.txt"):
        with pytest.raises(
            ValueError, match=f"{name} exists; choose another --output, or pass --overwrite to replace it"
        ):
            run(checkpoint, **settings)
        (tmp_path / name).rename(tmp_path / f"{name}.before")
    run(checkpoint, **settings, overwrite=True)
    assert "classes: 2, numbered from 0; use --classes to name them\n" in capsys.readouterr().out
    assert (tmp_path / "a.tensors.txt").read_text().count("only in x3d_tf: fc2/") == 3
    assert describe(tmp_path / "a.keras").class_names == ("0", "1")
    (tmp_path / "classes.txt").write_text("hug\nkick\nrun\n")
    with pytest.raises(ValueError, match=r"classes\.txt must name 2 classes, got 3"):
        run(checkpoint, **settings, overwrite=True, classes=tmp_path / "classes.txt")


def test_the_printed_command_fine_tunes_the_network(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = x3d_tf.ModelOptions(shortcut_norm="on_width_change", head_pool="fixed_probabilities")
    model = x3d_tf.build_x3d("x2d", 7, options=options)
    export_checkpoint(model, "a.pyth", "pytorchvideo")
    output = 'it\'s "new" \\ прыжок.keras'
    Path("classes.txt").write_text("\n".join("abcdefg"))
    run("a.pyth", variant="x2d", output=output, classes="classes.txt")
    printed = capsys.readouterr().out
    words = shlex.split(printed[printed.index("python -m x3d_tf.train") :].replace("\\\n", ""))
    given = [word.split("=", 1) for word in words[3:]]
    files = [value for name, value in given if name == "--gin_file"]
    bindings = [value for name, value in given if name == "--gin_bindings"]
    assert files == ["gin/x2d.gin", "gin/data/records.gin", "gin/finetune.gin"]
    assert ["--workdir", "runs/mine"] in given
    config = gin_config.parse(files, [*bindings, f"Expansion.gamma_d = {model.expansion.gamma_d}"]).config
    assert (config.init, config.expansion) == (output, model.expansion)
    network = x3d_tf.X3D(config.expansion, 3, config.model)
    network.class_names = ("a", "b", "c")
    assert network.options == model.options
    assert "head_pool" not in str(load_pretrained(network, output))


def test_a_wrong_variant_is_reported_before_tensorflow_starts(checkpoint: Path, tmp_path: Path) -> None:
    done = without_tensorflow(
        "import_weights", checkpoint, "--variant=x3d_l", "--output=a.keras", cwd=tmp_path, before=SHALLOW
    )
    assert done.returncode == 1
    assert "error: network (--variant) must be x2d to match" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--num_classes=10", "--num_classes must be 400, the number of outputs of the classifier in "),
        ("--classes=names.txt", "--classes=names.txt must name 400 classes, got 2"),
    ],
)
def test_another_number_of_classes_is_reported_before_tensorflow_starts(
    flag: str, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "names.txt").write_text("hug\nkick\n")
    done = without_tensorflow(
        "import_weights", checkpoint, "--variant=x2d", "--output=a.keras", flag, cwd=tmp_path, before=SHALLOW
    )
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": "a.keras"}, "--variant must be given to import a checkpoint: one of x2d, x3d_xs"),
        ({"output": ".", "variant": "x3d_s"}, "--output must be a file, but . is a folder"),
        ({"output": "a.h5", "variant": "x3d_s"}, "--output must end in .keras, got 'a.h5'"),
        (
            {"output": "a.keras", "variant": "x3d_s", "keep_head": False},
            "--num_classes must be given with --keep_head=false",
        ),
        ({"output": "a.pyth", "to": "slowfast", "variant": "x3d_s"}, "--variant must not be given with --to"),
        ({"output": "a.pyth", "to": "slowfast", "keep_head": False}, "--keep_head must not be given with --to"),
        ({"output": "a.keras", "variant": "x3d_s"}, r"missing\.pyth: no such checkpoint"),
        ({"output": "a.pyth", "to": "slowfast"}, r"missing\.pyth: no such model file or run folder"),
    ],
)
def test_invalid_arguments_are_rejected(
    run: Any, settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        run("missing.pyth", **settings)
    assert list(tmp_path.iterdir()) == []


def test_all_mismatches_are_written_beside_the_output(run: Any, tmp_path: Path) -> None:
    shapes = source_shapes(Expansion(gamma_w=3), "slowfast", 5)
    write_checkpoint(tmp_path / "a.pyth", {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    output, table = tmp_path / "new" / "b.keras", tmp_path / "new" / "b.mismatches.txt"
    for _ in range(2):  # the second attempt replaces the table of the first
        with pytest.raises(
            ValueError, match=r"must match x2d or .*; \.\.\.\. .*b\.mismatches\.txt lists all"
        ) as caught:
            run(tmp_path / "a.pyth", variant="x2d", output=output)
        assert "\n" not in str(caught.value)
    with pytest.raises(MismatchError) as direct:
        read_state_dict(tmp_path / "a.pyth", "x2d")
    assert table.read_text().splitlines() == list(direct.value.mismatches) and len(direct.value.mismatches) > 50
    assert list(table.parent.iterdir()) == [table]


def test_exactly_one_file_is_required(run: Any) -> None:
    with pytest.raises(ValueError, match="the command line must name one checkpoint"):
        command.main([])


def test_kinetics_has_400_sorted_classes() -> None:
    names = kinetics_classes()
    assert (len(names), names[0], names[-1]) == (400, "abseiling", "zumba")
    assert list(names) == sorted(names)
