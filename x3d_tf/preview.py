"""Draws training clips exactly as the network receives them, with their labels, to check the data before training.

Preview the data of a training run:
  python -m x3d_tf.preview --gin_file=gin/x3d_s.gin --gin_file=gin/data/records.gin --records=data/mine

Each row is a clip. The label to its left shows its class, its video and its time in the video or, for action detection,
the labels of its boxes. The clips are the first ones of a training run with the same --gin_file and --gin_bindings. If
the records do not suit the configuration, warnings state the mismatch and the --gin_bindings value that corrects it.
"""

from dataclasses import replace
from pathlib import Path

from absl import flags

from x3d_tf import commands, gin_config
from x3d_tf.data.datasets.spec import open_for_training
from x3d_tf.errors import require
from x3d_tf.runs.advice import print_advice
from x3d_tf.startup import starting_tensorflow
from x3d_tf.tasks.base import task_of_records
from x3d_tf.terminal import tell
from x3d_tf.text import counted

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    gin_config.define_flags(required=True)
    flags.DEFINE_string("records", None, "Records folder. Defaults to DatasetSpec.records of the configuration.")
    flags.DEFINE_integer("clips", 8, "Number of clips to draw, 1 to 64.", lower_bound=1, upper_bound=64)
    flags.DEFINE_string("output", "preview.png", "PNG file to write.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing picture.")


def main() -> None:
    """Draws the clips that the flags choose."""
    output = Path(FLAGS.output)
    require(output.suffix == ".png", "--output", "end in .png", FLAGS.output)
    commands.require_free(output, FLAGS.overwrite, "another --output")
    config = gin_config.parse(FLAGS.gin_file, FLAGS.gin_bindings or []).config
    spec = config.dataset
    if FLAGS.records:
        spec = replace(spec, name="records", records=FLAGS.records)
    spec = replace(spec, eval_split=spec.train_split)  # the records may have no test split yet
    manifest, spec = open_for_training(spec)
    task = task_of_records(config, manifest)
    with starting_tensorflow():
        import tensorflow  # noqa: F401  the task imports it

    tell(f"drawing {counted(FLAGS.clips, 'clip')} of {manifest.folder}")
    output.parent.mkdir(parents=True, exist_ok=True)
    config = replace(config, dataset=spec)
    print_advice(manifest, config, task)
    task.save_preview(config, manifest, output, FLAGS.clips)
    print(f"written: {output}")


if __name__ == "__main__":
    define_flags()
    commands.run(main)
