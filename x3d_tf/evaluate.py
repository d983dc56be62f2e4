"""Evaluates a trained network on records: top-1 or mAP, cost, predictions, per-class results, a confusion matrix.

Evaluate a run as it was evaluated after training, with more views per video, or on other records:
  python -m x3d_tf.evaluate --run=runs/x3d_s
  python -m x3d_tf.evaluate --run=runs/x3d_s --views=10 --crops=3
  python -m x3d_tf.evaluate --run=runs/mine --records=data/other --split=test

Evaluate a model file, or an exported .tflite, .onnx or OpenVINO .xml file or SavedModel as it will be used:
  python -m x3d_tf.evaluate --model=model.keras --records=data/mine --split=test --output=reports/mine
  python -m x3d_tf.evaluate --model=mine_int8.tflite --records=data/mine --split=test --output=reports/mine_int8

Plot the main metric against cost for 1, 3, 5, 7 and 10 clips per video; resumes an interrupted sweep:
  python -m x3d_tf.evaluate --run=runs/x3d_s --sweep

Evaluate each new checkpoint of a run that is training in another process:
  python -m x3d_tf.evaluate --run=runs/x3d_s --watch --views=1

Score a csv file of action detections in AVA's format from any detector (frame mAP at IoU 0.5):
  python -m x3d_tf.evaluate --detections=found.csv --groundtruth=ava_val_v2.2.csv --label_map=ava_60.pbtxt \\
      --exclusions=ava_val_excluded_timestamps_v2.2.csv --output=reports/ava

Compare the reports of several runs with each other and with the paper:
  python -m x3d_tf.evaluate --compare=runs/a --compare=runs/b --output=reports/a_b

K-Center evaluation (paper, section 4) samples K clips evenly over each video, scales the short side to 128γ pixels,
where γ is Expansion.gamma_s, and takes a centre crop of 112γ. K-LeftCenterRight evaluation (--crops=3) takes three
crops of 128γ instead. The probabilities of all views are averaged (--combine). The metric for multi-label models is
mAP, the mean of the average precision over the classes with positive examples.

A detector is evaluated on one centre crop around each key frame, with frame mAP at IoU 0.5. --records, --split,
--eval_boxes and --box_score apply to it, and the flags for clips, such as --views and --crops, do not:
  python -m x3d_tf.evaluate --run=runs/ava --eval_boxes=annotated
  python -m x3d_tf.evaluate --model=detector.keras --records=data/ava_v2.2 --split=val --output=reports/ava
"""

from pathlib import Path
from typing import Any

from absl import flags

from x3d_tf import commands
from x3d_tf.data.datasets.spec import open_dataset
from x3d_tf.errors import UserError
from x3d_tf.evaluation.eval_config import EvalConfig
from x3d_tf.evaluation.reports import RESULTS_NAME, refuse_to_replace
from x3d_tf.modeling.archive import describe_any
from x3d_tf.modeling.cards import is_exported
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.startup import starting_tensorflow
from x3d_tf.tasks.base import Task, task_of_model, task_of_run
from x3d_tf.terminal import tell

FLAGS = flags.FLAGS

_SETTINGS = {  # fields of EvalConfig, with the flags that set them
    "records": "records",
    "split": "split",
    "temporal_views": "views",
    "spatial_crops": "crops",
    "clip_starts": "clip_starts",
    "frame_sampling": "frame_sampling",
    "combine": "combine",
    "head_pool": "head_pool",
    "eval_boxes": "eval_boxes",
    "box_score": "box_score",
}


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("run", None, "Run folder to evaluate.")
    flags.DEFINE_string(
        "model",
        None,
        "A .keras file or an exported file to evaluate. Requires --records, --split and --output. SavedModels can "
        "execute arbitrary code: only load ones you trust.",
    )
    flags.DEFINE_multi_string(
        "compare", None, "Run folder whose existing reports are compared; repeat the flag for each run."
    )
    flags.DEFINE_string("detections", None, "Detections csv to score: video_id,timestamp,x1,y1,x2,y2,action_id,score.")
    flags.DEFINE_string(
        "groundtruth", None, "Ground-truth csv for --detections: video_id,timestamp,x1,y1,x2,y2,action_id,person_id."
    )
    flags.DEFINE_string(
        "label_map",
        None,
        "A .pbtxt file of the actions to score with --detections. Defaults to the 60 actions that AVA evaluates.",
    )
    flags.DEFINE_string("exclusions", None, "A csv of key frames to ignore with --detections: video_id,timestamp.")
    flags.DEFINE_bool(
        "sweep", False, "Evaluate 1, 3, 5, 7 and 10 clips per video and plot the main metric against cost."
    )
    flags.DEFINE_bool("watch", False, "Evaluate each new checkpoint of the run until training has finished.")
    flags.DEFINE_float("poll_seconds", 30.0, "Polling interval of --watch in seconds.", lower_bound=0.1)
    flags.DEFINE_string("records", None, "Records folder. Defaults to the run's records.")
    flags.DEFINE_string("split", None, "Split to evaluate. Defaults to the run's test split.")
    flags.DEFINE_integer(
        "views",
        None,
        "Number of clips per video, K. Defaults to the number stored in the run or the model file.",
        lower_bound=1,
    )
    flags.DEFINE_enum("crops", "1", ["1", "3"], "Crops per clip: 1 (centre) or 3 (left, centre and right).")
    flags.DEFINE_enum(
        "clip_starts",
        "offset",
        ["offset", "slowfast"],
        "Positions of the clips. offset: evenly spaced from start to end; the middle if K is 1. "
        "slowfast: as in PySlowFast, where clips never reach the end.",
    )
    flags.DEFINE_enum(
        "frame_sampling",
        None,
        ["slowfast", "exact"],
        "Frames of a clip. slowfast: spread over the clip's duration. exact: exactly Expansion.gamma_tau apart. "
        "Defaults to the run's setting.",
    )
    flags.DEFINE_enum(
        "combine",
        None,
        ["mean", "max"],
        "How the probabilities of a video's views are combined: their mean, or their maximum for each class, as for "
        "Charades. Defaults to the run's setting.",
    )
    flags.DEFINE_enum(
        "head_pool",
        None,
        ["global", "fixed_probabilities", "fixed_logits"],
        "Pooling of the head for the larger crops of --crops=3: global, over all positions; or fixed, over windows of "
        "the training size, whose probabilities or logits are averaged. Defaults to the network's setting.",
    )
    flags.DEFINE_enum(
        "eval_boxes",
        None,
        ["proposals", "annotated"],
        "Boxes to evaluate a detector on: those of the person detector, or the annotated ones. Defaults to the run's "
        "setting, or to proposals for a model file.",
    )
    flags.DEFINE_float(
        "box_score",
        None,
        "Minimum score of the person detector's boxes. Defaults to the run's setting, or to 0.8 for a model file.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    flags.DEFINE_string("output", None, "Report folder. Defaults to a folder in the run's evaluation/.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing report.")


def main() -> None:
    """Evaluates a model, or compares reports."""
    _check_flags()
    if FLAGS.compare:
        from x3d_tf.evaluation.comparison import compare

        compare(FLAGS.compare, output=FLAGS.output, overwrite=FLAGS.overwrite)
        if FLAGS.output:
            print(f"tables: {FLAGS.output}/: comparison.csv, comparison.md")
        return
    if FLAGS.detections:
        _score_detections()
        return
    task = _check_paths()
    with starting_tensorflow():
        from x3d_tf.evaluation.running import evaluate_file, evaluate_run
        from x3d_tf.evaluation.sweep import sweep_file, sweep_run
        from x3d_tf.evaluation.watch import watch_run
        from x3d_tf.parallel import use_single_threaded_ops
        from x3d_tf.runtimes.classifier_file import CLIPS_A_CALL

        use_single_threaded_ops(CLIPS_A_CALL)
    options: dict[str, Any] = {"overwrite": FLAGS.overwrite, **_eval_settings()}
    run = RunFolder(FLAGS.run) if FLAGS.run else None
    if run and FLAGS.watch:
        watch_run(run, task, poll_seconds=FLAGS.poll_seconds, **options)
        return
    if FLAGS.model and is_exported(FLAGS.model):
        tell(f"opening {FLAGS.model}")
    else:
        tell(f"loading and compiling {FLAGS.run or FLAGS.model}: the first clips take longer")
    options["output"] = FLAGS.output
    if FLAGS.sweep:
        sweep = sweep_run(run, task, **options) if run else sweep_file(FLAGS.model, task, **options)
        print(f"results: {sweep.folder}/: sweep.csv, sweep.png")
    else:
        report = evaluate_run(run, task, **options) if run else evaluate_file(FLAGS.model, task, **options)
        print(f"results: {report.folder}/: {', '.join(sorted(path.name for path in report.folder.glob('[!.]*')))}")


def _check_paths() -> Task:
    """Checks paths, records and settings before importing TensorFlow, which takes seconds. Returns the task."""
    eval_config, model = EvalConfig(**_eval_settings()), FLAGS.run or FLAGS.model
    run = RunFolder(FLAGS.run) if FLAGS.run else None
    task = task_of_run(run) if run and FLAGS.watch else task_of_model(model)  # --watch needs no model yet
    dataset = eval_config.dataset_of(run.read_config() if run else None)
    report = Path(FLAGS.output) if FLAGS.output or not run else task.report_folder(run, eval_config)
    if FLAGS.sweep and not task.sweeps:
        raise UserError(f"--sweep must not be given for {model}: the task {task.name} has a fixed number of clips")
    if dataset.synthetic is None:
        manifest = open_dataset(dataset)
        if not FLAGS.watch:
            task.check_evaluation(describe_any(model), eval_config, manifest, run)
    if not (FLAGS.watch or FLAGS.sweep):  # they keep existing reports
        refuse_to_replace(report / RESULTS_NAME, FLAGS.overwrite)
    return task


def _score_detections() -> None:
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


def _eval_settings() -> dict[str, Any]:
    return {field: FLAGS[flag].value for field, flag in _SETTINGS.items()} | {"spatial_crops": int(FLAGS.crops)}


def _check_flags() -> None:
    """Raises `UserError` for flags that conflict or that miss another flag."""
    given = [name for name in ("run", "model", "compare", "detections") if FLAGS[name].value]
    if len(given) != 1:
        names = ", ".join(f"--{name}" for name in given) or "none"
        raise UserError(f"exactly one of --run, --model, --compare and --detections must be given, got {names}")

    def reject(names: tuple[str, ...], why: str) -> None:
        found = [f"--{name}" for name in names if FLAGS[name].value != FLAGS[name].default]
        if found:
            raise UserError(f"{', '.join(found)} must not be given {why}")

    if FLAGS.compare:
        reject((*_SETTINGS.values(), "sweep", "watch"), "with --compare, which only reads existing reports")
    if FLAGS.detections:
        reject((*_SETTINGS.values(), "sweep", "watch"), "with --detections, which only reads csv files")
        if not FLAGS.groundtruth:
            raise UserError(f"--detections={FLAGS.detections} requires --groundtruth, the csv of the annotated boxes")
    else:
        reject(("groundtruth", "label_map", "exclusions"), "without --detections")
    if FLAGS.sweep:
        reject(("views", "watch"), "with --sweep, which evaluates 1, 3, 5, 7 and 10 clips per video")
    if FLAGS.watch:
        reject(("model", "output"), "with --watch, which evaluates a --run and writes to its folder")
    else:
        reject(("poll_seconds",), "without --watch")
    missing = [f"--{name}" for name in ("records", "split", "output") if not FLAGS[name].value]
    if FLAGS.model and missing:
        raise UserError(f"--model={FLAGS.model} requires {', '.join(missing)}: a model file does not name its records")


if __name__ == "__main__":
    define_flags()
    commands.run(
        main,
        settings={f"EvalConfig.{field}": flag for field, flag in _SETTINGS.items()},
    )
