"""Measures whether training steps of X3D-S wait for the input pipeline.

Reports the throughput of the input pipeline alone, and the time of a training step with new batches and with one batch
kept in memory, in alternating rounds; all values are medians. Without a GPU, the pipeline and the step share the CPU
cores, so a step with new batches is slower even if it never waits.

  python benchmarks/input_pipeline.py
  python benchmarks/input_pipeline.py --records=data/my_records --flip --json=input_pipeline.json

With --clips, it measures the cost of a clip without a network instead: the CPU time (user and system) of all threads,
the bytes read from disk or page cache, the clips per second, the mean number of busy cores, and the number of cores
that a GPU of a given speed needs (--gpu_speeds). Compare with `taskset -c 0` to see whether the pipeline scales with
the number of cores. --full_shard first writes one shard of 64 synthetic videos (480 MB) to the folder of --records if
it is missing; each video has 300 frames of 256 x 340 pixels, a record of 7.5 MB.

  python benchmarks/input_pipeline.py --records=/tmp/full_shard --full_shard --clips=500 --networks x3d_s x3d_m
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from reporting import machine_info, versions

import x3d_tf
from x3d_tf.data.datasets.spec import DatasetSpec, open_dataset
from x3d_tf.data.input_pipeline import training_dataset
from x3d_tf.data.records.format import RecordSource, write_split
from x3d_tf.data.records.index import VIDEOS_PER_SHARD
from x3d_tf.data.records.manifest import MANIFEST_NAME, Manifest
from x3d_tf.data.video.decode import EncodedVideo, VideoError, encode_jpeg
from x3d_tf.files import atomic_write
from x3d_tf.parallel import num_batch_slices, use_single_threaded_ops
from x3d_tf.training.forward import forward_of
from x3d_tf.types import Storage

NETWORK = x3d_tf.VARIANTS["x3d_s"].expansion
FRAMES, HEIGHT, WIDTH = 300, 256, 340  # size of a synthetic video
GRAIN, DEVIATION = 4, 6.3  # side of a colour block in pixels, deviation from grey: JPEG files of 25 kB


def main() -> None:
    """Measures, prints the table and writes the JSON file."""
    settings = parse_arguments()
    if settings.full_shard:
        write_full_shard(Path(settings.records))
    if settings.clips:
        measure_costs(settings)
    else:
        measure_rates(settings)


def measure_rates(settings: argparse.Namespace) -> None:
    """Measures the throughput of the pipeline, and the time of a training step with new and with cached batches."""
    use_single_threaded_ops(num_batch_slices(settings.batch, x3d_tf.ModelOptions().bn_group))
    synthetic = settings.records is None
    spec = DatasetSpec(
        settings.records or "data/moving_shapes",
        train_split=settings.split,
        eval_split=settings.split,
        flip=settings.flip,
        name="moving_shapes" if synthetic else "records",
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
    report(rows, figures, settings)


def measure_costs(settings: argparse.Namespace) -> None:
    """Measures the CPU time and the bytes read per clip, for the clip of each network."""
    spec = DatasetSpec(settings.records, train_split=settings.split, eval_split=settings.split, flip=settings.flip)
    manifest = open_dataset(spec)
    rows, figures = [f"batch {settings.batch}, {settings.clips} clips, {spec.records}"], {}
    for name in settings.networks:
        network = x3d_tf.VARIANTS[name].expansion
        dataset = training_dataset(
            manifest,
            spec.train_split,
            network.clip,
            jitter=network.jitter,
            flip=spec.flip,
            batch=settings.batch,
            seed=0,
        )
        figures[name] = cost_of(iter(dataset), -(-settings.clips // settings.batch), settings.batch)
        figures[name] |= cores_needed(figures[name]["core-ms a clip"], settings.gpu_speeds)
        rows += [f"  {name:8} {what:32} {value:9.3f}" for what, value in figures[name].items()]
    report(rows, figures, settings)


def cost_of(batches: Iterator[Any], count: int, batch: int) -> dict[str, float]:
    """Returns the cost of a clip, averaged over `count` batches after the first ones."""
    for _ in range(4):  # two are prefetched, and tf.data tunes its parallelism
        next(batches)
    before, read, start = resource.getrusage(resource.RUSAGE_SELF), bytes_read(), time.perf_counter()
    for _ in range(count):
        next(batches)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    clips = count * batch
    return {
        "core-ms a clip": 1e3 * seconds / clips,
        "MB read a clip": (bytes_read() - read) / 1e6 / clips,
        "clips/s": clips / wall,
        "cores busy": seconds / wall,
    }


def cores_needed(core_ms: float, speeds: Sequence[float]) -> dict[str, float]:
    """Returns the number of cores that make as many clips per second as a GPU of each speed trains on.

    Args:
        core_ms: CPU time of a clip in milliseconds.
        speeds: speeds of GPUs in clips per second.
    """
    return {f"cores for a GPU of {speed:g} clips/s": speed * core_ms / 1e3 for speed in speeds}


def bytes_read() -> int:
    """Returns the bytes that this process has read from disk or page cache. Linux only."""
    return int(Path("/proc/self/io").read_text().split()[1])


def write_full_shard(folder: Path) -> None:
    """Writes one full shard of synthetic videos and its manifest, if the folder has no manifest."""
    if (folder / MANIFEST_NAME).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)

    def video(seed: int) -> EncodedVideo | VideoError:
        random = np.random.default_rng(seed)
        coarse = random.normal(128, DEVIATION, (FRAMES, -(-HEIGHT // GRAIN), -(-WIDTH // GRAIN), 3)).clip(0, 255)
        frames = coarse.astype(np.uint8).repeat(GRAIN, 1).repeat(GRAIN, 2)[:, :HEIGHT, :WIDTH]
        return EncodedVideo([encode_jpeg(np.ascontiguousarray(frame)) for frame in frames], 30.0)

    sources = [RecordSource(f"noise/{seed:02d}", (seed % 2,)) for seed in range(VIDEOS_PER_SHARD)]
    classes = ("even", "odd")
    split = write_split(folder, "train", sources, map(video, range(VIDEOS_PER_SHARD)), classes, lambda _: None)
    build_settings: dict[str, int | float | str] = {"source": "benchmarks/input_pipeline.py"}
    Manifest(folder, "noise", classes, {"train": split}, build_settings, Storage(256, 95)).save()
    mean = split.shards[0].bytes / len(split.records) / 1e6
    print(f"{folder}: one shard of {len(split.records)} records, {mean:.2f} MB per record")


def report(rows: list[str], figures: dict[str, Any], settings: argparse.Namespace) -> None:
    """Prints the table and writes the JSON file."""
    print("\n".join(rows))
    gpus = [device.name for device in tf.config.list_physical_devices("GPU")]
    result = {
        "settings": vars(settings),
        "figures": figures,
        "versions": versions(),
        "machine": machine_info() | {"gpus": gpus},
    }
    atomic_write(Path(settings.json), (json.dumps(result, indent=2) + "\n").encode())
    print(f"written to {settings.json}")


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", help="folder of records; default: data/moving_shapes, created if missing")
    parser.add_argument("--split", default="train")
    parser.add_argument("--flip", action="store_true", help="flip half of the clips horizontally")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="training steps per round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--no_model", action="store_true", help="measure the pipeline alone")
    parser.add_argument("--clips", type=int, default=0, help="measure the cost per clip over this number of clips")
    parser.add_argument("--networks", nargs="+", default=["x3d_s", "x3d_m"], help="networks whose clips to measure")
    parser.add_argument(
        "--gpu_speeds",
        nargs="+",
        type=float,
        default=[100, 300, 1000],
        help="speeds of GPUs in clips per second. Defaults to 100 300 1000",
    )
    parser.add_argument("--full_shard", action="store_true", help="write synthetic records to --records first")
    parser.add_argument("--json", default="input_pipeline.json", help="JSON file to write")
    settings = parser.parse_args()
    if (settings.full_shard or settings.clips) and not settings.records:
        parser.error("--full_shard and --clips require --records")
    return settings


def pipeline_rate(batches: Iterator[Any], settings: argparse.Namespace) -> float:
    """Returns the clips per second without a consumer, the median over the rounds."""
    for _ in range(4):  # two are prefetched, and tf.data tunes its parallelism
        next(batches)
    rates = []
    for _ in range(settings.rounds):
        seconds = timed(lambda: [next(batches) for _ in range(settings.steps)])
        rates.append(settings.steps * settings.batch / seconds)
    return statistics.median(rates)


def step_times(batches: Iterator[Any], classes: int, settings: argparse.Namespace) -> dict[str, float]:
    """Returns the seconds of a step with new batches and with a cached one, and the time spent waiting."""
    step = training_step(classes)
    cached_batch = next(batches)
    for _ in range(2):  # the first one traces and compiles
        step(*cached_batch)
    fresh, cached, waits = [], [], []
    for _ in range(settings.rounds):
        for _ in range(settings.steps):
            cached.append(timed(lambda: step(*cached_batch)))
        next(batches)  # discards the batches that were prefetched during those steps
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
    """Returns a training step of X3D-S, which waits for the device and returns the loss."""
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
    """Returns the duration of a call in seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
