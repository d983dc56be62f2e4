"""How fast are single layers, ours and the peers'?

Of a network's plan: the temporal convolution of the stem, and of each stage the channel-wise convolution with and
without stride, a pointwise convolution and a batch norm in training. Two tables: forward, and forward with the
gradients of input and weights. Each framework has a process of its own, and in each round each form has its turn: one
call that does not count, then as many as take 20 ms, of which the mean is taken. Cells are medians in ms a clip;
"speed" is how many times as fast as the faster of PyTorch's two our form is, the median of the rounds' ratios. The JSON
file has the share of a matrix product's speed, too.

keras.ops is the form that other backends of Keras run; where there is none, ours is it. Keras' own layers are
Conv3D(groups=C), so slow that it gets two calls of one clip, Conv3D and BatchNormalization.

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

from command import chosen, parser, run
from measuring import Case, Form, Processes, Work, measure_in
from reporting import figures, machine, markdown, write_json

import x3d_tf
from x3d_tf.modeling.architecture import STAGE_NAMES, plan
from x3d_tf.modeling.cost import layer_costs

MODES = {"forward": 1, "forward and gradients": 3}  # and how often each computes as much as forward does


@dataclass(frozen=True)
class Layer:
    """A layer to measure.

    Attributes:
        name: of the network's layer.
        kind: of convolution, or batch norm.
        shape: of its input, (T, H, W, C).
        kernel: frames, rows, columns.
        stride: of rows and columns.
        filters: output channels.
        macs: multiply-adds of one clip; 0 of a batch norm.
        gradients: whether those are measured, too.
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
        how = {"norm": "batch norm", "pointwise": f"pointwise to {self.filters}"}.get(
            self.kind, f"channel-wise {kernel}"
        )
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{self.name}: {how}{stride}, {frames} x {height} x {width} x {channels}"


def layers_of(network: str) -> Iterator[Layer]:
    """The layers of a network that are measured, in execution order."""
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
            entering = shapes[f"{stage}_{block}_conv_a"]
            yield Layer(name, "channelwise", entering, (3, 3, 3), stride, inner, macs[name])
        leaving = shapes[f"{stage}_0_conv_b"]
        name = f"{stage}_0_conv_c"
        yield Layer(name, "pointwise", leaving, filters=numbers.width, macs=macs[name])
        yield Layer(f"{stage}_0_conv_b_bn", "norm", leaving, filters=inner)


def ours(name: str, process: str, form: str) -> Form:
    """A layer that TensorFlow runs."""
    return Form(name, "ours", Work(process, "tensorflow_layers:make", {"form": form}))


def torch(name: str, layout: str) -> Form:
    """A layer of PyTorch's."""
    return Form(name, "peers", Work("PyTorch", "torch_layers:make", {"layout": layout}), reference=True)


FORMS = (
    ours("ours", "TensorFlow", "ours"),
    ours("keras.ops", "TensorFlow", "ops"),
    torch("torch channels_last_3d", "channels_last_3d"),
    torch("torch contiguous", "contiguous_format"),
    ours("Keras layer", "Keras", "keras"),
)


def forms_of(layer: Layer, forms: list[Form]) -> list[Form]:
    """Those of the forms that a layer has."""
    has = [form for form in forms if not (form.name == "keras.ops" and layer.kind == "pointwise")]
    return [replace(form, slow=form.name == "Keras layer" and layer.kind == "channelwise") for form in has]


def main() -> None:
    """Measures, prints the tables and writes the JSON file."""
    flags = parser(__doc__, FORMS, networks=["x3d_s"], batches=[8], rounds=10, json="layers.json")
    flags.add_argument("--layers", nargs="+", default=["*"], metavar="NAME", help="names or patterns such as 'res3*'")
    settings = flags.parse_args()
    tables: list[dict[str, Any]] = []
    for network in settings.networks:
        for batch in settings.batches:
            measure_all(Case(network, batch, settings.threads, verbose=settings.verbose), settings, tables)
    print(f"written to {settings.json}")


def measure_all(case: Case, settings: argparse.Namespace, tables: list[dict[str, Any]]) -> None:
    """Measures the layers of a network, prints two tables and writes the JSON file after each."""
    forms = chosen(FORMS, settings.forms)
    layers = [one for one in layers_of(case.network) if any(fnmatch.fnmatch(one.name, p) for p in settings.layers)]
    if not layers:
        known = ", ".join(layer.name for layer in layers_of(case.network))
        sys.exit(f"error: --layers must name layers of {case.network}, got {settings.layers}; known: {known}")
    for mode, passes in MODES.items():
        with Processes(case.threads, case.verbose) as processes:
            found = []
            for layer in layers:
                own = replace(case, layer=replace(layer, gradients=passes > 1))
                measurement = measure_in(processes, forms_of(layer, forms), own, settings.rounds)
                found.append(figures(measurement, 2 * layer.macs * passes) | {"layer": str(layer)})
        print(f"{case}, {mode}, {case.threads} threads, {settings.rounds} rounds, ms/clip\n")
        print("\n".join(table(found)), end="\n\n", flush=True)
        tables.append({"network": case.network, "batch": case.batch, "mode": mode, "layers": found})
        write_json(settings.json, vars(settings), [*tables, {"machine_after": machine()}])


def table(found: list[dict[str, Any]]) -> list[str]:
    """The lines of a table in Markdown: a row for each layer, a column for each form."""
    names, rows = [form.name for form in FORMS], []
    for layer in found:
        by_name = {form["name"]: form for form in layer["forms"]}
        ours = by_name.get("ours", {})
        speed = f"{ours['speed_over_reference']:.2f}" if "speed_over_reference" in ours else "-"
        notes = {form["failure"] for form in layer["forms"] if "failure" in form}
        rows.append([layer["layer"], *(_cell(by_name.get(name)) for name in names), speed, "; ".join(sorted(notes))])
    return markdown(["layer", *names, "speed", ""], rows)


def _cell(form: dict[str, Any] | None) -> str:
    if form is None or "ms_per_clip" not in form:
        return "-"
    median = form["ms_per_clip"]["median"]
    return f"{median:.{max(0, 2 - math.floor(math.log10(median)))}f}" if median > 0 else "0"


if __name__ == "__main__":
    run(main)
