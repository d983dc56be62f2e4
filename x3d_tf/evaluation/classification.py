"""Multi-view testing of a run or of a model file: from what is asked for to a report."""

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
from x3d_tf.evaluation.reports import RESULTS_NAME, Predictions, Report, refuse_to_replace, reporting, write_report
from x3d_tf.modeling.archive import describe as describe_file
from x3d_tf.modeling.archive import weights_of
from x3d_tf.modeling.cost import cost
from x3d_tf.modeling.expansion import name_of
from x3d_tf.modeling.saving import load_classifier
from x3d_tf.modeling.x3d import X3D
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.terminal import tell
from x3d_tf.text import counted
from x3d_tf.types import ClipStarts, ViewSpec, stored_to_json


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """A network, the videos to test it on, and how: everything that decides what comes out.

    Attributes:
        model: the network.
        weights: where they come from, for the report.
        manifest: of the records.
        split: their part.
        views: of each video.
        clip_starts, frame_sampling: see `EvalConfig`.
        seed: of the run; None for a model file.

    Raises:
        UserError: records of classes that the model does not know, or of another task.
    """

    model: X3D
    weights: dict[str, Any]
    manifest: Manifest
    split: str
    views: ViewSpec
    clip_starts: ClipStarts
    frame_sampling: FrameSampling
    seed: int | None

    def __post_init__(self) -> None:
        known, folder = self.model.class_names, self.manifest.folder
        those = set(known)
        unknown = [name for name in self.manifest.classes if name not in those]
        if unknown:
            raise UserError(
                f"{folder} has {counted(len(unknown), 'class')} unknown to the model: {first_few(unknown)}; it knows "
                f"{len(known)}: {first_few(known)}. To know them, train from it (TrainConfig.init)"
            )
        task = self.model.task
        require(self.manifest.task == task, f"task of {folder}", f"be the model's, {task}", self.manifest.task)

    def with_views(self, temporal_views: int) -> "Evaluation":
        """The same with another number of clips."""
        return replace(self, views=replace(self.views, temporal_views=temporal_views))

    def settings(self) -> dict[str, Any]:
        """What results.json says of it."""
        model, views = self.model, self.views
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
            "split": self.split,
            "task": model.task,
            "videos": len(self.manifest.split(self.split).records),
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
            "stored": stored_to_json(self.manifest.stored),
            "head_pool": model.options.head_pool,
            "stem_kernel": model.options.stem_kernel,
            "options": asdict(model.options),
            "seed": self.seed,
        }

    def predict(self) -> Predictions:
        """Runs the network over all views of all videos."""
        probabilities = predict_split(
            self.model,
            self.manifest,
            self.split,
            self.views,
            clip_starts=self.clip_starts,
            frame_sampling=self.frame_sampling,
        )
        records = self.manifest.split(self.split).records
        names = self.model.class_names
        return Predictions(
            tuple(record.media_id for record in records), names, probabilities, self._truth(), self.model.task
        )

    def _truth(self) -> np.ndarray:
        """The model's classes of each record, bool (videos, classes)."""
        places = {name: place for place, name in reversed([*enumerate(self.model.class_names)])}  # the first of a name
        of_model = [places[name] for name in self.manifest.classes]
        records = self.manifest.split(self.split).records
        truth = np.zeros((len(records), self.model.num_classes), bool)
        for row, record in zip(truth, records):
            row[[of_model[label] for label in record.labels]] = True
        return truth

    def report(self, folder: Path) -> Report:
        """Tests and writes the report.

        Raises:
            UserError: records that are missing or damaged; probabilities that are not numbers; another process writes
                this report.
        """
        settings = self.settings()
        with reporting(folder):  # before the long part, which a mistyped path should not waste
            predictions = self.predict()
            tell(f"writing the report {folder}")
            return write_report(folder, settings, predictions)


def with_head_pool(model: X3D, head_pool: HeadPool | None) -> X3D:
    """The same network and weights with another pooling of the head; the model itself if it is its own or None."""
    if head_pool is None or head_pool == model.options.head_pool:
        return model
    options = replace(model.options, head_pool=head_pool)
    changed = X3D(model.expansion, model.num_classes, options, task=model.task)
    changed.set_weights(model.get_weights())  # poolings have no weights, so the lists are the same
    changed.copy_metadata(model)
    return changed


def evaluation_of_run(run: RunFolder, procedure: EvalConfig, model: X3D, weights: dict[str, Any]) -> Evaluation:
    """What is tested where a run's network is: the run's own records and settings but for what is asked for.

    Args:
        run: the run.
        procedure: what is asked for.
        model: its network, of model.keras or of a checkpoint.
        weights: where they come from, for the report.
    """
    config = run.read_config()
    dataset = procedure.dataset_of(config)
    return Evaluation(
        model=with_head_pool(model, procedure.head_pool),
        weights=weights,
        manifest=open_dataset(dataset),
        split=dataset.eval_split,
        views=procedure.views_of(model, config.test_views),
        clip_starts=procedure.clip_starts,
        frame_sampling=procedure.frame_sampling or dataset.frame_sampling,
        seed=config.seed,
    )


def evaluation_of_file(file: Path, procedure: EvalConfig) -> Evaluation:
    """What is tested where a model file is.

    Raises:
        UserError: no such file, or not one of ours; a procedure that does not name records and split.
    """
    if procedure.records is None or procedure.split is None:
        raise UserError(f"to test the file {file}, say on what: give --records and --split")
    dataset = DatasetSpec(procedure.records, train_split=procedure.split, eval_split=procedure.split)
    model = load_classifier(file)
    return Evaluation(
        model=with_head_pool(model, procedure.head_pool),
        weights=weights_of(file),
        manifest=open_dataset(dataset),
        split=dataset.eval_split,
        views=procedure.views_of(model, model.test_views),
        clip_starts=procedure.clip_starts,
        frame_sampling=procedure.frame_sampling or model.frame_sampling,
        seed=None,
    )


def evaluate_run(run: RunFolder, *, output: str | None = None, overwrite: bool = False, **procedure: Any) -> Report:
    """Tests the model of a finished run and writes a report. That of a detector is `evaluate_detector`'s.

    Args:
        run: the run.
        output: folder of the report; `evaluation/RECORDS_SPLIT_Kcenter` in the run folder unless given.
        overwrite: whether a report that is there may be replaced.
        **procedure: the fields of `EvalConfig`: records, split, temporal_views, spatial_crops, clip_starts,
            frame_sampling, head_pool.

    Raises:
        UserError: the run has no model yet; the records are missing, damaged or of other classes; a report is there; a
            setting out of range.
    """
    if describe_file(run.root).task == "detection":
        unused = sorted(name for name, value in procedure.items() if value != getattr(EvalConfig(), name))
        require(not unused, f"the test of a detector, {run.root},", "take no other procedure than the run's", unused)
        return evaluate_detector(run, output=output, overwrite=overwrite)
    asked = EvalConfig(**procedure)
    folder = Path(output) if output else folder_of(run, asked)
    refuse_to_replace(folder / RESULTS_NAME, overwrite)
    report = evaluation_of_run(run, asked, load_classifier(run.root), weights_of(run.root)).report(folder)
    print(describe(report))
    return report


def evaluate_file(file: str | Path, *, output: str, overwrite: bool = False, **procedure: Any) -> Report:
    """Tests a `.keras` file of this package as it is and writes a report.

    Args:
        file: the file.
        output: folder of the report.
        overwrite: whether a report that is there may be replaced.
        **procedure: the fields of `EvalConfig`, among them records and split. What is left out defaults to what the
            file says.

    Raises:
        UserError: no such file, or not one of ours; otherwise as `evaluate_run`.
    """
    folder = Path(output)
    refuse_to_replace(folder / RESULTS_NAME, overwrite)
    report = evaluation_of_file(Path(file), EvalConfig(**procedure)).report(folder)
    print(describe(report))
    return report
