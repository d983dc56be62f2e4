"""Opens classifiers in files of all kinds. Imports no TensorFlow."""

from pathlib import Path

from x3d_tf.modeling.cards import is_exported
from x3d_tf.runtimes.classifier_file import ClassifierFile
from x3d_tf.runtimes.exported import ExportedClassifier


def open_classifier(path: str | Path, at_once: int | None = None) -> ClassifierFile:
    """Opens a classifier. Run folders, `.keras` files and SavedModels run in TensorFlow.

    Args:
        path: run folder, `.keras` file, or exported file.
        at_once: for an exported file, see `ExportedClassifier`.

    Raises:
        UserError: see `StoredClassifier` and `ExportedClassifier`.
    """
    if is_exported(path):
        return ExportedClassifier(path, at_once)
    from x3d_tf.runtimes.stored import StoredClassifier

    return StoredClassifier(path)
