"""The training loop: the same for one device and for many."""

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

_ROW_STEPS = 10  # steps that a row of the history averages over


def train(
    config: TrainConfig,
    workdir: str | Path,
    *,
    strategy: tf.distribute.Strategy | None = None,
    texts: Mapping[str, str] | None = None,
    allow_other_groups: bool = False,
) -> RunFolder:
    """Trains a network, or goes on where the run in `workdir` was stopped, and saves the result.

    Args:
        config: everything that decides the outcome.
        workdir: the run folder; made if absent.
        strategy: where to train; all GPUs of this machine, or its CPU, unless given. Of one machine: several workers
            would write the same files.
        texts: further files to keep in the run folder, by name, written before the first step.
        allow_other_groups: whether a run that resumes may have other batch-norm groups than before, of another number
            of devices or another accumulation, which change its outcome.

    Returns:
        The run folder, which then holds `model.keras`.

    Raises:
        UserError: the folder is of another run, or has lost its checkpoints, or another process trains in it; the
            batch does not fit the devices; the records are missing or too few;
            the weights to start from are missing or of another network; the loss is not a number.
    """
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        raise UserError("train works on the devices of one machine, got a MultiWorkerMirroredStrategy")
    run = RunFolder(workdir)
    if config.init is not None and not run.has_checkpoint:
        describe(config.init)  # a wrong path should not come out minutes later
    if run.config.is_file() and run.model.is_file():  # which takes no lock, for nothing is written
        there = run.read_config().dataset  # whose records may be gone
        names = {there.train_split, there.eval_split, there.validation_split or there.train_split}
        run.open(replace(config, dataset=with_default_splits(config.dataset, names)), {})
        print(f"{run.root} is finished: {run.model} is there")
        return run
    with run.training():
        manifest, dataset = open_for_training(config.dataset)
        config = replace(config, dataset=dataset)
        run.open(config, texts or {})
        if not run.model.is_file():  # else another process has just finished it
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
    if not run.has_checkpoint:  # later its settings are fixed
        print_advice(records, config)
    if not run.preview.is_file():
        tell(f"drawing the first clips: {run.preview}")
        save_training_preview(records, config, run.preview)
    tell("building the network")
    trainer = Trainer(config, records, strategy)
    trainer.fit(run, manifest.fingerprint(), allow_other_groups=allow_other_groups)
    print("Saving the model.")
    atomic_write(run.labels, "".join(f"{name}\n" for name in manifest.classes).encode())
    atomic_write(run.input, json.dumps(input_contract(trainer.model), indent=1).encode())
    trainer.save_result(run)


class Trainer:
    """A run: the network, its step function, and what happens between the steps.

    Args:
        config: of the run. Its seed becomes Keras' global one.
        manifest: of the records, with the split to validate on.
        strategy: where to train.

    Raises:
        UserError: the batch cannot be divided among the devices, or a part of it into batch-norm groups.
    """

    def __init__(self, config: TrainConfig, manifest: Manifest, strategy: tf.distribute.Strategy) -> None:
        self.config, self.manifest, self.strategy = config, manifest, strategy
        self.steps, self.batch = config.recipe.scaled_steps, config.recipe.batch
        _check_batch(config, strategy.num_replicas_in_sync)
        keras.utils.set_random_seed(config.seed)
        with strategy.scope():
            with precision_scope(config.execution.precision):
                self.model = _network(config, manifest)
            self.model.class_names, self.model.stored = manifest.classes, manifest.stored
            self.model.stretch, self.model.frame_sampling = config.dataset.stretch, config.dataset.frame_sampling
            self.model.test_views = config.test_views
            self.step = TrainStep(self.model, config, strategy, self._class_weights())
        precise = config.recipe.precise_bn_batches
        self.statistics = PreciseStatistics(self.model, strategy) if precise else None
        split = HELD_OUT if config.dataset.validation_fraction else config.dataset.validation_split
        self.validation = self._validation_on(split) if split else None

    def _validation_on(self, split: str) -> Callable[[], Score]:
        if isinstance(self.model, Detector):
            return DetectorValidation(self.model, self.manifest, split, self.config.detection)
        return Validation(self.model, self.manifest, split, self.config.dataset, self.config.expansion.test_size)

    def fit(self, run: RunFolder, records: str, *, allow_other_groups: bool = False) -> None:
        """Trains from the newest checkpoint of the run, or from the start, to the last step or the end of patience.

        Args:
            run: its folder.
            records: fingerprint of the manifest, which its checkpoints must share.
            allow_other_groups: see `train`.
        """
        origin = Origin(self.config.fingerprint(), records, *self._groups())
        checkpoints = Checkpoints(run, self.model, self.step.variables, origin)
        first = checkpoints.restore(allow_other_groups=allow_other_groups)
        if first:
            run.keep_places(self.config)
        else:
            self._start()
        per_epoch = len(_training_records(self.manifest, self.config)) // self.batch
        history = History(run, self.config, per_epoch, first)
        print(self._describe(run) + (f", from the checkpoint of step {first}" if first else ""))
        self._warn_of_small_groups(origin)
        tell("compiling the training step and taking the first one: this may take a minute or two on a slow machine")
        try:
            with (
                record_errors_as_user_errors(),
                tqdm(total=self.steps, initial=first, bar_format=_BAR, mininterval=1.0) as bar,
            ):
                self._loop(run, checkpoints, history, first, bar)
        except KeyboardInterrupt:
            self._save_interrupted(checkpoints, history)
            raise
        history.save_plots()  # also of a run that was killed between its last checkpoint and here
        if left_out := history.boxes_left_out():
            print(f"no samples, outside the crops of their clips: {counted(left_out, 'box')}")

    def _loop(self, run: RunFolder, checkpoints: Checkpoints, history: History, first: int, bar: Any) -> None:
        if first and self._is_checkpoint(first):  # anew, for it may have been interrupted; it gives the same
            self._refresh_statistics(first)
            self._validate(run, history, first)
        batches, done = iter(self._batches(first)), first
        self.step.trace(batches)  # takes long, and may be interrupted
        while done < self.steps and not self._out_of_patience(history):
            count = self._until_pause(done)
            with held_back():  # a step that was taken must not be missing from the history
                history.add(self.step(batches, count))
                done += count
                _advance(bar, done, first)
                if self._is_checkpoint(done) or done // _ROW_STEPS != (done - count) // _ROW_STEPS:
                    bar.set_postfix_str(history.end_row(done))
            if self._is_checkpoint(done):
                self._refresh_statistics(done)
                checkpoints.save(done)  # before the validation, which may take long or fail
                self._validate(run, history, done)
                history.save_plots()
                history.restart_clock()
        if done < self.steps:
            patience = self.config.recipe.patience
            tqdm.write(f"stopped at step {done}: {patience} validations in a row were no better than the best before")

    def _refresh_statistics(self, step: int) -> None:
        """Measures batch norm anew, with the weights that are to be tested, if the recipe says so."""
        if self.statistics is None:
            return
        # batches that training has yet to see, so that they follow from the step alone
        batches, parts = iter(self._batches(step)), self.config.execution.accumulation
        with self._tested_weights():
            self.statistics.refresh(batches, self.config.recipe.precise_bn_batches * parts)
            if self.step.average is not None:
                self.step.average.keep_statistics()

    def _validate(self, run: RunFolder, history: History, step: int) -> None:
        """Tests the network on the videos that are held out, and keeps it if the recipe asks for the best."""
        if self.validation is None:
            return
        with self._tested_weights():
            score = self.validation()
            tqdm.write(f"step {step}: validation accuracy {score.accuracy:.1%}, loss {score.loss:.3f}")
            if history.score_step(step, score) and self.config.recipe.patience:
                save(self.model, run.best, self.manifest.classes, overwrite=True)

    def _until_pause(self, done: int) -> int:
        """Steps to take before Python looks again: never past a checkpoint, and to the end of a row if it is near."""
        count = min(self.config.execution.steps_per_execution, self.steps - done)
        pauses = [self.config.checkpoint_steps] + ([_ROW_STEPS] if count <= _ROW_STEPS else [])
        return min([count, *(pause - done % pause for pause in pauses)])

    def _is_checkpoint(self, step: int) -> bool:
        return step % self.config.checkpoint_steps == 0 or step == self.steps

    def _tested_weights(self) -> Any:
        """A block within which the network has the weights that are to be tested and saved."""
        return self.step.average.swapped() if self.step.average is not None else nullcontext()

    def _out_of_patience(self, history: History) -> bool:
        patience = self.config.recipe.patience
        return bool(patience) and history.best()[1] >= patience

    def save_result(self, run: RunFolder) -> None:
        """Writes the portable form of the network, of its best validation where the recipe has patience."""
        if self.config.recipe.patience:
            save(portable(load(run.best), self.manifest.classes), run.model)
            return
        with self._tested_weights():
            save(portable(self.model, self.manifest.classes), run.model)

    def _start(self) -> None:
        """Takes over weights before the first step, if the configuration names some."""
        if self.config.init is not None:
            print(load_pretrained(self.model, self.config.init))
            if self.step.average is not None:
                self.step.average.reset()

    def _save_interrupted(self, checkpoints: Checkpoints, history: History) -> None:
        """Keeps the steps since the last checkpoint. The optimiser counts whole steps: none is saved by halves."""
        step = self.step.done
        if history.pending:
            history.end_row(step)  # raises where the loss is no longer a number
        if step:
            checkpoints.save(step)
        history.writer.flush()  # after the checkpoint, for it may fail
        print(f"\nstopped at step {step}; the same command resumes from there", file=sys.stderr)

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
            raise UserError('Recipe.class_weights must be "none" where videos have several labels')
        records = self.manifest.split(self.config.dataset.train_split).records
        return balancing_weights(np.array([record.labels[0] for record in records]), len(self.manifest.classes))

    def _describe(self, run: RunFolder) -> str:
        devices, config = self.strategy.num_replicas_in_sync, self.config
        macs = cost(config.expansion, num_classes=self.model.num_classes, options=config.model).macs
        reference = config.recipe.reference_batch
        scaled = f" (Recipe.steps = {config.recipe.steps} is of Recipe.reference_batch = {reference})"
        scaled = scaled if reference != self.batch else ""
        clips = self.batch // devices // config.execution.accumulation
        parts = num_batch_slices(clips, config.model.bn_group)
        side_by_side = f", {parts} parts of its batch side by side" if parts > 1 else ""
        return (
            f"Training {name_of(config.expansion)} ({macs / 1e9:.3f} GMACs a clip) in {run.root} on "
            f"{counted(devices, 'device')}{side_by_side}: {counted(self.steps, 'step')} of "
            f"{counted(self.batch, 'clip')}{scaled}, {self._describe_groups()}"
        )

    def _groups(self) -> tuple[int, int]:
        """Clips that share batch-norm statistics, on one device, and such groups of a step; 0 and 0 if it is frozen.

        The parts that a device computes side by side do not count: batch norm takes them together.
        """
        if self.config.recipe.frozen_norms:
            return 0, 0
        clips = self.batch // self.strategy.num_replicas_in_sync // self.config.execution.accumulation
        clips = min(clips, self.config.model.bn_group)
        return clips, self.batch // clips

    def _describe_groups(self) -> str:
        clips, groups = self._groups()
        if not clips:
            return "batch norm frozen"
        return f"batch norm over {counted(clips, 'clip')} a group on each device, {counted(groups, 'group')} a step"

    def _warn_of_small_groups(self, origin: Origin) -> None:
        wanted = self.config.model.bn_group
        if 0 < origin.clips_per_group < wanted:
            print(
                f"warning: batch norm sees {counted(origin.clips_per_group, 'clip')} a group on each device, fewer "
                f"than ModelOptions.bn_group = {wanted}, so its statistics are noisier than the recipe's. Raise "
                "Recipe.batch, or lower Execution.accumulation or the number of devices",
                file=sys.stderr,
            )


def _advance(bar: "tqdm[Any]", done: int, first: int) -> None:
    """Moves the bar to `done` steps.

    The first call, after the step that compiled, restarts the clock: the time left must not count compiling.

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
    """What each split of the records is for; training chose those that the settings leave open."""
    dataset = config.dataset
    validation = HELD_OUT if dataset.validation_fraction else dataset.validation_split
    uses = {dataset.train_split: ["trains"]}
    uses.setdefault(validation or "", []).append("validates")
    uses.setdefault(dataset.eval_split, []).append("is evaluated when training has ended")
    told = [
        f"{name} ({len(manifest.splits[name].records)} records) {' and '.join(verbs)}"
        for name, verbs in uses.items()
        if name
    ]
    text = f"Splits: {', '.join(told)}."
    if validation == dataset.eval_split and config.recipe.patience:
        text += f" The best step is chosen by {validation}, so other videos may give less than its evaluation says."
    return text


def _check_records(manifest: Manifest, config: TrainConfig) -> None:
    split = config.dataset.train_split
    if manifest.task == "detection":
        _check_detection(manifest, config)
    validated = config.dataset.validation_split is not None or config.dataset.validation_fraction > 0
    rule = 'be 0 for records without a split "val", DatasetSpec.validation_split or DatasetSpec.validation_fraction'
    require(validated or not config.recipe.patience, "Recipe.patience", rule, config.recipe.patience)
    held = len(_training_records(manifest, config))
    fits = config.recipe.batch <= held
    rest = " less those held out for validation" if config.dataset.validation_fraction else ""
    rule = f"be at most {held}, the records of split {split!r}{rest}; learning rate and steps are scaled to it"
    require(fits, "Recipe.batch", rule, config.recipe.batch)


def _check_detection(manifest: Manifest, config: TrainConfig) -> None:
    dataset = config.dataset
    for name, plain in (("stretch", False), ("frame_sampling", "slowfast")):
        value, rule = getattr(dataset, name), f"stay {plain!r} for key frames, which have a rule of their own"
        require(value == plain, f"DatasetSpec.{name}", rule, value)
    if config.detection.eval_boxes == "proposals":
        for split in filter(None, (dataset.eval_split, dataset.validation_split)):
            require_proposals(manifest, split)


def _training_records(manifest: Manifest, config: TrainConfig) -> tuple[Record, ...]:
    records = manifest.split(config.dataset.train_split).records
    return with_labels(records) if manifest.task == "detection" else records


def _network(config: TrainConfig, manifest: Manifest) -> X3D | Detector:
    classes = len(manifest.classes)
    if manifest.task == "detection":
        return Detector(config.expansion, classes, config.model, head=config.detection.head)
    return X3D(config.expansion, classes, config.model, task=manifest.task)


def _check_batch(config: TrainConfig, replicas: int) -> None:
    batch, parts, group = config.recipe.batch, config.execution.accumulation, config.model.bn_group
    require(batch % replicas == 0, "Recipe.batch", f"be a multiple of the {replicas} devices", batch)
    share = batch // replicas
    divides = share % parts == 0
    require(
        divides, "Execution.accumulation", f"divide the {counted(share, 'clip')} that each device has of a batch", parts
    )
    share //= parts
    whole = share <= group or share % group == 0
    rule = f"give each device{' and part of a step' if parts > 1 else ''} a multiple of the {group} clips of "
    require(whole, "Recipe.batch", f"{rule}ModelOptions.bn_group", share)
