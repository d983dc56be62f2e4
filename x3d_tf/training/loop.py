"""The training loop, for the devices of one machine or of several, whose processes take the same steps.

One process, the chief, writes the run folder, validates and prints. See `Workers`.
"""

import json
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from tqdm import tqdm

import x3d_tf
from x3d_tf.config import TrainConfig
from x3d_tf.data.datasets.spec import validation_split
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.records.table import record_errors_as_user_errors
from x3d_tf.errors import require
from x3d_tf.files import atomic_write
from x3d_tf.modeling.cost import cost
from x3d_tf.modeling.expansion import name_of
from x3d_tf.modeling.portable import portable
from x3d_tf.modeling.saving import load, save
from x3d_tf.parallel import num_batch_slices
from x3d_tf.runs.advice import print_advice
from x3d_tf.runs.checkpoints import Checkpoints, Origin, state_of
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.signals import held_back
from x3d_tf.tasks.base import Loss, Task
from x3d_tf.terminal import tell
from x3d_tf.text import counted
from x3d_tf.training.checks import CheckedRun, check_batch, check_settings, open_records
from x3d_tf.training.history import History
from x3d_tf.training.multigrid import LossByBatch, phases_of
from x3d_tf.training.precise_bn import PreciseStatistics
from x3d_tf.training.schedule import PlateauWithWarmup
from x3d_tf.training.step import TrainStep, precision_scope
from x3d_tf.training.transfer import load_pretrained
from x3d_tf.training.workers import Workers, workers_of

_LOG_STEPS = 10  # steps between two rows of history.csv
START_AGAIN = "Start all workers again with the same command: training resumes from its last checkpoint"


def train(
    config: TrainConfig,
    workdir: str | Path,
    *,
    strategy: tf.distribute.Strategy | None = None,
    texts: Mapping[str, str] | None = None,
    allow_other_groups: bool = False,
    validates: bool = True,
) -> RunFolder:
    """Trains a network and saves it. If `workdir` contains an interrupted run, resumes it.

    Args:
        config: the settings that determine the result.
        workdir: the run folder, created if it does not exist.
        strategy: the distribution strategy. Defaults to all GPUs of the machine, or its CPU. With a
            `MultiWorkerMirroredStrategy`, call this function in all workers: `Recipe.batch` is divided among them, and
            only the chief uses `workdir`.
        texts: contents of additional files, by name, written to the run folder before the first step.
        allow_other_groups: whether to resume even if another number of devices or another `Execution.accumulation`
            changes the batch-norm groups, and therefore the result.
        validates: whether to evaluate on the validation split at each checkpoint; early stopping and the schedule
            "plateau" require it.

    Returns:
        The run folder, which contains `model.keras`.

    Raises:
        UserError: the folder belongs to a run with other settings, has lost its checkpoints, or is in use by another
            process; the batch cannot be divided among the devices; the records are missing or too few; the initial
            weights are missing or belong to a different architecture; the loss is not finite; the workers have other
            settings, records or versions, or one of them has ended.
    """
    rule = 'be True if Recipe.patience is set or Recipe.schedule is "plateau"'
    require(validates or not config.recipe.needs_validation, "validates", rule, validates)
    run, workers = RunFolder(workdir), workers_of(strategy or tf.distribute.MirroredStrategy())
    with workers.peer_errors_as_user_errors(START_AGAIN):
        workers.require_equal(lambda: _identity(config, allow_other_groups, validates))
        if workers.of_chief(workers.is_chief and run.is_finished(config)):
            print(f"{run.root} is already finished ({run.model} exists)")
            return run
        if workers.is_chief:
            check_settings(config, run)
        train_checked(
            workers.chief_first(lambda: open_records(config)),
            run,
            workers,
            texts=texts,
            allow_other_groups=allow_other_groups,
            validates=validates,
        )
    return run


def train_checked(
    checked: CheckedRun,
    run: RunFolder,
    workers: Workers | None = None,
    *,
    texts: Mapping[str, str] | None = None,
    allow_other_groups: bool = False,
    validates: bool = True,
) -> None:
    """Trains as `train` does, after `check_settings` and `open_records`, which need no TensorFlow."""
    workers = workers or Workers(tf.distribute.MirroredStrategy())
    fingerprint = checked.records.fingerprint()  # takes a second for the records of Kinetics
    workers.require_equal(lambda: {"the fingerprint of DatasetSpec.records": fingerprint})
    check_batch(checked.config, workers.strategy.num_replicas_in_sync)
    with run.training() if workers.is_chief else nullcontext():
        if workers.is_chief:
            run.open(checked.config, {run.fingerprint.name: fingerprint, **(texts or {})})
        # another process may have finished the run in the meantime
        if workers.of_chief(workers.is_chief and run.model.is_file()):
            return
        if workers.is_chief:
            _prepare(checked, run)
        tell("building the network")
        trainer = Trainer(checked.config, checked.records, workers, checked.task, validates=validates)
        trainer.fit(run, fingerprint, allow_other_groups=allow_other_groups)
        if workers.is_chief:
            _save(trainer, run)
        workers.leave_together()


def _identity(config: TrainConfig, allow_other_groups: bool, validates: bool) -> dict[str, Any]:
    """Returns what must be the same on all workers, by name."""
    return {
        "the version of x3d_tf": x3d_tf.__version__,
        "the version of TensorFlow": tf.__version__,
        "the version of Keras": keras.__version__,
        **config.outcome_settings(),
        "Execution.accumulation": config.execution.accumulation,
        "allow_other_groups": allow_other_groups,
        "validates": validates,
    }


def _prepare(checked: CheckedRun, run: RunFolder) -> None:
    """Prints advice about a run, and saves the preview of its clips."""
    config, records, task = checked.config, checked.records, checked.task
    print(_describe_splits(records, config))
    if not run.has_checkpoint:  # settings can no longer be changed after the first checkpoint
        print_advice(records, config, task)
    if not run.preview.is_file():
        tell(f"saving a preview of the first training clips: {run.preview}")
        task.save_preview(config, records, run.preview)


def _save(trainer: "Trainer", run: RunFolder) -> None:
    """Saves the trained network and the files beside it."""
    print("Saving the model.")
    atomic_write(run.labels, "".join(f"{name}\n" for name in trainer.classes).encode())
    atomic_write(run.input, json.dumps(trainer.task.input_contract(trainer.model), indent=1).encode())
    trainer.save_result(run)


class Trainer:
    """Trains the network of a run, and validates and saves checkpoints between the steps.

    Sets Keras' global seed to that of the configuration.

    Args:
        config: the configuration of the run, checked with `checks.check_records` and `checks.check_batch`.
        manifest: the manifest of the records, including the split held out for validation.
        workers: the workers, with the distribution strategy.
        task: the task of the run.
        validates: see `train`.
    """

    def __init__(
        self,
        config: TrainConfig,
        manifest: Manifest,
        workers: Workers,
        task: Task,
        *,
        validates: bool = True,
    ) -> None:
        self.config, self.manifest, self.workers, self.task = config, manifest, workers, task
        self.strategy = strategy = workers.strategy
        self.phases, self.batch = phases_of(config), config.recipe.batch
        self.steps = self.phases.steps
        self.classes = task.classes(manifest)
        keras.utils.set_random_seed(config.seed)
        with strategy.scope():
            with precision_scope(config.execution.precision):
                self.model = task.build_network(config, len(self.classes))
            self.model.class_names, self.model.stored = self.classes, manifest.stored
            self.model.stretch, self.model.frame_sampling = config.dataset.stretch, config.dataset.frame_sampling
            self.model.test_views, self.model.combine = config.test_views, config.combine
            self.step = TrainStep(self.model, config, strategy, self._loss())
        precise = config.recipe.precise_bn_batches
        self.statistics = PreciseStatistics(self.model, strategy) if precise else None
        split = validation_split(config.dataset) if validates and workers.is_chief else None
        self.validation = task.validation(self.model, config, manifest, split) if split else None

    def fit(self, run: RunFolder, records: str, *, allow_other_groups: bool = False) -> None:
        """Trains until the last step or early stopping, starting from the newest checkpoint if one exists.

        Args:
            run: the run folder.
            records: fingerprint of the manifest. The checkpoints must have been written with the same records.
            allow_other_groups: see `train`.
        """
        log = self._open_log(run, records, allow_other_groups=allow_other_groups) if self.workers.is_chief else None
        first = self.workers.of_chief(log.first if log else 0)
        if not log:
            tell(f"training from step {first}; worker 0 prints the progress")
        self.workers.broadcast([variable for part in self._state().values() for variable in part])
        try:
            with record_errors_as_user_errors(), self.workers.stopping_together(), log.bar if log else nullcontext():
                self._loop(log, first)
        except KeyboardInterrupt:
            if log:
                self._save_interrupted(log)
            self.workers.leave_together()  # schedulers end all workers when the first one ends
            raise
        if log:
            log.history.save_plots()  # a run killed after its last checkpoint may not have drawn them
            for line in log.history.totals():
                print(line)

    def _open_log(self, run: RunFolder, records: str, *, allow_other_groups: bool) -> "_Log":
        """Restores the newest checkpoint, or loads the initial weights, and opens the logs of the run."""
        origin = Origin(self.config.fingerprint(), records, *self._batch_norm_groups())
        checkpoints = Checkpoints(run, self.model, self.step.variables, origin)
        first = checkpoints.restore(allow_other_groups=allow_other_groups)
        if first:
            run.update_config(self.config)
        else:
            self._load_initial_weights()
        steps_per_epoch = len(self.task.training_records(self.manifest, self.config.dataset.train_split)) // self.batch
        metrics = self.step.loss.metrics
        schedule = self.step.schedule
        history = History(run, self.config, schedule, self.phases, steps_per_epoch, first, metrics, self.validation)
        print(self._describe(run) + (f", resuming from the checkpoint of step {first}" if first else ""))
        self._warn_about_small_groups(origin)
        tell("compiling the training step: on a slow machine the first step may take a minute or two")
        bar = tqdm(total=self.steps, initial=first, bar_format=_BAR, mininterval=1.0)
        return _Log(run, checkpoints, history, bar, first)

    def _state(self) -> dict[str, list[Any]]:
        return state_of(self.model, self.step.variables)

    def _loop(self, log: "_Log | None", first: int) -> None:
        """Takes the steps after `first`. The chief has a log, and does what is written or printed."""
        if first and self._is_checkpoint(first):  # the validation may have been interrupted; repeating it is harmless
            self._refresh_statistics(first)
            self._validate(log, first)
        step, end, exhausted = first, first, self._is_patience_exhausted(log)
        while step < self.steps and not exhausted:
            if step == end:
                batches, end = iter(self.batches(step)), self.phases.at(step).end
                self.step.trace(batches)  # outside of `held_back`: takes long, and one worker may be interrupted
            count = self._steps_until_pause(step)
            pauses = self._is_checkpoint(step + count) or step // _LOG_STEPS != (step + count) // _LOG_STEPS
            with held_back():  # the history must contain every step taken
                metrics = self.step(batches, count)
                step += count
                if log:
                    log.add(metrics, step, ends_row=pauses)
            if self._is_checkpoint(step):
                self._refresh_statistics(step)
                if log:
                    log.checkpoints.save(step)  # before the validation, which may take long or fail
            if pauses:
                self.workers.stop_if_asked()
            if self._is_checkpoint(step):
                self._validate(log, step)
                exhausted = self._is_patience_exhausted(log)
        if step < self.steps and log:
            patience = self.config.recipe.patience
            tqdm.write(f"early stopping at step {step}: no improvement in {counted(patience, 'validation')}")

    def _refresh_statistics(self, step: int) -> None:
        """Recomputes the batch-norm statistics with the evaluation weights (Recipe.precise_bn_batches)."""
        if self.statistics is None:
            return
        # the batches that follow this step, so that a resumed run computes the same statistics
        batches, micro_batches = iter(self.batches(step, full=True)), self.config.execution.accumulation
        with self._eval_weights():
            self.statistics.refresh(batches, self.config.recipe.precise_bn_batches * micro_batches)
            if self.step.average is not None:
                self.step.average.copy_statistics()

    def _validate(self, log: "_Log | None", step: int) -> None:
        """Evaluates the network on the validation split, on the chief.

        With early stopping, saves it if it is the best so far. The schedule "plateau" may divide the learning rate.
        """
        if log:
            self._validate_on_chief(log, step)
            log.history.save_plots()
            log.history.restart_clock()
        if isinstance(self.step.schedule, PlateauWithWarmup):
            variables = self.step.schedule.variables
            for variable, value in zip(variables, self.workers.of_chief([each.numpy().item() for each in variables])):
                variable.assign(value)

    def _validate_on_chief(self, log: "_Log", step: int) -> None:
        if self.validation is None:
            return
        with self._eval_weights():
            scores = self.validation()
            measured = (f"validation_{metric.text(scores[metric.name])}" for metric in self.validation.metrics)
            tqdm.write(f"step {step}: {', '.join(measured)}")
            improved = log.history.add_validation(step, scores)
            if improved and self.config.recipe.patience:
                save(self.model, log.run.best, self.classes, overwrite=True)
        # last, so that a validation that is interrupted and repeated counts once
        schedule = self.step.schedule
        if isinstance(schedule, PlateauWithWarmup) and schedule.count(step, improved=improved) and step < self.steps:
            validations = counted(schedule.validations, "validation")
            tqdm.write(f"step {step}: no improvement in {validations}, learning rate {float(schedule(step)):g}")

    def _steps_until_pause(self, step: int) -> int:
        """Returns the number of steps of the next call, at most up to the next checkpoint, phase or near log row."""
        count = min(self.config.execution.steps_per_execution, self.phases.at(step).end - step)
        intervals = [self.config.checkpoint_steps] + ([_LOG_STEPS] if count <= _LOG_STEPS else [])
        return min([count, *(interval - step % interval for interval in intervals)])

    def _is_checkpoint(self, step: int) -> bool:
        return step % self.config.checkpoint_steps == 0 or step == self.steps

    def _eval_weights(self) -> Any:
        """Returns a context in which the network holds the EMA of its weights, if EMA is enabled."""
        return self.step.average.swapped() if self.step.average is not None else nullcontext()

    def _is_patience_exhausted(self, log: "_Log | None") -> bool:
        patience = self.config.recipe.patience
        if not patience:
            return False
        return bool(self.workers.of_chief(log is not None and log.history.best()[1] >= patience))

    def save_result(self, run: RunFolder) -> None:
        """Saves the portable form of the network; with early stopping, the network with the best validation score."""
        if self.config.recipe.patience:
            save(portable(load(run.best), self.classes), run.model)
            return
        with self._eval_weights():
            save(portable(self.model, self.classes), run.model)

    def _load_initial_weights(self) -> None:
        """Loads the weights that `TrainConfig.init` names, if any."""
        if self.config.init is not None:
            print(load_pretrained(self.model, self.config.init))
            if self.step.average is not None:
                self.step.average.reset()

    def _save_interrupted(self, log: "_Log") -> None:
        """Saves a checkpoint of the last step that the optimizer completed, and the history up to it."""
        step = self.step.completed_steps
        if log.history.pending:
            log.history.end_row(step)  # before the checkpoint: raises if the loss is not finite
        if step:
            log.checkpoints.save(step)
        log.history.writer.flush()  # last, because flushing may fail
        print(f"\nstopped after step {step}; run the same command again to resume", file=sys.stderr)

    def batches(self, first: int = 0, *, full: bool = False) -> tf.distribute.DistributedDataset:
        """Returns the batches of the steps after `first`, for `TrainStep`, as an iterable of the strategy.

        Args:
            first: number of steps before.
            full: whether the clips have the shape of the network and come in the plain batch, instead of those of the
                phase. They are the clips that follow step `first` in both cases.
        """
        phase, config, factor = self.phases.at(first), self.config, 1
        if not full and phase.factor != 1:
            factor, recipe = phase.factor, replace(config.recipe, multigrid="none")  # the phase is not divided again
            config = replace(config, expansion=phase.expansion, recipe=recipe)

        def for_worker(context: tf.distribute.InputContext) -> tf.data.Dataset:
            size = context.get_per_replica_batch_size(self.batch) // config.execution.accumulation
            clips = self.task.training_clips(
                config,
                self.manifest,
                start_step=self.phases.plain_steps(first),
                worker=(context.input_pipeline_id, context.num_input_pipelines),
                replica_batch=size,
            )
            return clips if factor == 1 else clips.rebatch(factor * size, drop_remainder=True).prefetch(1)

        return self.strategy.distribute_datasets_from_function(for_worker)

    def _loss(self) -> Loss:
        """Returns the loss of the run, which depends on the number of clips per step."""
        if self.config.recipe.multigrid == "none":
            return self.task.loss(self.config, self.manifest)
        clips, losses = self.batch // self.strategy.num_replicas_in_sync // self.config.execution.accumulation, {}
        for factor in self.phases.clips:
            recipe = replace(self.config.recipe, batch=factor * self.batch)
            losses[factor * clips] = self.task.loss(replace(self.config, recipe=recipe), self.manifest)
        return LossByBatch(losses)

    def _describe(self, run: RunFolder) -> str:
        devices, config = self.strategy.num_replicas_in_sync, self.config
        macs = cost(config.expansion, num_classes=self.model.num_classes, options=config.model).macs
        reference = config.recipe.reference_batch
        scaled = f" (scaled from Recipe.steps = {config.recipe.steps} at Recipe.reference_batch = {reference})"
        scaled = scaled if reference != self.batch else ""
        clips = self.batch // devices // config.execution.accumulation
        slices = num_batch_slices(clips, config.model.bn_group)
        in_parallel = f" ({slices} batch slices in parallel)" if slices > 1 else ""
        of_workers = f" of {counted(self.workers.count, 'worker')}" if self.workers.count > 1 else ""
        network = name_of(config.expansion, config.model.family)
        largest = self.batch * max(self.phases.clips)
        batch = counted(self.batch, "clip") if largest == self.batch else f"{self.batch} to {largest} clips"
        return (
            f"Training {network} ({macs / 1e9:.3f} GMACs per clip) in {run.root} on "
            f"{counted(devices, 'device')}{of_workers}{in_parallel}: {counted(self.steps, 'step')} with a batch of "
            f"{batch}{scaled}, {self._describe_groups()}{self._describe_shapes()}"
        )

    def _describe_shapes(self) -> str:
        """Returns a line for multigrid training that states the shapes of its clips, else nothing."""
        if self.config.recipe.multigrid == "none":
            return ""
        shapes = [f"{factor * self.batch} x {clip.frames} x {clip.size}²" for factor, clip in self.phases.clips.items()]
        plain = counted(self.config.recipe.scaled_steps, "step")
        return (
            f"\nMultigrid training sees the clips of {plain} with a batch of {counted(self.batch, 'clip')} in "
            f"{counted(len(shapes), 'input shape')}, each of which is compiled once: {', '.join(shapes)} "
            "(clips x frames x pixels)"
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


@dataclass(frozen=True)
class _Log:
    """Logs of a run, which the chief writes and prints between the steps.

    Attributes:
        run: the run folder.
        checkpoints: its checkpoints.
        history: its history.
        bar: the progress bar.
        first: number of steps taken before this process.
    """

    run: RunFolder
    checkpoints: Checkpoints
    history: History
    bar: "tqdm[Any]"
    first: int

    def add(self, metrics: dict[str, Any], step: int, *, ends_row: bool) -> None:
        """Adds the metrics of the steps up to `step`, and writes a row if `ends_row`."""
        self.history.add(metrics)
        if self.bar.initial == self.first:  # the time left must not include compilation
            self.bar.initial = self.bar.n = step
            self.bar.unpause()
            self.bar.refresh()
        else:
            self.bar.update(step - self.bar.n)
        if ends_row:
            self.bar.set_postfix_str(self.history.end_row(step))


_BAR = "step {n_fmt}/{total_fmt} |{bar:20}| {remaining} left{postfix}"


def _describe_splits(manifest: Manifest, config: TrainConfig) -> str:
    """Returns a sentence that states the purpose of each split, including splits chosen by default."""
    dataset = config.dataset
    validation = validation_split(dataset)
    uses = {dataset.train_split: ["training"]}
    uses.setdefault(validation or "", []).append("validation")
    uses.setdefault(dataset.eval_split, []).append("the final evaluation")
    parts = [
        f"{name} ({len(manifest.splits[name].records)} records) for {' and '.join(purposes)}"
        for name, purposes in uses.items()
        if name
    ]
    text = f"Splits: {', '.join(parts)}."
    if validation == dataset.eval_split and config.recipe.needs_validation:
        chosen = "Early stopping selects the best step" if config.recipe.patience else "The learning rate is chosen"
        text += f" {chosen} on {validation}, so its results are optimistically biased."
    return text
