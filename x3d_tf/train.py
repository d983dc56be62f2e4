"""Trains an X3D network, evaluates it and saves it; resumes an interrupted run.

Train on a synthetic dataset (nothing to download):
  python -m x3d_tf.train --gin_file=gin/x3d_s.gin

Train on your own videos, after build_records has converted them to records:
  python -m x3d_tf.train --gin_file=gin/x3d_s.gin --gin_file=gin/data/records.gin \\
      --gin_bindings='DatasetSpec.records="data/mine"' --workdir=runs/mine

Later files override earlier ones, and bindings override files. The run folder holds the configuration, checkpoints,
history.csv, curves.png and TensorBoard logs and, once training has finished, model.keras and evaluation/.
Run the same command again to resume a run from its last checkpoint.
"""

from dataclasses import replace
from pathlib import Path

from absl import flags

from x3d_tf import commands, gin_config
from x3d_tf.config import TrainConfig
from x3d_tf.data.datasets.spec import hold_out, open_for_training
from x3d_tf.evaluation.eval_config import EvalConfig
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.startup import starting_tensorflow
from x3d_tf.tasks.base import find, task_of_model, task_of_records
from x3d_tf.training.checks import check_initial_weights, check_records

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    gin_config.define_flags(required=True)
    flags.DEFINE_string("workdir", None, "Run folder. Defaults to runs/<name of the first gin file>.")
    flags.DEFINE_bool(
        "allow_other_groups",
        False,
        "Resume even if the batch-norm groups differ from those of the checkpoint because the number of devices or "
        "Execution.accumulation has changed. This changes the result.",
    )


def main() -> None:
    """Trains and evaluates the network that the flags configure."""
    parsed = gin_config.parse(FLAGS.gin_file, FLAGS.gin_bindings or [])
    config, workdir = parsed.config, FLAGS.workdir or f"runs/{Path(FLAGS.gin_file[0]).stem}"
    _check_paths(config, RunFolder(workdir))
    with starting_tensorflow():
        from x3d_tf.evaluation.running import evaluate_run
        from x3d_tf.parallel import num_batch_slices, use_single_threaded_ops
        from x3d_tf.training.loop import train

        clips = config.recipe.batch // config.execution.accumulation
        use_single_threaded_ops(num_batch_slices(clips, config.model.bn_group))
    texts = {"config.gin": parsed.text, "operative_config.gin": parsed.operative_text}
    run = train(config, workdir, texts=texts, allow_other_groups=FLAGS.allow_other_groups)
    task = task_of_model(run.root)
    report = task.report_folder(run, EvalConfig())
    if not (report / "results.json").is_file():
        evaluate_run(run, task)
    files = ", ".join(sorted(path.name for path in report.glob("[!.]*")))
    print(
        f"model:   {run.model} (input format: {run.input.name})\n"
        f"curves:  {run.curves} (and tensorboard --logdir={run.tensorboard})\nresults: {report}/: {files}"
    )


def _check_paths(config: TrainConfig, run: RunFolder) -> None:
    """Checks paths, records and initial weights before importing TensorFlow, which takes seconds."""
    run.check(run.with_default_splits(config))
    if not run.has_checkpoint:
        check_initial_weights(config)
    if config.task is not None:
        find(config.task)
    if config.dataset.synthetic is None:
        manifest, dataset = open_for_training(config.dataset)
        config = replace(config, dataset=dataset)
        check_records(config, hold_out(manifest, dataset, config.seed), task_of_records(config, manifest))


if __name__ == "__main__":
    define_flags()
    commands.run(main)
