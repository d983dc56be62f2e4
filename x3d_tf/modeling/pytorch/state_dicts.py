"""The weights of a network in what a PyTorch checkpoint holds: under which key, prefix and names.

Imports no TensorFlow.

Training programs wrap a network, which puts prefixes before the names of its weights, and store it under a key of their
own, beside optimizers, averages and counters. No list of keys and prefixes is relied on: a reading of the file is
taken where it has the names and shapes of the network, if it is the only one.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from x3d_tf.errors import UserError, require
from x3d_tf.modeling.architecture import plan
from x3d_tf.modeling.expansion import VARIANTS, Expansion, as_expansion, name_of
from x3d_tf.modeling.pytorch.checkpoint_files import Tensor, read_checkpoint
from x3d_tf.modeling.pytorch.weight_names import COUNTER, HEAD, NAMINGS, TITLES, Naming, names, source_shapes

_MOST_READINGS = 32  # of a file that are compared; each goes through all its names
_DEEPEST = 8  # keys that lead to a state dict, one in the other
_CLOSE = 0.1  # part of its tensors that may not fit the variant that a file is said to be closest to


@dataclass(frozen=True)
class StateDict:
    """The weights of one network in a checkpoint.

    Attributes:
        path: the checkpoint.
        place: where in it they are, in words: keys and prefix; "" where they are all that it holds.
        naming: whose names they have.
        tensors: the weights by those names, without the counters.
        counters: how many `num_batches_tracked` there are.
        outside: names of tensors beside the network's, which the prefix tells apart.
    """

    path: Path
    place: str
    naming: Naming
    tensors: Mapping[str, Tensor]
    counters: int
    outside: tuple[str, ...] = ()

    def num_classes(self) -> int | None:
        """Outputs of the classifier, by its bias or else its kernel; None where there is neither."""
        shapes = [self.tensors[name].shape for name in sorted(_head_names(self.naming)) if name in self.tensors]
        return next((shape[0] for shape in shapes if shape and shape[0]), None)

    def misfits(self, expansion: Expansion, *, head: bool) -> list[str]:
        """A line for each tensor that a network lacks, that it does not have or that has another shape.

        Args:
            expansion: the network, with as many classes as the state dict has.
            head: whether the classifier counts.
        """
        expected = source_shapes(expansion, self.naming, self.num_classes() or 1)
        theirs = dict(self.tensors)
        if not head:
            for name in _head_names(self.naming):
                theirs.pop(name, None)
                expected.pop(name, None)
        faults = [f"missing: {name} {shape_text(shape)}" for name, shape in expected.items() if name not in theirs]
        faults += [f"left over: {printable(n)} {shape_text(t.shape)}" for n, t in theirs.items() if n not in expected]
        return faults + [
            f"shape {shape_text(theirs[name].shape)} instead of {shape_text(shape)}: {name}"
            for name, shape in expected.items()
            if name in theirs and theirs[name].shape != shape
        ]

    def wrong_values(self, *, head: bool) -> list[str]:
        """A line for each tensor whose values are no finite real numbers; see `misfits`."""
        kept = (name for name in self.tensors if head or name not in _head_names(self.naming))
        return [fault for name in kept if (fault := _fault(name, self.tensors[name]))]


def read_state_dict(path: str | Path, network: str | Expansion, *, keep_head: bool = True) -> StateDict:
    """Finds the weights of a network in a checkpoint.

    Args:
        path: a file that `torch.save` wrote. Nothing in it is executed.
        network: the variant or expansion that it is of.
        keep_head: whether the classifier counts.

    Raises:
        UserError: not a checkpoint; no names of X3D; another variant (names it); several networks that fit; tensors
            that are missing, left over, of another shape or type or not finite: it lists all of them.
    """
    path, expansion = Path(path), as_expansion(network)
    readings = list(_readings(path, read_checkpoint(path), expansion))
    fitting: list[StateDict] = []
    for reading in readings:
        fits = not reading.misfits(expansion, head=keep_head)
        if fits and not any(_equal(reading, other) for other in fitting):
            fitting.append(reading)
    if len(fitting) > 1:
        places = ", ".join(reading.place or "by itself" for reading in fitting)
        raise UserError(
            f"{path} holds {len(fitting)} different networks that are each {name_of(expansion)}: {places}. Save the "
            'one to import by itself: torch.save({"model_state": STATE_DICT}, "weights.pyth")'
        )
    if not fitting:
        _raise_misfits(readings, expansion, keep_head)
    found = fitting[0]
    faults = found.wrong_values(head=keep_head)
    if faults:
        raise UserError(_listed(found, name_of(expansion), faults))
    return found


def _readings(path: Path, content: Any, expansion: Expansion) -> Iterator[StateDict]:
    """The networks that a file may hold, most tensors with known names first."""
    mappings = list(_mappings(content))
    if not mappings:
        kinds = ", ".join(map(printable, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"{path} holds no state dict, names with a tensor each, by itself or under any key: it has "
            f"{kinds[:200] or 'nothing'}"
        )
    sources = _known_names(expansion)
    votes = Counter(
        {
            (number, prefix, naming): count
            for number, (_, tensors) in enumerate(mappings)
            for (prefix, naming), count in _prefixes(tensors, sources).items()
        }
    )
    if not votes:
        shown = ", ".join(printable(name) for _, tensors in mappings[:1] for name in list(tensors)[:3])
        raise UserError(
            f"{path}: its {sum(len(tensors) for _, tensors in mappings)} tensors have names of no X3D known here "
            f"({', '.join(TITLES.values())}), such as {shown}"
        )
    best = votes.most_common(_MOST_READINGS)
    for (number, prefix, naming), count in best:
        others = tuple(
            longer
            for (where, longer, _), theirs in best
            if where == number and longer != prefix and longer.startswith(prefix) and 10 * theirs >= count
        )
        yield _reading(path, *mappings[number], prefix, naming, others)


def _reading(
    path: Path,
    keys: tuple[str, ...],
    tensors: Mapping[str, Tensor],
    prefix: str,
    naming: Naming,
    others: tuple[str, ...],
) -> StateDict:
    """The tensors below a prefix, but for those below the longer prefixes of other networks."""
    own = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not (others and name.startswith(others))
    }
    weights = {name: tensor for name, tensor in own.items() if not _is_counter(name)}
    outside = [name for name in tensors if name.removeprefix(prefix) not in own or not name.startswith(prefix)]
    place = " > ".join(map(printable, keys))
    if prefix:
        place += f"{', ' if place else ''}names that begin with {printable(prefix)}"
    left = tuple(printable(name) for name in outside if not _is_counter(name))
    return StateDict(path, place, naming, weights, len(own) - len(weights), left)


def _mappings(content: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """The dicts in a file that have tensors under names, each once, with the keys that lead to it."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), content)]
    seen: set[int] = set()
    for keys, value in waiting:  # which grows meanwhile; a file's values may contain each other
        if id(value) in seen or not isinstance(value, dict | list | tuple):
            continue
        seen.add(id(value))
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        tensors = {key: item for key, item in items if isinstance(key, str) and isinstance(item, Tensor)}
        if tensors:
            yield keys, tensors
        items = items if len(keys) < _DEEPEST else []
        waiting += [((*keys, str(key)), item) for key, item in items if not isinstance(item, Tensor)]


def _known_names(expansion: Expansion) -> dict[str, Naming]:
    """The names of a network's weights, and of the deepest variant's, in all implementations."""
    deepest = VARIANTS["x3d_xxl"].expansion
    return {
        name.source: naming
        for naming in NAMINGS
        for network in (deepest, expansion)
        for name in names(plan(network), naming)
    }


def _prefixes(tensors: Mapping[str, Tensor], sources: Mapping[str, Naming]) -> Counter[tuple[str, Naming]]:
    """What stands before known names, and how often: "" where nothing does."""
    longest = max(source.count(".") for source in sources)
    votes: Counter[tuple[str, Naming]] = Counter()
    for name in tensors:
        parts = name.rsplit(".", longest + 1)
        for first in range(len(parts)):
            source = ".".join(parts[first:])
            if source in sources:
                votes[name[: len(name) - len(source)], sources[source]] += 1
    return votes


def _raise_misfits(readings: list[StateDict], expansion: Expansion, keep_head: bool) -> None:
    """Says which variants a checkpoint is of, or what keeps it from being of the given network."""

    def count(reading: StateDict, network: Expansion) -> int:
        return len(reading.misfits(network, head=keep_head))

    reading = min(readings, key=lambda reading: count(reading, expansion))
    faults = reading.misfits(expansion, head=keep_head)
    found, title, given = f"{reading.path}", TITLES[reading.naming], name_of(expansion)
    counts = {name: min(count(r, v.expansion) for r in readings) for name, v in VARIANTS.items()}
    fewest = min(counts.values())
    variants = [name for name, misfits in counts.items() if misfits == fewest]
    rule = f"be {' or '.join(variants)}, which {found} ({title})"
    require(fewest > 0, "network (--variant)", f"{rule} has the names and shapes of", given)
    if fewest < len(faults) and fewest <= _CLOSE * len(reading.tensors):
        closest = VARIANTS[variants[0]].expansion
        best = min(readings, key=lambda reading: count(reading, closest))
        faults = best.misfits(closest, head=keep_head)
        raise UserError(
            f"network (--variant) must {rule} is closest to, got {given!r}; "
            f"{len(faults)} tensors do not fit that either:\n" + "\n".join(faults)
        )
    if fewest > _CLOSE * len(reading.tensors):
        given += f", and it is of none of {', '.join(VARIANTS)}"
    raise UserError(_listed(reading, given, faults + reading.wrong_values(head=keep_head)))


def _listed(reading: StateDict, network: str, faults: list[str]) -> str:
    first = f"{reading.path} has the names of {TITLES[reading.naming]}, and {len(faults)} tensors do not fit {network}:"
    return "\n".join([first, *faults])


def _equal(one: StateDict, other: StateDict) -> bool:
    """Whether two readings give the same weights: a file may name one network twice."""
    if one.naming != other.naming or set(one.tensors) != set(other.tensors):
        return False
    return all(
        tensor is other.tensors[name] or np.array_equal(tensor.array(), other.tensors[name].array())
        for name, tensor in one.tensors.items()
    )


def _fault(name: str, tensor: Tensor) -> str:
    array = tensor.array()
    if array.dtype.kind != "f":
        return f"values of type {tensor.dtype}: {printable(name)}"
    return "" if np.isfinite(array).all() else f"values that are not finite: {printable(name)}"


def _head_names(naming: Naming) -> set[str]:
    return {name.source for name in names(plan(Expansion()), naming) if name.layer == HEAD}


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] == COUNTER


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape for a message: `8x3x1x3x3`."""
    return "x".join(map(str, shape)) or "scalar"


def printable(name: object) -> str:
    """A name out of a file; whatever it holds, a terminal shows it and does not obey it."""
    text = str(name)[:200]
    return text if text.isprintable() else ascii(text)
