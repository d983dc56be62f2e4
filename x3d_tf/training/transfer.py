"""Starting a run from the weights of another."""

from dataclasses import dataclass
from pathlib import Path

from x3d_tf.errors import UserError
from x3d_tf.modeling.architecture import plan
from x3d_tf.modeling.saving import load
from x3d_tf.modeling.x3d import Network

_HEAD = ("conv5", "fc")  # how the names of layers begin that a head may lack


@dataclass(frozen=True)
class Transfer:
    """Which layers of a network have weights of another now, and which are as they were.

    Attributes:
        source: where the other network was read from.
        taken, new: names of layers.
        head_pools: of the other network and of this one, where they differ.
    """

    source: str
    taken: tuple[str, ...]
    new: tuple[str, ...]
    head_pools: tuple[str, str] | None = None

    def __str__(self) -> str:
        new = ", ".join(self.new) if self.new else "nothing"
        text = (
            f"weights of {self.source}: {len(self.taken)} layers taken, {self.taken[0]} to {self.taken[-1]}; new: {new}"
        )
        if self.head_pools:
            text += "\nModelOptions.head_pool, which larger clips in testing depend on, is {} there and {} here".format(
                *self.head_pools
            )
        return text


def load_pretrained(model: Network, source: str | Path) -> Transfer:
    """Copies the weights of a run or a model file into a network, all that fit its classes.

    Clip size, frames and stride may differ: no weight depends on them. The classifier fc2 is taken only where the class
    names are the same. A detector starts from a classifier or a detector, whatever their heads.

    Args:
        model: with `class_names`.
        source: a run folder or a `.keras` file of this package.

    Raises:
        UserError: no such file, or a network of other widths or depths (names the layers that do not fit), or one that
            takes other input or has other activations.
    """
    other = load(source)
    theirs = {layer.name: layer for layer in other.layers if layer.weights}
    same_head = getattr(other, "head", None) == getattr(model, "head", None)  # of detectors
    if not model.class_names or other.class_names != model.class_names or not same_head:
        theirs.pop("fc2", None)
    ours = {layer.name: layer for layer in model.layers if layer.weights}
    new = [name for name in ours if name not in theirs and name.startswith(_HEAD)]
    _raise_misfits(model, other, str(source), [name for name in ours if name not in new])
    taken = [name for name in ours if name not in new]
    for name in taken:
        for target, weight in zip(ours[name].weights, theirs[name].weights):
            target.assign(weight)
    pools = (other.options.head_pool, model.options.head_pool)
    return Transfer(str(source), tuple(taken), tuple(new), pools if pools[0] != pools[1] else None)


def _raise_misfits(model: Network, other: Network, source: str, wanted: list[str]) -> None:
    for name in ("input", "swish", "swish_before", "shortcut_norm"):  # of which no shape tells, or not plainly
        there, here = getattr(other.options, name), getattr(model.options, name)
        if there != here:
            value = f'"{there}"' if isinstance(there, str) else there
            raise UserError(
                f"TrainConfig.init: {source} was trained with ModelOptions.{name} = {there!r}, "
                f"and here it is {here!r}; set it with --gin_bindings='ModelOptions.{name}={value}'"
            )
    ours, theirs = _shapes(model), _shapes(other)
    misfits = [name for name in wanted if ours[name] != theirs.get(name)]
    misfits += [name for name in theirs if name not in ours and not name.startswith(_HEAD)]
    if misfits:
        raise UserError(
            f"TrainConfig.init: {source} is of another network: {len(misfits)} layers do not fit, the first is "
            f"{misfits[0]}. Blocks x channels of its stages are {_stages(other)} there and {_stages(model)} here "
            "(Expansion.gamma_w, gamma_b and gamma_d and ModelOptions decide them)"
        )


def _shapes(network: Network) -> dict[str, list[tuple[int, ...]]]:
    return {layer.name: [tuple(w.shape) for w in layer.weights] for layer in network.layers if layer.weights}


def _stages(network: Network) -> str:
    stages = plan(network.expansion, network.options).stages
    return ", ".join(f"{stage.depth}x{stage.width} ({stage.inner_width} inside)" for stage in stages)
