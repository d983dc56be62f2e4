"""Printed predictions: the top classes of each video, or a timeline of windows."""

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from x3d_tf.data.video.decode import VideoError
from x3d_tf.inference.prediction import Prediction
from x3d_tf.inference.writers import partial_output
from x3d_tf.terminal import one_line
from x3d_tf.text import counted


def print_videos(results: Iterable[Prediction | VideoError], names: Sequence[str]) -> None:
    """Prints the five most probable classes of each video."""
    for result in results:
        if isinstance(result, VideoError):
            tqdm.write(one_line(f"error: {result}"), file=sys.stderr)
        else:
            heading = one_line(f"{result.path} ({result.end:.1f} s)")
            tqdm.write("\n".join([heading, *top_lines(result, names, 5)]))


def print_windows(results: Iterable[Prediction | VideoError], names: Sequence[str]) -> None:
    """Prints a timeline of each video: one line for consecutive windows that share their most probable class."""

    def key(result: Prediction | VideoError) -> tuple[str, int]:
        return str(result.path), -1 if isinstance(result, VideoError) else result.top(1)[0]

    printed = None
    for (path, top), group in itertools.groupby(results, key):
        start, end, total, windows = None, 0.0, 0.0, 0
        for result in group:
            if isinstance(result, VideoError):
                tqdm.write(one_line(f"error: {result}"), file=sys.stderr)
                continue
            start, end = result.start if start is None else start, result.end
            total, windows = total + float(result.probabilities[top]), windows + 1
        if windows:
            heading = [] if path == printed else [one_line(path)]
            printed = path
            line = f"  {start:8.1f} - {end:8.1f} s  {total / windows:6.1%}  {one_line(names[top])}"
            tqdm.write("\n".join([*heading, line]))


def top_lines(prediction: Prediction, names: Sequence[str], count: int) -> list[str]:
    """Returns the most probable classes of a prediction, one line each."""
    return [f"  {prediction.probabilities[index]:6.1%}  {one_line(names[index])}" for index in prediction.top(count)]


@contextmanager
def report_partial(done: Sized, videos: int, *outputs: str | None, windows: bool = False) -> Iterator[None]:
    """Reports which output files keep the predictions made so far when the block is left early.

    Args:
        done: the videos with predictions; it grows within the block.
        videos: the number of all videos.
        outputs: the output files that were requested.
        windows: whether the last video may lack some windows.
    """
    try:
        yield
    except BaseException:
        kept = [str(partial) for path in outputs if path and (partial := partial_output(Path(path))).is_file()]
        if kept and done:
            last = ", the last one perhaps incomplete" if windows else ""
            what = f"predictions for {len(done)} of {counted(videos, 'video')}{last}"
            print(f"\nkept: {one_line(', '.join(kept))}, {what}", file=sys.stderr)
        raise


def print_written(outputs: Sequence[str]) -> None:
    """Prints the names of the output files, if there are any."""
    if outputs:
        print(one_line(f"written: {', '.join(outputs)}"))
