"""Measures the speed of single layers, ours and the peers'.

The layers are the temporal convolution of the stem and, from each stage, the channel-wise convolution with and without
stride, a pointwise convolution, and a batch norm in training mode. The first table is for the forward pass, the second
for the forward pass with the gradients of input and weights. Each framework runs in a separate process. In each round,
every implementation makes one warm-up call and then timed calls for at least 20 ms, whose mean is taken. Cells are
medians in ms per clip. "speed" is the speed of our implementation relative to the faster one of PyTorch's: the median
of the ratios within each round. The JSON file also contains the speed relative to a matrix product.

keras.ops is the implementation for other Keras backends; layers without a separate one are only listed as ours. Keras'
own layers are Conv3D(groups=C), which is very slow and therefore measured with two calls of one clip, Conv3D and
BatchNormalization.

  python benchmarks/layers.py
  python benchmarks/layers.py --networks x3d_m --batches 1 8 --layers 'res3*' --rounds 20 --json=layers.json
"""

import argparse
import fnmatch
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from command import parser, run, select
from measuring import Case, Implementation, Job, Processes, measure_in_processes
from reporting import figures, machine_info, markdown, write_json

import x3d_tf
from x3d_tf.modeling.architecture import STAGE_NAMES, plan
from x3d_tf.modeling.cost import layer_costs

MODES = {"forward": 1, "forward and gradients": 3}  # operations relative to the forward pass


@dataclass(frozen=True)
class Layer:
    """A layer to measure.

    Attributes:
        name: name of the layer in the network.
        kind: type of the layer: a kind of convolution, or batch norm.
        shape: input shape, (T, H, W, C).
        kernel: kernel size in frames, rows and columns.
        stride: stride in rows and columns.
        filters: number of output channels.
        macs: multiply-adds per clip; 0 for a batch norm.
        gradients: whether to measure the gradients as well.
    """

    name: str
    kind: Literal["channelwise", "pointwise", "norm"]
    shape: tuple[int, int, int, int]
    kernel: tuple[int, int, int] = (1, 1, 1)
    stride: int = 1
    filters: int = 0
    macs: int = 0
    gradients: bool = False

    def __str__(self) -> str:
        frames, height, width, channels = self.shape
        kernel = "x".join(map(str, self.kernel))
        kind = {"norm": "batch norm", "pointwise": f"pointwise to {self.filters}"}.get(
            self.kind, f"channel-wise {kernel}"
        )
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{self.name}: {kind}{stride}, {frames} x {height} x {width} x {channels}"


def layers_of(network: str) -> Iterator[Layer]:
    """Yields the layers of a network to measure, in execution order."""
    shapes = {row.name: row.shape for row in layer_costs(network)}
    macs = {row.name: row.cost.macs for row in layer_costs(network)}
    architecture = plan(x3d_tf.VARIANTS[network].expansion)
    yield Layer(
        "conv1_t",
        "channelwise",
        shapes["conv1_t"],
        (architecture.options.stem_kernel, 1, 1),
        1,
        architecture.stem_width,
        macs["conv1_t"],
    )
    for stage, numbers in zip(STAGE_NAMES, architecture.stages):
        inner = numbers.inner_width
        for block in range(min(numbers.depth, 2)):
            name, stride = f"{stage}_{block}_conv_b", 1 if block else numbers.stride
            input_shape = shapes[f"{stage}_{block}_conv_a"]
            yield Layer(name, "channelwise", input_shape, (3, 3, 3), stride, inner, macs[name])
        output_shape = shapes[f"{stage}_0_conv_b"]
        name = f"{stage}_0_conv_c"
        yield Layer(name, "pointwise", output_shape, filters=numbers.width, macs=macs[name])
        yield Layer(f"{stage}_0_conv_b_bn", "norm", output_shape, filters=inner)


def ours(name: str, process: str, implementation: str) -> Implementation:
    """Returns an implementation of the layers in TensorFlow: "ours", "ops" or "keras"."""
    return Implementation(name, "ours", Job(process, "tensorflow_layers:make", {"implementation": implementation}))


def torch(name: str, layout: str) -> Implementation:
    """Returns PyTorch's implementation of the layers in a memory layout."""
    return Implementation(name, "peers", Job("PyTorch", "torch_layers:make", {"layout": layout}), reference=True)


IMPLEMENTATIONS = (
    ours("ours", "TensorFlow", "ours"),
    ours("keras.ops", "TensorFlow", "ops"),
    torch("torch channels_last_3d", "channels_last_3d"),
    torch("torch contiguous", "contiguous_format"),
    ours("Keras layer", "Keras", "keras"),
)


def implementations_of(layer: Layer, implementations: list[Implementation]) -> list[Implementation]:
    """Returns the implementations that exist for a layer."""
    existing = [row for row in implementations if not (row.name == "keras.ops" and layer.kind == "pointwise")]
    return [replace(row, slow=row.name == "Keras layer" and layer.kind == "channelwise") for row in existing]


def main() -> None:
    """Measures, prints the tables and writes the JSON file."""
    arguments = parser(__doc__, IMPLEMENTATIONS, networks=["x3d_s"], batches=[8], rounds=10, json="layers.json")
    help_layers = "layers to measure: names, or patterns such as 'res3*'; default: all"
    arguments.add_argument("--layers", nargs="+", default=["*"], metavar="NAME", help=help_layers)
    settings = arguments.parse_args()
    tables: list[dict[str, Any]] = []
    for network in settings.networks:
        for batch in settings.batches:
            measure_all(Case(network, batch, settings.threads, verbose=settings.verbose), settings, tables)
    print(f"written to {settings.json}")


def measure_all(case: Case, settings: argparse.Namespace, tables: list[dict[str, Any]]) -> None:
    """Measures the layers of a network, and prints two tables; updates the JSON file after each of them."""
    implementations = select(IMPLEMENTATIONS, settings.forms)
    existing = list(layers_of(case.network))
    layers = [layer for layer in existing if any(fnmatch.fnmatch(layer.name, name) for name in settings.layers)]
    if not layers:
        known = ", ".join(layer.name for layer in existing)
        sys.exit(f"error: --layers must name layers of {case.network}, got {settings.layers}; known: {known}")
    for mode, passes in MODES.items():
        with Processes(case.threads, case.verbose) as processes:
            measured = []
            for layer in layers:
                layer_case = replace(case, layer=replace(layer, gradients=passes > 1))
                rows = implementations_of(layer, implementations)
                measurement = measure_in_processes(processes, rows, layer_case, settings.rounds)
                measured.append(figures(measurement, 2 * layer.macs * passes) | {"layer": str(layer)})
        print(f"{case}, {mode}, {case.threads} threads, {settings.rounds} rounds, ms/clip\n")
        print("\n".join(table(measured)), end="\n\n", flush=True)
        tables.append({"network": case.network, "batch": case.batch, "mode": mode, "layers": measured})
        write_json(settings.json, vars(settings), [*tables, {"machine_after": machine_info()}])


def table(layers: list[dict[str, Any]]) -> list[str]:
    """Returns the lines of a Markdown table with a row for each layer and a column for each implementation."""
    names, rows = [implementation.name for implementation in IMPLEMENTATIONS], []
    for layer in layers:
        by_name = {row["name"]: row for row in layer["forms"]}
        ours = by_name.get("ours", {})
        speed = f"{ours['speed_over_reference']:.2f}" if "speed_over_reference" in ours else "-"
        notes = {row["failure"] for row in layer["forms"] if "failure" in row}
        rows.append([layer["layer"], *(_cell(by_name.get(name)) for name in names), speed, "; ".join(sorted(notes))])
    return markdown(["layer", *names, "speed", ""], rows)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or "ms_per_clip" not in row:
        return "-"
    median = row["ms_per_clip"]["median"]
    return f"{median:.{max(0, 2 - math.floor(math.log10(median)))}f}" if median > 0 else "0"


if __name__ == "__main__":
    run(main)
