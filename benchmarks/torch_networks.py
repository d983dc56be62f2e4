"""pytorchvideo's X3D in PyTorch, for inference and training. `predict` and `train` return the call to measure.

The networks and their settings are those of the parity tests. Clips are converted to the model's memory format before
the measurement.
"""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._inductor.config
from measuring import Case
from numpy.typing import NDArray
from synthetic_clips import normalized, squares

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
import pytorchvideo_models

from x3d_tf.errors import require

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def network(name: str) -> Any:
    """Returns the module in evaluation mode, which computes logits and has a random classifier."""
    known = pytorchvideo_models.SETTINGS
    require(name in known, "the network", f"be one of pytorchvideo's: {', '.join(known)}", name)
    model = pytorchvideo_models.standard(name).model
    for module in model.modules():
        if isinstance(module, torch.nn.AvgPool3d):  # torch.compile does not accept NumPy integers
            module.kernel_size = tuple(int(size) for size in module.kernel_size)
    # Makes the classes differ, so that wrong outputs are detected.
    torch.nn.init.normal_(model.blocks[5].proj.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return model


def _prepare(case: Case, layout: str, compiled: bool, training: bool = False) -> tuple[Any, Any]:
    """Returns the module and the clips in a memory format."""
    torch.set_flush_denormal(True)  # as TensorFlow does
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    memory_format = getattr(torch, layout)
    model = network(case.network).to(memory_format=memory_format).train(training)
    clips = torch.from_numpy(normalized(squares(case.network, case.batch))).contiguous(memory_format=memory_format)
    # Without dynamic=False, torch may use dynamic shapes after it has compiled several networks.
    return torch.compile(model, dynamic=False) if compiled else model, clips


def _precision_scope(precision: str) -> Any:
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
    """Returns the inference call of a mode of PyTorch.

    Args:
        case: computation to perform.
        layout: memory layout, "contiguous_format" or "channels_last_3d".
        compiled: whether to use torch.compile.
        frozen: whether to compile the weights as constants, which folds batch norms.
        precision: key of `PRECISIONS`, applied by autocast.
    """
    model, clips = _prepare(case, layout, compiled)

    def call() -> NDArray[np.float32]:
        with torch.inference_mode(), _precision_scope(precision):
            return torch.softmax(model(clips).float(), dim=1).numpy()

    if frozen:
        with torch._inductor.config.patch(freezing=True):  # torch.compile has no argument that sets it everywhere
            call()
    return call


def train(
    case: Case, *, layout: str = "contiguous_format", compiled: bool = False, precision: str = "float32"
) -> Callable[[], float]:
    """Returns a training step: cross entropy, Nesterov momentum, and L2 except for batch norms, as in our recipe.

    Args:
        case: computation to perform.
        layout, compiled, precision: see `predict`.
    """
    model, clips = _prepare(case, layout, compiled, training=True)
    labels = torch.arange(case.batch)
    optimizer = pytorchvideo_models.optimizer(model, 1e-4, l2=5e-5)

    def call() -> float:
        optimizer.zero_grad(set_to_none=True)
        with _precision_scope(precision):
            loss = torch.nn.functional.cross_entropy(model(clips), labels)
        loss.backward()
        optimizer.step()
        return float(loss)

    return call


def export_onnx(case: Case, file: str) -> None:
    """Writes the network, which computes logits of float32 clips (batch, 3, T, S, S), as an ONNX file."""
    import onnx  # required by the exporter; imported first, so that a missing package is reported clearly

    path = Path(case.folder) / file
    clips = torch.from_numpy(normalized(squares(case.network, case.batch)))
    with torch.inference_mode():  # dynamo=False: the newer exporter requires another package
        torch.onnx.export(network(case.network), (clips,), str(path), dynamo=False, input_names=["clips"])
    onnx.checker.check_model(str(path))
