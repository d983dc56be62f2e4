"""Whole checkpoints of PyTorch implementations made into networks of ours, and back, with a report of every weight."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import keras
import numpy as np

from x3d_tf.errors import first_few, require
from x3d_tf.modeling.architecture import ModelOptions, plan
from x3d_tf.modeling.expansion import VARIANTS, Expansion, as_expansion
from x3d_tf.modeling.pytorch.checkpoint_files import write_checkpoint
from x3d_tf.modeling.pytorch.state_dicts import StateDict, read_state_dict, shape_text
from x3d_tf.modeling.pytorch.weight_names import (
    COUNTER,
    HEAD,
    SHORTCUT_NORM,
    TITLES,
    Naming,
    WeightName,
    names,
    source_shape,
    to_ours,
    to_source,
)
from x3d_tf.modeling.x3d import X3D

# What an implementation does where ours has an option.
_HEAD_POOL: dict[Naming, Any] = dict.fromkeys(TITLES, "global") | dict.fromkeys(
    ("slowfast", "pytorchvideo"), "fixed_probabilities"
)
_POOLING_NOTE: dict[Naming, str] = {naming: f", as in {title}" for naming, title in TITLES.items()} | {
    "pytorchvideo": ", as in pytorchvideo's default; fixed_logits equals one built without its final softmax",
}
_FREE_OPTIONS = ("shortcut_norm", "head_pool", "bn_group", "drop_connect", "dropout")  # the rest decides the graph


@dataclass(frozen=True)
class Row:
    """Where one weight came from or went to. Shapes are as stored on each side."""

    source: str
    source_shape: tuple[int, ...]
    target: str
    target_shape: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """What became of every tensor of a checkpoint and of every weight of a network.

    Attributes:
        path: the checkpoint.
        naming: whose names it has.
        sha256: of the file.
        rows: the weights that both sides have, in execution order.
        left: what only the checkpoint has, beside the counters: not taken, or written as a layer that changes nothing.
        new: weights that only the network has: fresh, or folded into others.
        counters: `num_batches_tracked`s, ignored when read and written as 0.
        weights_sha256: of the values of `rows`, float32 in our layout: equal for equal weights under any names.
        notes: what else there is to know.
    """

    path: str
    naming: Naming
    sha256: str
    rows: tuple[Row, ...]
    left: tuple[str, ...]
    new: tuple[str, ...]
    counters: int
    weights_sha256: str
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.table()}\n{self.summary()}"

    def table(self) -> str:
        """A line for each weight, what only one side has, and the counters."""
        cells = [
            (row.source, shape_text(row.source_shape), row.target, shape_text(row.target_shape)) for row in self.rows
        ]
        cells.insert(0, (TITLES[self.naming], "shape", "x3d_tf", "shape"))
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
        lines += [f"only there: {name}" for name in self.left] + [f"only here: {name}" for name in self.new]
        return "\n".join(lines)

    def summary(self) -> str:
        """A few lines: how many weights, what only one side has, and the notes."""
        lines = [
            f"{len(self.rows)} tensors on both sides, with the names of {TITLES[self.naming]}; only there: "
            f"{first_few(self.left) or 'nothing'}; only here: {first_few(self.new) or 'nothing'}",
            f"{self.counters} {COUNTER}: no weights, ignored by both",
            *self.notes,
            f"sha256 of these weights' values {self.weights_sha256}",
            f"sha256 of the file {self.path} {self.sha256}",
        ]
        return "\n".join(lines)


def import_checkpoint(
    path: str | Path,
    network: str | Expansion,
    *,
    num_classes: int | None = None,
    keep_head: bool = True,
    head_pool: str | None = None,
) -> tuple[X3D, Report]:
    """Makes a network of a PyTorch checkpoint, whose implementation it recognises by its names.

    Args:
        path: a file that `torch.save` wrote: a state dict, by itself or under any keys, also below a prefix of its
            names. Nothing in it is executed.
        network: the variant or expansion that the checkpoint is of. XS, S and M have the same weights.
        num_classes: outputs of the classifier; those of the checkpoint unless given, which they must be if it is kept.
        keep_head: False makes a fresh classifier fc2, of `num_classes`.
        head_pool: see `ModelOptions`. Defaults to the source's own: `fixed_probabilities` for PySlowFast and
            pytorchvideo, `global` for the others.

    Returns:
        The network, with the batch norms on its shortcuts and the head's pooling of the source; and the report.

    Raises:
        UserError: see `read_state_dict`; a `num_classes` that is missing, or other than that of a classifier to keep.
    """
    require(keep_head or num_classes is not None, "num_classes", "be given where keep_head is false", num_classes)
    state = read_state_dict(path, network, keep_head=keep_head)
    return import_state_dict(state, network, num_classes=num_classes, keep_head=keep_head, head_pool=head_pool)


def import_state_dict(
    state: StateDict,
    network: str | Expansion,
    *,
    num_classes: int | None = None,
    keep_head: bool = True,
    head_pool: str | None = None,
) -> tuple[X3D, Report]:
    """Makes a network of what `read_state_dict` found for the same network; otherwise as `import_checkpoint`."""
    expansion, naming, tensors = as_expansion(network), state.naming, state.tensors
    options = ModelOptions(
        shortcut_norm=SHORTCUT_NORM[naming],
        head_pool=head_pool or _HEAD_POOL[naming],  # type: ignore[arg-type]
    )
    model = X3D(expansion, _classes(state, num_classes, keep_head), options)
    pairs = [(name, weight) for name, weight in _weights(model, naming) if keep_head or name.layer != HEAD]
    for name, weight in pairs:
        weight.assign(to_ours(tensors[name.source].array(), name.kind))
    notes = [f"found under {state.place}"] if state.place else []
    notes += [f"head: {options.head_pool} pooling" + ("" if head_pool else _POOLING_NOTE.get(naming, ""))]
    rounded = sorted({tensors[name.source].dtype for name, _ in pairs} - {"float32"})
    notes += [f"values of type {', '.join(rounded)} are float32 here"] if rounded else []
    notes += [] if keep_head else [f"{HEAD} is fresh: what the network says means nothing until it is trained"]
    notes.append(_clips_of(expansion))
    new = () if keep_head else tuple(name.target for name in names(plan(expansion), naming) if name.layer == HEAD)
    taken = {name.source for name, _ in pairs}
    left = (*(name for name in tensors if name not in taken), *state.outside)
    return model, _report(state.path, naming, pairs, left, new, state.counters, notes)


def export_checkpoint(model: X3D, path: str | Path, naming: Naming) -> Report:
    """Writes a network's weights as a PyTorch checkpoint `{"model_state": state_dict}`, for the same network there.

    Where only one side has a batch norm on the shortcut of res2, it is folded into the weights around it, or one that
    does nothing is written: the outputs stay the same, in evaluation only.

    Args:
        model: with its classifier.
        path: the file; replaced if it is there.
        naming: the implementation that is to load it.

    Raises:
        UserError: a network without classifier or with options that have no counterpart there.
        WriteError: the file cannot be written.
    """
    path = Path(path)
    require(naming in get_args(Naming), "the naming", f"be among {', '.join(get_args(Naming))}", naming)
    require(model.include_top, "the network to export", "have its classifier (include_top)", model.include_top)
    _require_common_options(model.options)
    options = replace(model.options, shortcut_norm=SHORTCUT_NORM[naming])
    values = {f"{layer}/{weight.name}": np.asarray(weight) for layer, weight in _layer_weights(model)}
    notes = _match_shortcut_norms(values, model, options, naming)
    if options.head_pool != _HEAD_POOL[naming]:
        notes.append(
            f"{TITLES[naming]} pools by {_HEAD_POOL[naming]} in its head, this network by {options.head_pool}: "
            "clips larger than the training crop give other outputs there"
        )
    pairs = [(name, values[name.target]) for name in names(plan(model.expansion, options), naming)]
    ours = [name.target for name in names(plan(model.expansion, model.options), naming)]
    state: dict[str, np.ndarray] = {}
    for name, value in pairs:
        state[name.source] = to_source(value.astype(np.float32), name.kind)
        if name.weight == "moving_variance":
            state[name.source.removesuffix("running_var") + COUNTER] = np.zeros((), np.int64)
    write_checkpoint(path, state)
    common = [(name, value) for name, value in pairs if name.target in set(ours)]
    left = tuple(name.source for name, _ in pairs if name.target not in set(ours))
    new = tuple(target for target in ours if target not in values)
    return _report(path, naming, common, left, new, len(state) - len(pairs), notes)


def _classes(state: StateDict, num_classes: int | None, keep_head: bool) -> int:
    if not keep_head:
        assert num_classes is not None
        return num_classes
    found = state.num_classes()
    assert found is not None  # `read_state_dict` found a classifier
    rule = f"be {found}, as the classifier of {state.path} has, unless keep_head is false"
    require(num_classes in (None, found), "num_classes", rule, num_classes)
    return found


def _layer_weights(model: X3D) -> Iterator[tuple[str, keras.Variable]]:
    for layer in model.layers:
        for weight in layer.weights:
            if "seed_generator" not in weight.path:
                yield layer.name, weight


def _weights(model: X3D, naming: Naming) -> list[tuple[WeightName, keras.Variable]]:
    """Every weight of a network with its names: the table and the network must have the same ones."""
    ours = {f"{layer}/{weight.name}": weight for layer, weight in _layer_weights(model)}
    pairs = [(name, ours.pop(name.target)) for name in names(plan(model.expansion, model.options), naming)]
    assert not ours, f"weights without a name in the table: {list(ours)}"
    return pairs


def _clips_of(expansion: Expansion) -> str:
    """The clips of the network, of which no weight tells, and the variants that differ by them alone."""
    clip, widths = expansion.clip, ("gamma_w", "gamma_b", "gamma_d")
    alike = [
        variant.name
        for variant in VARIANTS.values()
        if all(getattr(variant.expansion, name) == getattr(expansion, name) for name in widths)
    ]
    of = f"for clips of {clip.frames} frames of {clip.size} x {clip.size} pixels, one in {clip.stride:g} of 30 a second"
    if len(alike) < 2:
        return of
    return (
        f"{of}; the file does not tell whether it was trained on such: {', '.join(alike)} have equal names and shapes"
    )


def _require_common_options(options: ModelOptions) -> None:
    default = ModelOptions()
    for name, value in vars(options).items():
        common = name in _FREE_OPTIONS or value == getattr(default, name)
        rule = f"be {getattr(default, name)!r} for a network that other implementations have"
        require(common, f"ModelOptions.{name}", rule, value)


def _match_shortcut_norms(
    values: dict[str, np.ndarray], model: X3D, options: ModelOptions, naming: Naming
) -> list[str]:
    """Changes weights by layer name so that res2 has the shortcut of `options`, and says so."""
    ours = {name.target for name in names(plan(model.expansion, model.options), naming)}
    theirs = {name.target for name in names(plan(model.expansion, options), naming)}
    notes = []
    for layer in dict.fromkeys(target.rpartition("/")[0] for target in sorted(ours ^ theirs)):
        block = layer.removesuffix("_shortcut_bn")
        epsilon = model.get_layer(f"{block}_conv_c_bn").epsilon
        if layer in {target.rpartition("/")[0] for target in ours}:
            _fold(values, block, epsilon)
            done = f"{layer} is folded into {block}_shortcut and {block}_conv_c_bn"
        else:
            width = len(values[f"{block}_conv_c_bn/gamma"])
            values |= {f"{layer}/{name}": np.zeros(width) for name in ("beta", "moving_mean")}
            values |= {
                f"{layer}/moving_variance": np.ones(width),
                f"{layer}/gamma": np.full(width, (1 + epsilon) ** 0.5),
            }
            done = f"{layer}, which this network does not have, is written as one that changes nothing"
        notes.append(f"{done}: the same outputs for evaluation only; trained further, the networks differ")
    return notes


def _fold(values: dict[str, np.ndarray], block: str, epsilon: float) -> None:
    """Takes the batch norm of a block's shortcut out: its scale into the convolution, its shift into the last norm."""
    norm = {name: values.pop(f"{block}_shortcut_bn/{name}").astype(np.float64) for name in _NORM_WEIGHTS}
    scale = norm["gamma"] / np.sqrt(norm["moving_variance"] + epsilon)
    values[f"{block}_shortcut/kernel"] = values[f"{block}_shortcut/kernel"] * scale
    values[f"{block}_conv_c_bn/beta"] = values[f"{block}_conv_c_bn/beta"] + norm["beta"] - norm["moving_mean"] * scale


_NORM_WEIGHTS = ("gamma", "beta", "moving_mean", "moving_variance")


def _report(
    path: Path,
    naming: Naming,
    pairs: Iterable[tuple[WeightName, Any]],
    left: tuple[str, ...],
    new: tuple[str, ...],
    counters: int,
    notes: list[str],
) -> Report:
    rows, weights = [], hashlib.sha256()
    for name, weight in pairs:
        value = np.asarray(weight, np.float32)
        rows.append(Row(name.source, source_shape(value.shape, name.kind), name.target, value.shape))
        weights.update(name.target.encode() + np.ascontiguousarray(value).tobytes())
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Report(str(path), naming, digest, tuple(rows), left, new, counters, weights.hexdigest(), tuple(notes))
