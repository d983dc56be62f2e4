"""Multi-view evaluation of a run or a model file."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from x3d_tf.data.datasets.spec import DatasetSpec, open_dataset
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.sampling import FrameSampling
from x3d_tf.errors import UserError, first_few, require
from x3d_tf.evaluation.comparison import describe
from x3d_tf.evaluation.detection import evaluate_detector
from x3d_tf.evaluation.eval_config import EvalConfig, HeadPool, folder_of
from x3d_tf.evaluation.multiview import predict_split
from x3d_tf.evaluation.reports import (
    RESULTS_NAME,
    Predictions,
    Report,
    locked_report_folder,
    refuse_to_replace,
    write_report,
)
from x3d_tf.modeling.archive import describe as describe_file
from x3d_tf.modeling.archive import weights_of
from x3d_tf.modeling.cost import cost
from x3d_tf.modeling.expansion import name_of
from x3d_tf.modeling.saving import load_classifier
from x3d_tf.modeling.x3d import X3D
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.terminal import tell
from x3d_tf.text import counted
from x3d_tf.types import ClipStarts, Combine, ViewSpec, stored_to_json


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """A network, the records to evaluate it on, and the settings: everything that determines the results.

    Attributes:
        model: the network.
        weights: origin of the weights, for the report.
        manifest: the manifest of the records.
        split: name of the split to evaluate.
        views: the views of each video.
        clip_starts: see `EvalConfig`.
        frame_sampling: see `EvalConfig`.
        combine: see `EvalConfig`.
        seed: seed of the run; None for a model file.

    Raises:
        UserError: the records have classes that the model does not have, or another task.
    """

    model: X3D
    weights: dict[str, Any]
    manifest: Manifest
    split: str
    views: ViewSpec
    clip_starts: ClipStarts
    frame_sampling: FrameSampling
    combine: Combine
    seed: int | None

    def __post_init__(self) -> None:
        known, folder = self.model.class_names, self.manifest.folder
        known_set = set(known)
        unknown = [name for name in self.manifest.classes if name not in known_set]
        if unknown:
            raise UserError(
                f"{folder} has {counted(len(unknown), 'class')} unknown to the model: {first_few(unknown)}. The model "
                f"has {len(known)}: {first_few(known)}. Fine-tune it on the new classes (TrainConfig.init)"
            )
        task = self.model.task
        require(
            self.manifest.task == task, f"the task of {folder}", f"be that of the model, {task}", self.manifest.task
        )

    def with_views(self, temporal_views: int) -> "Evaluation":
        """Returns a copy with another number of clips per video."""
        return replace(self, views=replace(self.views, temporal_views=temporal_views))

    def settings(self) -> dict[str, Any]:
        """Returns the settings as results.json states them."""
        model, views, split = self.model, self.views, self.manifest.split(self.split)
        count = cost(
            model.expansion,
            replace(model.clip, size=views.crop),
            num_classes=model.num_classes,
            options=model.options,
        )
        return {
            "network": name_of(model.expansion),
            **self.weights,
            "records": str(self.manifest.folder),
            "records_sha256": self.manifest.fingerprint(),
            "dataset": self.manifest.dataset,
            "split": self.split,
            "task": model.task,
            "videos": len(split.records),
            "videos_expected": split.expected,
            "videos_present": split.present,
            "classes": model.num_classes,
            "views": f"{views.temporal_views}-{'Center' if views.spatial_crops == 1 else 'LeftCenterRight'}",
            "gmacs_per_clip": count.macs / 1e9,
            "gmacs_per_video": count.macs * views.views / 1e9,
            "params": count.params,
            "frames": model.clip.frames,
            "stride": model.clip.stride,
            "resize": views.resize,
            "crop": views.crop,
            "stretch": views.stretch,
            "clip_starts": self.clip_starts,
            "frame_sampling": self.frame_sampling,
            "combine": self.combine,
            "stored": stored_to_json(self.manifest.stored),
            "head_pool": model.options.head_pool,
            "stem_kernel": model.options.stem_kernel,
            "options": asdict(model.options),
            "seed": self.seed,
        }

    def predict(self) -> Predictions:
        """Runs the network on all views of all videos."""
        probabilities = predict_split(
            self.model,
            self.manifest,
            self.split,
            self.views,
            clip_starts=self.clip_starts,
            frame_sampling=self.frame_sampling,
            combine=self.combine,
        )
        records = self.manifest.split(self.split).records
        names = self.model.class_names
        return Predictions(
            tuple(record.media_id for record in records), names, probabilities, self._truth(), self.model.task
        )

    def _truth(self) -> np.ndarray:
        """Returns the labels of each record as the model's classes, bool (videos, classes)."""
        # reversed, so that the first of several classes with the same name is used
        model_classes = {name: index for index, name in reversed([*enumerate(self.model.class_names)])}
        model_labels = [model_classes[name] for name in self.manifest.classes]
        records = self.manifest.split(self.split).records
        truth = np.zeros((len(records), self.model.num_classes), bool)
        for row, record in zip(truth, records):
            row[[model_labels[label] for label in record.labels]] = True
        return truth

    def report(self, folder: Path) -> Report:
        """Runs the evaluation and writes its report.

        Raises:
            UserError: the records are missing or damaged, the probabilities are not finite, or another process writes
                the same report.
        """
        settings = self.settings()
        with locked_report_folder(folder):  # before the evaluation, so that a wrong path fails at once
            predictions = self.predict()
            tell(f"writing the report {folder}")
            return write_report(folder, settings, predictions)


def with_head_pool(model: X3D, head_pool: HeadPool | None) -> X3D:
    """Returns the network with another head pooling and the same weights; `model` itself if nothing changes."""
    if head_pool is None or head_pool == model.options.head_pool:
        return model
    options = replace(model.options, head_pool=head_pool)
    changed = X3D(model.expansion, model.num_classes, options, task=model.task)
    changed.set_weights(model.get_weights())  # pooling has no weights
    changed.copy_metadata(model)
    return changed


def evaluation_of_run(run: RunFolder, eval_config: EvalConfig, model: X3D, weights: dict[str, Any]) -> Evaluation:
    """Returns the evaluation of a network of a run. Settings that are None are those of the run.

    Args:
        run: the run folder.
        eval_config: the evaluation settings.
        model: the network of the run, from model.keras or from a checkpoint.
        weights: origin of the weights, for the report.
    """
    config = run.read_config()
    dataset = eval_config.dataset_of(config)
    return Evaluation(
        model=with_head_pool(model, eval_config.head_pool),
        weights=weights,
        manifest=open_dataset(dataset),
        split=dataset.eval_split,
        views=eval_config.views_for(model, config.test_views),
        clip_starts=eval_config.clip_starts,
        frame_sampling=eval_config.frame_sampling or dataset.frame_sampling,
        combine=eval_config.combine or config.combine,
        seed=config.seed,
    )


def evaluation_of_file(file: Path, eval_config: EvalConfig) -> Evaluation:
    """Returns the evaluation of a model file.

    Raises:
        UserError: the file does not exist or was not saved by this package; the settings lack records or split.
    """
    if eval_config.records is None or eval_config.split is None:
        raise UserError(f"evaluating the model file {file} requires --records and --split")
    dataset = DatasetSpec(eval_config.records, train_split=eval_config.split, eval_split=eval_config.split)
    model = load_classifier(file)
    return Evaluation(
        model=with_head_pool(model, eval_config.head_pool),
        weights=weights_of(file),
        manifest=open_dataset(dataset),
        split=dataset.eval_split,
        views=eval_config.views_for(model, model.test_views),
        clip_starts=eval_config.clip_starts,
        frame_sampling=eval_config.frame_sampling or model.frame_sampling,
        combine=eval_config.combine or model.combine,
        seed=None,
    )


def evaluate_run(run: RunFolder, *, output: str | None = None, overwrite: bool = False, **settings: Any) -> Report:
    """Evaluates the model of a finished run and writes a report; for a detector, calls `evaluate_detector`.

    Args:
        run: the run folder.
        output: folder of the report. Defaults to `evaluation/RECORDS_SPLIT_Kcenter` in the run folder.
        overwrite: whether to replace an existing report.
        **settings: the fields of `EvalConfig`: records, split, temporal_views, spatial_crops, clip_starts,
            frame_sampling, combine, head_pool.

    Raises:
        UserError: the run has no model yet; the records are missing, damaged or have other classes; a report exists; a
            setting is out of range.
    """
    if describe_file(run.root).task == "detection":
        changed = sorted(name for name, value in settings.items() if value != getattr(EvalConfig(), name))
        require(not changed, f"the evaluation of the detector {run.root}", "use the settings of the run", changed)
        return evaluate_detector(run, output=output, overwrite=overwrite)
    eval_config = EvalConfig(**settings)
    folder = Path(output) if output else folder_of(run, eval_config)
    refuse_to_replace(folder / RESULTS_NAME, overwrite)
    report = evaluation_of_run(run, eval_config, load_classifier(run.root), weights_of(run.root)).report(folder)
    print(describe(report))
    return report


def evaluate_file(file: str | Path, *, output: str, overwrite: bool = False, **settings: Any) -> Report:
    """Evaluates a `.keras` file of this package and writes a report.

    Args:
        file: the model file.
        output: folder of the report.
        overwrite: whether to replace an existing report.
        **settings: the fields of `EvalConfig`, including records and split. The others default to those stored in the
            file.

    Raises:
        UserError: the file does not exist or was not saved by this package; otherwise as `evaluate_run`.
    """
    folder = Path(output)
    refuse_to_replace(folder / RESULTS_NAME, overwrite)
    report = evaluation_of_file(Path(file), EvalConfig(**settings)).report(folder)
    print(describe(report))
    return report
