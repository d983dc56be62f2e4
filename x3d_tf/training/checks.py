"""Checks of a configuration against the records and the devices, before training starts. Imports no TensorFlow."""

from x3d_tf.config import TrainConfig
from x3d_tf.data.datasets.spec import validation_split
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.errors import require
from x3d_tf.tasks.base import Task
from x3d_tf.text import counted


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
    dataset, recipe = config.dataset, config.recipe
    rule = 'be 0 without validation: a "val" split, DatasetSpec.validation_split or DatasetSpec.validation_fraction'
    require(bool(validation_split(dataset)) or not recipe.patience, "Recipe.patience", rule, recipe.patience)
    available = len(task.training_records(manifest, dataset.train_split))
    rest = " that are not held out for validation" if dataset.validation_fraction else ""
    rule = f"be at most {available}, the number of records in split {dataset.train_split!r}{rest}"
    require(recipe.batch <= available, "Recipe.batch", rule, recipe.batch)
    _check_batch(config, devices)
    task.check(config, manifest)


def _check_batch(config: TrainConfig, devices: int) -> None:
    """Raises `UserError` unless the batch can be divided among devices, micro-batches and batch-norm groups."""
    batch, micro_batches, group = config.recipe.batch, config.execution.accumulation, config.model.bn_group
    require(batch % devices == 0, "Recipe.batch", f"be a multiple of the number of devices, {devices}", batch)
    clips = batch // devices
    rule = f"divide the {counted(clips, 'clip')} per device"
    require(clips % micro_batches == 0, "Execution.accumulation", rule, micro_batches)
    clips //= micro_batches
    unit = "device and micro-batch" if micro_batches > 1 else "device"
    rule = f"give a multiple of ModelOptions.bn_group = {group} clips per {unit}, or fewer than that"
    require(clips <= group or clips % group == 0, "Recipe.batch", rule, clips)
