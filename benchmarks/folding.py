"""Is folding batch norms into convolutions worth it, where TensorFlow runs the network?

Forms of one network, each called through tf.function, take turns; medians, and the median over the rounds of each
form's time in units of the portable form's:

- trainable: what `x3d_tf.load` gives;
- portable: what `model.keras` holds;
- unfolded: the exporters' form, 4-D and in time-major order, with its batch norms left in;
- deployed: the same with them folded;
- frozen: the same with its weights as constants of the graph.

Weights and moving statistics are random. The largest difference of any probability from the trainable network's is on
made-up clips of coloured squares, and has to be below 1e-5.

  python benchmarks/folding.py
  python benchmarks/folding.py --network=x3d_m --batch=8 --threads=1 --json=folding.json
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

import x3d_tf
from x3d_tf.modeling import deployed as deployed_form
from x3d_tf.modeling.layers import GhostBatchNorm

BOUND = 1e-5  # of probabilities
CLASSES = 400


def main() -> None:
    """Measures, prints the table and writes the JSON file."""
    settings = parse_arguments()
    tf.config.threading.set_intra_op_parallelism_threads(settings.threads)
    tf.config.threading.set_inter_op_parallelism_threads(settings.threads)
    model = network(settings.network)
    forms = functions(model, settings.batch)
    clips = tf.constant(squares(settings.batch, model.clip))
    expected = forms["trainable"](clips)
    figures: dict[str, dict[str, float]] = {}
    times = alternate({name: lambda call=call: call(clips) for name, call in forms.items()}, settings.rounds)
    for name, call in forms.items():
        ratios = [own / portable for own, portable in zip(times[name], times["portable"])]
        figures[name] = {
            "ms_per_clip": 1000 * statistics.median(times[name]) / settings.batch,
            "time_over_portable": statistics.median(ratios),
            "max_difference": float(np.abs(call(clips) - expected).max()),
        }
    rows = [f"{settings.network}, batch {settings.batch}, {settings.threads} threads, {settings.rounds} rounds"]
    rows += [f"{'form':12} {'ms/clip':>9} {'of portable':>11} {'max difference':>14}"]
    for name, row in figures.items():
        rows.append(
            f"{name:12} {row['ms_per_clip']:9.1f} {row['time_over_portable']:11.3f} {row['max_difference']:14.1e}"
        )
    print("\n".join(rows))
    result = {"settings": vars(settings), "figures": figures, "versions": versions(), "machine": machine()}
    Path(settings.json).write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {settings.json}")
    worst = max(row["max_difference"] for row in figures.values())
    if not worst < BOUND:
        raise SystemExit(f"probabilities differ by {worst:.1e}, more than {BOUND:g}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="x3d_s", choices=list(x3d_tf.VARIANTS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", default="export.json", help="where to write the figures")
    return parser.parse_args()


def network(name: str) -> x3d_tf.X3D:
    """A network none of whose batch norms is at its first values, and whose classes differ."""
    keras.utils.set_random_seed(0)
    model = x3d_tf.build_x3d(name, num_classes=CLASSES)
    draw = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, GhostBatchNorm):
            shape = layer.gamma.shape
            layer.set_weights([draw.random(shape) + 0.5, *draw.normal(0, 0.3, (2, *shape)), draw.random(shape) + 0.5])
    model.get_layer("fc2").kernel.assign(draw.normal(0, 0.3, model.get_layer("fc2").kernel.shape))
    return model


def squares(count: int, clip: x3d_tf.ClipSpec) -> np.ndarray:
    """Clips of coloured squares of 16 pixels, uint8."""
    side = -(-clip.size // 16)
    colours = np.random.default_rng(1).integers(0, 256, (count, clip.frames, side, side, 3), dtype=np.uint8)
    return colours.repeat(16, axis=2).repeat(16, axis=3)[:, :, : clip.size, : clip.size]


def functions(model: x3d_tf.X3D, batch: int) -> dict[str, Callable[[tf.Tensor], np.ndarray]]:
    """Each form as a function from clips to probabilities; returns an array, so that the device has finished."""
    portable = x3d_tf.portable(model, [str(number) for number in range(CLASSES)])
    folded = deployed_form.deployed(model, batch=batch)
    with mock.patch.object(deployed_form, "DeployedParts", UnfoldedParts):
        unfolded = deployed_form.deployed(model, batch=batch)
    shape = (batch, *portable.input_shape[1:])

    def traced(function: Callable[[Any], Any]) -> Any:
        return tf.function(function, input_signature=[tf.TensorSpec(shape, tf.uint8)]).get_concrete_function()

    concrete = {
        "trainable": traced(lambda clips: tf.nn.softmax(model(clips, training=False))),
        "portable": traced(lambda clips: portable(clips, training=False)),
        "unfolded": traced(lambda clips: unfolded(clips, training=False)),
        "deployed": traced(lambda clips: folded(clips, training=False)),
    }
    frozen = convert_variables_to_constants_v2(concrete["deployed"])
    calls = {name: lambda clips, call=call: call(clips).numpy() for name, call in concrete.items()}
    return calls | {"frozen": lambda clips: frozen(clips)[0].numpy()}


class UnfoldedParts(deployed_form.DeployedParts):
    """The layers of the deployed form, with batch norms left where they are."""

    def __init__(self, model: x3d_tf.X3D, batch: int | None) -> None:
        super().__init__(model, batch)
        self.norms = {}

    def norm(self, x: Any, name: str, gamma: str = "ones") -> Any:
        own = self.model.get_layer(name)
        layer = keras.layers.BatchNormalization(epsilon=own.epsilon, name=name)
        y = layer(x)
        layer.set_weights(own.get_weights())
        return y


def alternate(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, in rounds in which each has its turn; the first two rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def versions() -> dict[str, str]:
    """Of what decides the figures."""
    modules = {"tensorflow": tf, "keras": keras, "numpy": np, "x3d_tf": x3d_tf}
    return {"python": platform.python_version()} | {name: module.__version__ for name, module in modules.items()}


def machine() -> dict[str, Any]:
    """What it ran on, and how busy that was."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"system": platform.platform(), "cpus": cpus, "load_average_1_minute": load}


if __name__ == "__main__":
    main()
