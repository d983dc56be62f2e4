"""Finds the weights of a network in a PyTorch checkpoint: their key, their prefix and the implementation's names.

Imports no TensorFlow.

Training code often wraps a network, which adds a prefix to the names of its weights, and stores it under a custom key
together with optimizer state, moving averages and counters. The search does not rely on a list of keys and prefixes: it
accepts the candidate whose names and shapes match the network, provided that there is only one.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from x3d_tf.errors import UserError, first_few, require
from x3d_tf.modeling.architecture import plan
from x3d_tf.modeling.expansion import VARIANTS, Expansion, as_expansion, name_of
from x3d_tf.modeling.pytorch.checkpoint_files import Tensor, read_checkpoint
from x3d_tf.modeling.pytorch.weight_names import COUNTER, HEAD, NAMINGS, TITLES, Naming, names, source_shapes
from x3d_tf.text import counted

_MAX_CANDIDATES = 32  # compared per file; each scans all names of the file
_MAX_DEPTH = 8  # nesting depth of a state dict
_MAX_MISMATCH = 0.1  # maximum fraction of mismatched tensors for a variant to be suggested


class MismatchError(UserError):
    """A checkpoint without the weights of the requested network.

    Attributes:
        mismatches: a line for each tensor that is missing, unexpected or invalid. The message has the first ten.
    """

    def __init__(self, message: str, mismatches: Sequence[str]) -> None:
        super().__init__(f"{message}: {first_few(mismatches, '; ')}")
        self.mismatches = tuple(mismatches)


@dataclass(frozen=True)
class StateDict:
    """The weights of one network in a checkpoint.

    Attributes:
        path: path of the checkpoint.
        location: keys and prefix that lead to the weights, as text; "" for the top level without prefix.
        naming: implementation whose names the weights have.
        tensors: the weights by name, without the counters.
        counters: number of `num_batches_tracked` counters.
        unrelated: names of further tensors, which the prefix separates from the network's.
    """

    path: Path
    location: str
    naming: Naming
    tensors: Mapping[str, Tensor]
    counters: int
    unrelated: tuple[str, ...] = ()

    def num_classes(self) -> int | None:
        """Returns the number of outputs of the classifier, from its bias or kernel; None if both are missing."""
        shapes = [self.tensors[name].shape for name in sorted(_head_names(self.naming)) if name in self.tensors]
        return next((shape[0] for shape in shapes if shape and shape[0]), None)

    def outputs(self, requested: int | None) -> int:
        """Returns the number of outputs of a network that keeps the classifier.

        Raises:
            UserError: another number is requested.
        """
        count = self.num_classes()
        assert count is not None  # `read_state_dict` found a classifier
        source = f"the number of outputs of the classifier in {self.path}"
        rule = f"be {count}, {source}, unless the classifier is replaced (keep_head=false)"
        require(requested in (None, count), "num_classes", rule, requested)
        return count

    def mismatches(self, expansion: Expansion, *, head: bool) -> list[str]:
        """Returns a line for each missing tensor, unexpected tensor and tensor of another shape.

        Args:
            expansion: the network to compare with, with the number of classes of the state dict.
            head: whether to compare the classifier.
        """
        expected = source_shapes(expansion, self.naming, self.num_classes() or 1)
        actual = dict(self.tensors)
        if not head:
            for name in _head_names(self.naming):
                actual.pop(name, None)
                expected.pop(name, None)
        errors = [f"missing: {name} {shape_text(shape)}" for name, shape in expected.items() if name not in actual]
        errors += [f"unexpected: {printable(n)} {shape_text(t.shape)}" for n, t in actual.items() if n not in expected]
        return errors + [
            f"shape {shape_text(actual[name].shape)}, expected {shape_text(shape)}: {name}"
            for name, shape in expected.items()
            if name in actual and actual[name].shape != shape
        ]

    def invalid_values(self, *, head: bool) -> list[str]:
        """Returns a line for each tensor with values that are not finite floats; see `mismatches`."""
        compared = (name for name in self.tensors if head or name not in _head_names(self.naming))
        return [error for name in compared if (error := _value_error(name, self.tensors[name]))]


def read_state_dict(path: str | Path, network: str | Expansion, *, keep_head: bool = True) -> StateDict:
    """Finds the weights of a network in a checkpoint.

    Args:
        path: a file written by `torch.save`. Nothing in it is executed.
        network: variant or expansion of the network.
        keep_head: whether the classifier must match too.

    Raises:
        UserError: the file is not a checkpoint; it has no names of a known X3D implementation; it holds another
            variant, which the message names; or several networks match.
        MismatchError: tensors are missing, unexpected, not finite, or of another shape or type.
    """
    path, expansion = Path(path), as_expansion(network)
    candidates = list(_candidates(path, read_checkpoint(path), expansion))
    matches: list[StateDict] = []
    for candidate in candidates:
        is_match = not candidate.mismatches(expansion, head=keep_head)
        if is_match and not any(_equal(candidate, other) for other in matches):
            matches.append(candidate)
    if len(matches) > 1:
        locations = ", ".join(candidate.location or "top level" for candidate in matches)
        raise UserError(
            f"{path} contains {len(matches)} different networks that match {name_of(expansion)}: {locations}. Save "
            'only the one to import: torch.save({"model_state": STATE_DICT}, "weights.pyth")'
        )
    if not matches:
        _raise_mismatch(candidates, expansion, keep_head)
    found = matches[0]
    errors = found.invalid_values(head=keep_head)
    if errors:
        raise _mismatch_error(found, name_of(expansion), errors)
    return found


def _candidates(path: Path, content: Any, expansion: Expansion) -> Iterator[StateDict]:
    """Yields the networks that a file may hold, in descending order of the number of tensors with known names."""
    mappings = list(_mappings(content))
    if not mappings:
        raise UserError(
            f"{path} must contain a state dict, a mapping from names to tensors, at the top level or under a key, but "
            f"{_describe_content(content)}"
        )
    sources = _namings_by_source(expansion)
    votes = Counter(
        {
            (number, prefix, naming): count
            for number, (_, tensors) in enumerate(mappings)
            for (prefix, naming), count in _prefixes(tensors, sources).items()
        }
    )
    if not votes:
        examples = ", ".join(printable(name) for _, tensors in mappings[:1] for name in list(tensors)[:3])
        raise UserError(
            f"{path}: its {sum(len(tensors) for _, tensors in mappings)} tensors have names of no known X3D "
            f"implementation ({', '.join(TITLES.values())}), for example {examples}"
        )
    best = votes.most_common(_MAX_CANDIDATES)
    for (number, prefix, naming), count in best:
        nested = tuple(
            longer
            for (mapping, longer, _), other_count in best
            if mapping == number and longer != prefix and longer.startswith(prefix) and 10 * other_count >= count
        )
        yield _candidate(path, *mappings[number], prefix, naming, nested)


def _describe_content(content: Any) -> str:
    """Returns what a file without a state dict holds, which follows "but" in a message."""
    if not isinstance(content, dict):
        return f"it holds a value of type {type(content).__name__}"
    keys = first_few([printable(key) for key in content])
    return f"no key of it holds one; its keys are: {keys}" if keys else "it is empty"


def _candidate(
    path: Path,
    keys: tuple[str, ...],
    tensors: Mapping[str, Tensor],
    prefix: str,
    naming: Naming,
    nested: tuple[str, ...],
) -> StateDict:
    """Returns the tensors below a prefix, without those below the longer prefixes of other networks."""
    selected = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not (nested and name.startswith(nested))
    }
    weights = {name: tensor for name, tensor in selected.items() if not _is_counter(name)}
    unrelated = [name for name in tensors if name.removeprefix(prefix) not in selected or not name.startswith(prefix)]
    location = " > ".join(map(printable, keys))
    if prefix:
        location += f"{', ' if location else ''}names with prefix {printable(prefix)}"
    unrelated_names = tuple(printable(name) for name in unrelated if not _is_counter(name))
    return StateDict(path, location, naming, weights, len(selected) - len(weights), unrelated_names)


def _mappings(content: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yields each dict in a file that maps names to tensors, once, with the keys that lead to it."""
    pending: list[tuple[tuple[str, ...], Any]] = [((), content)]
    visited: set[int] = set()
    for keys, value in pending:  # grows during the loop; values may contain each other
        if id(value) in visited or not isinstance(value, dict | list | tuple):
            continue
        visited.add(id(value))
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        tensors = {key: item for key, item in items if isinstance(key, str) and isinstance(item, Tensor)}
        if tensors:
            yield keys, tensors
        items = items if len(keys) < _MAX_DEPTH else []
        pending += [((*keys, str(key)), item) for key, item in items if not isinstance(item, Tensor)]


def _namings_by_source(expansion: Expansion) -> dict[str, Naming]:
    """Returns the implementation for each known name: all weights of the network and of the deepest variant."""
    deepest = VARIANTS["x3d_xxl"].expansion
    return {
        name.source: naming
        for naming in NAMINGS
        for network in (deepest, expansion)
        for name in names(plan(network), naming)
    }


def _prefixes(tensors: Mapping[str, Tensor], sources: Mapping[str, Naming]) -> Counter[tuple[str, Naming]]:
    """Counts the prefixes before known names, by implementation; "" for names without prefix."""
    longest = max(source.count(".") for source in sources)
    votes: Counter[tuple[str, Naming]] = Counter()
    for name in tensors:
        parts = name.rsplit(".", longest + 1)
        for first in range(len(parts)):
            source = ".".join(parts[first:])
            if source in sources:
                votes[name[: len(name) - len(source)], sources[source]] += 1
    return votes


def _raise_mismatch(candidates: list[StateDict], expansion: Expansion, keep_head: bool) -> None:
    """Raises an error that names the matching variants, or else lists the mismatches with the requested network."""

    def count(candidate: StateDict, network: Expansion) -> int:
        return len(candidate.mismatches(network, head=keep_head))

    candidate = min(candidates, key=lambda candidate: count(candidate, expansion))
    errors = candidate.mismatches(expansion, head=keep_head)
    source, requested = f"{candidate.path} ({TITLES[candidate.naming]})", name_of(expansion)
    counts = {name: min(count(c, v.expansion) for c in candidates) for name, v in VARIANTS.items()}
    fewest = min(counts.values())
    variants = [name for name, mismatches in counts.items() if mismatches == fewest]
    rule = f"be {' or '.join(variants)}"
    require(fewest > 0, "network (--variant)", f"{rule} to match the names and shapes in {source}", requested)
    if fewest < len(errors) and fewest <= _MAX_MISMATCH * len(candidate.tensors):
        closest = VARIANTS[variants[0]].expansion
        best = min(candidates, key=lambda candidate: count(candidate, closest))
        errors = best.mismatches(closest, head=keep_head)
        raise MismatchError(
            f"network (--variant) must {rule}, the closest match for {source}, got {requested!r}; "
            f"{counted(len(errors), 'mismatch')} with {variants[0]}",
            errors,
        )
    if fewest > _MAX_MISMATCH * len(candidate.tensors):
        requested = f"{requested} or another variant ({', '.join(name for name in VARIANTS if name != requested)})"
    raise _mismatch_error(candidate, requested, errors + candidate.invalid_values(head=keep_head))


def _mismatch_error(candidate: StateDict, network: str, errors: list[str]) -> MismatchError:
    source = f"{candidate.path} ({TITLES[candidate.naming]})"
    return MismatchError(f"{source} must match {network}, but has {counted(len(errors), 'mismatch')}", errors)


def _equal(one: StateDict, other: StateDict) -> bool:
    """Returns whether two candidates have equal weights; a file may contain a network twice."""
    if one.naming != other.naming or set(one.tensors) != set(other.tensors):
        return False
    return all(
        tensor is other.tensors[name] or np.array_equal(tensor.array(), other.tensors[name].array())
        for name, tensor in one.tensors.items()
    )


def _value_error(name: str, tensor: Tensor) -> str:
    array = tensor.array()
    if array.dtype.kind != "f":
        return f"values of type {tensor.dtype}: {printable(name)}"
    return "" if np.isfinite(array).all() else f"values that are not finite: {printable(name)}"


def _head_names(naming: Naming) -> set[str]:
    return {name.source for name in names(plan(Expansion()), naming) if name.layer == HEAD}


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] == COUNTER


def shape_text(shape: tuple[int, ...]) -> str:
    """Formats a shape for a message: `8x3x1x3x3`."""
    return "x".join(map(str, shape)) or "scalar"


def printable(name: object) -> str:
    """Formats a name from a file for a terminal, with control characters escaped."""
    text = str(name)[:200]
    return text if text.isprintable() else ascii(text)
