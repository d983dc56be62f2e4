"""Does prediction on video files give what the report of a run says of their records?

  python benchmarks/prediction_agreement.py runs/ut_set1 runs/ut_set2 --videos=ut_interaction

Of each finished run the report is evaluated again on its test records, and the files that the records were made of are
predicted: as `x3d_tf.predict` does it, and without parts of what the records' frames went through.

  scaled and JPEG   as the records: the default
  scaled only       scaled as the records, not compressed
  neither           scaled to 256 pixels, or what the network looks at where that is more, not compressed

The columns are top-1 of the report and of the prediction, the largest difference and the mean one of a probability, how
many videos get another class, and seconds of CPU time a video. The first row's difference should be below 0.005.
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

from x3d_tf.evaluation.classification import Evaluation, Procedure, evaluation_of_run
from x3d_tf.inference import prediction
from x3d_tf.inference.prediction import Prediction, predict_videos
from x3d_tf.modeling.archive import weights_of
from x3d_tf.modeling.saving import load_classifier
from x3d_tf.modeling.x3d import X3D
from x3d_tf.runs.run_folder import RunFolder


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="finished runs of classifiers")
    parser.add_argument("--videos", type=Path, required=True, help="the folder that their records were built of")
    settings = parser.parse_args()
    columns = f"{'report':>7} {'predict':>7} {'max diff':>9} {'mean diff':>9} {'other':>6} {'CPU s':>6}"
    print(f"{'run':24} {'frames':16} {columns}")
    for path in settings.runs:
        compare(RunFolder(path), settings.videos)


def compare(folder: RunFolder, videos: Path) -> None:
    """Prints the rows of a run."""
    model = load_classifier(folder.root)
    measurement = evaluation_of_run(folder, Procedure(), model, weights_of(folder.root))
    expected = measurement.predict()
    report = float((expected.probabilities.argmax(axis=1) == expected.labels).mean())
    files = [videos / name for name in expected.videos]
    for name, scaled, compressed in (
        ("scaled and JPEG", True, True),
        ("scaled only", True, False),
        ("neither", False, False),
    ):
        with leaving_out(model, scaled=scaled, compressed=compressed):
            start = time.process_time()
            found = predicted(model, files, measurement)
            seconds = (time.process_time() - start) / len(files)
        difference = np.abs(found - expected.probabilities)
        top1 = float((found.argmax(axis=1) == expected.labels).mean())
        other = int((found.argmax(axis=1) != expected.probabilities.argmax(axis=1)).sum())
        print(
            f"{folder.root.name:24} {name:16} {report:7.1%} {top1:7.1%} {difference.max():9.2g} "
            f"{difference.mean():9.2g} {other:6d} {seconds:6.2f}",
            flush=True,
        )


@contextmanager
def leaving_out(model: X3D, *, scaled: bool, compressed: bool) -> Iterator[None]:
    """Prediction within the block without parts of what the frames of the records went through."""
    stored = model.stored
    try:
        model.stored = stored if scaled else None
        keep = prediction.as_stored if compressed else lambda pixels, _: pixels
        with mock.patch.object(prediction, "as_stored", keep):
            yield
    finally:
        model.stored = stored


def predicted(model: X3D, files: list[Path], measurement: Evaluation) -> np.ndarray:
    """Probabilities [videos, classes]."""
    rows = []
    for result in predict_videos(model, files, temporal_views=measurement.views.temporal_views):
        if not isinstance(result, Prediction):
            sys.exit(f"error: {result}; --videos names the folder that the records were built of")
        rows.append(result.probabilities)
    return np.array(rows)


if __name__ == "__main__":
    run(main)
