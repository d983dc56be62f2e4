"""Multi-view testing: each video's probabilities are the mean over clips spread across it (paper, section 4)."""

import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from x3d_tf import _plots
from x3d_tf._checks import UserError
from x3d_tf.data.clips import ClipStarts, FrameSampling, ViewSpec
from x3d_tf.data.datasets import DatasetSpec, open_dataset
from x3d_tf.data.manifest import Manifest
from x3d_tf.evaluation.metrics import confusion_matrix, top_k_accuracy
from x3d_tf.evaluation.views import predict_split
from x3d_tf.modeling.cost import cost
from x3d_tf.modeling.expansion import name_of
from x3d_tf.modeling.saving import load
from x3d_tf.modeling.x3d import X3D
from x3d_tf.training.run_folder import RunFolder

_CLIP_STARTS: ClipStarts = "offset"
_FRAME_SAMPLING: FrameSampling = "slowfast"


@dataclass(frozen=True)
class Report:
    """What a test found, and the folder with the details.

    Attributes:
        folder: holds results.json, predictions.csv and confusion.png.
        results: the content of results.json.
    """

    folder: Path
    results: dict[str, Any]


def evaluate_run(
    run: RunFolder,
    *,
    records: str | None = None,
    split: str | None = None,
    temporal_views: int | None = None,
    output: str | None = None,
    overwrite: bool = False,
) -> Report:
    """Tests the model of a finished run by K-Center testing and writes a report.

    Args:
        run: the run.
        records: folder of the records; the run's own unless given. Their classes must be among the model's.
        split: its part; the one that the run tests on unless given.
        temporal_views: clips of a video, K; the run's own unless given.
        output: folder of the report; `evaluation/RECORDS_SPLIT_Kcenter` in the run folder unless given.
        overwrite: whether a report that is there may be replaced.

    Raises:
        UserError: the run has no model yet; the records are missing, damaged or of other classes; a report is there.
    """
    config = run.read_config()
    dataset = replace(config.dataset, eval_split=split or config.dataset.eval_split)
    if records is not None:
        dataset = replace(dataset, name="records", records=records, train_split=dataset.eval_split)
    expansion = config.expansion
    views = ViewSpec(
        temporal_views=temporal_views or config.test_views, resize=expansion.test_size, crop=expansion.clip.size
    )
    folder = Path(output) if output else report_folder(run, dataset, views.temporal_views)
    if (folder / "results.json").is_file() and not overwrite:
        raise UserError(f"{folder} holds a report already; choose another --output, or replace it with --overwrite")
    manifest, model = open_dataset(dataset), load(run.root)
    labels = _labels(manifest, dataset.eval_split, model.class_names)
    probabilities = predict_split(
        model, manifest, dataset.eval_split, views, clip_starts=_CLIP_STARTS, frame_sampling=_FRAME_SAMPLING
    )
    report = _write(folder, model, manifest, dataset.eval_split, views, probabilities, labels, config.seed)
    print(describe(report))
    return report


def report_folder(run: RunFolder, dataset: DatasetSpec, temporal_views: int) -> Path:
    """Where the report of a test goes by itself."""
    return run.evaluations / f"{Path(dataset.records).name}_{dataset.eval_split}_{temporal_views}center"


def _labels(manifest: Manifest, split: str, class_names: tuple[str, ...]) -> np.ndarray:
    """The model's class of each record of a split."""
    unknown = [name for name in manifest.classes if name not in class_names]
    if unknown:
        raise UserError(
            f"{manifest.folder} has classes that the model does not know: {', '.join(unknown)}; it knows "
            f"{', '.join(class_names)}"
        )
    of_model = np.array([class_names.index(name) for name in manifest.classes])
    return of_model[[record.label for record in manifest.split(split).records]]


def _write(
    folder: Path,
    model: X3D,
    manifest: Manifest,
    split: str,
    views: ViewSpec,
    probabilities: np.ndarray,
    labels: np.ndarray,
    seed: int,
) -> Report:
    test_clip = replace(model.clip, size=views.crop)
    macs = cost(model.expansion, test_clip, num_classes=model.num_classes, options=model.options).macs
    results = {
        "network": name_of(model.expansion),
        "records": str(manifest.folder),
        "split": split,
        "videos": len(labels),
        "classes": model.num_classes,
        "views": f"{views.temporal_views}-{'Center' if views.spatial_crops == 1 else 'LeftCenterRight'}",
        "top1": top_k_accuracy(probabilities, labels, 1),
        "top5": top_k_accuracy(probabilities, labels, 5),
        "gmacs_per_clip": macs / 1e9,
        "gmacs_per_video": macs * views.views / 1e9,
        "resize": views.resize,
        "crop": views.crop,
        "clip_starts": _CLIP_STARTS,
        "frame_sampling": _FRAME_SAMPLING,
        "head_pool": model.options.head_pool,
        "stem_kernel": model.options.stem_kernel,
        "seed": seed,
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_predictions(folder / "predictions.csv", manifest, split, model.class_names, probabilities, labels)
    confusion = confusion_matrix(probabilities.argmax(axis=1), labels, model.num_classes)
    title = f"{results['network']}, {split}, {results['views']}: top-1 {results['top1']:.1%}"
    _plots.save_confusion(confusion, model.class_names, folder / "confusion.png", title)
    # last: a folder that has it has the rest
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    return Report(folder, results)


def _write_predictions(
    path: Path, manifest: Manifest, split: str, names: tuple[str, ...], probabilities: np.ndarray, labels: np.ndarray
) -> None:
    """One row a video: its name, its class, the class with the highest probability, and all probabilities."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "label", "predicted", *(f"p({name})" for name in names)])
        for record, label, row in zip(manifest.split(split).records, labels, probabilities):
            writer.writerow([record.media_id, names[label], names[row.argmax()], *(f"{p:.6g}" for p in row)])


def describe(report: Report) -> str:
    """The results in one line for people."""
    r = report.results
    top5 = f", top-5 {r['top5']:.1%}" if r["classes"] > 5 else ""
    return (
        f"{r['network']} on {r['records']}, split {r['split']}: top-1 {r['top1']:.1%}{top5} ({r['videos']} videos, "
        f"{r['classes']} classes, {r['views']}, {r['gmacs_per_video']:.2f} GMACs a video; the paper's figures "
        "are of Kinetics)"
    )
