"""pytorchvideo's X3D with deterministic weights. Requires torch and pytorchvideo, so tests import it lazily.

pytorchvideo 0.1.5 imports torchvision for detection, which X3D does not use. An empty stub replaces torchvision,
because it is a large package tied to a single version of torch.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from recipe import recipe_weight

from x3d_tf.modeling.architecture import ModelOptions, plan
from x3d_tf.modeling.expansion import Expansion, as_expansion
from x3d_tf.modeling.pytorch.weight_names import Naming, WeightName, names

if TYPE_CHECKING:
    from x3d_tf import X3D


def _import() -> tuple[Any, Any]:
    stubs: dict[str, Any] = {name: ModuleType(name) for name in ("torchvision", "torchvision.ops")}
    stubs["torchvision.ops"].RoIAlign = None
    replaced = {name: sys.modules[name] for name in stubs if name in sys.modules}
    sys.modules.update(stubs)
    try:
        from pytorchvideo.models import x3d
        from pytorchvideo.models.accelerator.mobile_cpu import efficient_x3d
    finally:
        for name in stubs:
            del sys.modules[name]
        sys.modules.update(replaced)
    return x3d, efficient_x3d


x3d, efficient_x3d = _import()

# XS to M as published by pytorchvideo, L with the depth in its builder's documentation, XL with the paper's width.
SETTINGS: dict[str, dict[str, Any]] = {
    "x3d_xs": {"input_clip_length": 4, "input_crop_size": 160},
    "x3d_s": {"input_clip_length": 13, "input_crop_size": 160},
    "x3d_m": {"input_clip_length": 16, "input_crop_size": 224},
    "x3d_l": {"input_clip_length": 16, "input_crop_size": 312, "depth_factor": 5.0},
    "x3d_xl": {"input_clip_length": 16, "input_crop_size": 312, "depth_factor": 5.0, "width_factor": 2.9},
}


@dataclass(frozen=True)
class Reference:
    """A pytorchvideo network in evaluation mode.

    Attributes:
        network: our equivalent network.
        naming: naming scheme of the weights.
        model: the module, from normalised clips (N, 3, T, H, W) to logits, or to probabilities if so configured.
        stages: modules by the name that their output has in our networks.
    """

    network: str | Expansion
    naming: Naming
    model: Any
    stages: dict[str, Any]

    def __call__(self, clips: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the outputs of all stages, channels last, and the `logits` for RGB clips (N, T, H, W, 3)."""
        outputs: dict[str, np.ndarray] = {}

        def keep(stage: str) -> Any:
            return lambda module, inputs, output: outputs.update({stage: output.permute(0, 2, 3, 4, 1).numpy()})

        hooks = [module.register_forward_hook(keep(stage)) for stage, module in self.stages.items()]
        with torch.no_grad():
            outputs["logits"] = self.model(self.normalized(clips)).numpy()
        for hook in hooks:
            hook.remove()
        return outputs

    def train(self, clips: np.ndarray, labels: np.ndarray, rates: Sequence[float], l2: float) -> dict[str, np.ndarray]:
        """Trains with Nesterov momentum on one batch; `l2` does not apply to batch norm.

        Returns:
            The gradients of the first step by name.
        """
        descent = optimizer(self.model, rates[0], l2)
        gradients: dict[str, np.ndarray] = {}
        self.model.train()
        for rate in rates:
            for group in descent.param_groups:
                group["lr"] = rate
            descent.zero_grad()
            logits = self.model(self.normalized(clips))
            torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
            gradients = gradients or {n: p.grad.numpy().copy() for n, p in self.model.named_parameters()}
            descent.step()
        self.model.eval()
        return gradients

    def state(self) -> dict[str, np.ndarray]:
        """Returns copies of the current weights and statistics by name."""
        return {name: tensor.numpy().copy() for name, tensor in self.model.state_dict().items()}

    def load(self, path: Path) -> None:
        """Loads the weights of a file with strict=True."""
        self.model.load_state_dict(torch.load(path, weights_only=True)["model_state"], strict=True)

    def normalized(self, clips: np.ndarray) -> Any:
        """Returns clips normalised as in pytorchvideo's recipes."""
        dtype = next(self.model.parameters()).dtype
        return torch.from_numpy((clips / 255 - 0.45) / 0.225).permute(0, 4, 1, 2, 3).to(dtype)


def optimizer(model: Any, rate: float, l2: float) -> Any:
    """Returns SGD with Nesterov momentum 0.9; `l2` does not apply to batch norm."""
    modules = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm3d)]
    norms = [parameter for module in modules for parameter in module.parameters()]
    others = list(set(model.parameters()) - set(norms))
    return torch.optim.SGD(
        [{"params": norms}, {"params": others, "weight_decay": l2}], rate, momentum=0.9, nesterov=True
    )


def standard(
    name: str,
    *,
    clip: tuple[int, int] | None = None,
    num_classes: int = 400,
    softmax: bool = False,
    double: bool = False,
) -> Reference:
    """Returns a network of `SETTINGS` without dropout.

    Args:
        name: name of the network.
        clip: frames and pixels of the clips, to replace those of the network.
        num_classes: number of classifier outputs.
        softmax: keep pytorchvideo's final softmax.
        double: use float64 instead of float32.
    """
    settings, network = SETTINGS[name], as_expansion(name)
    if clip is not None:
        settings = settings | {"input_clip_length": clip[0], "input_crop_size": clip[1]}
        network = replace(network, gamma_t=clip[0], gamma_s=clip[1] / 112)
    if not softmax:
        settings = settings | {"head_activation": None}
    model = x3d.create_x3d(**settings, model_num_class=num_classes, dropout_rate=0.0)
    stages = dict(zip(("conv1", "res2", "res3", "res4", "res5"), model.blocks))
    reference = Reference(network, "pytorchvideo", model, stages | {"conv5": model.blocks[5].pool.pre_act})
    return _with_recipe_weights(reference, double)


def mobile(name: str, *, num_classes: int = 400, double: bool = False) -> Reference:
    """Returns the mobile form of XS to L, which has batch norm in every shortcut and global pooling."""
    expansion = name.removeprefix("x3d_").upper()
    model = efficient_x3d.create_x3d(expansion=expansion, num_classes=num_classes, dropout=0.0)
    stages = dict(zip(("conv1", "res2", "res3", "res4", "res5"), (model.s1, model.s2, model.s3, model.s4, model.s5)))
    reference = Reference(name, "pytorchvideo_mobile", model, stages | {"conv5": model.head.conv_5})
    return _with_recipe_weights(reference, double)


def named(reference: Reference) -> list[tuple[WeightName, WeightName]]:
    """Returns for each weight its names in PySlowFast, on which its values depend, and in the reference."""
    options = ModelOptions(shortcut_norm="on_width_change" if reference.naming == "pytorchvideo" else "always")
    architecture = plan(as_expansion(reference.network), options)
    return list(zip(names(architecture, "slowfast"), names(architecture, reference.naming), strict=True))


def _with_recipe_weights(reference: Reference, double: bool) -> Reference:
    """Sets the weights that our table of names lists, which must be all weights, and returns the reference."""
    model = reference.model.eval().to(torch.float64 if double else torch.float32)
    fresh = model.state_dict()
    state = {key: tensor for key, tensor in fresh.items() if key.endswith(".num_batches_tracked")}
    for recipe, name in named(reference):
        state[name.source] = torch.from_numpy(recipe_weight(recipe.source, tuple(fresh[name.source].shape)))
    model.load_state_dict(state, strict=True)
    return reference


def imported(reference: Reference, folder: Path, head_pool: str) -> "X3D":
    """Imports all weights of the reference into our network through a file."""
    from x3d_tf.modeling.pytorch.convert import import_checkpoint

    path = folder / "reference.pyth"
    torch.save({"model_state": reference.model.state_dict()}, path)
    model, report = import_checkpoint(path, reference.network, head_pool=head_pool)
    assert (report.naming, report.only_in_checkpoint, report.only_in_network) == (reference.naming, (), ())
    return model
