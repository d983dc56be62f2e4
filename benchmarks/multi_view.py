"""Measures multi-view evaluation: 30 views per video, ten clips with three crops each, as in the paper.

  python benchmarks/multi_view.py --records=/tmp/full_shard --full_shard
  python benchmarks/multi_view.py --records=/tmp/full_shard --network=x3d_s --videos=8 --rounds=5

The rows, which take turns in each round:

  evaluation         the evaluation of this package: each frame is decoded once, and the views of a video are batched
  network alone      the same network on views that stay in memory: what an evaluation reaches if it never waits
  naive loop         each view by itself: reads the record, decodes, scales and crops 16 frames, and runs the network

Columns: milliseconds per view, median with 10th and 90th percentile; views per second; speed relative to the network
alone, the median of the ratios within each round. The probabilities of the naive loop, which has code of its own for
reading and preparing clips, are compared with those of the evaluation; the exit status is 1 if they differ by more than
1e-4. The last lines state the time that the evaluation waits for views, and the CPU time to make a view without the
network. --full_shard writes one shard of 64 synthetic videos (480 MB) to the folder of --records if it is missing.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from command import positive, run
from input_pipeline import write_full_shard
from numpy.typing import NDArray
from reporting import machine_info, median_ratio, percentiles, versions
from tensorflow_networks import network

import x3d_tf
from x3d_tf.data.input_pipeline import evaluation_clips
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.sampling import crop_offsets, frame_indices, view_starts
from x3d_tf.evaluation.multiview import predict_split
from x3d_tf.files import atomic_write
from x3d_tf.parallel import use_single_threaded_ops
from x3d_tf.runtimes.classifier_file import CLIPS_A_CALL, ClassifierFile
from x3d_tf.runtimes.opening import open_classifier
from x3d_tf.types import ViewSpec

CROPS, TOLERANCE = 3, 1e-4
EVALUATION, ALONE, NAIVE = "evaluation", "network alone", "naive loop"


def main() -> None:
    """Measures, prints the table and writes the JSON file."""
    settings = parse_arguments()
    use_single_threaded_ops(CLIPS_A_CALL)
    if settings.full_shard:
        write_full_shard(Path(settings.records))
    manifest = first_videos(Manifest.load(settings.records), settings.split, settings.videos)
    model = classifier(settings.network)
    size = model.expansion.test_size
    views = ViewSpec(temporal_views=settings.clips, spatial_crops=CROPS, resize=size, crop=size)
    seconds, difference = measure(model, manifest, settings.split, views, settings.rounds)
    total = len(manifest.split(settings.split).records) * views.views
    figures = waiting(model, manifest, settings.split, views)
    print(f"{settings.network}, {settings.videos} videos of {views.views} views, {settings.rounds} rounds")
    print("\n".join(table(seconds, total)))
    print("\n".join(f"{name}: {value:.2f}" for name, value in figures.items()))
    print(f"maximum difference of a probability from the naive loop: {difference:.1g}")
    result = {
        "settings": vars(settings),
        "seconds": seconds,
        "figures": figures | {"difference": difference},
        "versions": versions(),
        "machine": machine_info(),
    }
    atomic_write(Path(settings.json), (json.dumps(result, indent=2) + "\n").encode())
    print(f"written to {settings.json}")
    if difference > TOLERANCE:
        sys.exit("the evaluation and the naive loop differ")


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", required=True, help="folder of records")
    parser.add_argument("--split", default="train", help="split of the records. Defaults to train")
    parser.add_argument("--full_shard", action="store_true", help="write synthetic records to --records first")
    parser.add_argument("--network", default="x3d_m", help="network. Defaults to x3d_m")
    parser.add_argument("--videos", type=positive, default=4, help="number of videos. Defaults to 4")
    parser.add_argument("--clips", type=positive, default=10, help="clips per video, in three crops. Defaults to 10")
    parser.add_argument("--rounds", type=positive, default=5, help="number of rounds. Defaults to 5")
    parser.add_argument("--json", default="multi_view.json", help="JSON file to write. Defaults to multi_view.json")
    return parser.parse_args()


def first_videos(manifest: Manifest, split: str, count: int) -> Manifest:
    """Returns the manifest with the first videos of the split."""
    return manifest.with_records(split, manifest.split(split).records[:count])


def classifier(name: str) -> ClassifierFile:
    """Returns a network with random weights, as evaluations open it."""
    model = network(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        x3d_tf.save(model, path, [str(number) for number in range(model.num_classes)])
        return open_classifier(path)


def measure(
    model: ClassifierFile, manifest: Manifest, split: str, views: ViewSpec, rounds: int
) -> tuple[dict[str, list[float]], float]:
    """Returns the seconds of each row in each round, and the maximum difference of a probability."""
    probabilities = model.for_crop(views.crop)
    batches = [*evaluation_clips(manifest, split, model.clip, views).batch(CLIPS_A_CALL).take(1)]
    total = len(manifest.split(split).records) * views.views
    found: dict[str, NDArray[np.float32]] = {}

    def evaluate() -> None:
        found[EVALUATION] = predict_split(model, manifest, split, views, progress=False).probabilities

    def alone() -> None:
        for first in range(0, total, CLIPS_A_CALL):
            probabilities(batches[0][0][: total - first])

    def naive() -> None:
        found[NAIVE] = naive_loop(probabilities, model.clip, manifest, split, views)

    calls: dict[str, Callable[[], None]] = {EVALUATION: evaluate, ALONE: alone, NAIVE: naive}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    probabilities(batches[0][0])  # compiles
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds, float(np.abs(found[EVALUATION] - found[NAIVE]).max())


def naive_loop(
    probabilities: Callable[[Any], NDArray[np.float32]],
    clip: x3d_tf.ClipSpec,
    manifest: Manifest,
    split: str,
    views: ViewSpec,
) -> NDArray[np.float32]:
    """Returns the mean probabilities of each video, from views that are made and predicted one after another."""
    rows = []
    for record in manifest.split(split).records:
        found = []
        for number in range(views.views):
            found.append(probabilities(naive_view(record, clip, manifest, split, views, number)[None])[0])
        rows.append(np.mean(found, axis=0, dtype=np.float64))
    return np.array(rows, np.float32)


def naive_view(
    record: Any, clip: x3d_tf.ClipSpec, manifest: Manifest, split: str, views: ViewSpec, number: int
) -> NDArray[np.float32]:
    """Reads and prepares one view: float32 (T, crop, crop, 3)."""
    with (manifest.folder / manifest.split(split).shards[record.shard].file).open("rb") as file:
        file.seek(record.offset)
        content = file.read(record.length)
    features = tf.train.SequenceExample.FromString(content)
    files = [feature.bytes_list.value[0] for feature in features.feature_lists.feature_list["image/encoded"].feature]
    fps = features.context.feature["image/frame_rate"].float_list.value[0]
    start = view_starts(len(files), fps, clip, views.temporal_views)[number // views.spatial_crops]
    chosen = frame_indices(np.array([start]), len(files), fps, clip)[0]
    frames = np.stack([tf.io.decode_jpeg(files[index], dct_method="INTEGER_ACCURATE").numpy() for index in chosen])
    height, width = frames.shape[1:3]
    scale = views.resize / min(height, width)
    sides = [views.resize if side == min(height, width) else int(side * scale) for side in (height, width)]
    resized = tf.image.resize(frames, sides).numpy()
    top, left = crop_offsets(*sides, views.crop, views.spatial_crops)[number % views.spatial_crops]
    return resized[:, top : top + views.crop, left : left + views.crop]


def waiting(model: ClassifierFile, manifest: Manifest, split: str, views: ViewSpec) -> dict[str, float]:
    """Returns the time that an evaluation waits for views, and the cost of making one without the network."""
    probabilities = model.for_crop(views.crop)
    dataset = evaluation_clips(manifest, split, model.clip, views).batch(CLIPS_A_CALL).prefetch(2)
    batches, waits, start = iter(dataset), [], time.perf_counter()
    while True:
        before = time.perf_counter()
        batch = next(batches, None)
        waits.append(time.perf_counter() - before)
        if batch is None:
            break
        probabilities(batch[0])
    total = time.perf_counter() - start
    before_use = resource.getrusage(resource.RUSAGE_SELF)
    made = sum(len(clips) for clips, *_ in dataset)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime - before_use.ru_utime + after.ru_stime - before_use.ru_stime
    return {
        "share of the time that the evaluation waits for views, in percent": 100 * sum(waits[1:]) / total,
        "seconds until the first views": waits[0],
        "core-ms to make a view": 1e3 * cpu / made,
    }


def table(seconds: dict[str, list[float]], views: int) -> list[str]:
    """Returns the rows of the table."""
    lines = [f"{'':16} {'ms/view':>8} {'p10 - p90':>16} {'views/s':>8} {'speed':>6}"]
    for name, values in seconds.items():
        of_view = percentiles([1e3 * value / views for value in values])
        speed = median_ratio(seconds[ALONE], values)
        spread = f"{of_view['p10']:.1f} - {of_view['p90']:.1f}"
        lines.append(f"{name:16} {of_view['median']:8.1f} {spread:>16} {1e3 / of_view['median']:8.2f} {speed:6.2f}")
    return lines


if __name__ == "__main__":
    run(main)
