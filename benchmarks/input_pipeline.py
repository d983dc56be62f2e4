"""Does a training step of X3D-S wait for its data?

Measures the clips that the input pipeline delivers alone, and the time of a training step in rounds that alternate
between fresh batches and one batch that stays in memory; medians. On a machine without a GPU both do their work on the
same cores, so a step with fresh batches is slower even where it never waits.

  python benchmarks/input_pipeline.py
  python benchmarks/input_pipeline.py --records=data/my_records --flip --json=input_pipeline.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from reporting import machine, versions

import x3d_tf
from x3d_tf.data.datasets import DatasetSpec, open_dataset
from x3d_tf.data.pipeline import training_dataset
from x3d_tf.modeling.lowerings.tensorflow import one_thread_an_operation, parts_of_batch
from x3d_tf.training.forward import forward_of

NETWORK = x3d_tf.VARIANTS["x3d_s"].expansion


def main() -> None:
    """Measures, prints the table and writes the JSON file."""
    settings = parse_arguments()
    one_thread_an_operation(parts_of_batch(settings.batch, x3d_tf.ModelOptions().bn_group))
    made_up = settings.records is None
    spec = DatasetSpec(
        settings.records or "data/moving_shapes",
        train_split=settings.split,
        eval_split=settings.split,
        flip=settings.flip,
        name="moving_shapes" if made_up else "records",
    )
    manifest = open_dataset(spec)
    dataset = training_dataset(
        manifest, spec.train_split, NETWORK.clip, jitter=NETWORK.jitter, flip=spec.flip, batch=settings.batch, seed=0
    )
    figures = {"pipeline alone, clips/s": pipeline_rate(iter(dataset), settings)}
    if not settings.no_model:
        figures |= step_times(iter(dataset), len(manifest.classes), settings)
    rows = [f"X3D-S, batch {settings.batch}, {settings.rounds} rounds of {settings.steps} steps, {spec.records}"]
    rows += [f"  {name:46} {value:9.3f}" for name, value in figures.items()]
    print("\n".join(rows))
    gpus = [device.name for device in tf.config.list_physical_devices("GPU")]
    result = {
        "settings": vars(settings),
        "figures": figures,
        "versions": versions(),
        "machine": machine() | {"gpus": gpus},
    }
    Path(settings.json).write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {settings.json}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", help="folder of records; data/moving_shapes, made if absent, by default")
    parser.add_argument("--split", default="train")
    parser.add_argument("--flip", action="store_true", help="mirror half of the clips")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="of a round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--no_model", action="store_true", help="measure the pipeline alone")
    parser.add_argument("--json", default="input_pipeline.json", help="where to write the figures")
    return parser.parse_args()


def pipeline_rate(batches: Iterator[Any], settings: argparse.Namespace) -> float:
    """Clips per second without a consumer, the median of the rounds."""
    for _ in range(4):  # two are prefetched; tf.data finds its parallelism
        next(batches)
    rates = []
    for _ in range(settings.rounds):
        seconds = timed(lambda: [next(batches) for _ in range(settings.steps)])
        rates.append(settings.steps * settings.batch / seconds)
    return statistics.median(rates)


def step_times(batches: Iterator[Any], classes: int, settings: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step with fresh batches and with one that is kept, and the part spent waiting for the next."""
    step = training_step(classes)
    kept = next(batches)
    for _ in range(2):  # the first one traces and compiles
        step(*kept)
    fresh, cached, waits = [], [], []
    for _ in range(settings.rounds):
        for _ in range(settings.steps):
            cached.append(timed(lambda: step(*kept)))
        next(batches)  # what was prefetched during those steps was free
        next(batches)
        next(batches)
        for _ in range(settings.steps):
            start = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - start)
            step(*batch)
            fresh.append(time.perf_counter() - start)
    return {
        "step with a batch kept in memory, s": statistics.median(cached),
        "step with fresh batches, s": statistics.median(fresh),
        "of it waiting for the batch, s (median)": statistics.median(waits),
        "of it waiting for the batch, s (mean)": statistics.fmean(waits),
    }


def training_step(classes: int) -> Callable[[tf.Tensor, tf.Tensor], float]:
    """Forward, backward and update of X3D-S; returns the loss, so that the device has finished."""
    model = x3d_tf.build_x3d(NETWORK, num_classes=classes)
    forward = forward_of(model)
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True)
    optimizer.build(model.trainable_variables)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def step(clips: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = loss_of(labels, forward(clips))
        optimizer.apply_gradients(zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables))
        return loss

    return lambda clips, labels: float(step(clips, labels))


def timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
