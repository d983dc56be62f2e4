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


def _prepare(
    case: Case, layout: str, compiled: bool, *, cuda_graphs: bool = False, training: bool = False
) -> tuple[Any, Any]:
    """Returns the module and the clips on the device, in a memory format."""
    device = _device(case)
    memory_format = getattr(torch, layout)
    model = network(case.network).to(device, memory_format=memory_format).train(training)
    clips = torch.from_numpy(normalized(squares(case.network, case.batch)))
    clips = clips.to(device).contiguous(memory_format=memory_format)
    if not compiled:
        return model, clips
    # Without dynamic=False, torch may use dynamic shapes after it has compiled several networks.
    return torch.compile(model, dynamic=False, mode="reduce-overhead" if cuda_graphs else None), clips


def _device(case: Case) -> str:
    """Configures the device of a case and returns its name in PyTorch."""
    torch.set_flush_denormal(True)  # as TensorFlow does
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    if case.device == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no GPU")
    torch.set_float32_matmul_precision("high" if case.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = case.tf32  # for convolutions
    torch.backends.cudnn.benchmark = True  # chooses the fastest algorithm for each shape
    torch.cuda.reset_peak_memory_stats()
    return "cuda"


def describe(case: Case) -> str:
    """Returns the version of PyTorch, its device and how that computes float32 products."""
    if _device(case) == "cpu":
        return f"PyTorch {torch.__version__}: the CPU"
    products = "TF32" if torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32 else "float32"
    found = torch.cuda.get_device_properties(0)
    memory, cuda = f"{found.total_memory / 1e9:.0f} GB", f"CUDA {torch.version.cuda}"
    return f"PyTorch {torch.__version__}: {found.name}, {memory}, {cuda}; float32 products in {products}"


class _Call:
    """A call that records the peak of the GPU memory that it has allocated, beyond that allocated before."""

    def __init__(self, call: Callable[[], Any], before: int) -> None:
        self._call, self._before = call, before

    def __call__(self) -> Any:
        return self._call()

    @property
    def peak_bytes(self) -> int | None:
        """Peak in bytes since the call was created; None on a CPU."""
        return torch.cuda.max_memory_allocated() - self._before if torch.cuda.is_initialized() else None


def _allocated() -> int:
    """Returns the GPU memory in use in bytes; 0 on a CPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0


def _precision_scope(case: Case, precision: str) -> Any:
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast("cpu" if case.device == "cpu" else "cuda", dtype=PRECISIONS[precision])


def predict(
    case: Case,
    *,
    layout: str = "contiguous_format",
    compiled: bool = False,
    frozen: bool = False,
    cuda_graphs: bool = False,
    precision: str = "float32",
) -> Callable[[], NDArray[np.float32]]:
    """Returns the inference call of a mode of PyTorch.

    Args:
        case: computation to perform.
        layout: memory layout, "contiguous_format" or "channels_last_3d".
        compiled: whether to use torch.compile.
        frozen: whether to compile the weights as constants, which folds batch norms.
        cuda_graphs: whether the compiled module is replayed as a CUDA graph.
        precision: key of `PRECISIONS`, applied by autocast.
    """
    before = _allocated()
    model, clips = _prepare(case, layout, compiled, cuda_graphs=cuda_graphs)

    def call() -> NDArray[np.float32]:
        with torch.inference_mode(), _precision_scope(case, precision):
            return torch.softmax(model(clips).float(), dim=1).cpu().numpy()  # cpu() waits for the device

    if frozen:
        with torch._inductor.config.patch(freezing=True):  # torch.compile has no argument that sets it everywhere
            call()
    return _Call(call, before)


def train(
    case: Case,
    *,
    layout: str = "contiguous_format",
    compiled: bool = False,
    cuda_graphs: bool = False,
    precision: str = "float32",
) -> Callable[[], float]:
    """Returns a training step: cross entropy, Nesterov momentum, and L2 except for batch norms, as in our recipe.

    Args:
        case: computation to perform.
        layout, compiled, cuda_graphs, precision: see `predict`.
    """
    before = _allocated()
    model, clips = _prepare(case, layout, compiled, cuda_graphs=cuda_graphs, training=True)
    labels = torch.arange(case.batch, device=clips.device)
    optimizer = pytorchvideo_models.optimizer(model, 1e-4, l2=5e-5)

    def call() -> float:
        optimizer.zero_grad(set_to_none=True)
        with _precision_scope(case, precision):
            loss = torch.nn.functional.cross_entropy(model(clips), labels)
        loss.backward()
        optimizer.step()
        return float(loss)  # waits for the device

    return _Call(call, before)


def export_onnx(case: Case, file: str, batch: int | None = None) -> None:
    """Writes the network, which computes logits of float32 clips (batch, 3, T, S, S), as an ONNX file.

    Args:
        case: the computation, whose batch size the file has by default.
        file: name of the file.
        batch: another batch size.
    """
    import onnx  # required by the exporter; imported first, so that a missing package is reported clearly

    path = Path(case.folder) / file
    clips = torch.from_numpy(normalized(squares(case.network, batch or case.batch)))
    with torch.inference_mode():  # dynamo=False: the newer exporter requires another package
        torch.onnx.export(network(case.network), (clips,), str(path), dynamo=False, input_names=["clips"])
    onnx.checker.check_model(str(path))
