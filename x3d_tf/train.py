"""Trains an X3D network, evaluates it and saves it; resumes an interrupted run.

Train on a synthetic dataset (nothing to download):
  python -m x3d_tf.train --gin_file=gin/x3d_s.gin

Train on your own videos, after build_records has converted them to records:
  python -m x3d_tf.train --gin_file=gin/x3d_s.gin --gin_file=gin/data/records.gin \\
      --gin_bindings='DatasetSpec.records="data/mine"' --workdir=runs/mine

Later files override earlier ones, and bindings override files. The run folder holds the configuration, checkpoints,
history.csv, curves.png and TensorBoard logs and, once training has finished, model.keras and evaluation/.
Run the same command again to resume a run from its last checkpoint.

On several machines, set TF_CONFIG on each to the list of all workers and its own place in it, and start the same
command on all of them. The first worker writes the run folder. See docs/cluster.md.
  TF_CONFIG='{"cluster": {"worker": ["host0:12345", "host1:12345"]}, "task": {"type": "worker", "index": 0}}' \\
      python -m x3d_tf.train --gin_file=gin/x3d_s.gin --workdir=runs/x3d_s
"""

from dataclasses import replace
from pathlib import Path

from absl import flags

from x3d_tf import commands, gin_config
from x3d_tf.config import TrainConfig
from x3d_tf.data.datasets.spec import open_for_training
from x3d_tf.evaluation.eval_config import EvalConfig
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.startup import starting_tensorflow
from x3d_tf.tasks.base import task_of_model
from x3d_tf.training.checks import check_settings, open_records
from x3d_tf.training.cluster import Cluster, cluster_from_environment

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
    config, run = parsed.config, RunFolder(FLAGS.workdir or f"runs/{Path(FLAGS.gin_file[0]).stem}")
    texts = {"config.gin": parsed.text, "operative_config.gin": parsed.operative_text}
    texts[run.recipe.name] = parsed.recipe_json()
    cluster = cluster_from_environment()
    if cluster is None:
        finished = _train(config, run, texts)
    else:
        _train_in_cluster(config, run, texts, cluster)
        return
    _evaluate(config, run, finished)


def _train(config: TrainConfig, run: RunFolder, texts: dict[str, str]) -> bool:
    """Trains on this machine. Returns True if the run was already finished."""
    finished = run.is_finished(config)
    if not finished:
        check_settings(config, run)
        if config.dataset.synthetic is not None:  # TensorFlow creates its records, with the threads that are set first
            _start_tensorflow(config)
        checked = open_records(config)  # otherwise before TensorFlow, which takes seconds
    _start_tensorflow(config)
    from x3d_tf.training.loop import train_checked

    if finished:
        print(f"{run.root} is already finished ({run.model} exists)")
    else:
        train_checked(checked, run, texts=texts, allow_other_groups=FLAGS.allow_other_groups)
    return finished


def _train_in_cluster(config: TrainConfig, run: RunFolder, texts: dict[str, str], cluster: Cluster) -> None:
    """Trains together with the other workers. The chief then evaluates, and all end together."""
    finished = cluster.is_chief and run.is_finished(config)
    if cluster.is_chief and not finished:
        check_settings(config, run)  # before waiting for the others
    _start_tensorflow(config, devices=None)
    from x3d_tf.training.loop import START_AGAIN, train
    from x3d_tf.training.workers import start_workers, workers_of

    strategy = start_workers(cluster)
    train(config, run.root, strategy=strategy, texts=texts, allow_other_groups=FLAGS.allow_other_groups)
    workers = workers_of(strategy)
    if cluster.is_chief:
        _evaluate(config, run, finished)
    else:
        print(f"training has ended; {cluster.name(0)} evaluates the network", flush=True)
    with workers.peer_errors_as_user_errors(START_AGAIN):
        workers.leave_together()


def _evaluate(config: TrainConfig, run: RunFolder, finished: bool) -> None:
    """Evaluates the network of a run unless its report exists, and prints what the run holds."""
    from x3d_tf.evaluation.running import evaluate_run

    task = task_of_model(run.root)
    report = task.report_folder(run, EvalConfig())
    if not (report / "results.json").is_file():
        if finished:
            _find_records(config, run)
        evaluate_run(run, task)
    files = ", ".join(sorted(path.name for path in report.glob("[!.]*")))
    print(
        f"model:   {run.model} (input format: {run.input.name})\n"
        f"curves:  {run.curves} (and tensorboard --logdir={run.tensorboard})\nresults: {report}/: {files}"
    )


def _find_records(config: TrainConfig, run: RunFolder) -> None:
    """Checks that a configuration names the records of a finished run, which may have been moved or replaced."""
    manifest, dataset = open_for_training(config.dataset)
    run.require_records(manifest.fingerprint())
    run.update_config(replace(config, dataset=dataset))


def _start_tensorflow(config: TrainConfig, devices: bool | None = True) -> None:
    """Imports TensorFlow and sets its threads, which has no effect a second time."""
    with starting_tensorflow(devices=devices):
        import x3d_tf.training.loop  # noqa: F401  takes seconds
        from x3d_tf.parallel import num_batch_slices, use_single_threaded_ops

        clips = config.recipe.batch // config.execution.accumulation
        use_single_threaded_ops(num_batch_slices(clips, config.model.bn_group))


if __name__ == "__main__":
    define_flags()
    commands.run(main)
