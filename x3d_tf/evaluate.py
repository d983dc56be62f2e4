"""Tests a trained network on records: accuracy, cost, predictions, a table of the classes, a confusion matrix.

As the run itself was tested, with other views of each video, or on other records:
  python -m x3d_tf.evaluate --run=runs/x3d_s
  python -m x3d_tf.evaluate --run=runs/x3d_s --views=10 --crops=3
  python -m x3d_tf.evaluate --run=runs/mine --records=data/other --split=test

A model file without its run:
  python -m x3d_tf.evaluate --model=model.keras --records=data/mine --split=test --output=reports/mine

Accuracy over cost, with 1, 3, 5, 7 and 10 clips of each video; goes on where it was stopped:
  python -m x3d_tf.evaluate --run=runs/x3d_s --sweep

The checkpoints of a run that is training in another process, as they come:
  python -m x3d_tf.evaluate --run=runs/x3d_s --watch --views=1

A csv file of action detections in AVA's format, of whatever made it (frame mAP at IoU 0.5):
  python -m x3d_tf.evaluate --detections=found.csv --groundtruth=ava_val_v2.2.csv --label_map=ava_60.pbtxt \\
      --exclusions=ava_val_excluded_timestamps_v2.2.csv --output=reports/ava

One table of the reports of several runs, beside the paper's figures:
  python -m x3d_tf.evaluate --compare=runs/a --compare=runs/b --output=reports/a_b

K-Center testing (paper, section 4) takes K clips spread evenly over each video, scales the short side to 128γs pixels
and cuts out a centre crop of 112γs; K-LeftCenterRight testing (--crops=3) takes three crops of 128γs instead. The
probabilities of all views are averaged. With several labels a video, results are mAP: the mean over the classes that
have positives.

A run of action detection is tested as it was trained, on its own test split, without --records, --split, --views or
--crops: one centre crop around each key frame, frame mAP at IoU 0.5.
"""

from pathlib import Path
from typing import Any

from absl import flags

from x3d_tf import commands
from x3d_tf.data.datasets.spec import DatasetSpec, open_dataset
from x3d_tf.errors import UserError
from x3d_tf.evaluation.eval_config import EvalConfig, detector_report_folder, folder_of
from x3d_tf.evaluation.reports import RESULTS_NAME, refuse_to_replace
from x3d_tf.modeling.archive import describe
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.startup import starting_tensorflow
from x3d_tf.terminal import tell

FLAGS = flags.FLAGS

_HOW = ("records", "split", "views", "crops", "clip_starts", "frame_sampling", "head_pool")  # to test


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("run", None, "The run folder.")
    flags.DEFINE_string("model", None, "A .keras file, instead of a run; takes --records, --split and --output.")
    flags.DEFINE_multi_string(
        "compare", None, "Print a table of a run's reports, testing nothing; may be given several times."
    )
    flags.DEFINE_string("detections", None, "A csv to measure: video_id,timestamp,x1,y1,x2,y2,action_id,score.")
    flags.DEFINE_string("groundtruth", None, "With --detections: a csv of the real boxes, person_id in place of score.")
    flags.DEFINE_string(
        "label_map", None, "With --detections: a .pbtxt of the actions that count; AVA's 60 unless given."
    )
    flags.DEFINE_string("exclusions", None, "With --detections: a csv of what does not count, video_id,timestamp.")
    flags.DEFINE_bool("sweep", False, "Test with 1, 3, 5, 7 and 10 clips of each video and plot accuracy over cost.")
    flags.DEFINE_bool("watch", False, "Test each new checkpoint of the run until it is finished.")
    flags.DEFINE_float("poll_seconds", 30.0, "With --watch: time from one look to the next.", lower_bound=0.1)
    flags.DEFINE_string("records", None, "Folder of records; the run's own unless given.")
    flags.DEFINE_string("split", None, "Part of the records; the one that the run tests on unless given.")
    flags.DEFINE_integer("views", None, "Clips of each video, K; the run's own, 10 of a file.", lower_bound=1)
    flags.DEFINE_enum("crops", "1", ["1", "3"], "Crops of each clip: the centre, or left, centre and right.")
    flags.DEFINE_enum(
        "clip_starts",
        "offset",
        ["offset", "slowfast"],
        "Clips from the start of a video to its end, the middle where K is 1; or PySlowFast's, which never reach it.",
    )
    flags.DEFINE_enum(
        "frame_sampling",
        None,
        ["slowfast", "exact"],
        "Frames spread from end to end of a clip's time, or exactly γτ apart; as the run was trained unless given.",
    )
    flags.DEFINE_enum(
        "head_pool",
        None,
        ["global", "fixed_probabilities", "fixed_logits"],
        "What the head does with the larger crops of --crops=3; the network's own unless given.",
    )
    flags.DEFINE_string("output", None, "Folder of the report; within the run's evaluation/ unless given.")
    flags.DEFINE_bool("overwrite", False, "Make a report anew that is there already.")


def main() -> None:
    """Tests, or compares, as the flags say."""
    _check_flags()
    if FLAGS.compare:
        from x3d_tf.evaluation.comparison import compare

        compare(FLAGS.compare, output=FLAGS.output, overwrite=FLAGS.overwrite)
        if FLAGS.output:
            print(f"tables: {FLAGS.output}/: comparison.csv, comparison.md")
        return
    if FLAGS.detections:
        _measure_detections()
        return
    _check_paths()
    with starting_tensorflow():
        from x3d_tf.evaluation.classification import evaluate_file, evaluate_run
        from x3d_tf.evaluation.multiview import CLIPS_A_CALL
        from x3d_tf.evaluation.sweep import sweep_file, sweep_run
        from x3d_tf.evaluation.watch import watch_run
        from x3d_tf.parallel import use_single_threaded_ops

        use_single_threaded_ops(CLIPS_A_CALL)
    if FLAGS.watch:
        watch_run(RunFolder(FLAGS.run), poll_seconds=FLAGS.poll_seconds, overwrite=FLAGS.overwrite, **_procedure())
        return
    tell(f"loading and compiling {FLAGS.run or FLAGS.model}: the first clips take longer")
    if FLAGS.sweep:
        to = {"output": FLAGS.output, "overwrite": FLAGS.overwrite, **_procedure()}
        sweep = sweep_run(RunFolder(FLAGS.run), **to) if FLAGS.run else sweep_file(FLAGS.model, **to)
        print(f"results: {sweep.folder}/: sweep.csv, sweep.png")
    else:
        to = {"output": FLAGS.output, "overwrite": FLAGS.overwrite, **_procedure()}
        report = evaluate_run(RunFolder(FLAGS.run), **to) if FLAGS.run else evaluate_file(FLAGS.model, **to)
        print(f"results: {report.folder}/: {', '.join(sorted(path.name for path in report.folder.glob('[!.]*')))}")


def _check_paths() -> None:
    """Raises what a test would raise of paths, before TensorFlow, which takes seconds, is imported."""
    asked, report = EvalConfig(**_procedure()), Path(FLAGS.output or "")
    detects = not FLAGS.watch and describe(FLAGS.run or FLAGS.model).task == "detection"  # watching needs no model yet
    if FLAGS.run:
        run = RunFolder(FLAGS.run)
        dataset = asked.dataset_of(run.read_config())
        if not FLAGS.output:
            report = detector_report_folder(run) if detects else folder_of(run, asked)
    else:
        dataset = DatasetSpec(FLAGS.records, train_split=FLAGS.split, eval_split=FLAGS.split)
    if dataset.name == "records":
        open_dataset(dataset)
    if not (FLAGS.watch or FLAGS.sweep):  # which continue with reports that exist
        refuse_to_replace(report / RESULTS_NAME, FLAGS.overwrite)


def _measure_detections() -> None:
    from x3d_tf.evaluation import detection_reports

    if FLAGS.output:
        refuse_to_replace(Path(FLAGS.output) / RESULTS_NAME, FLAGS.overwrite)
    settings, scores = detection_reports.evaluate_files(
        FLAGS.detections, FLAGS.groundtruth, FLAGS.label_map, FLAGS.exclusions
    )
    print("\n".join(detection_reports.summary(scores)))
    if FLAGS.output:
        detection_reports.write_detection_report(Path(FLAGS.output), settings, scores)
        print(f"results: {FLAGS.output}/: per_class.csv, per_class.png, results.json")


def _procedure() -> dict[str, Any]:
    return {
        "records": FLAGS.records,
        "split": FLAGS.split,
        "temporal_views": FLAGS.views,
        "spatial_crops": int(FLAGS.crops),
        "clip_starts": FLAGS.clip_starts,
        "frame_sampling": FLAGS.frame_sampling,
        "head_pool": FLAGS.head_pool,
    }


def _check_flags() -> None:
    """Raises `UserError` where flags do not go together."""
    given = [name for name in ("run", "model", "compare", "detections") if FLAGS[name].value]
    if len(given) != 1:
        there = ", ".join(f"--{name}" for name in given) or "none"
        raise UserError(f"exactly one of --run, --model, --compare and --detections must be given, got {there}")

    def refuse(names: tuple[str, ...], why: str) -> None:
        found = [f"--{name}" for name in names if FLAGS[name].value != FLAGS[name].default]
        if found:
            raise UserError(f"{', '.join(found)} must not be given {why}")

    if FLAGS.compare:
        refuse((*_HOW, "sweep", "watch"), "with --compare, which tests nothing")
    if FLAGS.detections:
        refuse((*_HOW, "sweep", "watch"), "with --detections, which are there already")
        if not FLAGS.groundtruth:
            raise UserError(f"--detections={FLAGS.detections} takes --groundtruth, the csv of the real boxes")
    else:
        refuse(("groundtruth", "label_map", "exclusions"), "without --detections")
    if FLAGS.sweep:
        refuse(("views", "watch"), "with --sweep, which takes 1, 3, 5, 7 and 10 clips")
    if FLAGS.watch:
        refuse(("model", "output"), "with --watch, which is for --run and writes into its folder")
    else:
        refuse(("poll_seconds",), "without --watch")
    missing = [f"--{name}" for name in ("records", "split", "output") if not FLAGS[name].value]
    if FLAGS.model and missing:
        raise UserError(f"--model={FLAGS.model} takes {', '.join(missing)} too: a file does not say what to test it on")


if __name__ == "__main__":
    define_flags()
    commands.run(main)
