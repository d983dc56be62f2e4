"""Trains an X3D network, tests it and saves it; a run that was stopped goes on where it was.

On made-up videos, with nothing to download:
  python -m x3d_tf.train --gin_file=gin/x3d_s.gin

On your own, once build_records has made records of them:
  python -m x3d_tf.train --gin_file=gin/x3d_s.gin --gin_file=gin/data/records.gin \\
      --gin_bindings='DatasetSpec.records="data/mine"' --workdir=runs/mine

Files given later win, bindings win over files. The run folder holds the configuration, checkpoints, history.csv,
curves.png, TensorBoard's files and, in the end, model.keras and evaluation/.
"""

from pathlib import Path

from absl import flags

from x3d_tf import commands, gin_config
from x3d_tf.config import TrainConfig
from x3d_tf.data.datasets.spec import open_dataset
from x3d_tf.evaluation.eval_config import detector_report_folder, report_folder
from x3d_tf.modeling.archive import describe
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.startup import starting_tensorflow

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    gin_config.define_flags(required=True)
    flags.DEFINE_string("workdir", None, "The run folder; runs/<name of the first gin file> unless given.")
    flags.DEFINE_bool(
        "allow_other_groups",
        False,
        "Resume although batch norm has other groups than before (another number of devices, another accumulation), "
        "which changes the outcome.",
    )


def main() -> None:
    """Trains and tests as the flags say."""
    parsed = gin_config.parse(FLAGS.gin_file, FLAGS.gin_bindings or [])
    config, workdir = parsed.config, FLAGS.workdir or f"runs/{Path(FLAGS.gin_file[0]).stem}"
    _check_paths(config, RunFolder(workdir))
    with starting_tensorflow():
        from x3d_tf.evaluation.classification import evaluate_run
        from x3d_tf.parallel import num_batch_slices, use_single_threaded_ops
        from x3d_tf.training.loop import train

        clips = config.recipe.batch // config.execution.accumulation
        use_single_threaded_ops(num_batch_slices(clips, config.model.bn_group))
    texts = {"config.gin": parsed.text, "operative_config.gin": parsed.operative_text}
    run = train(config, workdir, texts=texts, allow_other_groups=FLAGS.allow_other_groups)
    config = run.read_config()  # whose records may have another place than those of a finished run
    detects = describe(run.root).task == "detection"
    report = detector_report_folder(run) if detects else report_folder(run, config.dataset, config.test_views)
    if not (report / "results.json").is_file():
        evaluate_run(run)
    files = ", ".join(sorted(path.name for path in report.glob("[!.]*")))
    print(
        f"model:   {run.model}, fed as {run.input.name} says\n"
        f"curves:  {run.curves} (and tensorboard --logdir={run.tensorboard})\nresults: {report}/: {files}"
    )


def _check_paths(config: TrainConfig, run: RunFolder) -> None:
    """Raises what `train` would raise of paths, before TensorFlow, which takes seconds, is imported."""
    run.check(config)
    if config.init is not None and not run.has_checkpoint:
        describe(config.init)
    if config.dataset.name == "records":
        open_dataset(config.dataset)


if __name__ == "__main__":
    define_flags()
    commands.run(main)
