"""Saves and loads model files: Keras' `.keras` format plus the member `x3d_tf.json`, the metadata of the network."""

import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import keras

from x3d_tf.errors import UserError, require
from x3d_tf.files import atomic_path, os_errors_as_write_error
from x3d_tf.modeling.archive import MEMBER, UNREADABLE, check_weights, model_file, read_metadata, require_classifier
from x3d_tf.modeling.detection import Detector
from x3d_tf.modeling.metadata import Metadata, class_names_or_numbers, copy_metadata
from x3d_tf.modeling.portable import build_portable, copy_portable_weights
from x3d_tf.modeling.x3d import X3D, Network

_Model = TypeVar("_Model", X3D, Detector, X3D | Detector)


def save(
    model: keras.Model, path: str | Path, class_names: Sequence[str] | None = None, *, overwrite: bool = False
) -> None:
    """Saves a trainable network, or its portable form, as a `.keras` file.

    Args:
        model: a model from `build_x3d`, `build_detector`, `load` or `portable`.
        path: output file, ending in `.keras`.
        class_names: class names of a trainable network, one per output. Defaults to numbers, with a warning.
        overwrite: whether an existing file may be replaced.

    Raises:
        ValueError: wrong file name ending, unsupported model, or wrong number of class names.
        FileExistsError: the file exists and `overwrite` is false.
        WriteError: the file cannot be written; no partial file remains.
    """
    path = Path(path)
    require(path.suffix == ".keras", "the path of a model file", "end in .keras", str(path))
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass another path, or overwrite=True")
    metadata = _metadata(model, class_names)
    with os_errors_as_write_error(path), atomic_path(path, path.suffix) as temporary:
        model.save(temporary)
        with zipfile.ZipFile(temporary, "a") as archive:
            archive.writestr(MEMBER, metadata.to_json())


def _metadata(model: keras.Model, class_names: Sequence[str] | None) -> Metadata:
    if isinstance(model, Network):
        if not model.include_top:
            return Metadata.from_model(model, class_names=(), form="trainable")
        names = class_names_or_numbers(class_names, model.num_classes)
        return Metadata.from_model(model, class_names=names, form="trainable")
    metadata = getattr(model, "metadata", None)
    if not isinstance(metadata, Metadata):
        raise ValueError(
            f"x3d_tf.save requires a model from x3d_tf.build_x3d, build_detector, load or portable, got {model!r}"
        )
    require(class_names is None, "class_names", "be passed to x3d_tf.portable, not to x3d_tf.save", class_names)
    return metadata


def load(path: str | Path) -> X3D | Detector:
    """Loads the trainable network from a run folder or from a `.keras` file saved by this package.

    Reads only numbers and names from the file, never code, and checks both before building the network.

    Args:
        path: a run folder, which holds `model.keras`, or a `.keras` file.

    Returns:
        The network, or the detector if the file holds one. Its `class_names` are those of the file.

    Raises:
        UserError: the file does not exist, was not saved by this package, or has weights that do not match its
            metadata.
    """
    path, metadata = _read_checked_metadata(path)
    return _load_into(build_network(metadata), metadata, path)


def build_network(metadata: Metadata) -> X3D | Detector:
    """Builds the network that the metadata describe, with randomly initialized weights."""
    return _build_classifier(metadata) if metadata.detection_head is None else _build_detector(metadata)


def load_classifier(path: str | Path) -> X3D:
    """Loads a classifier; see `load`.

    Raises:
        UserError: as for `load`, or the file holds a detector.
    """
    require_classifier(path)
    path, metadata = _read_checked_metadata(path)
    return _load_into(_build_classifier(metadata), metadata, path)


def load_detector(path: str | Path) -> Detector:
    """Loads a detector; see `load`.

    Raises:
        UserError: as for `load`, or the file holds a classifier.
    """
    path, metadata = _read_checked_metadata(path)
    if metadata.detection_head is None:
        raise UserError(f"{path} is not a detector: it classifies clips (task {metadata.task!r})")
    return _load_into(_build_detector(metadata), metadata, path)


def _read_checked_metadata(path: str | Path) -> tuple[Path, Metadata]:
    """Returns the path of the `.keras` file and its metadata, checked against the weights."""
    file = model_file(path)
    metadata = read_metadata(file)
    check_weights(file, metadata)
    return file, metadata


def _build_classifier(metadata: Metadata) -> X3D:
    return X3D(
        metadata.expansion,
        metadata.num_classes,
        metadata.options,
        include_top=metadata.include_top,
        activation=metadata.activation,
        task=metadata.task,
    )


def _build_detector(metadata: Metadata) -> Detector:
    assert metadata.detection_head is not None  # checked by Metadata
    return Detector(
        metadata.expansion, metadata.num_classes, metadata.options, head=metadata.detection_head, task=metadata.task
    )


def _load_into(model: _Model, metadata: Metadata, path: Path) -> _Model:
    """Loads the weights and metadata of the file into the network and returns it."""
    try:
        if metadata.form == "portable":
            app = build_portable(model, metadata.size)
            _load_weights(app, path)
            copy_portable_weights(model, app)
        else:
            _load_weights(model, path)
    except (*UNREADABLE, UserWarning) as error:
        raise UserError(f"the weights of {path} do not match its metadata: {error}") from error
    copy_metadata(metadata, model)
    return model


def _load_weights(model: keras.Model, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Skipping")  # missing weights must be an error, not a warning
        model.load_weights(path)
