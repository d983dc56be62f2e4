"""Warnings about configurations that do not fit the records, each with the gin binding that fixes it.

Does not import TensorFlow at module level, so that commands that only read settings start quickly.
"""

import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from x3d_tf.config import TrainConfig
from x3d_tf.data.records.index import Record
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.sampling import STRIDE_FPS
from x3d_tf.modeling.expansion import BASE_SCALE
from x3d_tf.text import binding_flag, counted, plural

MIN_CLIP_COVERAGE = 0.8  # of the clip's duration, for most videos; gin/few_videos.gin was measured at 0.87
MAX_EPOCHS = 300  # the paper's recipe trains for 256 epochs of Kinetics-400, and for 512 of Kinetics-600
MANY_RECORDS = 100_000  # training records for which `MAX_EPOCHS` does not apply: Kinetics has more
MAX_RATE = 1.6  # learning rate; the paper uses it for batches of 1024, and more only in proportion to larger ones
MIN_SCALED_STEPS = 100  # steps that a recipe must keep when it is scaled to a larger batch
MAX_IMBALANCE = 5  # ratio of the most frequent to the rarest class


class Adviser(Protocol):
    """A task, as far as advice uses it; see `tasks.base.Task`."""

    @property
    def sample(self) -> str: ...

    def classes(self, manifest: Manifest) -> tuple[str, ...]: ...

    def training_records(self, manifest: Manifest, split: str) -> Sequence[Record]: ...

    def advice(self, config: TrainConfig, manifest: Manifest) -> list[str]: ...


def print_advice(manifest: Manifest, config: TrainConfig, task: Adviser) -> None:
    """Measures the frames of a sample of the records and prints `advice` to stderr.

    Raises:
        UserError: the records are damaged.
    """
    from x3d_tf.data.input_pipeline import short_sides  # imports TensorFlow

    for text in advice(manifest, config, short_sides(manifest, config.dataset.train_split), task):
        print(f"warning: {text}", file=sys.stderr)


def advice(manifest: Manifest, config: TrainConfig, sides: Sequence[int], task: Adviser) -> list[str]:
    """Returns warnings about training records that do not fit the configuration.

    Synthetic data sets are exempt from all but the check of the batch: they have recipes of their own.

    Args:
        manifest: the manifest of the records, without those held out for validation.
        config: the configuration of the run.
        sides: short side in pixels of the frames of a sample of the training records.
        task: the task of the run, which adds its own warnings.

    Returns:
        Messages of one line each. They end with the suggested binding.
    """
    records = task.training_records(manifest, config.dataset.train_split)
    scaling = _check_scaling(config)
    if config.dataset.synthetic is not None or not records:
        return [scaling] if scaling else []
    found = [
        scaling,
        _check_frame_size(manifest, config, sides),
        _check_epochs(config, len(records), plural(task.sample)),
        _check_flip(task.classes(manifest), config),
    ]
    return [*(text for text in found if text), *task.advice(config, manifest)]


def _check_scaling(config: TrainConfig) -> str | None:
    """Returns a warning if the learning rate is too high, or if scaling to a larger batch leaves too few steps."""
    recipe = config.recipe
    rate, steps = recipe.scaled_learning_rate, recipe.scaled_steps
    too_fast = rate > MAX_RATE * max(1, recipe.batch / 1024)
    too_short = steps < MIN_SCALED_STEPS <= recipe.steps
    if not (too_fast or too_short):
        return None
    if recipe.batch <= recipe.reference_batch:
        return (
            f"the learning rate is {rate:g} for a batch of {counted(recipe.batch, 'clip')} and "
            f"{counted(steps, 'step')}. The paper uses {MAX_RATE} for 1024 clips, and more for larger batches only"
        )
    return (
        f"Recipe.batch = {recipe.batch} scales Recipe.learning_rate = {recipe.learning_rate:g} and Recipe.steps = "
        f"{recipe.steps}, which are for {recipe.reference_batch} clips, to a learning rate of {rate:g} for "
        f"{counted(steps, 'step')}. Use a recipe for large batches, such as gin/kinetics400/x3d_m.gin, or state that "
        f"rate and steps are for this batch: {binding_flag('Recipe.reference_batch', recipe.batch)}"
    )


def check_clip_length(config: TrainConfig, records: Sequence[Record]) -> list[str]:
    """Returns a warning if clips are longer than most videos."""
    clip = config.expansion.clip
    span = clip.frames * clip.stride / STRIDE_FPS
    seconds = sorted(record.frames / record.fps for record in records)
    median = statistics.median(seconds)
    if clip.frames == 1 or median >= MIN_CLIP_COVERAGE * span:
        return []
    shorter = sum(duration < span for duration in seconds)
    text = (
        f"a clip of this network spans {span:.2f} s, but {shorter} of the {len(seconds)} training videos are shorter "
        f"(median {median:.2f} s, so that {1 - median / span:.0%} of a clip repeats the last frame); most videos "
        f"should cover at least {MIN_CLIP_COVERAGE:.0%} of a clip. "
    )
    target = seconds[len(seconds) // 4]  # at least three quarters of the videos are this long
    every_frame = round(STRIDE_FPS / statistics.median(record.fps for record in records) + 5e-4, 3)  # as gamma_tau
    tau = math.floor(100 * target * STRIDE_FPS / clip.frames) / 100
    if tau >= every_frame:
        return [text + f"Use shorter clips: {binding_flag('Expansion.gamma_tau', tau)}"]
    frames = math.floor(target * STRIDE_FPS / every_frame)
    if frames < 2:
        return [text + "The videos have too few frames for a clip of more than one: use longer videos"]
    bindings = f"{binding_flag('Expansion.gamma_tau', every_frame)} {binding_flag('Expansion.gamma_t', frames)}"
    return [text + f"Use shorter clips of consecutive frames: {bindings}"]


def _check_frame_size(manifest: Manifest, config: TrainConfig, sides: Sequence[int]) -> str | None:
    """Returns a warning if training upscales the stored frames, else None."""
    low, high = config.expansion.jitter
    if not sides or (side := int(statistics.median_low(sides))) >= low:
        return None
    text = (
        f"the training frames have a short side of {side} pixels (median of {len(sides)} records), and this network "
        f"upscales them to {low} to {high} pixels for its crop of {config.expansion.clip.size}, which adds no detail. "
    )
    if side == manifest.stored.short_side:  # the original videos may be larger
        text += f"Rebuild the records with --short_side={high} if the videos are that large, or use a smaller crop"
    else:
        text += "Use a smaller crop"
    return f"{text}: {binding_flag('Expansion.gamma_s', side / BASE_SCALE[0])}"


def _check_epochs(config: TrainConfig, records: int, things: str) -> str | None:
    """Returns a warning if the run has so many epochs that it overfits and no early stopping, else None."""
    recipe = config.recipe
    epochs = recipe.scaled_steps * recipe.batch / records
    if recipe.patience or epochs < MAX_EPOCHS + 1 or records >= MANY_RECORDS:
        return None
    steps = max(1, math.floor(MAX_EPOCHS * records / recipe.reference_batch))
    return (
        f"{recipe.scaled_steps} steps with a batch of {recipe.batch} clips are {epochs:.0f} epochs of the {records} "
        f"training {things}, and training for more than {MAX_EPOCHS} epochs overfits. Add {things}, or reduce the "
        f"steps: {binding_flag('Recipe.steps', steps)}"
    )


def _check_flip(classes: Sequence[str], config: TrainConfig) -> str | None:
    """Returns a warning if training flips clips and two class names are mirror images, else None."""
    if not config.dataset.flip:
        return None
    names = set(classes)
    pairs = ((name, _mirrored(name)) for name in classes)
    pair = next(((name, other) for name, other in pairs if other != name and other in names), None)
    if pair is None:
        return None
    return (
        f"classes {pair[0]!r} and {pair[1]!r} differ in left and right, and training flips half of the clips "
        "horizontally, which makes them indistinguishable. Disable flipping: --gin_bindings=DatasetSpec.flip=False"
    )


def _mirrored(name: str) -> str:
    """Swaps "left" and "right" in a class name, and keeps their case."""
    other = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
    other |= {right: left for left, right in other.items()}
    return re.sub("|".join(other), lambda match: other[match.group()], name)


def check_class_balance(config: TrainConfig, manifest: Manifest, records: Sequence[Record]) -> list[str]:
    """Returns a warning if there is only one class, or if the classes are imbalanced and not weighted."""
    if len(manifest.classes) == 1:
        return ["the records have only one class: there is nothing to classify. Add videos of other classes"]
    counts = Counter(record.labels[0] for record in records).most_common()
    (most, many), (least, few) = counts[0], counts[-1]
    if config.recipe.class_weights != "none" or many < MAX_IMBALANCE * few:
        return []
    return [
        f"class {manifest.classes[least]!r} has {counted(few, 'training video')} and class "
        f"{manifest.classes[most]!r} has {many}; at a ratio of {MAX_IMBALANCE} or more, the rare class hardly "
        f"contributes to the loss. Use class weights: {binding_flag('Recipe.class_weights', 'balanced')}"
    ]
