"""Opens the records of a run and checks everything that it needs before training starts. Imports no TensorFlow."""

from dataclasses import dataclass, replace
from pathlib import Path

from x3d_tf.config import TrainConfig
from x3d_tf.data.datasets.spec import open_for_training, validation_split
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.errors import UserError, require
from x3d_tf.modeling.architecture import ModelOptions, plan
from x3d_tf.modeling.archive import describe
from x3d_tf.modeling.cost import parameters
from x3d_tf.modeling.expansion import Expansion
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.tasks.base import Task, find, task_of_records
from x3d_tf.text import binding_flag, counted
from x3d_tf.training.multigrid import phases_of


@dataclass(frozen=True)
class CheckedRun:
    """A configuration that suits its records, on any number of devices that `check_batch` accepts.

    Attributes:
        config: the configuration, with the default splits of the records.
        records: the manifest, with the videos held out for validation in a split of their own.
        task: the task of the run.
    """

    config: TrainConfig
    records: Manifest
    task: Task


def check_settings(config: TrainConfig, run: RunFolder) -> None:
    """Checks a configuration before its records are opened or created: the run folder, initial weights and the task.

    Args:
        config: the configuration of the run.
        run: the run folder, which need not exist. Nothing is written.

    Raises:
        UserError: the folder has a run with other settings; the initial weights are missing or of another architecture;
            no task has the name. Names the setting, the rule and the value received.
    """
    run.check(run.with_default_splits(config))
    if not run.has_checkpoint:  # otherwise the initial weights are no longer needed
        check_initial_weights(config)
    if config.task is not None:
        find(config.task)


def open_records(config: TrainConfig) -> CheckedRun:
    """Opens the records of a run, after creating those of a synthetic data set, and makes all checks but `check_batch`.

    Args:
        config: the configuration of the run, which `check_settings` has accepted.

    Raises:
        UserError: the records are missing or do not suit the configuration. Names the setting, the rule and the value.
    """
    records, dataset = open_for_training(config.dataset)
    config = replace(config, dataset=dataset)
    task = task_of_records(config, records)
    check_records(config, records, task)
    return CheckedRun(config, records, task)


def check_records(config: TrainConfig, records: Manifest, task: Task) -> None:
    """Checks a configuration against its records.

    Args:
        config: the configuration of the run.
        records: the manifest of the records, including the split held out for validation.
        task: the task of the run, which adds its own checks.

    Raises:
        UserError: a setting does not suit the records or the task. Names the setting and the rule.
    """
    dataset, recipe = config.dataset, config.recipe
    reason = 'without validation: a "val" split, DatasetSpec.validation_split or DatasetSpec.validation_fraction'
    validated = bool(validation_split(dataset))
    require(validated or not recipe.patience, "Recipe.patience", f"be 0 {reason}", recipe.patience)
    rule = f'not be "plateau" {reason}'
    require(validated or recipe.schedule != "plateau", "Recipe.schedule", rule)
    available = len(task.training_records(records, dataset.train_split))
    rest = " that are not held out for validation" if dataset.validation_fraction else ""
    rule = f"be at most {available}, the number of records in split {dataset.train_split!r}{rest}"
    require(recipe.batch <= available, "Recipe.batch", rule + _suggestion(config, available), recipe.batch)
    task.check(config, records)


def check_initial_weights(config: TrainConfig) -> None:
    """Checks that the network of `TrainConfig.init`, if any, has the architecture of the run, from its metadata alone.

    Raises:
        UserError: the file does not exist, was not saved by this package, or see `require_compatible`.
    """
    if config.init is not None:
        metadata = describe(config.init)
        require_compatible(config.init, (metadata.expansion, metadata.options), (config.expansion, config.model))


def require_compatible(
    source: str | Path, theirs: tuple[Expansion, ModelOptions], ours: tuple[Expansion, ModelOptions]
) -> None:
    """Checks that weights of one network suit another one. Classes, heads and clips may differ.

    Args:
        source: path of the source network, for the message.
        theirs, ours: expansion and options of the source network and of the target network.

    Raises:
        UserError: the networks have another width, depth, input or activation.
    """
    for name in ("family", "input", "swish", "swish_before", "shortcut_norm"):  # weight shapes do not reveal these
        their_value, our_value = getattr(theirs[1], name), getattr(ours[1], name)
        if their_value != our_value:
            value = f'"{their_value}"' if isinstance(their_value, str) else their_value
            raise UserError(
                f"TrainConfig.init: {source} was trained with ModelOptions.{name} = {their_value!r}, but this run has "
                f"{our_value!r}; set it with --gin_bindings='ModelOptions.{name}={value}'"
            )
    their_layers, our_layers = (dict(parameters(expansion, None, options)) for expansion, options in (theirs, ours))
    mismatches = [name for name, count in our_layers.items() if their_layers.get(name) != count]
    mismatches += [name for name in their_layers if name not in our_layers]
    if mismatches:
        count, first = len(mismatches), mismatches[0]
        layers = f"layer {first} does not match" if count == 1 else f"{count} layers do not match, the first is {first}"
        raise UserError(
            f"TrainConfig.init: {source} has another architecture: {layers}. Blocks x channels per stage: "
            f"{_stages(*theirs)} in the source, {_stages(*ours)} in this run; set Expansion.gamma_w, gamma_b, gamma_d "
            "and ModelOptions to those of the source"
        )


def _stages(expansion: Expansion, options: ModelOptions) -> str:
    stages = plan(expansion, options).stages
    return ", ".join(f"{stage.depth}x{stage.width} ({stage.inner_width} inside)" for stage in stages)


def fitting_batch(config: TrainConfig, largest: int, devices: int = 1) -> int:
    """Returns the largest batch, at most `largest`, that devices, micro-batches and batch-norm groups divide, or 0."""
    parts, group = devices * config.execution.accumulation, config.model.bn_group
    clips = largest // parts
    return parts * (clips if clips <= group else clips // group * group)


def _suggestion(config: TrainConfig, largest: int, devices: int = 1) -> str:
    """Returns the binding of a valid batch in brackets, or nothing if there is none."""
    batch = fitting_batch(config, min(largest, config.recipe.batch), devices)
    return f" ({binding_flag('Recipe.batch', batch)})" if batch else ""


def check_batch(config: TrainConfig, devices: int) -> None:
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
    for factor in phases_of(config).clips:
        larger = clips * factor
        rule = f"give a multiple of ModelOptions.bn_group = {group} clips per {unit} in a batch {factor} times as large"
        require(larger <= group or larger % group == 0, "Recipe.batch", f"{rule} too (Recipe.multigrid)", larger)
