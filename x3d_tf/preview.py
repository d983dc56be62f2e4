"""Draws training clips exactly as the network gets them, with their labels: a look at the data before training.

With the recipe of a run, before it:
  python -m x3d_tf.preview --gin_file=gin/x3d_s.gin --gin_file=gin/data/records.gin --records=data/mine

Each row is a clip, with its class, its video and its time in that at the left, or of action detection with its boxes
and what each does: the first ones of the run that the same --gin_file and --gin_bindings start. Where the records do
not fit the configuration, warnings name the numbers and the binding that mends them.
"""

from dataclasses import replace
from pathlib import Path

from absl import flags

from x3d_tf import commands, gin_config
from x3d_tf.data.datasets.spec import hold_out, open_dataset, with_default_splits
from x3d_tf.errors import UserError, require
from x3d_tf.runs.advice import print_advice
from x3d_tf.startup import starting_tensorflow
from x3d_tf.terminal import tell
from x3d_tf.text import counted

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    gin_config.define_flags(required=True)
    flags.DEFINE_string("records", None, "Folder of the records; the configuration's unless given.")
    flags.DEFINE_integer("clips", 8, "Rows of the picture.", lower_bound=1, upper_bound=64)
    flags.DEFINE_string("output", "preview.png", "The picture.")
    flags.DEFINE_bool("overwrite", False, "Replace a picture that is there already.")


def main() -> None:
    """Draws what the flags say."""
    output = Path(FLAGS.output)
    require(output.suffix == ".png", "--output", "end in .png", FLAGS.output)
    if output.exists() and not FLAGS.overwrite:
        raise UserError(f"{output} exists; give another --output, or replace it with --overwrite")
    config = gin_config.parse(FLAGS.gin_file, FLAGS.gin_bindings or []).config
    spec = config.dataset
    if FLAGS.records:
        spec = replace(spec, name="records", records=FLAGS.records)
    manifest = open_dataset(replace(spec, eval_split=spec.train_split))  # there need be nothing to test on yet
    spec = with_default_splits(spec, manifest.splits)
    manifest = hold_out(manifest, spec, config.seed)
    with starting_tensorflow():
        from x3d_tf.training.inputs import save_training_preview

    tell(f"drawing {counted(FLAGS.clips, 'clip')} of {manifest.folder}")
    output.parent.mkdir(parents=True, exist_ok=True)
    config = replace(config, dataset=spec)
    print_advice(manifest, config)
    save_training_preview(manifest, config, output, FLAGS.clips)
    print(f"written: {output}")


if __name__ == "__main__":
    define_flags()
    commands.run(main)
