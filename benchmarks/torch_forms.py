"""pytorchvideo's X3D under PyTorch, to predict and to train. Each maker gets a case and gives the call to measure.

Its networks and their settings are those that the tests compare ours with. Clips are in the model's memory format
before anything is timed.
"""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._inductor.config
from clips import normalized, squares
from measuring import Case
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import pytorchvideo_models

from x3d_tf.errors import require

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def network(name: str) -> Any:
    """The module, in evaluation mode, to logits; its weights are none of a fresh network."""
    known = pytorchvideo_models.SETTINGS
    require(name in known, "the network", f"be one that pytorchvideo has, {', '.join(known)}", name)
    model = pytorchvideo_models.standard(name).model
    for module in model.modules():
        if isinstance(module, torch.nn.AvgPool3d):  # NumPy's integers, at which torch.compile gives up
            module.kernel_size = tuple(int(size) for size in module.kernel_size)
    # so that classes differ, and with them what forms compute
    torch.nn.init.normal_(model.blocks[5].proj.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return model


def _prepared(case: Case, layout: str, compiled: bool, training: bool = False) -> tuple[Any, Any]:
    """Module and clips in a memory format."""
    torch.set_flush_denormal(True)  # as TensorFlow does
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    memory_format = getattr(torch, layout)
    model = network(case.network).to(memory_format=memory_format).train(training)
    clips = torch.from_numpy(normalized(squares(case.network, case.batch))).contiguous(memory_format=memory_format)
    # not dynamic: where several networks are compiled, torch may take what differs for what varies
    return torch.compile(model, dynamic=False) if compiled else model, clips


def _arithmetic(precision: str) -> Any:
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype=PRECISIONS[precision])


def predict(
    case: Case,
    *,
    layout: str = "contiguous_format",
    compiled: bool = False,
    frozen: bool = False,
    precision: str = "float32",
) -> Callable[[], NDArray[np.float32]]:
    """A mode of PyTorch's.

    Args:
        case: what to compute.
        layout: "contiguous_format" or "channels_last_3d".
        compiled: by torch.compile.
        frozen: its weights compiled in as constants, so that batch norms are folded.
        precision: a key of `PRECISIONS`; by autocast.
    """
    model, clips = _prepared(case, layout, compiled)

    def call() -> NDArray[np.float32]:
        with torch.inference_mode(), _arithmetic(precision):
            return torch.softmax(model(clips).float(), dim=1).numpy()

    if frozen:
        with torch._inductor.config.patch(freezing=True):  # no argument of torch.compile's reaches all who ask
            call()
    return call


def train(
    case: Case, *, layout: str = "contiguous_format", compiled: bool = False, precision: str = "float32"
) -> Callable[[], float]:
    """A training step: cross entropy, Nesterov momentum, L2 but of batch norm, as in our recipe.

    Args:
        case: what to compute.
        layout, compiled, precision: as of `predict`.
    """
    model, clips = _prepared(case, layout, compiled, training=True)
    labels = torch.arange(case.batch)
    optimizer = pytorchvideo_models.optimizer(model, 1e-4, l2=5e-5)

    def call() -> float:
        optimizer.zero_grad(set_to_none=True)
        with _arithmetic(precision):
            loss = torch.nn.functional.cross_entropy(model(clips), labels)
        loss.backward()
        optimizer.step()
        return float(loss)

    return call


def export_onnx(case: Case, file: str) -> None:
    """Writes the network, to logits, for float32 clips (batch, 3, T, S, S)."""
    import onnx  # what the exporter needs; here, so that its absence is said as such

    path = Path(case.folder) / file
    clips = torch.from_numpy(normalized(squares(case.network, case.batch)))
    with torch.inference_mode():  # the older exporter: the newer one takes another package
        torch.onnx.export(network(case.network), (clips,), str(path), dynamo=False, input_names=["clips"])
    onnx.checker.check_model(str(path))
