"""Predicts the classes of videos, or the actions of people in them, with a trained model.

Print the five most probable classes of each file, also in subfolders. Write the results to files, with a picture:
  python -m x3d_tf.predict --model=runs/mine party.mp4 holidays/
  python -m x3d_tf.predict --model=runs/mine --json=out.json --csv=out.csv --contact_sheet=out.png holidays/

Predict with an exported .tflite, .onnx or OpenVINO .xml file, or a SavedModel. The first three start without TensorFlow
and run faster on CPUs:
  python -m x3d_tf.predict --model=exported/mine.onnx party.mp4

Print a timeline of a long video: one prediction per 5 seconds, or per 5-second sliding window with a hop of 1 second:
  python -m x3d_tf.predict --model=runs/mine --window=5 --csv=out.csv film.mkv
  python -m x3d_tf.predict --model=runs/mine --window=5 --hop=1 --csv=out.csv film.mkv
Times are in seconds, as video players show them: 0 is the start of the earliest stream, which may be the audio. The
columns start and end can be used as the segments of `build_records --csv`.

Detect the actions of each person, once per second, with a model for action detection. Boxes come from a csv file (AVA's
columns, the last one a score; timestamps are in seconds from the start of the video; --starts_at adds an offset) or
from a person detector, which is a SavedModel with TensorFlow's object detection signature. Outputs are detections in
AVA's format and the video, without audio, with boxes and actions drawn on its frames:
  python -m x3d_tf.predict --model=runs/ava party.mp4 --boxes=people.csv --csv=out.csv --draw=drawn/
  python -m x3d_tf.predict --model=runs/ava party.mp4 --person_detector=efficientdet/ --draw=drawn/

A prediction for a video is the mean over 10 clips spread evenly in time (--views), as in evaluation; the maximum if the
run has TrainConfig.combine="max". A prediction for a window uses one clip, from its middle. Frames are first scaled and
compressed in memory like the frames of the training records, so a video gets the same probabilities as in the run's
report. Any format that FFmpeg decodes and any length works. If files cannot be read, they are reported on stderr and in
the output files, the others are predicted, and the exit status is 1. For multi-label models each class has a
probability of its own: they do not add up to 1.

Output files appear only when complete. If the command stops early (Ctrl-C, SIGTERM, an error), the predictions made so
far are kept in out.partial.csv beside out.csv, and in out.partial.json.
"""

import sys
from contextlib import nullcontext

from absl import flags

from x3d_tf import commands
from x3d_tf.data.video.listing import list_videos
from x3d_tf.errors import UserError, require
from x3d_tf.modeling.archive import describe_any
from x3d_tf.modeling.cards import runs_in_tensorflow
from x3d_tf.startup import starting_tensorflow
from x3d_tf.tasks.base import find
from x3d_tf.text import counted
from x3d_tf.types import MAX_VIEWS

FLAGS = flags.FLAGS

_OF_ALL_TASKS = ("model", "csv", "overwrite")
_OF_A_TASK = (  # each task lists those that apply to it
    *("views", "window", "hop", "json", "contact_sheet"),
    *("boxes", "person_detector", "box_score", "action_score", "draw", "starts_at"),
)


def define_flags() -> None:
    """Defines the flags of this command."""
    about_model = (
        "Run folder, .keras file saved by this package, or exported file: .tflite, .onnx, OpenVINO .xml, or the folder "
        "of a version of a SavedModel. SavedModels can execute arbitrary code: only load ones you trust."
    )
    flags.DEFINE_string("model", None, about_model, required=True)
    flags.DEFINE_integer(
        "views",
        None,
        "Number of clips per video (K). Defaults to the run's evaluation setting, or to 1 with --window.",
        lower_bound=1,
        upper_bound=MAX_VIEWS,
    )
    flags.DEFINE_float("window", None, "Window length in seconds. Defaults to one prediction per video.")
    flags.DEFINE_float("hop", None, "Seconds between the starts of two windows. Defaults to the window length.")
    flags.DEFINE_string("json", None, "JSON file for all predictions.")
    flags.DEFINE_string("csv", None, "csv file for all predictions.")
    flags.DEFINE_string("contact_sheet", None, "PNG file with frames and classes of the first 30 predictions.")
    flags.DEFINE_string("boxes", None, "For detectors: csv file with the boxes of people.")
    flags.DEFINE_string(
        "person_detector",
        None,
        "For detectors, instead of --boxes: SavedModel that finds people. SavedModels can execute arbitrary code: only "
        "load ones you trust.",
    )
    flags.DEFINE_float(
        "box_score", 0.8, "Minimum score of the boxes to use. Defaults to 0.8.", lower_bound=0.0, upper_bound=1.0
    )
    flags.DEFINE_integer(
        "starts_at",
        0,
        "Timestamp of the videos' first frame in --boxes and --csv, in seconds; 900 for AVA's videos. Defaults to 0.",
        lower_bound=0,
    )
    flags.DEFINE_float(
        "action_score", 0.5, "Minimum score of the actions to show. Defaults to 0.5.", lower_bound=0.0, upper_bound=1.0
    )
    flags.DEFINE_string("draw", None, "Folder for mp4 files with boxes and actions drawn on the frames.")
    flags.DEFINE_bool("overwrite", False, "Replace existing output files. Defaults to false.")


def main(videos: list[str]) -> None:
    """Predicts classes, or detects actions."""
    require(bool(videos), "the command line", "name video files or folders")
    _check_outputs()
    metadata = describe_any(FLAGS.model)
    task = find(metadata.task)
    unfit = [f"--{name}" for name in _OF_A_TASK if FLAGS[name].present and name not in task.prediction_flags]
    if unfit:
        raise UserError(f"{', '.join(unfit)} must not be given with {FLAGS.model}, a model of the task {task.name}")
    paths = list_videos(videos)
    options = {name: FLAGS[name].value for name in (*_OF_ALL_TASKS, *_OF_A_TASK)}
    task.check_prediction(metadata, options, paths)
    with starting_tensorflow() if runs_in_tensorflow(FLAGS.model) else nullcontext():
        job = task.prediction_job(options, paths)
    if failures := job.run(paths):
        sys.exit(f"{failures} of {counted(len(paths), 'file')} could not be predicted")


def _check_outputs() -> None:
    outputs = [path for path in (FLAGS.json, FLAGS.csv, FLAGS.contact_sheet) if path]
    require(len(set(outputs)) == len(outputs), "output files", "be distinct", outputs)
    if FLAGS.contact_sheet:
        require(FLAGS.contact_sheet.endswith(".png"), "--contact_sheet", "end in .png", FLAGS.contact_sheet)
    for path in outputs:
        commands.require_free(path, FLAGS.overwrite, "another name")


if __name__ == "__main__":
    define_flags()
    commands.run(main, positional=True)
