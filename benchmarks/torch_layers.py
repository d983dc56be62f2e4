"""Single layers in PyTorch."""

from collections.abc import Callable
from typing import Any

import torch
from measuring import Case


def make(case: Case, layout: str) -> Callable[[], None]:
    """Returns the call of a layer: the forward pass, with the gradients of input and weights if the case asks for them.

    Args:
        case: computation to perform; its layer is a `layers.Layer`.
        layout: memory layout of input, weights and upstream gradients: "contiguous_format" or "channels_last_3d".
    """
    torch.set_flush_denormal(True)
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    memory_format = getattr(torch, layout)
    layer = _build_layer(case.layer).to(memory_format=memory_format).train()
    frames, height, width, channels = case.layer.shape
    x = torch.randn(case.batch, channels, frames, height, width).contiguous(memory_format=memory_format)
    if not case.layer.gradients:

        def forward() -> None:
            with torch.no_grad():
                layer(x)

        return forward
    x.requires_grad_(True)
    upstream = torch.randn_like(layer(x)).contiguous(memory_format=memory_format)
    sources = [x, *layer.parameters()]

    def with_gradients() -> None:
        torch.autograd.grad(layer(x), sources, upstream)

    return with_gradients


def _build_layer(layer: Any) -> torch.nn.Module:
    channels = layer.shape[-1]
    if layer.kind == "norm":
        return torch.nn.BatchNorm3d(channels)
    return torch.nn.Conv3d(
        channels,
        layer.filters,
        layer.kernel,
        stride=(1, layer.stride, layer.stride),
        padding=tuple(size // 2 for size in layer.kernel),
        groups=channels if layer.kind == "channelwise" else 1,
        bias=False,
    )
