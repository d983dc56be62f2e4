"""The training loop, for one or several devices of a machine."""

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from x3d_tf.config import TrainConfig
from x3d_tf.data.datasets.spec import HELD_OUT, hold_out, open_for_training, with_default_splits
from x3d_tf.data.detection_pipeline import require_proposals, with_labels
from x3d_tf.data.input_pipeline import record_errors_as_user_errors
from x3d_tf.data.records.index import Record
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.sampling import input_contract
from x3d_tf.errors import UserError, require
from x3d_tf.files import atomic_write
from x3d_tf.modeling.archive import describe
from x3d_tf.modeling.cost import cost
from x3d_tf.modeling.detection import Detector
from x3d_tf.modeling.expansion import name_of
from x3d_tf.modeling.portable import portable
from x3d_tf.modeling.saving import load, save
from x3d_tf.modeling.x3d import X3D
from x3d_tf.parallel import num_batch_slices
from x3d_tf.runs.advice import print_advice
from x3d_tf.runs.checkpoints import Checkpoints, Origin
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.signals import held_back
from x3d_tf.terminal import tell
from x3d_tf.text import counted
from x3d_tf.training.history import History
from x3d_tf.training.inputs import save_training_preview, training_clips
from x3d_tf.training.precise_bn import PreciseStatistics
from x3d_tf.training.step import TrainStep, balancing_weights, precision_scope
from x3d_tf.training.transfer import load_pretrained
from x3d_tf.training.validation import DetectorValidation, Score, Validation

_LOG_STEPS = 10  # steps between two rows of history.csv


def train(
    config: TrainConfig,
    workdir: str | Path,
    *,
    strategy: tf.distribute.Strategy | None = None,
    texts: Mapping[str, str] | None = None,
    allow_other_groups: bool = False,
) -> RunFolder:
    """Trains a network and saves it. If `workdir` contains an interrupted run, resumes it.

    Args:
        config: the settings that determine the result.
        workdir: the run folder, created if it does not exist.
        strategy: the distribution strategy. Defaults to all GPUs of the machine, or its CPU. Strategies with several
            workers are not supported, because the workers would write the same files.
        texts: contents of additional files, by name, written to the run folder before the first step.
        allow_other_groups: whether to resume even if another number of devices or another `Execution.accumulation`
            changes the batch-norm groups, and therefore the result.

    Returns:
        The run folder, which contains `model.keras`.

    Raises:
        UserError: the folder belongs to a run with other settings, has lost its checkpoints, or is in use by another
            process; the batch cannot be divided among the devices; the records are missing or too few; the initial
            weights are missing or belong to a different architecture; the loss is not finite.
    """
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        raise UserError("strategy must use the devices of a single machine, got a MultiWorkerMirroredStrategy")
    run = RunFolder(workdir)
    if config.init is not None and not run.has_checkpoint:
        describe(config.init)  # fail on a wrong path before the records are built
    if run.config.is_file() and run.model.is_file():  # nothing is written, so no lock is needed
        used = run.read_config().dataset  # not from the manifest: the records may have been deleted
        names = {used.train_split, used.eval_split, used.validation_split or used.train_split}
        run.open(replace(config, dataset=with_default_splits(config.dataset, names)), {})
        print(f"{run.root} is already finished ({run.model} exists)")
        return run
    with run.training():
        manifest, dataset = open_for_training(config.dataset)
        config = replace(config, dataset=dataset)
        run.open(config, texts or {})
        if not run.model.is_file():  # another process may have finished the run in the meantime
            _train(config, manifest, run, strategy or tf.distribute.MirroredStrategy(), allow_other_groups)
    return run


def _train(
    config: TrainConfig,
    manifest: Manifest,
    run: RunFolder,
    strategy: tf.distribute.Strategy,
    allow_other_groups: bool,
) -> None:
    records = hold_out(manifest, config.dataset, config.seed)
    _check_records(records, config)
    print(_describe_splits(records, config))
    if not run.has_checkpoint:  # settings can no longer be changed after the first checkpoint
        print_advice(records, config)
    if not run.preview.is_file():
        tell(f"saving a preview of the first training clips: {run.preview}")
        save_training_preview(records, config, run.preview)
    tell("building the network")
    trainer = Trainer(config, records, strategy)
    trainer.fit(run, manifest.fingerprint(), allow_other_groups=allow_other_groups)
    print("Saving the model.")
    atomic_write(run.labels, "".join(f"{name}\n" for name in manifest.classes).encode())
    atomic_write(run.input, json.dumps(input_contract(trainer.model), indent=1).encode())
    trainer.save_result(run)


class Trainer:
    """Trains the network of a run, and validates and saves checkpoints between the steps.

    Sets Keras' global seed to that of the configuration.

    Args:
        config: the configuration of the run.
        manifest: the manifest of the records, including the split held out for validation.
        strategy: the distribution strategy.

    Raises:
        UserError: the batch cannot be divided evenly among devices, micro-batches and batch-norm groups.
    """

    def __init__(self, config: TrainConfig, manifest: Manifest, strategy: tf.distribute.Strategy) -> None:
        self.config, self.manifest, self.strategy = config, manifest, strategy
        self.steps, self.batch = config.recipe.scaled_steps, config.recipe.batch
        _check_batch(config, strategy.num_replicas_in_sync)
        keras.utils.set_random_seed(config.seed)
        with strategy.scope():
            with precision_scope(config.execution.precision):
                self.model = _build_network(config, manifest)
            self.model.class_names, self.model.stored = manifest.classes, manifest.stored
            self.model.stretch, self.model.frame_sampling = config.dataset.stretch, config.dataset.frame_sampling
            self.model.test_views, self.model.combine = config.test_views, config.combine
            self.step = TrainStep(self.model, config, strategy, self._class_weights())
        precise = config.recipe.precise_bn_batches
        self.statistics = PreciseStatistics(self.model, strategy) if precise else None
        split = HELD_OUT if config.dataset.validation_fraction else config.dataset.validation_split
        self.validation = self._build_validation(split) if split else None

    def _build_validation(self, split: str) -> Callable[[], Score]:
        if isinstance(self.model, Detector):
            return DetectorValidation(self.model, self.manifest, split, self.config.detection)
        return Validation(self.model, self.manifest, split, self.config.dataset, self.config.expansion.test_size)

    def fit(self, run: RunFolder, records: str, *, allow_other_groups: bool = False) -> None:
        """Trains until the last step or early stopping, starting from the newest checkpoint if one exists.

        Args:
            run: the run folder.
            records: fingerprint of the manifest. The checkpoints must have been written with the same records.
            allow_other_groups: see `train`.
        """
        origin = Origin(self.config.fingerprint(), records, *self._batch_norm_groups())
        checkpoints = Checkpoints(run, self.model, self.step.variables, origin)
        first = checkpoints.restore(allow_other_groups=allow_other_groups)
        if first:
            run.update_config(self.config)
        else:
            self._load_initial_weights()
        steps_per_epoch = len(_training_records(self.manifest, self.config)) // self.batch
        history = History(run, self.config, steps_per_epoch, first)
        print(self._describe(run) + (f", resuming from the checkpoint of step {first}" if first else ""))
        self._warn_about_small_groups(origin)
        tell("compiling the training step: on a slow machine the first step may take a minute or two")
        try:
            with (
                record_errors_as_user_errors(),
                tqdm(total=self.steps, initial=first, bar_format=_BAR, mininterval=1.0) as bar,
            ):
                self._loop(run, checkpoints, history, first, bar)
        except KeyboardInterrupt:
            self._save_interrupted(checkpoints, history)
            raise
        history.save_plots()  # the run may have been killed after its last checkpoint, before the plots were drawn
        if left_out := history.boxes_left_out():
            print(f"{counted(left_out, 'box')} ignored: outside the training crops")

    def _loop(self, run: RunFolder, checkpoints: Checkpoints, history: History, first: int, bar: Any) -> None:
        if first and self._is_checkpoint(first):  # the validation may have been interrupted; repeating it is harmless
            self._refresh_statistics(first)
            self._validate(run, history, first)
        batches, step = iter(self._batches(first)), first
        self.step.trace(batches)  # outside of `held_back`, because it takes long and may be interrupted
        while step < self.steps and not self._is_patience_exhausted(history):
            count = self._steps_until_pause(step)
            with held_back():  # the history must contain every step taken
                history.add(self.step(batches, count))
                step += count
                _advance(bar, step, first)
                if self._is_checkpoint(step) or step // _LOG_STEPS != (step - count) // _LOG_STEPS:
                    bar.set_postfix_str(history.end_row(step))
            if self._is_checkpoint(step):
                self._refresh_statistics(step)
                checkpoints.save(step)  # before the validation, which may take long or fail
                self._validate(run, history, step)
                history.save_plots()
                history.restart_clock()
        if step < self.steps:
            patience = self.config.recipe.patience
            tqdm.write(f"early stopping at step {step}: no improvement in {counted(patience, 'validation')}")

    def _refresh_statistics(self, step: int) -> None:
        """Recomputes the batch-norm statistics with the evaluation weights (Recipe.precise_bn_batches)."""
        if self.statistics is None:
            return
        # the batches that follow this step, so that a resumed run computes the same statistics
        batches, micro_batches = iter(self._batches(step)), self.config.execution.accumulation
        with self._eval_weights():
            self.statistics.refresh(batches, self.config.recipe.precise_bn_batches * micro_batches)
            if self.step.average is not None:
                self.step.average.copy_statistics()

    def _validate(self, run: RunFolder, history: History, step: int) -> None:
        """Evaluates the network on the validation split; with early stopping, saves it if it is the best so far."""
        if self.validation is None:
            return
        with self._eval_weights():
            score = self.validation()
            tqdm.write(f"step {step}: validation accuracy {score.accuracy:.1%}, loss {score.loss:.3f}")
            if history.add_validation(step, score) and self.config.recipe.patience:
                save(self.model, run.best, self.manifest.classes, overwrite=True)

    def _steps_until_pause(self, step: int) -> int:
        """Returns the number of steps of the next call, at most up to the next checkpoint or, if near, log row."""
        count = min(self.config.execution.steps_per_execution, self.steps - step)
        intervals = [self.config.checkpoint_steps] + ([_LOG_STEPS] if count <= _LOG_STEPS else [])
        return min([count, *(interval - step % interval for interval in intervals)])

    def _is_checkpoint(self, step: int) -> bool:
        return step % self.config.checkpoint_steps == 0 or step == self.steps

    def _eval_weights(self) -> Any:
        """Returns a context in which the network holds the EMA of its weights, if EMA is enabled."""
        return self.step.average.swapped() if self.step.average is not None else nullcontext()

    def _is_patience_exhausted(self, history: History) -> bool:
        patience = self.config.recipe.patience
        return bool(patience) and history.best()[1] >= patience

    def save_result(self, run: RunFolder) -> None:
        """Saves the portable form of the network; with early stopping, the network with the best validation score."""
        if self.config.recipe.patience:
            save(portable(load(run.best), self.manifest.classes), run.model)
            return
        with self._eval_weights():
            save(portable(self.model, self.manifest.classes), run.model)

    def _load_initial_weights(self) -> None:
        """Loads the weights that `TrainConfig.init` names, if any."""
        if self.config.init is not None:
            print(load_pretrained(self.model, self.config.init))
            if self.step.average is not None:
                self.step.average.reset()

    def _save_interrupted(self, checkpoints: Checkpoints, history: History) -> None:
        """Saves a checkpoint of the last step that the optimizer completed, and the history up to it."""
        step = self.step.completed_steps
        if history.pending:
            history.end_row(step)  # before the checkpoint: raises if the loss is not finite
        if step:
            checkpoints.save(step)
        history.writer.flush()  # last, because flushing may fail
        print(f"\ninterrupted at step {step}; run the same command again to resume", file=sys.stderr)

    def _batches(self, first: int) -> tf.distribute.DistributedDataset:
        config = self.config

        def for_worker(context: tf.distribute.InputContext) -> tf.data.Dataset:
            return training_clips(
                self.manifest,
                config,
                start_step=first,
                worker=(context.input_pipeline_id, context.num_input_pipelines),
                replica_batch=context.get_per_replica_batch_size(self.batch) // config.execution.accumulation,
            )

        return self.strategy.distribute_datasets_from_function(for_worker)

    def _class_weights(self) -> np.ndarray | None:
        if self.config.recipe.class_weights == "none":
            return None
        if self.manifest.task != "single_label":
            raise UserError('Recipe.class_weights must be "none" for multi-label and detection records')
        records = self.manifest.split(self.config.dataset.train_split).records
        return balancing_weights(np.array([record.labels[0] for record in records]), len(self.manifest.classes))

    def _describe(self, run: RunFolder) -> str:
        devices, config = self.strategy.num_replicas_in_sync, self.config
        macs = cost(config.expansion, num_classes=self.model.num_classes, options=config.model).macs
        reference = config.recipe.reference_batch
        scaled = f" (scaled from Recipe.steps = {config.recipe.steps} at Recipe.reference_batch = {reference})"
        scaled = scaled if reference != self.batch else ""
        clips = self.batch // devices // config.execution.accumulation
        slices = num_batch_slices(clips, config.model.bn_group)
        in_parallel = f" ({slices} batch slices in parallel)" if slices > 1 else ""
        return (
            f"Training {name_of(config.expansion)} ({macs / 1e9:.3f} GMACs per clip) in {run.root} on "
            f"{counted(devices, 'device')}{in_parallel}: {counted(self.steps, 'step')} with a batch of "
            f"{counted(self.batch, 'clip')}{scaled}, {self._describe_groups()}"
        )

    def _batch_norm_groups(self) -> tuple[int, int]:
        """Returns the clips per batch-norm group and the groups per step; (0, 0) if batch norm is frozen.

        Slices of a batch that run in parallel do not reduce the group: batch norm computes its statistics across them.
        """
        if self.config.recipe.frozen_norms:
            return 0, 0
        clips = self.batch // self.strategy.num_replicas_in_sync // self.config.execution.accumulation
        clips = min(clips, self.config.model.bn_group)
        return clips, self.batch // clips

    def _describe_groups(self) -> str:
        clips, groups = self._batch_norm_groups()
        if not clips:
            return "batch norm frozen"
        return f"batch norm over groups of {counted(clips, 'clip')} ({groups} per step)"

    def _warn_about_small_groups(self, origin: Origin) -> None:
        recommended = self.config.model.bn_group
        if 0 < origin.clips_per_group < recommended:
            print(
                f"warning: batch-norm groups have {counted(origin.clips_per_group, 'clip')}, fewer than "
                f"ModelOptions.bn_group = {recommended}, so the statistics are noisier than the recipe intends. "
                "Increase Recipe.batch, or reduce Execution.accumulation or the number of devices",
                file=sys.stderr,
            )


def _advance(bar: "tqdm[Any]", done: int, first: int) -> None:
    """Moves the bar to `done` steps.

    The first call restarts the clock, so that the time left does not include compilation.

    Args:
        bar: the progress bar, which started at step `first`.
        done: number of steps taken, more than before.
        first: number of steps taken before this process.
    """
    if bar.initial == first:
        bar.initial = bar.n = done
        bar.unpause()
        bar.refresh()
    else:
        bar.update(done - bar.n)


_BAR = "step {n_fmt}/{total_fmt} |{bar:20}| {remaining} left{postfix}"


def _describe_splits(manifest: Manifest, config: TrainConfig) -> str:
    """Returns a sentence that states the purpose of each split, including splits chosen by default."""
    dataset = config.dataset
    validation = HELD_OUT if dataset.validation_fraction else dataset.validation_split
    uses = {dataset.train_split: ["training"]}
    uses.setdefault(validation or "", []).append("validation")
    uses.setdefault(dataset.eval_split, []).append("the final evaluation")
    parts = [
        f"{name} ({len(manifest.splits[name].records)} records) for {' and '.join(purposes)}"
        for name, purposes in uses.items()
        if name
    ]
    text = f"Splits: {', '.join(parts)}."
    if validation == dataset.eval_split and config.recipe.patience:
        text += f" Early stopping selects the best step on {validation}, so its results are optimistically biased."
    return text


def _check_records(manifest: Manifest, config: TrainConfig) -> None:
    split = config.dataset.train_split
    if manifest.task == "detection":
        _check_detection(manifest, config)
    validated = config.dataset.validation_split is not None or config.dataset.validation_fraction > 0
    rule = 'be 0 without validation: a "val" split, DatasetSpec.validation_split or DatasetSpec.validation_fraction'
    require(validated or not config.recipe.patience, "Recipe.patience", rule, config.recipe.patience)
    available = len(_training_records(manifest, config))
    fits = config.recipe.batch <= available
    rest = " that are not held out for validation" if config.dataset.validation_fraction else ""
    rule = f"be at most {available}, the number of records in split {split!r}{rest}"
    require(fits, "Recipe.batch", rule, config.recipe.batch)


def _check_detection(manifest: Manifest, config: TrainConfig) -> None:
    dataset = config.dataset
    for name, required in (("stretch", False), ("frame_sampling", "slowfast")):
        value, rule = (
            getattr(dataset, name),
            f"be {required!r} for detection, because clips are sampled around key frames",
        )
        require(value == required, f"DatasetSpec.{name}", rule, value)
    if config.detection.eval_boxes == "proposals":
        for split in filter(None, (dataset.eval_split, dataset.validation_split)):
            require_proposals(manifest, split)


def _training_records(manifest: Manifest, config: TrainConfig) -> tuple[Record, ...]:
    records = manifest.split(config.dataset.train_split).records
    return with_labels(records) if manifest.task == "detection" else records


def _build_network(config: TrainConfig, manifest: Manifest) -> X3D | Detector:
    classes = len(manifest.classes)
    if manifest.task == "detection":
        return Detector(config.expansion, classes, config.model, head=config.detection.head)
    return X3D(config.expansion, classes, config.model, task=manifest.task)


def _check_batch(config: TrainConfig, replicas: int) -> None:
    batch, micro_batches, group = config.recipe.batch, config.execution.accumulation, config.model.bn_group
    require(batch % replicas == 0, "Recipe.batch", f"be a multiple of the number of devices, {replicas}", batch)
    clips = batch // replicas
    rule = f"divide the {counted(clips, 'clip')} per device"
    require(clips % micro_batches == 0, "Execution.accumulation", rule, micro_batches)
    clips //= micro_batches
    unit = "device and micro-batch" if micro_batches > 1 else "device"
    rule = f"give a multiple of ModelOptions.bn_group = {group} clips per {unit}, or fewer than that"
    require(clips <= group or clips % group == 0, "Recipe.batch", rule, clips)
