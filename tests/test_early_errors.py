"""Errors in settings, records and models that commands report before they start TensorFlow."""

from pathlib import Path

import pytest
from moving_square import write_records
from no_tensorflow import without_tensorflow

import x3d_tf

pytestmark = pytest.mark.usefixtures("uncompiled_module")

ROOT = Path(__file__).parents[1]
RECIPE = ("--gin_file=gin/x3d_s.gin", "--gin_file=gin/data/records.gin")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight records of the classes left and right, in the split train."""
    folder = tmp_path_factory.mktemp("data") / "square"
    write_records(folder, videos=8)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """X3D-S for the classes left and right, trained on stretched frames."""
    path = tmp_path_factory.mktemp("model") / "model.keras"
    network = x3d_tf.build_x3d("x3d_s", num_classes=2)
    network.stretch = True
    x3d_tf.save(network, path, ("left", "right"))
    return path


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["ModelOptions.swish=False"], "with ModelOptions.swish = True, but this run has False; set it with --gin_bi"),
        (['ModelOptions.input="difference"'], "with ModelOptions.input = 'rgb', but this run has 'difference'"),
        (["Expansion.gamma_d=1"], "has another architecture: 61 layers do not match, the first is res2_1_conv_a."),
        (["ModelOptions.stem_kernel=3"], "has another architecture: layer conv1_t does not match."),
    ],
)
def test_initial_weights_of_another_network(
    model: Path, records: Path, tmp_path: Path, bindings: list[str], message: str
) -> None:
    bindings = [f'TrainConfig.init="{model}"', f'DatasetSpec.records="{records}"', *bindings]
    flags = [f"--gin_bindings={binding}" for binding in (*bindings, 'DatasetSpec.eval_split="train"')]
    done = without_tensorflow("train", *RECIPE, *flags, f"--workdir={tmp_path / 'run'}", cwd=ROOT)
    assert done.stderr.startswith(f"error: TrainConfig.init: {model} ") and message in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


def test_an_evaluation_on_unknown_classes(model: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "other", videos=2, classes=("left", "sideways"))
    flags = [f"--model={model}", f"--records={tmp_path / 'other'}", "--split=train", f"--output={tmp_path / 'report'}"]
    assert without_tensorflow("evaluate", *flags).stderr == (
        f"error: {tmp_path / 'other'} has 1 class unknown to the model: sideways. The model has 2: left, right. "
        "Fine-tune it on the new classes (TrainConfig.init)\n"
    )


def test_a_sweep_of_a_detector(records: Path, tmp_path: Path) -> None:
    detector = tmp_path / "detector.keras"
    x3d_tf.save(x3d_tf.build_detector("x3d_s", num_classes=2, head="simple"), detector, ("left", "right"))
    flags = [f"--model={detector}", f"--records={records}", "--split=train", f"--output={tmp_path / 'report'}"]
    assert without_tensorflow("evaluate", *flags, "--sweep").stderr == (
        f"error: --sweep must not be given for {detector}: the task detection has a fixed number of clips\n"
    )


def test_several_crops_of_stretched_frames(model: Path, records: Path, tmp_path: Path) -> None:
    flags = [f"--model={model}", f"--records={records}", "--split=train", f"--output={tmp_path / 'report'}"]
    refused = without_tensorflow("evaluate", *flags, "--crops=3")
    assert refused.stderr == (
        "error: --crops must be 1 for a network trained on stretched frames, because square frames have a single crop, "
        "got 3\n"
    )
    assert "import of keras halted" in without_tensorflow("evaluate", *flags).stderr  # all checks passed


def test_exported_files_where_a_network_is_required(records: Path, tmp_path: Path) -> None:
    """They cannot be trained or exported again."""
    served = tmp_path / "served" / "1"
    served.mkdir(parents=True)
    for file in (tmp_path / "mine.onnx", served / "saved_model.pb"):
        file.touch()
    for path in (tmp_path / "mine.onnx", served):
        expected = (
            f"{path} is an exported file, which only predict and evaluate accept; give a run folder or a .keras file"
        )
        bindings = [f'TrainConfig.init="{path}"', f'DatasetSpec.records="{records}"', 'DatasetSpec.eval_split="train"']
        flags = [f"--gin_bindings={binding}" for binding in bindings]
        done = without_tensorflow("train", *RECIPE, *flags, f"--workdir={tmp_path / 'run'}", cwd=ROOT)
        assert done.stderr == f"error: {expected}\n" and not (tmp_path / "run").exists()
        for name in ("export.onnx", "export.saved_model"):
            done = without_tensorflow(name, f"--model={path}", f"--output={tmp_path / 'out'}")
            assert done.stderr == f"error: {expected}\n"
