"""Model files: Keras' own format with one more member, `x3d_tf.json`, which `load` builds the network from."""

import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import keras

from x3d_tf.errors import UserError, require
from x3d_tf.files import atomic_path, os_errors_as_write_error
from x3d_tf.modeling.archive import MEMBER, UNREADABLE, check_weights, model_file, read_description, require_classifier
from x3d_tf.modeling.detection import Detector
from x3d_tf.modeling.metadata import Metadata, named_or_numbered
from x3d_tf.modeling.portable import build_portable, take_weights
from x3d_tf.modeling.x3d import X3D, Network

_Model = TypeVar("_Model", X3D, Detector)


def save(
    model: keras.Model, path: str | Path, class_names: Sequence[str] | None = None, *, overwrite: bool = False
) -> None:
    """Writes a `.keras` file of a trainable network or of its portable form.

    Args:
        model: from `build_x3d`, `build_detector`, `load` or `portable`.
        path: ends in `.keras`.
        class_names: for a trainable network, one for each output; numbered, with a warning, unless given.
        overwrite: whether a file that is there may be replaced.

    Raises:
        ValueError: another ending, another kind of model, or a wrong number of names.
        FileExistsError: the file is there and may not be replaced.
        WriteError: it cannot be written; nothing is left behind.
    """
    path = Path(path)
    require(path.suffix == ".keras", "the path of a model file", "end in .keras", str(path))
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; give another path, or overwrite=True")
    description = _description(model, class_names)
    with os_errors_as_write_error(path), atomic_path(path, path.suffix) as partial:
        model.save(partial)
        with zipfile.ZipFile(partial, "a") as archive:
            archive.writestr(MEMBER, description.to_json())


def _description(model: keras.Model, class_names: Sequence[str] | None) -> Metadata:
    if isinstance(model, Network):
        if not model.include_top:
            return Metadata.of(model, class_names=(), form="trainable")
        names = named_or_numbered(class_names, model.num_classes)
        return Metadata.of(model, class_names=names, form="trainable")
    description = getattr(model, "description", None)
    if not isinstance(description, Metadata):
        raise ValueError(
            f"x3d_tf.save takes a model of x3d_tf.build_x3d, build_detector, load or portable, got {model!r}"
        )
    require(class_names is None, "class_names", "be given to x3d_tf.portable, which has them already", class_names)
    return description


def load(path: str | Path) -> X3D | Detector:
    """Builds the trainable network of a run folder or of a `.keras` file that this package saved.

    Only numbers and names are read from the file, never code, and both are checked before a network is built.

    Args:
        path: a run folder, which holds `model.keras`, or the file.

    Returns:
        The network, or the detector of such a file; its `class_names` are the file's.

    Raises:
        UserError: no such file, one that this package did not save, or one whose weights are not those of the network
            that it describes.
    """
    path, description = _checked(path)
    if description.task == "detection":
        return _filled(_detector(description), description, path)
    return _filled(_classifier(description), description, path)


def load_classifier(path: str | Path) -> X3D:
    """As `load`, for what works with classifiers alone.

    Raises:
        UserError: besides, the file of a detector.
    """
    require_classifier(path)
    path, description = _checked(path)
    return _filled(_classifier(description), description, path)


def load_detector(path: str | Path) -> Detector:
    """As `load`, for what works with detectors alone.

    Raises:
        UserError: besides, the file of a classifier.
    """
    path, description = _checked(path)
    if description.task != "detection":
        raise UserError(f"{path} is no detector but classifies clips (its task is {description.task})")
    return _filled(_detector(description), description, path)


def _checked(path: str | Path) -> tuple[Path, Metadata]:
    """The `.keras` file and its description, which fits the weights."""
    file = model_file(path)
    description = read_description(file)
    check_weights(file, description)
    return file, description


def _classifier(description: Metadata) -> X3D:
    return X3D(
        description.expansion,
        description.num_classes,
        description.options,
        include_top=description.include_top,
        task=description.task,
    )


def _detector(description: Metadata) -> Detector:
    assert description.detection_head is not None  # a description of a detector has one
    return Detector(
        description.expansion, description.num_classes, description.options, head=description.detection_head
    )


def _filled(model: _Model, description: Metadata, path: Path) -> _Model:
    """The network with weights and names of the file."""
    try:
        if description.form == "portable":
            app = build_portable(model, description.size)
            _load_weights(app, path)
            take_weights(model, app)
        else:
            _load_weights(model, path)
    except (*UNREADABLE, UserWarning) as error:
        raise UserError(f"the weights of {path} do not fit its description: {error}") from error
    model.take_facts(description)
    return model


def _load_weights(model: keras.Model, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Skipping")  # by itself Keras keeps fresh weights for missing ones
        model.load_weights(path)
