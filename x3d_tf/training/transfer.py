"""Transfer learning: initialises a network with the weights of another one."""

from dataclasses import dataclass
from pathlib import Path

from x3d_tf.modeling.saving import load
from x3d_tf.modeling.x3d import Network
from x3d_tf.training.checks import require_compatible

_HEAD = ("conv5", "fc")  # name prefixes of the layers that some heads lack


@dataclass(frozen=True)
class Transfer:
    """Report of a weight transfer.

    Attributes:
        source: path of the source network.
        loaded: names of the layers whose weights were copied.
        new: names of the layers that keep their initial weights.
        head_pools: `ModelOptions.head_pool` of the source and of the target network if they differ, else None.
    """

    source: str
    loaded: tuple[str, ...]
    new: tuple[str, ...]
    head_pools: tuple[str, str] | None = None

    def __str__(self) -> str:
        new = ", ".join(self.new) if self.new else "none"
        text = (
            f"Loaded {len(self.loaded)} layers from {self.source}, {self.loaded[0]} to {self.loaded[-1]}; "
            f"newly initialised: {new}"
        )
        if self.head_pools:
            text += (
                "\nwarning: ModelOptions.head_pool is {!r} in the source and {!r} in this network; "
                "evaluation on crops larger than the training clips differs"
            ).format(*self.head_pools)
        return text


def load_pretrained(model: Network, source: str | Path) -> Transfer:
    """Copies the weights of a run or a model file into a network.

    Clip size, frames and stride may differ, because no weight depends on them. The classifier fc2 is copied only if the
    class names are equal. A network with another head can be the source too.

    Args:
        model: the target network, with its `class_names` set.
        source: a run folder or a `.keras` file of this package.

    Raises:
        UserError: the file does not exist, or its network has another width, depth, input or activation.
    """
    other = load(source)
    require_compatible(source, (other.expansion, other.options), (model.expansion, model.options))
    source_layers = {layer.name: layer for layer in other.layers if layer.weights}
    if not model.class_names or other.class_names != model.class_names or other.head != model.head:
        source_layers.pop("fc2", None)
    target_layers = {layer.name: layer for layer in model.layers if layer.weights}
    new = [name for name in target_layers if name not in source_layers and name.startswith(_HEAD)]
    loaded = [name for name in target_layers if name not in new]
    for name in loaded:
        for target, weight in zip(target_layers[name].weights, source_layers[name].weights):
            target.assign(weight)
    pools = (other.options.head_pool, model.options.head_pool)
    return Transfer(str(source), tuple(loaded), tuple(new), pools if pools[0] != pools[1] else None)
