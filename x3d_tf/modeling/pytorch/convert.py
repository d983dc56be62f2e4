"""Imports and exports checkpoints of PyTorch implementations, with a report of every weight."""

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

# Head pooling of each implementation.
_HEAD_POOL: dict[Naming, Any] = dict.fromkeys(TITLES, "global") | dict.fromkeys(
    ("slowfast", "pytorchvideo"), "fixed_probabilities"
)
_POOLING_NOTE: dict[Naming, str] = {naming: f", as in {title}" for naming, title in TITLES.items()} | {
    "pytorchvideo": ", the default of pytorchvideo; fixed_logits is equivalent to a model without final softmax",
}
# All other options change the graph.
_EXPORTABLE_OPTIONS = ("shortcut_norm", "head_pool", "bn_group", "drop_connect", "dropout")


@dataclass(frozen=True)
class Row:
    """Names and shapes of a weight in the checkpoint and in the network."""

    source: str
    source_shape: tuple[int, ...]
    target: str
    target_shape: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """Per-tensor report of a weight conversion.

    Attributes:
        path: path of the checkpoint.
        naming: implementation whose names it has.
        sha256: SHA-256 of the file.
        rows: weights that exist in both, in execution order.
        only_in_checkpoint: tensors that only the checkpoint has, without the counters: ignored in an import, or written
            as an identity layer in an export.
        only_in_network: weights that only the network has: initialized in an import, or folded into others in an
            export.
        counters: number of `num_batches_tracked` counters, which are ignored in an import and written as 0.
        weights_sha256: SHA-256 of the values of `rows`, float32 in this package's layout. Equal for equal weights in
            all implementations.
        notes: further information, one sentence each.
    """

    path: str
    naming: Naming
    sha256: str
    rows: tuple[Row, ...]
    only_in_checkpoint: tuple[str, ...]
    only_in_network: tuple[str, ...]
    counters: int
    weights_sha256: str
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.table()}\n{self.summary()}"

    def table(self) -> str:
        """Returns the table of weights, followed by those that only one side has."""
        cells = [
            (row.source, shape_text(row.source_shape), row.target, shape_text(row.target_shape)) for row in self.rows
        ]
        cells.insert(0, (TITLES[self.naming], "shape", "x3d_tf", "shape"))
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
        lines += [f"only in the checkpoint: {name}" for name in self.only_in_checkpoint]
        lines += [f"only in x3d_tf: {name}" for name in self.only_in_network]
        return "\n".join(lines)

    def summary(self) -> str:
        """Returns a few lines: the number of weights, those that only one side has, and the notes."""
        lines = [
            f"{len(self.rows)} tensors converted, with the names of {TITLES[self.naming]}; only in the checkpoint: "
            f"{first_few(self.only_in_checkpoint) or 'none'}; only in x3d_tf: "
            f"{first_few(self.only_in_network) or 'none'}",
            f"{self.counters} {COUNTER} counters, which have no effect on the outputs",
            *self.notes,
            f"SHA-256 of the weights: {self.weights_sha256}",
            f"SHA-256 of {self.path}: {self.sha256}",
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
    """Imports a network from a PyTorch checkpoint. The names in it identify the implementation.

    Args:
        path: a file written by `torch.save` with a state dict, at the top level or under any keys; the names may have a
            prefix. Nothing in the file is executed.
        network: variant or expansion of the checkpoint. XS, S and M have weights of equal names and shapes.
        num_classes: number of outputs of the classifier. Defaults to that of the checkpoint. Required if `keep_head` is
            false; otherwise no other number is valid.
        keep_head: False creates a randomly initialized classifier fc2 with `num_classes` outputs.
        head_pool: see `ModelOptions`. Defaults to that of the implementation: `fixed_probabilities` for PySlowFast and
            pytorchvideo, `global` for the others.

    Returns:
        The network, with the implementation's batch norms on shortcuts and pooling in the head; and the report.

    Raises:
        UserError: see `read_state_dict`; or `num_classes` is missing, or differs from that of the classifier to keep.
    """
    require(keep_head or num_classes is not None, "num_classes", "be set if keep_head is false", num_classes)
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
    """Imports a network from the result of `read_state_dict` for the same network; see `import_checkpoint`."""
    expansion, naming, tensors = as_expansion(network), state.naming, state.tensors
    options = ModelOptions(
        shortcut_norm=SHORTCUT_NORM[naming],
        head_pool=head_pool or _HEAD_POOL[naming],  # type: ignore[arg-type]
    )
    outputs = state.outputs(num_classes) if keep_head else num_classes
    assert outputs is not None  # required without the classifier of the checkpoint
    model = X3D(expansion, outputs, options)
    pairs = [(name, weight) for name, weight in _named_weights(model, naming) if keep_head or name.layer != HEAD]
    for name, weight in pairs:
        weight.assign(to_ours(tensors[name.source].array(), name.kind))
    notes = [f"found under {state.location}"] if state.location else []
    notes += [f"head: {options.head_pool} pooling" + ("" if head_pool else _POOLING_NOTE.get(naming, ""))]
    rounded = sorted({tensors[name.source].dtype for name, _ in pairs} - {"float32"})
    notes += [f"values of type {', '.join(rounded)} were converted to float32"] if rounded else []
    notes += [] if keep_head else [f"{HEAD} is randomly initialized: predictions are meaningless until it is trained"]
    notes.append(_describe_clips(expansion))
    only_in_network = (
        () if keep_head else tuple(name.target for name in names(plan(expansion), naming) if name.layer == HEAD)
    )
    converted = {name.source for name, _ in pairs}
    only_in_checkpoint = (*(name for name in tensors if name not in converted), *state.unrelated)
    return model, _make_report(state.path, naming, pairs, only_in_checkpoint, only_in_network, state.counters, notes)


def export_checkpoint(model: X3D, path: str | Path, naming: Naming) -> Report:
    """Writes the weights of a network as a PyTorch checkpoint `{"model_state": state_dict}`.

    If only one side has a batch norm on the shortcut of res2, it is folded into the adjacent weights, or an identity
    batch norm is written. This preserves the outputs in evaluation only.

    Args:
        model: the network, with its classifier.
        path: output file. An existing file is replaced.
        naming: implementation that will load the file.

    Raises:
        UserError: the network has no classifier, or options that the implementation does not support.
        WriteError: the file cannot be written.
    """
    path = Path(path)
    require(naming in get_args(Naming), "naming", f"be one of {', '.join(get_args(Naming))}", naming)
    require(model.include_top, "the network to export", "have its classifier (include_top)", model.include_top)
    _require_exportable_options(model.options)
    options = replace(model.options, shortcut_norm=SHORTCUT_NORM[naming])
    values = {f"{layer}/{weight.name}": np.asarray(weight) for layer, weight in _iter_weights(model)}
    notes = _match_shortcut_norms(values, model, options, naming)
    if options.head_pool != _HEAD_POOL[naming]:
        notes.append(
            f"{TITLES[naming]} uses {_HEAD_POOL[naming]} pooling in the head, this network {options.head_pool}: "
            "outputs differ for clips larger than the training crop"
        )
    pairs = [(name, values[name.target]) for name in names(plan(model.expansion, options), naming)]
    targets = [name.target for name in names(plan(model.expansion, model.options), naming)]
    state: dict[str, np.ndarray] = {}
    for name, value in pairs:
        state[name.source] = to_source(value.astype(np.float32), name.kind)
        if name.weight == "moving_variance":
            state[name.source.removesuffix("running_var") + COUNTER] = np.zeros((), np.int64)
    write_checkpoint(path, state)
    common = [(name, value) for name, value in pairs if name.target in set(targets)]
    only_in_checkpoint = tuple(name.source for name, _ in pairs if name.target not in set(targets))
    only_in_network = tuple(target for target in targets if target not in values)
    return _make_report(path, naming, common, only_in_checkpoint, only_in_network, len(state) - len(pairs), notes)


def _iter_weights(model: X3D) -> Iterator[tuple[str, keras.Variable]]:
    for layer in model.layers:
        for weight in layer.weights:
            if "seed_generator" not in weight.path:
                yield layer.name, weight


def _named_weights(model: X3D, naming: Naming) -> list[tuple[WeightName, keras.Variable]]:
    """Pairs every weight of a network with its names. The table must have exactly the weights of the network."""
    weights = {f"{layer}/{weight.name}": weight for layer, weight in _iter_weights(model)}
    pairs = [(name, weights.pop(name.target)) for name in names(plan(model.expansion, model.options), naming)]
    assert not weights, f"weights without a name in the table: {list(weights)}"
    return pairs


def _describe_clips(expansion: Expansion) -> str:
    """Describes the input clips, which the weights do not determine, and lists variants that differ in them alone."""
    clip, widths = expansion.clip, ("gamma_w", "gamma_b", "gamma_d")
    variants = [
        variant.name
        for variant in VARIANTS.values()
        if all(getattr(variant.expansion, name) == getattr(expansion, name) for name in widths)
    ]
    text = f"input clips: {clip.frames} frames of {clip.size} x {clip.size} pixels, stride {clip.stride:g} at 30 fps"
    if len(variants) < 2:
        return text
    return f"{text}; the file does not record the variant: {', '.join(variants)} have equal names and shapes"


def _require_exportable_options(options: ModelOptions) -> None:
    default = ModelOptions()
    for name, value in vars(options).items():
        is_exportable = name in _EXPORTABLE_OPTIONS or value == getattr(default, name)
        rule = f"be {getattr(default, name)!r} for export: other implementations support no other value"
        require(is_exportable, f"ModelOptions.{name}", rule, value)


def _match_shortcut_norms(
    values: dict[str, np.ndarray], model: X3D, options: ModelOptions, naming: Naming
) -> list[str]:
    """Changes the weights in place so that the shortcut of res2 matches `options`, and returns notes about it."""
    current = {name.target for name in names(plan(model.expansion, model.options), naming)}
    required = {name.target for name in names(plan(model.expansion, options), naming)}
    notes = []
    for layer in dict.fromkeys(target.rpartition("/")[0] for target in sorted(current ^ required)):
        block = layer.removesuffix("_shortcut_bn")
        epsilon = model.get_layer(f"{block}_conv_c_bn").epsilon
        if layer in {target.rpartition("/")[0] for target in current}:
            _fold_shortcut_norm(values, block, epsilon)
            change = f"{layer} is folded into {block}_shortcut and {block}_conv_c_bn"
        else:
            width = len(values[f"{block}_conv_c_bn/gamma"])
            values |= {f"{layer}/{name}": np.zeros(width) for name in ("beta", "moving_mean")}
            values |= {
                f"{layer}/moving_variance": np.ones(width),
                f"{layer}/gamma": np.full(width, (1 + epsilon) ** 0.5),
            }
            change = f"{layer} does not exist in this network and is written as an identity"
        notes.append(f"{change}: outputs are equal in evaluation only, and further training differs")
    return notes


def _fold_shortcut_norm(values: dict[str, np.ndarray], block: str, epsilon: float) -> None:
    """Removes the batch norm of a block's shortcut: scales the convolution and shifts the block's last batch norm."""
    norm = {name: values.pop(f"{block}_shortcut_bn/{name}").astype(np.float64) for name in _NORM_WEIGHTS}
    scale = norm["gamma"] / np.sqrt(norm["moving_variance"] + epsilon)
    values[f"{block}_shortcut/kernel"] = values[f"{block}_shortcut/kernel"] * scale
    values[f"{block}_conv_c_bn/beta"] = values[f"{block}_conv_c_bn/beta"] + norm["beta"] - norm["moving_mean"] * scale


_NORM_WEIGHTS = ("gamma", "beta", "moving_mean", "moving_variance")


def _make_report(
    path: Path,
    naming: Naming,
    pairs: Iterable[tuple[WeightName, Any]],
    only_in_checkpoint: tuple[str, ...],
    only_in_network: tuple[str, ...],
    counters: int,
    notes: list[str],
) -> Report:
    rows, weights_hash = [], hashlib.sha256()
    for name, weight in pairs:
        value = np.asarray(weight, np.float32)
        rows.append(Row(name.source, source_shape(value.shape, name.kind), name.target, value.shape))
        weights_hash.update(name.target.encode() + np.ascontiguousarray(value).tobytes())
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Report(
        str(path),
        naming,
        digest,
        tuple(rows),
        only_in_checkpoint,
        only_in_network,
        counters,
        weights_hash.hexdigest(),
        tuple(notes),
    )
