"""Converts videos to the records that training reads.

A folder per class; train on 80% of each class's videos and test on the other 20%:
  python -m x3d_tf.build_records --videos=my_videos --output=data/my_records --split=0.2

Folders my_videos/train/CLASS/VIDEO and my_videos/test/CLASS/VIDEO, and optionally my_videos/val/CLASS/VIDEO for
validation during training (--splits=one,two if the folders have other names):
  python -m x3d_tf.build_records --videos=my_videos --output=data/my_records

A csv file that lists the videos, with paths relative to --videos (or, without --videos, to the csv file's folder):
  python -m x3d_tf.build_records --csv=my_list.csv --videos=my_videos --output=data/my_records
The first line names the columns: path,label and optionally split,start,end. The split is train, val or test, or a name
in --splits; without the column, use --split. start and end delimit the segment to use, in seconds. "run;jump" stands
for two labels and makes the task multi-label. The columns may also be separated by tabs, or by semicolons if labels
that contain a semicolon are quoted.

Action detection from AVA's videos, or from folders of their frames, and AVA's csv files of boxes, one per split:
  python -m x3d_tf.build_records --dataset=ava_v2.2 --videos=ava/videos_15min --output=data/ava_v2.2 \\
      --boxes=train=ava/ava_train_v2.2.csv --boxes=val=ava/ava_val_v2.2.csv --proposals=val=ava/person_boxes_val.csv \\
      --exclusions=val=ava/ava_val_excluded_timestamps_v2.2.csv
A record then holds the 2.7 seconds around a key frame. Proposals are the boxes of a person detector, in the same format
with a score in the last column. Without --dataset, any csv files in AVA's format are accepted, and --label_map names
their actions.

Published data sets by name, with their own lists, one per split (docs/kinetics.md and docs/small-sets.md):
  python -m x3d_tf.build_records --dataset=kinetics400 --videos=kinetics400 --output=data/kinetics400 \\
      --lists=train=train.csv --lists=val=validate.csv

TFRecord files that Model Garden, MediaSequence or DMVR wrote (docs/training.md):
  python -m x3d_tf.build_records --dataset=sequence_examples --lists='train=shards/train-*' --classes=classes.txt \\
      --frame_rate=25 --output=data/my_records

Other data sets by name, from an installed package or a module of your own:
  python -m x3d_tf.build_records --plugin=my_data --dataset=my_data --videos=my_videos --output=data/my_records

On many machines that share the folders, such as the jobs of a SLURM array: any number of parts, each built by a command
of its own, at the same time and in any order. When all have ended, the same command with --finish writes the manifest:
  python -m x3d_tf.build_records --videos=my_videos --output=data/my_records --split=0.2 --part=3/16
  python -m x3d_tf.build_records --videos=my_videos --output=data/my_records --split=0.2 --finish

On all nodes of a Ray cluster, pip install 'x3d_tf[cluster]':
  python -m x3d_tf.build_records --videos=/data/videos --output=/data/my_records --split=0.2 --ray=head.example:6379

Verify that existing records are intact, or write their files SHARD.frames, without which shards cannot be read:
  python -m x3d_tf.build_records --verify --output=data/my_records
  python -m x3d_tf.build_records --index --output=data/my_records

All formats that FFmpeg decodes are supported. Files that cannot be decoded are listed in failures.csv in the output
folder. To resume an interrupted build (Ctrl-C, SIGTERM or a crash), run the same command again. It also retries videos
that exceeded --timeout or changed while they were read, and failed videos that have changed since. Parts do the same
when they are run again; then run --finish again. The records are the same bytes, however they are built.

In --csv, a leading ' before text that begins with = + - or @ is removed. The csv files that this package writes have it
to keep spreadsheets from reading the text as a formula. --output holds a build.json that identifies the build.

Records take 6 to 26 times the disk space of the videos. The command prints an estimate first. --quality=85 or a smaller
--short_side makes them smaller.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from x3d_tf import commands, gin_config
from x3d_tf.config import TrainConfig
from x3d_tf.data.building.builder import BuildResult, PartResult, build_part, build_records, finish_records
from x3d_tf.data.building.distributed import build_on_ray
from x3d_tf.data.building.encoding import TIMEOUT
from x3d_tf.data.building.state import FAILURES_NAME
from x3d_tf.data.datasets.base import DATA_SETS, Inputs
from x3d_tf.data.records.frames import index_records
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.errors import UserError, first_few, require
from x3d_tf.runs.advice import advice
from x3d_tf.startup import starting_tensorflow
from x3d_tf.tasks.base import Task, find
from x3d_tf.terminal import one_line
from x3d_tf.text import binding_flag, counted
from x3d_tf.training.checks import fitting_batch

FLAGS = flags.FLAGS

_PATHS = ("videos", "csv", "label_map", "classes")
_FILES_BY_SPLIT = ("lists", "boxes", "proposals", "exclusions")
_EXCLUSIVE = ("part", "finish", "ray")
_PART = re.compile(r"([0-9]{1,9})/([0-9]{1,9})", re.ASCII)
_NUMBERS = ("starts_at", "frame_rate", "split", "seed")


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string(
        "videos",
        None,
        "Folder with one folder of videos per class; with --csv or --boxes, the folder of the listed videos.",
    )
    flags.DEFINE_string(
        "dataset",
        None,
        "Name of the data set, such as kinetics400; a --plugin can add data sets. Defaults to ava with --boxes, csv "
        "with --csv, else folder.",
    )
    flags.DEFINE_string("csv", None, "A csv file that lists the videos.")
    flags.DEFINE_multi_string(
        "lists",
        None,
        "SPLIT=FILE: list of a split's videos in the format of the --dataset; repeat the flag for each split. For "
        "sequence_examples, TFRecord files, such as 'train=shards/train-*'.",
    )
    flags.DEFINE_multi_string(
        "boxes",
        None,
        "SPLIT=FILE: csv of boxes and actions in AVA's format; repeat the flag for each split.",
    )
    flags.DEFINE_multi_string(
        "proposals",
        None,
        "SPLIT=FILE: csv of person-detector boxes for --boxes; repeat the flag for each split.",
    )
    flags.DEFINE_multi_string(
        "exclusions",
        None,
        "SPLIT=FILE: csv of key frames to skip with --boxes; repeat the flag for each split.",
    )
    flags.DEFINE_string(
        "label_map",
        None,
        "A .pbtxt file that names the actions of --boxes. Defaults to AVA's 80 actions.",
    )
    flags.DEFINE_float(
        "starts_at", None, "Timestamp of the first frame in seconds, for --boxes. Defaults to 900, as in AVA."
    )
    flags.DEFINE_float(
        "frame_rate",
        None,
        "Frame rate of folders of frames and of TFRecord files. Defaults to 30 for --boxes, 24 for charades.",
    )
    flags.DEFINE_string(
        "output",
        None,
        "Folder for the records: new, empty, or with an earlier build of the same videos and settings. Required.",
        required=True,
    )
    flags.DEFINE_list(
        "splits",
        None,
        "Comma-separated names of the splits: folders in --videos, or values of the split column of --csv. "
        "Defaults to train, val and test.",
    )
    flags.DEFINE_float(
        "split",
        None,
        "Fraction of each class's videos for the test split, such as 0.2. Defaults to no test split.",
    )
    flags.DEFINE_string(
        "classes",
        None,
        "Text file of class names, one per line, that sets the order of the classes, or the file of the classes that "
        "the --dataset has. Defaults to alphabetical order, or numeric order if all names are numbers.",
    )
    flags.DEFINE_integer(
        "short_side",
        256,
        "Short side of the stored frames in pixels; smaller videos are not upscaled.",
    )
    flags.DEFINE_integer("quality", 95, "JPEG quality of the stored frames, 1 to 95.")
    flags.DEFINE_integer("seed", 0, "Random seed for the order of the videos and for choosing the test split.")
    flags.DEFINE_integer(
        "workers",
        None,
        "Number of decoder processes. Defaults to the number of CPUs; with --ray, number for each task, which reserves "
        "as many CPUs. Defaults to 1 then.",
    )
    flags.DEFINE_float("timeout", TIMEOUT, "Time limit for decoding one video, in seconds. Defaults to 600.")
    flags.DEFINE_string(
        "part",
        None,
        "K/N: part of the records to build, such as 3/16 for the third of 16 parts: every 16th shard. Parts may be "
        "built at the same time, on machines that share --output.",
    )
    flags.DEFINE_bool("finish", False, "Check that the shards of all parts exist, and write the manifest.")
    flags.DEFINE_string(
        "ray", None, "HOST:PORT of the head node of a Ray cluster, whose nodes build the records. They share --output."
    )
    flags.DEFINE_bool(
        "index",
        False,
        "Write the missing or damaged files SHARD.frames of the records in --output; nothing else is built.",
    )
    flags.DEFINE_bool(
        "verify",
        False,
        "Verify the records in --output by reading every byte, and report damaged shards; nothing is built.",
    )


def main() -> None:
    """Builds the records and prints what was written and what to run next, or verifies existing records."""
    if FLAGS.verify or FLAGS.index:
        _check_records()
        return
    given = [f"--{name}" for name in _EXCLUSIVE if FLAGS[name].value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} must not be given together; each builds the records in another way")
    try:
        print("\n".join(_build()))
    except KeyboardInterrupt:
        print("\nRun the same command again to resume after the last finished shard.", file=sys.stderr)
        raise


def _build() -> list[str]:
    """Builds what the flags select; returns lines that describe it."""
    options: Any = {name: FLAGS[name].value for name in ("dataset", "short_side", "quality", "workers", "timeout")}
    part, output = _part(), FLAGS.output
    if part is not None:
        return part_summary(build_part(_inputs(), output, part, **options))
    if FLAGS.finish:
        return summary(finish_records(_inputs(), output, **options), "build the parts and --finish again")
    if FLAGS.ray is not None:
        return summary(build_on_ray(_inputs(), output, FLAGS.ray, **options))
    return summary(build_records(_inputs(), output, **options))


def _part() -> tuple[int, int] | None:
    """Returns the number of the part to build and the number of parts, from --part=K/N."""
    if FLAGS.part is None:
        return None
    match = _PART.fullmatch(FLAGS.part)
    if match is None:
        raise UserError(f"--part must be K/N, such as 3/16 for the third of 16 parts, got {FLAGS.part!r}")
    return int(match[1]), int(match[2])


def _inputs() -> Inputs:
    """Returns the inputs of data sets from the flags."""
    values: dict[str, Any] = {name: FLAGS[name].value for name in _NUMBERS}
    values |= {name: Path(FLAGS[name].value) for name in _PATHS if FLAGS[name].value is not None}
    values |= {name: _by_split(name) for name in _FILES_BY_SPLIT}
    return Inputs(splits=tuple(FLAGS.splits) if FLAGS.splits else None, **values)


def _by_split(name: str) -> dict[str, Path]:
    """Returns the files by split from a flag with values SPLIT=FILE."""
    files: dict[str, Path] = {}
    for value in FLAGS[name].value or ():
        split, _, file = value.partition("=")
        good = bool(re.fullmatch(r"\w+", split)) and bool(file) and split not in files
        require(good, f"--{name}", "be SPLIT=FILE, once for each split", value)
        files[split] = Path(file)
    return files


def _check_records() -> None:
    """Verifies or indexes existing records."""
    given = [f"--{name}" for name in ("dataset", *_EXCLUSIVE, *_inputs().given()) if FLAGS[name].present]
    if given:
        raise UserError(f"{', '.join(given)} must not be given with --verify or --index; they only need --output")
    if FLAGS.index:
        result = index_records(FLAGS.output)
        print(f"{FLAGS.output}: wrote {counted(result.written, 'file')} of frames; {result.kept} existed")
    if FLAGS.verify:
        _verify()


def _verify() -> None:
    Manifest.load(FLAGS.output)  # before importing TensorFlow, which takes seconds
    with starting_tensorflow():
        from x3d_tf.data.records.verify import verify_records

    problems: list[str] = []
    frame_problems: list[str] = []
    for report in verify_records(FLAGS.output):
        tqdm.write(str(report))
        problems += report.problems
        frame_problems += report.frame_problems
    if problems:
        raise UserError(
            f"{FLAGS.output} has {counted(len(problems), 'damaged shard')}; delete the folder and build the records "
            "again"
        )
    if frame_problems:
        raise UserError(
            f"{FLAGS.output} has no damaged shard, but {counted(len(frame_problems), 'file')} of frames must be made "
            f"again: python -m x3d_tf.build_records --index --output={shlex.quote(FLAGS.output)}"
        )


def part_summary(result: PartResult) -> list[str]:
    """Returns lines that state what a part wrote, and the command to run next."""
    if result.was_finished:
        return [f"{result.part}: the build was already complete"]
    lines = [f"{result.part}: all of its {counted(result.shards, 'shard')} are finished"]
    if result.failures:
        lines.append(f"  skipped: {counted(result.failures, 'video')}; --finish lists the reasons in {FAILURES_NAME}")
    if result.to_retry:
        why = "exceeded --timeout or changed while being read; run the same command again to retry"
        lines.append(f"  of these, {counted(result.to_retry, 'video')} {why}")
    return [*lines, "When all parts are finished, run the same command with --finish instead of --part."]


def summary(result: BuildResult, retry: str = "run the same command again") -> list[str]:
    """Returns lines that list what a build wrote, problems with it, and the command to run next.

    Args:
        result: the build.
        retry: what to do to retry videos, without "to retry".
    """
    manifest, task = result.manifest, find(result.manifest.task)
    done = "; the build was already complete" if result.was_finished else ""
    lines = [f"{manifest.folder}: {counted(len(manifest.classes), 'class')}, task {task.name}{done}"]
    for name, split in manifest.splits.items():
        size = sum(shard.bytes for shard in split.shards)
        records, shards = counted(len(split.records), task.sample), counted(len(split.shards), "shard")
        lines.append(f"  {name}: {records}, {size / 1e6:.1f} MB in {shards}")
        if split.expected is not None and split.present != split.expected:
            listed = counted(split.expected, "video")
            lines.append(f"  {name} has records of {split.present} of the {listed} that the data set lists")
        present = {label for record in split.records for label in record.labels}
        missing = [label for number, label in enumerate(manifest.classes) if number not in present]
        if missing:
            classes = counted(len(missing), "class")
            lines.append(f"  {name} has no {task.sample} for {classes}: {one_line(first_few(missing))}")
    if result.failures:
        where = manifest.folder / FAILURES_NAME
        lines.append(f"  skipped: {counted(result.failures, 'source')}; {where} lists the reasons")
    if result.to_retry:
        why = f"exceeded --timeout or changed while being read; {retry} to retry"
        lines.append(f"  of these, {counted(result.to_retry, 'video')} {why}")
    return [*lines, *_training_command(manifest, task)]


def _training_command(manifest: Manifest, task: Task) -> list[str]:
    """Returns the command that trains on the records, with warnings about them."""
    names, suggestion = list(manifest.splits), task.suggestion(manifest)
    gin_files = _recipe_of_data_set(manifest.dataset) or suggestion.gin_files
    if len(names) == 1:
        return [
            "Training also needs a test split: build again with --split=0.2 or --splits, or with another list of the "
            "data set, such as --lists=SPLIT=FILE or --boxes=SPLIT=FILE."
        ]
    config = gin_config.parse(gin_files).config
    bindings: dict[str, str | int] = {"DatasetSpec.records": str(manifest.folder)}
    train, validation, test = _purposes(names)
    if not {"train", "val"} <= set(names):  # training finds these two by their names
        bindings |= {"DatasetSpec.train_split": train} if train != "train" else {}
        bindings |= {"DatasetSpec.validation_split": validation} if validation else {}
        bindings |= {"DatasetSpec.eval_split": test} if test != config.dataset.eval_split else {}
    flips = manifest.dataset not in DATA_SETS.names() or DATA_SETS.get(manifest.dataset).flips
    bindings |= {} if flips or not config.dataset.flip else {"DatasetSpec.flip": False}
    bindings |= suggestion.bindings
    config = replace(config, dataset=replace(config.dataset, train_split=train))
    records, recipe = len(task.training_records(manifest, train)), config.recipe
    batch = fitting_batch(config, min(recipe.batch, suggestion.largest_batch or recipe.batch, records))
    if batch not in (0, recipe.batch):
        bindings["Recipe.batch"] = batch
        config = replace(config, recipe=replace(recipe, batch=batch))
    flags_ = [f"--gin_file={file}" for file in gin_files]
    flags_ += [binding_flag(*binding) for binding in bindings.items()]
    run = "--workdir=" + shlex.quote(f"runs/{Path(manifest.folder).resolve().name}")
    intro = f"Train on them{suggestion.note} with:"
    return [*_advice(manifest, config), intro, f"  python -m x3d_tf.train {' '.join(flags_)} {run}"]


def _purposes(names: Sequence[str]) -> tuple[str, str | None, str]:
    """Returns the splits to train on, to validate on and to evaluate on, by their names or else by their order."""
    train = "train" if "train" in names else names[0]
    others = [name for name in names if name != train]
    test = "test" if "test" in others else others[-1]
    between = [name for name in others if name != test]
    return train, between[0] if len(between) == 1 else None, test


def _recipe_of_data_set(name: str) -> tuple[str, ...]:
    """Returns the gin files of a recipe named after a data set, for the smallest network, or nothing."""
    for files in ((f"gin/{name}/x3d_s.gin",), (f"gin/{name}/x3d_xl.gin",), ("gin/x3d_s.gin", f"gin/data/{name}.gin")):
        with suppress(UserError):
            gin_config.find_recipe(files[-1])
            return files
    return ()


def _advice(manifest: Manifest, config: TrainConfig) -> list[str]:
    """Returns warnings about settings that do not suit the records."""
    with starting_tensorflow():
        from x3d_tf.data.input_pipeline import short_sides

    sides = short_sides(manifest, config.dataset.train_split)
    return [f"  warning: {text}" for text in advice(manifest, config, sides, find(manifest.task))]


if __name__ == "__main__":
    define_flags()
    commands.run(main)
