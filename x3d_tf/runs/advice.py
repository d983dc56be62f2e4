"""Advice where a configuration does not fit the records: the numbers found, the rule, and the binding that mends it.

Imports no TensorFlow at the top: commands that only read settings import this module.
"""

import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence

from x3d_tf.config import TrainConfig
from x3d_tf.data.records.index import Record
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.sampling import STRIDE_FPS
from x3d_tf.modeling.expansion import BASE_SCALE
from x3d_tf.text import binding_flag, counted

FILLED = 0.8  # share of a clip that most videos must fill; gin/few_videos.gin was measured on videos that fill 0.87
MOST_EPOCHS = 300  # the paper's recipe sees each video of Kinetics-400 256 times
RARE = 5  # times as many videos of the most frequent class as of the rarest


def print_advice(manifest: Manifest, config: TrainConfig) -> None:
    """Prints `advice` to stderr, once it has measured the frames of some records.

    Raises:
        UserError: damaged records.
    """
    from x3d_tf.data.input_pipeline import short_sides  # imports TensorFlow

    for text in advice(manifest, config, short_sides(manifest, config.dataset.train_split)):
        print(f"warning: {text}", file=sys.stderr)


def advice(manifest: Manifest, config: TrainConfig, sides: Sequence[int]) -> list[str]:
    """Says where the training records do not fit the configuration.

    The synthetic videos of moving_shapes get none: they and the recipes for them come with the package.

    Args:
        manifest: of the records, less what is held out for validation.
        config: of the run.
        sides: short side in pixels of the frames of some training records.

    Returns:
        Texts of one line each, which end with the binding to use.
    """
    records = [record for record in manifest.split(config.dataset.train_split).records if record.labels]
    if config.dataset.name == "moving_shapes" or not records:
        return []
    found = [
        _of_frames(manifest, config, sides),
        _of_epochs(manifest, config, len(records)),
        _of_flip(manifest, config),
    ]
    if manifest.task != "detection":  # records of key frames are as long as a clip may be
        found.append(_of_length(config, records))
    if manifest.task == "single_label":
        found.append(_of_classes(manifest, config, records))
    return [text for text in found if text]


def _of_length(config: TrainConfig, records: Sequence[Record]) -> str | None:
    """Of clips longer than most videos."""
    clip = config.expansion.clip
    span = clip.frames * clip.stride / STRIDE_FPS
    seconds = sorted(record.frames / record.fps for record in records)
    median = statistics.median(seconds)
    if clip.frames == 1 or median >= FILLED * span:
        return None
    shorter = sum(each < span for each in seconds)
    text = (
        f"a clip of this network spans {span:.2f} s, and {shorter} of the {len(seconds)} training videos are shorter "
        f"(median {median:.2f} s, where {1 - median / span:.0%} of a clip repeats the last frame); most videos should "
        f"fill {FILLED:.0%} of a clip. "
    )
    fitting = seconds[len(seconds) // 4]  # of three videos in four, or more
    neighbours = round(STRIDE_FPS / statistics.median(record.fps for record in records) + 5e-4, 3)
    tau = math.floor(100 * fitting * STRIDE_FPS / clip.frames) / 100
    if tau >= neighbours:
        return text + f"A clip that fits: {binding_flag('Expansion.gamma_tau', tau)}"
    frames = math.floor(fitting * STRIDE_FPS / neighbours)
    if frames < 2:
        return text + "They have too few frames for a clip of several: use longer videos"
    bindings = f"{binding_flag('Expansion.gamma_tau', neighbours)} {binding_flag('Expansion.gamma_t', frames)}"
    return text + f"A clip that fits, of all their frames: {bindings}"


def _of_frames(manifest: Manifest, config: TrainConfig, sides: Sequence[int]) -> str | None:
    """Of frames smaller than what they are scaled to."""
    low, high = config.expansion.jitter
    if not sides or (side := int(statistics.median_low(sides))) >= low:
        return None
    text = (
        f"the training frames measure {side} pixels on their short side (median of {len(sides)} records), and this "
        f"network enlarges them to {low} to {high} before it cuts out {config.expansion.clip.size}; it should not have "
        "to enlarge. "
    )
    if side == manifest.stored.short_side:  # the videos may have been larger
        text += f"Build the records with --short_side={high} if the videos are that large, or train a network that fits"
    else:
        text += "A network that fits"
    return f"{text}: {binding_flag('Expansion.gamma_s', side / BASE_SCALE[0])}"


def _of_epochs(manifest: Manifest, config: TrainConfig, records: int) -> str | None:
    """Of videos too few for the length of the run. Early stopping ends such a run by itself."""
    recipe = config.recipe
    epochs = recipe.scaled_steps * recipe.batch / records
    if recipe.patience or epochs < MOST_EPOCHS + 1:
        return None
    things = "key frames" if manifest.task == "detection" else "videos"
    steps = max(1, math.floor(MOST_EPOCHS * records / recipe.reference_batch))
    return (
        f"{recipe.scaled_steps} steps of {recipe.batch} clips see each of the {records} training {things} "
        f"{epochs:.0f} times, and more than {MOST_EPOCHS} times overfits. Add {things}, or train for fewer steps: "
        f"{binding_flag('Recipe.steps', steps)}"
    )


def _of_flip(manifest: Manifest, config: TrainConfig) -> str | None:
    """Of two classes that are mirror images by their names."""
    if not config.dataset.flip:
        return None
    names = set(manifest.classes)
    pairs = ((name, _mirrored(name)) for name in manifest.classes)
    pair = next(((name, other) for name, other in pairs if other != name and other in names), None)
    if pair is None:
        return None
    return (
        f"classes {pair[0]!r} and {pair[1]!r} differ in left and right, and training mirrors half of its clips, which "
        "makes them the same. Train without mirroring: --gin_bindings=DatasetSpec.flip=False"
    )


def _mirrored(name: str) -> str:
    """The name with left and right exchanged, in the case that they have."""
    other = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
    other |= {right: left for left, right in other.items()}
    return re.sub("|".join(other), lambda match: other[match.group()], name)


def _of_classes(manifest: Manifest, config: TrainConfig, records: Sequence[Record]) -> str | None:
    """Of a rare class."""
    counts = Counter(record.labels[0] for record in records).most_common()
    (most, many), (least, few) = counts[0], counts[-1]
    if config.recipe.class_weights != "none" or many < RARE * few:
        return None
    return (
        f"class {manifest.classes[least]!r} has {counted(few, 'training video')} and "
        f"{manifest.classes[most]!r} {many}; from {RARE} times as many on, the loss of the rare one hardly counts. "
        f"Weigh all classes alike: {binding_flag('Recipe.class_weights', 'balanced')}"
    )
