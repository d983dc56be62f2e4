"""Tests the model of a finished run on records: top-1, top-5, cost, predictions and a confusion matrix.

As the run itself was tested, on other clips of each video, or on other records:
  python -m x3d_tf.evaluate --run=runs/x3d_s
  python -m x3d_tf.evaluate --run=runs/x3d_s --views=1
  python -m x3d_tf.evaluate --run=runs/mine --records=data/other --split=test

K-Center testing (paper, section 4): K clips spread evenly over each video, the short side scaled to 128γs pixels, a
centre crop of 112γs, and the mean of the probabilities.
"""

from absl import flags

from x3d_tf import _command
from x3d_tf.training.run_folder import RunFolder

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("run", None, "The run folder.", required=True)
    flags.DEFINE_string("records", None, "Folder of records; the run's own unless given.")
    flags.DEFINE_string("split", None, "Part of the records; the one that the run tests on unless given.")
    flags.DEFINE_integer("views", None, "Clips of each video, K; the run's own unless given.", lower_bound=1)
    flags.DEFINE_string("output", None, "Folder of the report; within the run's evaluation/ unless given.")
    flags.DEFINE_bool("overwrite", False, "Make a report anew that is there already.")


def main() -> None:
    """Tests as the flags say."""
    _command.quiet_tensorflow()
    from x3d_tf.evaluation.testing import evaluate_run

    report = evaluate_run(
        RunFolder(FLAGS.run),
        records=FLAGS.records,
        split=FLAGS.split,
        temporal_views=FLAGS.views,
        output=FLAGS.output,
        overwrite=FLAGS.overwrite,
    )
    print(f"results: {report.folder}/: results.json, predictions.csv, confusion.png")


if __name__ == "__main__":
    define_flags()
    _command.run(main)
