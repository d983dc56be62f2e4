"""Compares predictions for video files with the evaluation of their records.

  python benchmarks/prediction_agreement.py runs/ut_set1 runs/ut_set2 --videos=ut_interaction

Each finished run is evaluated again on its test records. Predictions are made for the video files that the records were
built from, once as in `x3d_tf.predict` and then without some steps of the preprocessing of records:

  scaled and JPEG   scaled and compressed like the records: the default
  scaled only       scaled like the records, not compressed
  neither           scaled to 256 pixels, or to the network's size if that is larger; not compressed

The columns are the top-1 accuracy of the evaluation and of the prediction, the maximum and mean difference of the
probabilities, the number of videos with another top-1 class, and the CPU time per video in seconds. The maximum
difference in the first row should be below 0.005.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
from command import run

from x3d_tf.evaluation.classification import ClipEvaluation
from x3d_tf.evaluation.eval_config import EvalConfig
from x3d_tf.inference import prediction
from x3d_tf.inference.prediction import Prediction, predict_videos
from x3d_tf.modeling.archive import weights_of
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.runtimes.classifier_file import ClassifierFile
from x3d_tf.runtimes.opening import open_classifier
from x3d_tf.tasks.classification import SingleLabel


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished classifier runs")
    parser.add_argument("--videos", type=Path, required=True, help="folder of the videos that the records contain")
    settings = parser.parse_args()
    columns = f"{'report':>7} {'predict':>7} {'max diff':>9} {'mean diff':>9} {'other':>6} {'CPU s':>6}"
    print(f"{'run':24} {'frames':16} {columns}")
    for path in settings.runs:
        compare(RunFolder(path), settings.videos)


def compare(folder: RunFolder, videos: Path) -> None:
    """Prints the rows of one run."""
    model = open_classifier(folder.root)
    evaluation = SingleLabel().evaluation(model, weights_of(folder.root), EvalConfig(), folder)
    expected = evaluation.predict()
    report = float((expected.probabilities.argmax(axis=1) == expected.labels).mean())
    files = [videos / name for name in expected.videos]
    for name, scaled, compressed in (
        ("scaled and JPEG", True, True),
        ("scaled only", True, False),
        ("neither", False, False),
    ):
        with preprocessing(model, scaled=scaled, compressed=compressed):
            start = time.process_time()
            probabilities = predict(model, files, evaluation)
            seconds = (time.process_time() - start) / len(files)
        difference = np.abs(probabilities - expected.probabilities)
        top1 = float((probabilities.argmax(axis=1) == expected.labels).mean())
        other = int((probabilities.argmax(axis=1) != expected.probabilities.argmax(axis=1)).sum())
        print(
            f"{folder.root.name:24} {name:16} {report:7.1%} {top1:7.1%} {difference.max():9.2g} "
            f"{difference.mean():9.2g} {other:6d} {seconds:6.2f}",
            flush=True,
        )


@contextmanager
def preprocessing(model: ClassifierFile, *, scaled: bool, compressed: bool) -> Iterator[None]:
    """Context manager in which predictions scale and compress frames like the records only if requested."""
    stored = model.stored
    try:
        model.stored = stored if scaled else None
        as_stored = prediction.as_stored if compressed else lambda pixels, _: pixels
        with mock.patch.object(prediction, "as_stored", as_stored):
            yield
    finally:
        model.stored = stored


def predict(model: ClassifierFile, files: list[Path], evaluation: ClipEvaluation) -> np.ndarray:
    """Returns the probabilities [videos, classes]."""
    rows = []
    for result in predict_videos(model, files, temporal_views=evaluation.views.temporal_views):
        if not isinstance(result, Prediction):
            sys.exit(f"error: {result}; --videos must be the folder that the records were built from")
        rows.append(result.probabilities)
    return np.array(rows)


if __name__ == "__main__":
    run(main)
