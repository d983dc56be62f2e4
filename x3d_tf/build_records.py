"""Turns videos into the records that training reads.

A folder for each class, all videos to train on but a fifth of each class, to test on:
  python -m x3d_tf.build_records --videos=my_videos --output=data/my_records --split=0.2

my_videos/train/CLASS/VIDEO and my_videos/test/CLASS/VIDEO (other names: --splits=train,val,test):
  python -m x3d_tf.build_records --videos=my_videos --output=data/my_records

A csv file that lists them, with paths relative to --videos (without it, to the file's own folder):
  python -m x3d_tf.build_records --csv=my_list.csv --videos=my_videos --output=data/my_records
Its first line names the columns: path,label and any of split,start,end. Split is train, val or test (or as in --splits;
or none, and --split); start and end are the seconds to keep. "run;jump" are two labels, and make a multi-label task.

Whether the records are whole:
  python -m x3d_tf.build_records --verify --output=data/my_records

Any format that FFmpeg decodes will do. Files that cannot be decoded are listed in failures.csv, beside the records. A
build that was stopped, or even killed, goes on when the same command is given again. --output keeps a build.json that
tells it from other builds. Records take 6 to 26 times the room of the videos: the command says how much before it goes
on, and --quality=85 or a smaller --short_side make them smaller.
"""

import sys
from pathlib import Path

from absl import flags
from tqdm import tqdm

from x3d_tf import _command
from x3d_tf._checks import UserError
from x3d_tf.data.build_folder import FAILURES_NAME
from x3d_tf.data.builder import BuildResult, build_records
from x3d_tf.data.sources import default_splits

FLAGS = flags.FLAGS

_SMALLEST_OF_X3D_S = 182  # pixels to which it scales the short side; smaller frames would be blown up


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("videos", None, "Folder that holds a folder of videos for each class; with --csv, its files.")
    flags.DEFINE_string("csv", None, "File that lists the videos, in place of folders.")
    flags.DEFINE_string("output", None, "Folder for the records: new, empty, or of this build.", required=True)
    flags.DEFINE_list("splits", None, "Names of the folders in --videos, or in --csv's column, that are the splits.")
    flags.DEFINE_float("split", None, "Part of each class's videos that becomes the test split, such as 0.2.")
    flags.DEFINE_string("classes", None, "Text file with a class on each line, where their order matters.")
    flags.DEFINE_integer("short_side", 256, "Of the stored frames, in pixels; smaller videos keep their size.")
    flags.DEFINE_integer("quality", 95, "Of the stored JPEG frames, 1 to 95.")
    flags.DEFINE_integer("seed", 0, "Of the order of the videos, and of which --split chooses.")
    flags.DEFINE_integer("workers", None, "Processes that decode; one for each CPU by default.")
    flags.DEFINE_bool("verify", False, "Read the records in --output whole and say what is damaged; builds nothing.")


def main() -> None:
    """Builds the records and says what was written and what to do next; or verifies those there are."""
    _command.quiet_tensorflow()
    if FLAGS.verify:
        _verify()
        return
    if FLAGS.videos is None and FLAGS.csv is None:
        raise UserError("--videos=FOLDER or --csv=FILE must say where the videos are")
    if not (FLAGS.csv or FLAGS.splits or FLAGS.split is not None or default_splits(Path(FLAGS.videos))):
        print('All videos become the split "train". Training also needs some to test on: --split=0.2, or --splits.')
    try:
        result = build_records(
            FLAGS.videos,
            FLAGS.output,
            csv=FLAGS.csv,
            splits=FLAGS.splits,
            split=FLAGS.split,
            classes=FLAGS.classes,
            short_side=FLAGS.short_side,
            quality=FLAGS.quality,
            seed=FLAGS.seed,
            workers=FLAGS.workers,
        )
    except KeyboardInterrupt:
        print("\nThe same command goes on after the last finished shard.", file=sys.stderr)
        raise
    print("\n".join(summary(result)))


def _verify() -> None:
    from x3d_tf.data.verify import verify_records  # imports TensorFlow

    given = [f"--{name}" for name in ("videos", "csv", "splits", "split", "classes") if FLAGS[name].present]
    if given:
        raise UserError(f"--verify takes --output only, not {', '.join(given)}")
    problems: list[str] = []
    for report in verify_records(FLAGS.output):
        tqdm.write(str(report))
        problems += report.problems
    if problems:
        raise UserError(
            f"{FLAGS.output} holds {len(problems)} damaged shards; delete the folder and build the records again"
        )


def summary(result: BuildResult) -> list[str]:
    """Lines that say what a build wrote, what to watch out for, and what to run next."""
    manifest = result.manifest
    several = ", several of a video" if manifest.task == "multi_label" else ""
    done = "; they were finished already" if result.was_finished else ""
    lines = [f"{manifest.folder}: {len(manifest.classes)} classes{several}{done}"]
    for name, split in manifest.splits.items():
        size = sum(shard.bytes for shard in split.shards)
        lines.append(f"  {name}: {len(split.records)} videos, {size / 1e6:.1f} MB in {len(split.shards)} shards")
        present = {label for record in split.records for label in record.labels}
        missing = [label for number, label in enumerate(manifest.classes) if number not in present]
        if missing:
            lines.append(f"  {name} has no video of {len(missing)} classes: {', '.join(missing)}")
    if len(manifest.classes) == 1 and manifest.task == "single_label":
        lines.append("  There is one class only: a network has nothing to tell it from.")
    if result.failures:
        lines.append(f"  {result.failures} files are left out; {manifest.folder / FAILURES_NAME} gives the reasons")
    names = list(manifest.splits)
    if len(names) == 1:
        return [*lines, "Training also needs videos to test on: build with --split=0.2, or with --splits."]
    bindings = [f'DatasetSpec.records="{manifest.folder}"']
    bindings += [f'DatasetSpec.train_split="{names[0]}"'] if names[0] != "train" else []
    bindings += [f'DatasetSpec.eval_split="{names[-1]}"'] if names[-1] != "test" else []
    options = " ".join(f"--gin_bindings='{binding}'" for binding in bindings)
    small = int(manifest.settings.get("short_side", 256)) < _SMALLEST_OF_X3D_S
    recipes = "--gin_file=gin/few_videos.gin" if small else "--gin_file=gin/x3d_s.gin --gin_file=gin/data/records.gin"
    run = f"--workdir=runs/{Path(manifest.folder).resolve().name}"
    return [*lines, "Train on them with:", f"  python -m x3d_tf.train {recipes} {options} {run}"]


if __name__ == "__main__":
    define_flags()
    _command.run(main)
