"""Turns videos into the records that training reads.

A folder for each class, all videos to train on but a fifth of each class, to test on:
  python -m x3d_tf.build_records --videos=my_videos --output=data/my_records --split=0.2

my_videos/train/CLASS/VIDEO, my_videos/test/CLASS/VIDEO and, if you like, my_videos/val/CLASS/VIDEO, which validates
while a network trains (other names: --splits=one,two):
  python -m x3d_tf.build_records --videos=my_videos --output=data/my_records

A csv file that lists them, with paths relative to --videos (without it, to the file's own folder):
  python -m x3d_tf.build_records --csv=my_list.csv --videos=my_videos --output=data/my_records
Its first line names the columns: path,label and any of split,start,end. Split is train, val or test (or as in --splits;
or none, and --split); start and end are the seconds to keep. "run;jump" are two labels, and make a multi-label task.
Columns may also be separated by ; (labels of several classes then take quotes) or tabs.

Action detection: AVA's videos, or folders of their frames, and its csv files of boxes, one for each split:
  python -m x3d_tf.build_records --videos=ava/videos_15min --output=data/ava \\
      --boxes=train=ava/ava_train_v2.2.csv --boxes=val=ava/ava_val_v2.2.csv --proposals=val=ava/person_boxes_val.csv \\
      --exclusions=val=ava/ava_val_excluded_timestamps_v2.2.csv
A record then is the 2.7 seconds around a key frame. Proposals are the boxes of a person detector, in the same format
with a score in the last column. --label_map names the actions of other lists.

Whether the records are whole:
  python -m x3d_tf.build_records --verify --output=data/my_records

Any format that FFmpeg decodes will do. Files that cannot be decoded are listed in failures.csv, beside the records. A
build that was stopped (Ctrl-C, SIGTERM), or even killed, resumes when the same command is given again. It then also
retries the videos that took longer than --timeout or changed while they were read, and those that failed and have
changed since.
In --csv a leading ' before text that begins with = + - or @ is removed: the csv files that the package writes have it,
so that no spreadsheet takes such a name for a formula. --output keeps a build.json that
tells it from other builds. Records take 6 to 26 times the room of the videos: the command says how much before it goes
on, and --quality=85 or a smaller --short_side make them smaller.
"""

import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from x3d_tf import commands, gin_config
from x3d_tf.data.build.builder import BuildResult, build_key_frames, build_records
from x3d_tf.data.build.encoding import TIMEOUT
from x3d_tf.data.build.key_frames import FIRST_MINUTE
from x3d_tf.data.build.sources import find_split_folders
from x3d_tf.data.build.state import FAILURES_NAME
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.video.image_sequences import FOLDER_FPS
from x3d_tf.errors import UserError, first_few, require
from x3d_tf.runs.advice import advice
from x3d_tf.startup import starting_tensorflow
from x3d_tf.terminal import one_line
from x3d_tf.text import binding_flag, counted

FLAGS = flags.FLAGS

_OF_BOXES = ("proposals", "exclusions", "label_map", "starts_at", "frame_rate")
_SMALLEST_OF_X3D_S = 182  # pixels to which it scales the short side; smaller frames would be blown up


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("videos", None, "Folder that holds a folder of videos for each class; with --csv, its files.")
    flags.DEFINE_string("csv", None, "File that lists the videos, in place of folders.")
    flags.DEFINE_multi_string("boxes", None, "SPLIT=FILE: a csv of boxes and actions, in AVA's format. Once a split.")
    flags.DEFINE_multi_string("proposals", None, "SPLIT=FILE: with --boxes, a csv of a person detector's boxes.")
    flags.DEFINE_multi_string("exclusions", None, "SPLIT=FILE: with --boxes, a csv of key frames to leave out.")
    flags.DEFINE_string("label_map", None, "With --boxes: a .pbtxt of the actions; AVA's 80 unless given.")
    flags.DEFINE_float("starts_at", FIRST_MINUTE, "With --boxes: second of the film at which the files begin.")
    flags.DEFINE_float("frame_rate", None, "With --boxes: images a second in folders of frames. Defaults to 30.")
    flags.DEFINE_string("output", None, "Folder for the records: new, empty, or of this build.", required=True)
    flags.DEFINE_list("splits", None, "Names of the folders in --videos, or in --csv's column, that are the splits.")
    flags.DEFINE_float("split", None, "Part of each class's videos that becomes the test split, such as 0.2.")
    flags.DEFINE_string("classes", None, "Text file with a class on each line, where their order matters.")
    flags.DEFINE_integer("short_side", 256, "Of the stored frames, in pixels; smaller videos keep their size.")
    flags.DEFINE_integer("quality", 95, "Of the stored JPEG frames, 1 to 95.")
    flags.DEFINE_integer("seed", 0, "Of the order of the videos, and of which --split chooses.")
    flags.DEFINE_integer("workers", None, "Processes that decode; one for each CPU by default.")
    flags.DEFINE_float("timeout", TIMEOUT, "Seconds that decoding one video may take. Defaults to 600.")
    flags.DEFINE_bool("verify", False, "Read the records in --output whole and say what is damaged; builds nothing.")


def main() -> None:
    """Builds the records and says what was written and what to do next; or verifies those there are."""
    if FLAGS.verify:
        _verify()
        return
    if FLAGS.videos is None and FLAGS.csv is None:
        raise UserError("--videos=FOLDER or --csv=FILE must say where the videos are")
    _check_boxes()
    if not (
        FLAGS.boxes or FLAGS.csv or FLAGS.splits or FLAGS.split is not None or find_split_folders(Path(FLAGS.videos))
    ):
        print('All videos become the split "train". Training also needs some to test on: --split=0.2, or --splits.')
    try:
        result = _build_key_frames() if FLAGS.boxes else _build_videos()
    except KeyboardInterrupt:
        print("\nThe same command goes on after the last finished shard.", file=sys.stderr)
        raise
    print("\n".join(summary(result)))


def _coding() -> dict[str, Any]:
    return {name: FLAGS[name].value for name in ("short_side", "quality", "seed", "workers", "timeout")}


def _build_videos() -> BuildResult:
    how = {name: FLAGS[name].value for name in ("csv", "splits", "split", "classes")}
    return build_records(FLAGS.videos, FLAGS.output, **how, **_coding())


def _build_key_frames() -> BuildResult:
    videos = Path(FLAGS.videos)
    if FLAGS.frame_rate is None and videos.is_dir() and any(entry.is_dir() for entry in videos.iterdir()):
        print(f"Folders of frames are read as {FOLDER_FPS:g} images a second; --frame_rate says otherwise.")
    return build_key_frames(
        FLAGS.videos,
        FLAGS.output,
        _by_split("boxes"),
        proposals=_by_split("proposals"),
        exclusions=_by_split("exclusions"),
        label_map=FLAGS.label_map,
        starts_at=FLAGS.starts_at,
        frame_rate=FOLDER_FPS if FLAGS.frame_rate is None else FLAGS.frame_rate,
        **_coding(),
    )


def _by_split(name: str) -> dict[str, str]:
    """Files by their splits, of a flag whose values are SPLIT=FILE."""
    found: dict[str, str] = {}
    for value in FLAGS[name].value or ():
        split, _, file = value.partition("=")
        good = bool(re.fullmatch(r"\w+", split)) and bool(file) and split not in found
        require(good, f"--{name}", "be SPLIT=FILE, once for each split", value)
        found[split] = file
    return found


def _check_boxes() -> None:
    """Raises `UserError` where flags do not go together."""
    others = ("csv", "splits", "split", "classes") if FLAGS.boxes else _OF_BOXES
    given = [f"--{name}" for name in others if FLAGS[name].present]
    if given and FLAGS.boxes:
        raise UserError(f"--boxes takes --videos, not {', '.join(given)}")
    if given:
        raise UserError(f"{', '.join(given)} must not be given without --boxes")


def _verify() -> None:
    sources = ("videos", "csv", "splits", "split", "classes", "boxes", *_OF_BOXES)
    given = [f"--{name}" for name in sources if FLAGS[name].present]
    if given:
        raise UserError(f"--verify takes --output only, not {', '.join(given)}")
    Manifest.load(FLAGS.output)  # before TensorFlow is loaded, which takes seconds
    with starting_tensorflow():
        from x3d_tf.data.records.verify import verify_records

    problems: list[str] = []
    for report in verify_records(FLAGS.output):
        tqdm.write(str(report))
        problems += report.problems
    if problems:
        raise UserError(
            f"{FLAGS.output} holds {counted(len(problems), 'damaged shard')}; delete the folder and build the records "
            "again"
        )


def summary(result: BuildResult) -> list[str]:
    """Lines that say what a build wrote, what to watch out for, and what to run next."""
    manifest = result.manifest
    detects = manifest.task == "detection"
    several = {"multi_label": ", several of a video", "detection": " of boxes on key frames"}.get(manifest.task, "")
    kind, thing = ("key frame", "box") if detects else ("video", "video")
    done = "; they were finished already" if result.was_finished else ""
    lines = [f"{manifest.folder}: {counted(len(manifest.classes), 'class')}{several}{done}"]
    for name, split in manifest.splits.items():
        size = sum(shard.bytes for shard in split.shards)
        held, shards = counted(len(split.records), kind), counted(len(split.shards), "shard")
        lines.append(f"  {name}: {held}, {size / 1e6:.1f} MB in {shards}")
        present = {label for record in split.records for label in record.labels}
        missing = [label for number, label in enumerate(manifest.classes) if number not in present]
        if missing:
            lines.append(f"  {name} has no {thing} of {counted(len(missing), 'class')}: {one_line(first_few(missing))}")
    if len(manifest.classes) == 1 and manifest.task == "single_label":
        lines.append("  There is one class only: a network has nothing to tell it from.")
    if result.failures:
        what = counted(result.failures, "video or key frame" if detects else "file")
        lines.append(f"  left out: {what}; {manifest.folder / FAILURES_NAME} gives the reasons")
    if result.to_retry:
        why = "that took too long, or changed while being read: the same command tries again"
        lines.append(f"  among them {counted(result.to_retry, thing)} {why}")
    return [*lines, *_next(manifest, detects)]


def _next(manifest: Manifest, detects: bool) -> list[str]:
    """What to run next."""
    names = list(manifest.splits)
    if len(names) == 1:
        how = "another --boxes=SPLIT=FILE" if detects else "--split=0.2, or with --splits"
        return [f"Training also needs videos to test on: build with {how}."]
    tested = "val" if detects else "test"
    bindings: dict[str, str | int] = {"DatasetSpec.records": str(manifest.folder)}
    if not {"train", "val"} <= set(names):  # else training finds them by their names
        bindings |= {"DatasetSpec.train_split": names[0]} if names[0] != "train" else {}
        bindings |= {"DatasetSpec.validation_split": names[1]} if len(names) == 3 and not detects else {}
        bindings |= {"DatasetSpec.eval_split": names[-1]} if names[-1] != tested else {}
    recipes = ["gin/x3d_s.gin", "gin/data/records.gin"]
    begin = "Train on them with:"
    if detects:
        recipes = ["gin/ava/x3d_m_v2.2.gin"]
        begin = "Train on them, from weights of Kinetics (TrainConfig.init; without it from random ones), with:"
        trained = sum(bool(record.labels) for record in manifest.splits[names[0]].records)
        bindings |= {"TrainConfig.init": "runs/x3d_m_kinetics", "Recipe.batch": min(64, trained // 8 * 8 or trained)}
    elif manifest.stored.short_side < _SMALLEST_OF_X3D_S:
        recipes = ["gin/few_videos.gin"]
    flags_ = [f"--gin_file={file}" for file in recipes] + [binding_flag(*binding) for binding in bindings.items()]
    run = "--workdir=" + shlex.quote(f"runs/{Path(manifest.folder).resolve().name}")
    return [*_advice(manifest, recipes, names[0]), begin, f"  python -m x3d_tf.train {' '.join(flags_)} {run}"]


def _advice(manifest: Manifest, recipes: list[str], split: str) -> list[str]:
    """Where the records do not fit the recipes that are named for them."""
    with starting_tensorflow():
        from x3d_tf.data.input_pipeline import short_sides

    config = gin_config.parse(recipes).config
    config = replace(config, dataset=replace(config.dataset, train_split=split))
    return [f"  warning: {text}" for text in advice(manifest, config, short_sides(manifest, split))]


if __name__ == "__main__":
    define_flags()
    commands.run(main)
