"""Tests of the import and export of PyTorch checkpoints, without PyTorch."""

import functools
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest

from x3d_tf import X3D, Expansion, ModelOptions, build_x3d
from x3d_tf.errors import UserError
from x3d_tf.modeling.architecture import plan
from x3d_tf.modeling.expansion import VARIANTS
from x3d_tf.modeling.pytorch import convert
from x3d_tf.modeling.pytorch.checkpoint_files import read_checkpoint, write_checkpoint
from x3d_tf.modeling.pytorch.convert import export_checkpoint, import_checkpoint
from x3d_tf.modeling.pytorch.weight_names import NAMINGS, Naming, names, source_shape, to_ours

pytestmark = pytest.mark.usefixtures("uncompiled_module")

SMALL = Expansion(gamma_tau=1, gamma_t=2, gamma_s=64 / 112, gamma_w=1 / 3, gamma_b=2.25, gamma_d=0.4)
CLASSES = 5
NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}

State = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def trained() -> X3D:
    """A network with no weight at its initial value."""
    return fill(build_x3d(SMALL, num_classes=CLASSES))


def fill(model: X3D) -> X3D:
    draw = np.random.default_rng(0)
    for layer in model.layers:
        for weight in layer.weights:
            if weight.name in ("gamma", "moving_variance"):
                weight.assign(0.5 + draw.random(weight.shape))
            elif "seed" not in weight.path:
                weight.assign(0.3 * draw.standard_normal(weight.shape))
    return model


@functools.cache
def shapes(shortcut_norm: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a network's weights, LAYER/WEIGHT."""
    model = build_x3d(SMALL, num_classes=CLASSES, options=ModelOptions(shortcut_norm=shortcut_norm))  # type: ignore[arg-type]
    return {f"{layer.name}/{weight.name}": tuple(weight.shape) for layer in model.layers for weight in layer.weights}


def random_state(naming: Naming) -> State:
    """Creates random weights with the names and shapes of an implementation."""
    options = ModelOptions(shortcut_norm="on_width_change" if naming == "pytorchvideo" else "always")
    draw = np.random.default_rng(1)
    state = {}
    for name in names(plan(SMALL, options), naming):
        shape = source_shape(shapes(options.shortcut_norm)[f"{name.layer}/{name.weight}"], name.kind)
        state[name.source] = draw.standard_normal(shape).astype(np.float32)
        if name.source.endswith("running_var"):
            state[name.source.replace("running_var", "num_batches_tracked")] = np.array(7, np.int64)
    return state


def written(path: Path, state: State) -> Path:
    write_checkpoint(path, state)
    return path


def arrays(path: Path) -> State:
    return {name: tensor.array() for name, tensor in read_checkpoint(path)["model_state"].items()}


SHORTCUTS_AND_POOLING = {
    "slowfast": ("always", "fixed_probabilities"),
    "pytorchvideo": ("on_width_change", "fixed_probabilities"),
    "pytorchvideo_mobile": ("always", "global"),
    "mmaction2": ("always", "global"),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_import_export_round_trip(naming: Naming, tmp_path: Path) -> None:
    state = random_state(naming)
    model, report = import_checkpoint(written(tmp_path / "original.pyth", state), SMALL)
    assert model.num_classes == CLASSES
    assert (model.options.shortcut_norm, model.options.head_pool) == SHORTCUTS_AND_POOLING[naming]
    assert report.naming == naming
    weights = {name: value for name, value in state.items() if "num_batches" not in name}
    assert [row.source for row in report.rows] == list(weights)
    assert len({row.target for row in report.rows}) == len(weights)
    for name in names(plan(SMALL, model.options), naming):
        weight = getattr(model.get_layer(name.layer), name.weight)
        np.testing.assert_array_equal(weight, to_ours(state[name.source], name.kind))
    assert report.counters == len(state) - len(weights)
    assert (report.only_in_checkpoint, report.only_in_network) == ((), ())

    back = export_checkpoint(model, tmp_path / "back.pyth", naming)
    returned = arrays(tmp_path / "back.pyth")
    assert list(returned) == list(state)  # in the same order
    for name, value in returned.items():
        expected = np.zeros((), np.int64) if "num_batches" in name else state[name]
        np.testing.assert_array_equal(value, expected)
        assert value.dtype == expected.dtype
    assert back.rows == report.rows
    assert back.weights_sha256 == report.weights_sha256
    assert not any("evaluation only" in note for note in back.notes)


def test_another_pooling_can_be_chosen(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pyth", random_state("mmaction2"))
    assert import_checkpoint(path, SMALL, head_pool="fixed_logits")[0].options.head_pool == "fixed_logits"


def test_equal_weights_have_equal_checksums(trained: X3D, tmp_path: Path) -> None:
    reports = {naming: export_checkpoint(trained, tmp_path / naming, naming) for naming in NAMINGS}
    assert (
        reports["slowfast"].weights_sha256
        == reports["mmaction2"].weights_sha256
        == reports["pytorchvideo_mobile"].weights_sha256
    )
    assert reports["slowfast"].sha256 != reports["mmaction2"].sha256
    trained.get_layer("fc2").bias.assign_add(np.full(CLASSES, 1e-3))
    changed = export_checkpoint(trained, tmp_path / "changed", "slowfast")
    assert changed.weights_sha256 != reports["slowfast"].weights_sha256


def test_the_report_names_every_tensor(tmp_path: Path) -> None:
    state = random_state("mmaction2")
    _, report = import_checkpoint(written(tmp_path / "a.pyth", state), SMALL, num_classes=3, keep_head=False)
    text = str(report)
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    for name, value in state.items():
        if name.startswith("cls_head.fc2"):
            assert f"only in the checkpoint: {'cls_head.fc2.weight, cls_head.fc2.bias'}" in text
        elif "num_batches" not in name:
            assert lines[name][0] == "x".join(map(str, value.shape))
    assert lines["backbone.conv1_s.conv.weight"] == ["8x3x1x3x3", "conv1_xy/kernel", "1x3x3x3x8"]
    assert "only in x3d_tf: fc2/kernel, fc2/bias" in text
    assert report.sha256 in text
    assert report.weights_sha256 in text


def test_the_report_describes_the_input_clips() -> None:
    for variant, others in (("x3d_s", "x3d_xs, x3d_s, x3d_m have equal names and shapes"), ("x3d_xxl", "")):
        note = convert._describe_clips(VARIANTS[variant].expansion)
        assert note.endswith(others or "stride 2.5 at 30 fps")


def test_a_new_classifier(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pyth", random_state("slowfast"))
    model, _ = import_checkpoint(path, SMALL, num_classes=9, keep_head=False)
    assert model.output_shape == (None, 9)
    assert not np.asarray(model.get_layer("fc2").bias).any()
    with pytest.raises(
        UserError,
        match=r"num_classes must be 5, the number of outputs of the classifier in .*keep_head=false\), got 9",
    ):
        import_checkpoint(path, SMALL, num_classes=9)
    with pytest.raises(UserError, match="num_classes must be set if keep_head is false"):
        import_checkpoint(path, SMALL, keep_head=False)


def test_a_backbone_without_classifier(tmp_path: Path) -> None:
    state = {name: value for name, value in random_state("slowfast").items() if "projection" not in name}
    path = written(tmp_path / "a.pyth", state)
    assert import_checkpoint(path, SMALL, num_classes=4, keep_head=False)[0].num_classes == 4
    with pytest.raises(UserError, match=r"2 mismatches: missing: head\.projection\.weight 1x2048; missing: .*bias 1$"):
        import_checkpoint(path, SMALL)


def test_all_mismatches_are_listed(tmp_path: Path) -> None:
    state = random_state("pytorchvideo")
    del state["blocks.0.norm.bias"], state["blocks.5.proj.bias"]
    state["blocks.9.weight"] = np.ones((2, 3), np.float32)
    state["blocks.1.res_blocks.0.branch1_norm.weight"] = np.ones(8, np.float32)
    state["blocks.5.pool.post_conv.weight"] = state["blocks.5.pool.post_conv.weight"].reshape(2048, -1)
    state["blocks.0.conv.conv_t.weight"] = np.ones((8, 3, 1, 3, 3), np.int64)
    state["blocks.0.norm.running_mean"][1] = np.nan
    with pytest.raises(UserError) as caught:
        import_checkpoint(written(tmp_path / "a.pyth", state), SMALL, num_classes=CLASSES)
    expected = (
        f"{tmp_path / 'a.pyth'} (pytorchvideo) must match ",
        "missing: blocks.0.norm.bias 8",
        "missing: blocks.5.proj.bias 5",
        "unexpected: blocks.9.weight 2x3",
        "unexpected: blocks.1.res_blocks.0.branch1_norm.weight 8",
        "shape 2048x144, expected 2048x144x1x1x1: blocks.5.pool.post_conv.weight",
        "values of type int64: blocks.0.conv.conv_t.weight",
        "values that are not finite: blocks.0.norm.running_mean",
    )
    start, mismatches = str(caught.value).split(" mismatches: ")
    assert start.startswith(expected[0]) and start.endswith(" 7")
    assert sorted(mismatches.split("; ")) == sorted(expected[1:])


def outputs(model: X3D) -> Iterable[np.ndarray]:
    """Yields outputs for clips of the training crop and for larger ones."""
    for side in (64, 96):
        clips = np.random.default_rng(2).integers(0, 256, (2, 2, side, side, 3)).astype(np.uint8)
        yield keras.ops.convert_to_numpy(model(clips))


def test_a_batch_norm_on_a_shortcut_is_folded(trained: X3D, tmp_path: Path) -> None:
    report = export_checkpoint(trained, tmp_path / "a.pyth", "pytorchvideo")
    assert not any("branch1_norm" in row.source for row in report.rows if ".1.res_blocks" in row.source)
    assert "res2_0_shortcut_bn is folded" in str(report)
    assert (report.only_in_checkpoint, report.only_in_network) == (
        (),
        tuple(f"res2_0_shortcut_bn/{name}" for name in NORM),
    )
    assert "evaluation only" in str(report)
    assert "pytorchvideo uses fixed_probabilities pooling in the head, this network global" in str(report)
    model, _ = import_checkpoint(tmp_path / "a.pyth", SMALL, head_pool="global")
    assert model.options.shortcut_norm == "on_width_change"
    for actual, expected in zip(outputs(model), outputs(trained)):
        np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())


def test_a_missing_batch_norm_is_written_as_an_identity(tmp_path: Path) -> None:
    model = fill(build_x3d(SMALL, num_classes=CLASSES, options=ModelOptions(shortcut_norm="on_width_change")))
    report = export_checkpoint(model, tmp_path / "a.pyth", "mmaction2")
    assert "res2_0_shortcut_bn does not exist in this network and is written as an identity" in str(report)
    assert report.only_in_checkpoint == tuple(f"backbone.layer1.0.downsample.bn.{name}" for name in NORM.values())
    assert report.only_in_network == ()
    returned, _ = import_checkpoint(tmp_path / "a.pyth", SMALL)
    assert returned.options.shortcut_norm == "always"
    for actual, expected in zip(outputs(returned), outputs(model)):
        np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("option", "value"),
    [("input", "difference"), ("stem_kernel", 3), ("se", "all"), ("swish", False), ("separable", False)],
)
def test_ablations_cannot_be_exported(option: str, value: object, tmp_path: Path) -> None:
    model: Any = SimpleNamespace(include_top=True, options=ModelOptions(**{option: value}))  # needs no weights
    with pytest.raises(UserError, match=f"ModelOptions.{option} must be .* for export: other implementations"):
        export_checkpoint(model, tmp_path / "a.pyth", "slowfast")
    assert not (tmp_path / "a.pyth").exists()


def test_invalid_arguments_of_export_are_named(tmp_path: Path) -> None:
    model = build_x3d(SMALL, include_top=False)
    with pytest.raises(UserError, match="the network to export must have its classifier"):
        export_checkpoint(model, tmp_path / "a.pyth", "slowfast")
    with pytest.raises(UserError, match="naming must be one of slowfast"):
        export_checkpoint(model, tmp_path / "a.pyth", "caffe2")  # type: ignore[arg-type]
