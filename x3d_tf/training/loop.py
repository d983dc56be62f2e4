"""The training loop: one step function under a distribution strategy, the same for one device and for many."""

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from tqdm import tqdm

from x3d_tf import _plots
from x3d_tf._checks import UserError, require
from x3d_tf.data.datasets import open_dataset
from x3d_tf.data.manifest import Manifest
from x3d_tf.data.pipeline import naming_records, training_dataset
from x3d_tf.modeling.cost import cost
from x3d_tf.modeling.expansion import name_of
from x3d_tf.modeling.layers import GhostBatchNorm
from x3d_tf.modeling.portable import portable
from x3d_tf.modeling.saving import save
from x3d_tf.modeling.x3d import X3D
from x3d_tf.training.checkpointing import Checkpoints
from x3d_tf.training.optimizer import SGD
from x3d_tf.training.recipe import TrainConfig
from x3d_tf.training.run_folder import RunFolder
from x3d_tf.training.schedule import schedule_of

_ROW_STEPS = 10  # steps that a row of the history averages over


def train(
    config: TrainConfig,
    workdir: str | Path,
    *,
    strategy: tf.distribute.Strategy | None = None,
    texts: Mapping[str, str] | None = None,
) -> RunFolder:
    """Trains a network, or goes on where the run in `workdir` was stopped, and saves the result.

    Args:
        config: everything that decides the outcome.
        workdir: the run folder; made if absent.
        strategy: where to train; all GPUs of this machine, or its CPU, unless given.
        texts: further files to keep in the run folder, by name, written before the first step.

    Returns:
        The run folder, which then holds `model.keras`.

    Raises:
        UserError: the folder is of another run; the batch does not fit the devices; the records are missing or too few;
            the loss is not a number.
    """
    run = RunFolder(workdir)
    run.open(config, texts or {})
    if run.model.is_file():
        print(f"{run.root} is finished: {run.model} is there")
        return run
    manifest = open_dataset(config.dataset)
    _check_records(manifest, config)
    trainer = Trainer(config, len(manifest.classes), strategy or tf.distribute.MirroredStrategy())
    trainer.fit(run, manifest)
    run.labels.write_text("".join(f"{name}\n" for name in manifest.classes), encoding="utf-8")
    save(portable(trainer.model, manifest.classes), run.model)
    return run


class Trainer:
    """Network, optimiser and step function of a run.

    Args:
        config: of the run. Its seed becomes Keras' global one.
        num_classes: outputs of the classifier.
        strategy: where to train.

    Raises:
        UserError: the batch cannot be divided among the devices, or a device's share into batch-norm groups.
    """

    def __init__(self, config: TrainConfig, num_classes: int, strategy: tf.distribute.Strategy) -> None:
        self.config, self.strategy = config, strategy
        self.steps, self.batch = config.recipe.scaled_steps, config.recipe.batch
        _check_batch(self.batch, strategy.num_replicas_in_sync, config.model.bn_group)
        keras.utils.set_random_seed(config.seed)
        with strategy.scope():
            self.model = X3D(config.expansion, num_classes, config.model)
            norms = [layer for layer in self.model.layers if isinstance(layer, GhostBatchNorm)]
            self.optimizer = SGD(schedule_of(config.recipe), config.recipe.momentum, l2=config.recipe.weight_decay)
            self.optimizer.exclude(weight for norm in norms for weight in norm.trainable_weights)
            self.optimizer.build(self.model.trainable_variables)
        self._step = tf.function(self._distributed_step)

    def fit(self, run: RunFolder, manifest: Manifest) -> None:
        """Trains from the newest checkpoint of the run, or from the start, to the last step."""
        fingerprint = f"{self.config.fingerprint()} {manifest.fingerprint()}"
        checkpoints = Checkpoints(run.checkpoints, self.model, self.optimizer, fingerprint)
        first = checkpoints.restore()
        batches = iter(self._batches(manifest, first))
        per_epoch = len(manifest.split(self.config.dataset.train_split).records) // self.batch
        history = History(run, self.config, per_epoch, first)
        print(self._describe(run) + (f", from the checkpoint of step {first}" if first else ""))
        print("The first step takes longer: TensorFlow compiles it.")
        try:
            with naming_records(), tqdm(total=self.steps, initial=first, bar_format=_BAR, mininterval=1.0) as bar:
                for step in range(first + 1, self.steps + 1):
                    history.add(self._step(next(batches)))
                    at_checkpoint = step % self.config.checkpoint_steps == 0 or step == self.steps
                    if at_checkpoint or step % _ROW_STEPS == 0:
                        bar.set_postfix_str(history.end_row(step))
                    bar.update()
                    if at_checkpoint:
                        checkpoints.save(step)
                        history.save_plots()
        except KeyboardInterrupt:
            self._save_interrupted(checkpoints, history)
            raise
        history.save_plots()  # also of a run that was killed between its last checkpoint and here

    def _save_interrupted(self, checkpoints: Checkpoints, history: "History") -> None:
        """Keeps the steps since the last checkpoint. The optimiser counts whole steps: none is saved by halves."""
        step = int(keras.ops.convert_to_numpy(self.optimizer.iterations))
        if history.pending:
            history.end_row(step)  # raises where the loss is no longer a number
        if step:
            checkpoints.save(step)
        print(f"\nstopped at step {step}; the same command goes on from there", file=sys.stderr)

    def _batches(self, manifest: Manifest, first: int) -> tf.distribute.DistributedDataset:
        config = self.config

        def for_worker(context: tf.distribute.InputContext) -> tf.data.Dataset:
            return training_dataset(
                manifest,
                config.dataset.train_split,
                config.expansion.clip,
                jitter=config.expansion.jitter,
                flip=config.dataset.flip,
                batch=self.batch,
                seed=config.seed,
                start_step=first,
                worker=(context.input_pipeline_id, context.num_input_pipelines),
                replica_batch=context.get_per_replica_batch_size(self.batch),
            )

        return self.strategy.distribute_datasets_from_function(for_worker)

    def _distributed_step(self, batch: Any) -> tuple[Any, Any]:
        """Loss and accuracy of one step over all devices."""
        loss, correct = self.strategy.run(self._replica_step, args=batch)
        total = self.strategy.reduce(tf.distribute.ReduceOp.SUM, correct, axis=None)
        return self.strategy.reduce(tf.distribute.ReduceOp.SUM, loss, axis=None), total / self.batch

    def _replica_step(self, clips: Any, labels: Any) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            logits = self.model(clips, training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_sum(losses) / self.batch  # the optimiser adds the devices' gradients up
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        correct = tf.equal(tf.argmax(logits, axis=1, output_type=labels.dtype), labels)
        return loss, tf.reduce_sum(tf.cast(correct, tf.float32))

    def _describe(self, run: RunFolder) -> str:
        devices, config = self.strategy.num_replicas_in_sync, self.config
        macs = cost(config.expansion, num_classes=self.model.num_classes, options=config.model).macs
        return (
            f"Training {name_of(config.expansion)} ({macs / 1e9:.3f} GMACs a clip) in {run.root} on {devices} "
            f"device{'s' if devices > 1 else ''}: {self.steps} steps of {self.batch} clips"
        )


_BAR = "step {n_fmt}/{total_fmt} |{bar:20}| {remaining} left{postfix}"


class History:
    """Collects what the steps return and writes it where people look: progress bar, csv, TensorBoard, plots.

    Args:
        run: where to write; rows after step `first` are of a lost part of the run and are left out.
        config: of the run.
        steps_per_epoch: to tell the epoch.
        first: steps already done.
    """

    def __init__(self, run: RunFolder, config: TrainConfig, steps_per_epoch: int, first: int) -> None:
        self.run, self.config, self.steps_per_epoch = run, config, steps_per_epoch
        self.schedule = schedule_of(config.recipe)
        self.rows: list[dict[str, float]] = [row for row in run.read_history() if row["step"] <= first]
        run.write_history(self.rows)
        self.writer = tf.summary.create_file_writer(str(run.tensorboard))
        self.pending: list[tuple[Any, Any]] = []
        self.started = time.perf_counter()

    def add(self, result: tuple[Any, Any]) -> None:
        """Takes the loss and accuracy of a step, without waiting for them."""
        self.pending.append(result)

    def end_row(self, step: int) -> str:
        """Averages what was added since the last row and returns it in a few words.

        Raises:
            UserError: a loss is not a number.
        """
        losses = [float(loss) for loss, _ in self.pending]
        for offset, loss in enumerate(losses, start=step - len(losses) + 1):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at step {offset}: lower Recipe.learning_rate (it is "
                    f"{self.config.recipe.learning_rate}) or lengthen Recipe.warmup_steps, with a --workdir of its "
                    f"own; checkpoints from before, if any, are in {self.run.checkpoints}"
                )
        accuracies = [float(accuracy) for _, accuracy in self.pending]
        elapsed, self.started = time.perf_counter() - self.started, time.perf_counter()
        row = {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "learning_rate": float(self.schedule(step - 1)),
            "loss": sum(losses) / len(losses),
            "accuracy": sum(accuracies) / len(accuracies),
            "clips_per_second": len(losses) * self.config.recipe.batch / elapsed,
        }
        self.pending.clear()
        self.rows.append(row)
        self.run.append_history(row)
        with self.writer.as_default(step=step):
            for name in ("learning_rate", "loss", "accuracy", "clips_per_second"):
                tf.summary.scalar(f"train/{name}", row[name])
        return f"{row['clips_per_second']:.1f} clips/s, loss {row['loss']:.3f}, accuracy {row['accuracy']:.0%}"

    def save_plots(self) -> None:
        """Draws the curves so far."""
        self.writer.flush()
        _plots.save_curves(self.rows, self.run.curves, name_of(self.config.expansion))


def _check_records(manifest: Manifest, config: TrainConfig) -> None:
    require(manifest.task == "single_label", f"task of {manifest.folder}", "be single_label", manifest.task)
    split = config.dataset.train_split
    held = len(manifest.split(split).records)
    fits = config.recipe.batch <= held
    require(fits, "Recipe.batch", f"be at most {held}, the records of split {split!r}", config.recipe.batch)


def _check_batch(batch: int, replicas: int, group: int) -> None:
    require(batch % replicas == 0, "Recipe.batch", f"be a multiple of the {replicas} devices", batch)
    share = batch // replicas
    whole = share <= group or share % group == 0
    require(whole, "Recipe.batch", f"give each device a multiple of the {group} clips of ModelOptions.bn_group", share)
