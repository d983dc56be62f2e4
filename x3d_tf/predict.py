"""Predicts what happens in video files, with a model that was trained here.

The five most probable classes of each file, also below folders; as files, too, with a picture to look at:
  python -m x3d_tf.predict --model=runs/mine party.mp4 holidays/
  python -m x3d_tf.predict --model=runs/mine --json=out.json --csv=out.csv --contact_sheet=out.png holidays/

What happens when in a long video: a prediction for every 5 seconds of it, or for 5 seconds in every second:
  python -m x3d_tf.predict --model=runs/mine --window=5 --csv=out.csv film.mkv
  python -m x3d_tf.predict --model=runs/mine --window=5 --hop=1 --csv=out.csv film.mkv
Seconds are those of the file, as players count them: 0 is where its first stream begins, which may be the sound. The
columns start and end are what `build_records --csv` takes.

What each person does, once a second, with a model of action detection: boxes from a csv file (AVA's columns, the last a
score; the timestamps are seconds of the video, or of the film with --starts_at) or from a person detector, a SavedModel
with TensorFlow's object detection signature; detections in AVA's format, and the video with boxes and actions drawn
into it, without its sound:
  python -m x3d_tf.predict --model=runs/ava party.mp4 --boxes=persons.csv --csv=out.csv --draw=drawn/
  python -m x3d_tf.predict --model=runs/ava party.mp4 --person_detector=efficientdet/ --draw=drawn/

A prediction is the mean of 10 clips spread evenly over a video (--views), as in testing; of a window it is one clip, in
its middle. Frames are scaled and compressed first, in memory, as those of the records were that the model was trained
on, so that a video gets the probabilities that the run's report has of it. Any format that FFmpeg decodes will do, and
videos of any length. Files that cannot be read are named on stderr and in the output files, and the rest goes on; the
exit status is then 1. With a multi-label model each class has a probability of its own, and they do not add up to 1.

Output files are complete when they appear. A command that stops early (Ctrl-C, SIGTERM, an error) keeps its predictions
so far in out.partial.csv beside out.csv, and out.partial.json, and prints of how many videos they are.
"""

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from tqdm import tqdm

from x3d_tf import commands, plots
from x3d_tf.data.datasets.ava import write_detections
from x3d_tf.data.sampling import require_windows
from x3d_tf.data.video.decode import VideoError
from x3d_tf.data.video.listing import list_videos
from x3d_tf.errors import UserError, require
from x3d_tf.modeling.archive import describe
from x3d_tf.modeling.expansion import name_of
from x3d_tf.startup import starting_tensorflow
from x3d_tf.terminal import one_line, tell
from x3d_tf.text import counted

if TYPE_CHECKING:
    from x3d_tf.inference.actions import ActionScores, PersonBoxes
    from x3d_tf.inference.prediction import Prediction
    from x3d_tf.modeling.detection import Detector

FLAGS = flags.FLAGS

_OF_CLASSIFIERS = ("views", "window", "hop", "json", "contact_sheet")
_OF_DETECTORS = ("boxes", "person_detector", "box_score", "action_score", "draw", "starts_at")
_SHEET_ROWS, _SHEET_FRAMES = 30, 6  # of the contact sheet, at most


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("model", None, "A run folder, or a .keras file that this package saved.", required=True)
    flags.DEFINE_integer(
        "views",
        None,
        "Clips of each video, K. Defaults to those of the run's test, 10; of a window to 1.",
        lower_bound=1,
    )
    flags.DEFINE_float("window", None, "Seconds of video for which to make a prediction each; else one for all of it.")
    flags.DEFINE_float("hop", None, "Seconds from one window to the next; the window's length unless given.")
    flags.DEFINE_string("json", None, "File for all predictions.")
    flags.DEFINE_string("csv", None, "File for all predictions as a table.")
    flags.DEFINE_string("contact_sheet", None, f"PNG of frames and classes; at most {_SHEET_ROWS} rows.")
    flags.DEFINE_string("boxes", None, "Of a detector of actions: a csv of the persons' boxes.")
    flags.DEFINE_string("person_detector", None, "Instead: a SavedModel that finds persons. It is a program: trust it.")
    flags.DEFINE_float("box_score", 0.8, "Lowest score of a box.", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_integer(
        "starts_at", 0, "Timestamp of the first frames, in --boxes and --csv; 900 of AVA's cut videos.", lower_bound=0
    )
    flags.DEFINE_float("action_score", 0.5, "Lowest score of an action to show.", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_string("draw", None, "Folder for mp4 files with boxes and actions.")
    flags.DEFINE_bool("overwrite", False, "Replace output files that are there already.")


def main(videos: list[str]) -> None:
    """Predicts as the flags say."""
    require(bool(videos), "the command line", "name video files or folders of them", videos)
    outputs = _outputs()
    task = _check_model()
    paths = list_videos(videos)
    if task == "detection":
        _act(paths)
        return
    with starting_tensorflow():
        from x3d_tf.evaluation.multiview import CLIPS_A_CALL
        from x3d_tf.inference.prediction import csv_table, json_document, predict_videos
        from x3d_tf.modeling.saving import load_classifier
        from x3d_tf.parallel import use_single_threaded_ops

        if FLAGS.views != 1 and FLAGS.window is None:  # one clip alone is faster with all threads
            use_single_threaded_ops(CLIPS_A_CALL)
    tell(f"loading {FLAGS.model}")
    model = load_classifier(FLAGS.model)
    tell("compiling the network: the first clips take longer")
    results = predict_videos(
        model,
        paths,
        temporal_views=FLAGS.views,
        window=FLAGS.window,
        hop=FLAGS.hop,
        thumbnails=_SHEET_FRAMES if FLAGS.contact_sheet else 0,
    )
    about = {"model": FLAGS.model, "network": name_of(model.expansion), "task": task, "window": FLAGS.window}
    names = model.class_names
    if task == "multi_label":
        tqdm.write("Each class has a probability of its own: they do not add up to 1.")
    failures = predictions = 0
    seen: set[str] = set()
    sheet: list[Prediction] = []

    def kept(results: "Iterator[Prediction | VideoError]") -> "Iterator[Prediction | VideoError]":
        """The same results, once they are on their way into the files."""
        nonlocal failures, predictions, sheet
        for result in results:
            for add in sinks:
                add(result)
            seen.add(str(result.path))
            if isinstance(result, VideoError):
                failures += 1
            else:
                predictions += 1
                sheet += [result] if FLAGS.contact_sheet and len(sheet) < _SHEET_ROWS else []
            yield result

    with _telling_kept(seen, len(paths), FLAGS.json, FLAGS.csv), contextlib.ExitStack() as files:
        sinks = []
        if FLAGS.json:
            sinks.append(files.enter_context(json_document(FLAGS.json, about, names, overwrite=FLAGS.overwrite)))
        if FLAGS.csv:
            sinks.append(files.enter_context(csv_table(FLAGS.csv, names, overwrite=FLAGS.overwrite)))
        if FLAGS.window is None:
            show_videos(kept(results), names)
        else:
            show_windows(kept(results), names)
    if sheet:
        part = f", the first {len(sheet)} of {predictions}" if len(sheet) < predictions else ""
        tell(f"drawing {FLAGS.contact_sheet}")
        _save_sheet(Path(FLAGS.contact_sheet), sheet, names, f"{name_of(model.expansion)}, {FLAGS.model}{part}")
    written = [path for path in outputs if sheet or path != FLAGS.contact_sheet]
    if written:
        print(one_line(f"written: {', '.join(written)}"))
    if failures:
        sys.exit(f"{failures} of {counted(len(paths), 'file')} could not be read")


@contextlib.contextmanager
def _telling_kept(seen: Sized, videos: int, *outputs: str | None) -> Iterator[None]:
    """Says, when the block is left early, which files keep the predictions so far.

    Args:
        seen: the videos that have some, as of then; a window of the last of them may be missing.
        videos: how many there are.
        outputs: the files that were asked for.
    """
    from x3d_tf.inference.prediction import unfinished

    try:
        yield
    except BaseException:
        kept = [str(place) for path in outputs if path and (place := unfinished(Path(path))).is_file()]
        if kept and seen:
            last = ", the last of them perhaps not to its end" if FLAGS.window is not None else ""
            what = f"{len(seen)} of {counted(videos, 'video')}{last}"
            print(f"\nkept: {one_line(', '.join(kept))}, predictions of {what}", file=sys.stderr)
        raise


def _check_model() -> str:
    """The model's task, once it is sure that the flags go with it."""
    description = describe(FLAGS.model)
    task = description.task
    given = [f"--{name}" for name in (_OF_CLASSIFIERS if task == "detection" else _OF_DETECTORS) if FLAGS[name].present]
    if given:
        what = "a model of action detection" if task == "detection" else "a model that classifies videos"
        raise UserError(f"{', '.join(given)} must not be given with {FLAGS.model}, {what}")
    if task == "detection" and (FLAGS.boxes is None) == (FLAGS.person_detector is None):
        raise UserError(f"{FLAGS.model} detects actions in boxes: give one of --boxes and --person_detector")
    require_windows(description.expansion.clip, FLAGS.window, FLAGS.hop)
    return task


def _act(paths: Sequence[Path]) -> None:
    """Predicts what persons do, as the flags say."""
    names_of = [path.stem for path in paths]
    require(len(set(names_of)) == len(names_of), "the videos", "have distinct names, which boxes go by", names_of)
    drawn = {path: Path(FLAGS.draw) / f"{path.stem}.mp4" for path in paths} if FLAGS.draw else {}
    for output in drawn.values():
        require_free(str(output), FLAGS.overwrite)
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is no file: actions are detected in video files")
    commands.require_path("--boxes", FLAGS.boxes, "csv file")
    commands.require_path("--person_detector", FLAGS.person_detector, "SavedModel")
    with starting_tensorflow():
        from x3d_tf.inference import actions
        from x3d_tf.inference.prediction import unfinished
        from x3d_tf.modeling.saving import load_detector

    listed = actions.CsvBoxes(FLAGS.boxes, FLAGS.box_score, FLAGS.starts_at) if FLAGS.boxes else None
    if listed and listed.unsure:
        left_out = f"{counted(listed.unsure, 'row')} with a score below {FLAGS.box_score:g} (--box_score)"
        print(one_line(f"{FLAGS.boxes}: left out {left_out}"))
    if FLAGS.person_detector:
        tell(f"loading {FLAGS.person_detector}")
    finder = actions.PersonDetector(FLAGS.person_detector, FLAGS.box_score) if FLAGS.person_detector else None
    tell(f"loading {FLAGS.model}")
    model = load_detector(FLAGS.model)
    found: dict[str, list[actions.ActionScores]] = {}
    failures = 0

    def act(path: Path) -> None:
        persons = finder if listed is None else listed.of_video(path.stem)
        if persons is None:
            raise VideoError(path, f"{FLAGS.boxes} has no boxes of {path.stem}")
        own = _act_in(model, path, persons)
        if listed and (late := listed.after(path.stem, len(own))):
            beyond = f"{FLAGS.boxes} has {counted(late, 'box')} after its last second, {len(own) - 1}"
            tqdm.write(one_line(f"{path.name}: {beyond}"))
        if drawn:
            drawn[path].parent.mkdir(parents=True, exist_ok=True)
            tell(f"drawing {drawn[path]}")
            actions.draw_video(path, drawn[path], own, model.class_names, FLAGS.action_score)
        found[path.stem] = own

    with _telling_kept(found, len(paths), FLAGS.csv):
        try:
            for path in paths:
                try:
                    act(path)
                except VideoError as error:
                    tqdm.write(one_line(f"error: {error}"), file=sys.stderr)
                    failures += 1
        except BaseException:
            if FLAGS.csv and found:
                write_detections(unfinished(Path(FLAGS.csv)), actions.detections(found, FLAGS.starts_at))
            raise
    if FLAGS.csv:
        write_detections(Path(FLAGS.csv), actions.detections(found, FLAGS.starts_at))
    written = [str(drawn[path]) for path in drawn if path.stem in found] + ([FLAGS.csv] if FLAGS.csv else [])
    if written:
        print(one_line(f"written: {', '.join(written)}"))
    if failures:
        sys.exit(f"{failures} of {counted(len(paths), 'file')} could not be predicted")


def _act_in(model: "Detector", path: Path, persons: "PersonBoxes") -> "list[ActionScores]":
    """What persons do in each second of a video, also printed."""
    from x3d_tf.inference.actions import detect_actions, format_actions

    own = []
    for each in detect_actions(model, path, persons):
        own.append(each)
        for number, actions in enumerate(format_actions(each, model.class_names, FLAGS.action_score), 1):
            line = ", ".join(actions) or "nothing of which the network is sure"
            tqdm.write(one_line(f"{path.name}  {each.second:5d} s  person {number}: {line}"))
    return own


def _outputs() -> list[str]:
    """The files to write, once it is sure that they may be written."""
    outputs = [path for path in (FLAGS.json, FLAGS.csv, FLAGS.contact_sheet) if path]
    require(len(set(outputs)) == len(outputs), "output files", "be distinct", outputs)
    if FLAGS.contact_sheet:
        require(FLAGS.contact_sheet.endswith(".png"), "--contact_sheet", "end in .png", FLAGS.contact_sheet)
    for path in outputs:
        require_free(path, FLAGS.overwrite)
    return outputs


def require_free(path: str, overwrite: bool) -> None:
    """Raises UserError where a file would be replaced that may not be."""
    if Path(path).exists() and not overwrite:
        raise UserError(f"{path} exists; give another name, or replace it with --overwrite")


def show_videos(results: "Iterable[Prediction | VideoError]", names: Sequence[str]) -> None:
    """Prints the most probable classes of each video."""
    for result in results:
        if isinstance(result, VideoError):
            tqdm.write(one_line(f"error: {result}"), file=sys.stderr)
        else:
            heading = one_line(f"{result.path} ({result.end:.1f} s)")
            tqdm.write("\n".join([heading, *top_lines(result, names, 5)]))


def show_windows(results: "Iterable[Prediction | VideoError]", names: Sequence[str]) -> None:
    """Prints what follows what in each video: a line for all windows in a row of one most probable class."""

    def kind(result: "Prediction | VideoError") -> tuple[str, int]:
        return str(result.path), -1 if isinstance(result, VideoError) else result.top(1)[0]

    shown = None
    for (path, top), row in itertools.groupby(results, kind):
        start, end, windows, total = None, 0.0, 0, 0.0
        for result in row:
            if isinstance(result, VideoError):
                tqdm.write(one_line(f"error: {result}"), file=sys.stderr)
                continue
            start, end = result.start if start is None else start, result.end
            windows, total = windows + 1, total + float(result.probabilities[top])
        if windows:
            heading = [] if path == shown else [one_line(path)]
            shown = path
            line = f"  {start:8.1f} - {end:8.1f} s  {total / windows:6.1%}  {one_line(names[top])}"
            tqdm.write("\n".join([*heading, line]))


def top_lines(prediction: "Prediction", names: Sequence[str], count: int) -> list[str]:
    """The most probable classes of a prediction, a line each."""
    return [f"  {prediction.probabilities[index]:6.1%}  {one_line(names[index])}" for index in prediction.top(count)]


def _save_sheet(path: Path, rows: "Sequence[Prediction]", names: Sequence[str], title: str) -> None:
    def label(row: "Prediction") -> str:
        times = f"{row.start:.1f} - {row.end:.1f} s"
        return "\n".join([one_line(row.path.name), times, *top_lines(row, names, 3)])

    path.parent.mkdir(parents=True, exist_ok=True)
    clips, times = [row.thumbnails for row in rows], [row.times.tolist() for row in rows]
    plots.save_clips(clips, [label(row) for row in rows], path, title, times)


if __name__ == "__main__":
    define_flags()
    commands.run(main, positional=True)
