"""Turns folders of videos into the records that training reads.

A folder for each class, all videos to train on but a fifth of each class, to test on:
  python -m x3d_tf.build_records --videos=my_videos --output=data/my_records --split=0.2

my_videos/train/CLASS/VIDEO and my_videos/test/CLASS/VIDEO (other names: --splits=train,val,test):
  python -m x3d_tf.build_records --videos=my_videos --output=data/my_records

Any format that FFmpeg decodes will do. Files that cannot be decoded are listed in failures.csv, beside the records.
"""

from pathlib import Path

from absl import flags

from x3d_tf import _command
from x3d_tf.data.builder import FAILURES_NAME, BuildResult, build_records, default_splits

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("videos", None, "Folder that holds a folder of videos for each class.", required=True)
    flags.DEFINE_string("output", None, "New or empty folder for the records.", required=True)
    flags.DEFINE_list("splits", None, "Names of the folders in --videos that hold the class folders of each split.")
    flags.DEFINE_float("split", None, "Part of each class's videos that becomes the test split, such as 0.2.")


def main() -> None:
    """Builds the records and says what was written and what to do next."""
    if not (FLAGS.splits or FLAGS.split or default_splits(Path(FLAGS.videos))):
        print('All videos become the split "train". Training also needs some to test on: --split=0.2, or --splits.')
    result = build_records(FLAGS.videos, FLAGS.output, splits=FLAGS.splits, split=FLAGS.split)
    print("\n".join(summary(result)))


def summary(result: BuildResult) -> list[str]:
    """Lines that say what a build wrote, what to watch out for, and what to run next."""
    manifest = result.manifest
    lines = [f"{manifest.folder}: {len(manifest.classes)} classes"]
    for name, split in manifest.splits.items():
        size = sum(shard.bytes for shard in split.shards)
        lines.append(f"  {name}: {len(split.records)} videos, {size / 1e6:.1f} MB in {len(split.shards)} shards")
        present = {label for record in split.records for label in record.labels}
        missing = [label for number, label in enumerate(manifest.classes) if number not in present]
        if missing:
            lines.append(f"  {name} has no video of {len(missing)} classes: {', '.join(missing)}")
    if result.failures:
        lines.append(f"  {result.failures} files are left out; {manifest.folder / FAILURES_NAME} gives the reasons")
    names = list(manifest.splits)
    if len(names) == 1:
        return [*lines, "Training also needs videos to test on: build with --split=0.2, or with --splits."]
    bindings = [f'DatasetSpec.records="{manifest.folder}"']
    bindings += [f'DatasetSpec.train_split="{names[0]}"'] if names[0] != "train" else []
    bindings += [f'DatasetSpec.eval_split="{names[-1]}"'] if names[-1] != "test" else []
    options = " ".join(f"--gin_bindings='{binding}'" for binding in bindings)
    recipes = "--gin_file=gin/x3d_s.gin --gin_file=gin/data/records.gin"
    run = f"--workdir=runs/{Path(manifest.folder).resolve().name}"
    return [*lines, "Train on them with:", f"  python -m x3d_tf.train {recipes} {options} {run}"]


if __name__ == "__main__":
    define_flags()
    _command.run(main)
