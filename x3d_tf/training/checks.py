"""Checks of a configuration against the records and the devices, before training starts. Imports no TensorFlow."""

from x3d_tf.config import TrainConfig
from x3d_tf.data.datasets.spec import validation_split
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.errors import require
from x3d_tf.tasks.base import Task
from x3d_tf.text import binding_flag, counted


def check_run(config: TrainConfig, manifest: Manifest, task: Task, devices: int) -> None:
    """Checks everything that a run needs of its records and devices.

    Args:
        config: the configuration of the run.
        manifest: the manifest of the records, including the split held out for validation.
        task: the task of the run, which adds its own checks.
        devices: number of devices.

    Raises:
        UserError: a setting does not suit the records, the task or the devices. Names the setting and the rule.
    """
    check_records(config, manifest, task, devices)
    _check_batch(config, devices)
    task.check(config, manifest)


def check_records(config: TrainConfig, manifest: Manifest, task: Task, devices: int = 1) -> None:
    """Checks what a run needs of its records on any number of devices; see `check_run`.

    `devices` only affects the batch that the error message suggests.
    """
    dataset, recipe = config.dataset, config.recipe
    rule = 'be 0 without validation: a "val" split, DatasetSpec.validation_split or DatasetSpec.validation_fraction'
    require(bool(validation_split(dataset)) or not recipe.patience, "Recipe.patience", rule, recipe.patience)
    available = len(task.training_records(manifest, dataset.train_split))
    rest = " that are not held out for validation" if dataset.validation_fraction else ""
    rule = f"be at most {available}, the number of records in split {dataset.train_split!r}{rest}"
    require(recipe.batch <= available, "Recipe.batch", rule + _suggestion(config, available, devices), recipe.batch)


def fitting_batch(config: TrainConfig, largest: int, devices: int = 1) -> int:
    """Returns the largest batch, at most `largest`, that devices, micro-batches and batch-norm groups divide, or 0."""
    parts, group = devices * config.execution.accumulation, config.model.bn_group
    clips = largest // parts
    return parts * (clips if clips <= group else clips // group * group)


def _suggestion(config: TrainConfig, largest: int, devices: int) -> str:
    """Returns the binding of a valid batch in brackets, or nothing if there is none."""
    batch = fitting_batch(config, min(largest, config.recipe.batch), devices)
    return f" ({binding_flag('Recipe.batch', batch)})" if batch else ""


def _check_batch(config: TrainConfig, devices: int) -> None:
    """Raises `UserError` unless the batch can be divided among devices, micro-batches and batch-norm groups."""
    batch, micro_batches, group = config.recipe.batch, config.execution.accumulation, config.model.bn_group
    suggestion = _suggestion(config, batch, devices)
    rule = f"be a multiple of the number of devices, {devices}{suggestion}"
    require(batch % devices == 0, "Recipe.batch", rule, batch)
    clips = batch // devices
    rule = f"divide the {counted(clips, 'clip')} per device"
    require(clips % micro_batches == 0, "Execution.accumulation", rule, micro_batches)
    clips //= micro_batches
    unit = "device and micro-batch" if micro_batches > 1 else "device"
    rule = f"give a multiple of ModelOptions.bn_group = {group} clips per {unit}, or fewer than that{suggestion}"
    require(clips <= group or clips % group == 0, "Recipe.batch", rule, clips)
