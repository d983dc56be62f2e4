"""Exports a SavedModel for TF Serving, C, C++, Java, Go, or Python without this package.

  python -m export.saved_model --model=runs/mine --output=serving/mine

The first call writes version 1 of the model "mine" to serving/mine/1, the next call writes version 2. A server that
watches serving/mine loads new versions automatically. The model accepts uint8 clips (signature serving_default),
float32 clips (float_clips), or the frames of clips as JPEG or PNG files (encoded_frames), with any batch size. A
detector accepts uint8 clips and boxes (detect and serving_default, which are identical).

In addition to TensorFlow's files, the folder of a version contains model_card.json (input, output, cost and training of
the model), assets/labels.txt (class names) and assets.extra/tf_serving_warmup_requests, which TF Serving runs before it
puts the version into service.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from x3d_tf import commands
from x3d_tf.errors import UserError, require
from x3d_tf.files import os_errors_as_write_error, temporary_path
from x3d_tf.modeling.archive import describe
from x3d_tf.modeling.cards import CARD
from x3d_tf.startup import starting_tensorflow
from x3d_tf.terminal import tell

if TYPE_CHECKING:
    from .models import ExportableModel
    from .signatures import Device, ServedNetwork

FLAGS = flags.FLAGS

LABELS, WARMUP = "labels.txt", "tf_serving_warmup_requests"


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("model", None, "Run folder, or .keras file saved by this package.", required=True)
    flags.DEFINE_string(
        "output", None, "Folder of the served model. Clients address the model by the folder's name.", required=True
    )
    flags.DEFINE_integer(
        "version", None, "Version to write. Defaults to the highest existing version plus 1.", lower_bound=1
    )
    flags.DEFINE_enum("device", "cpu", ["cpu", "gpu"], "Device to optimize for; the SavedModel runs on both.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing version; requires --version. Defaults to false.")


def main() -> None:
    """Runs the command."""
    output = Path(FLAGS.output)
    version_folder(output, FLAGS.version, overwrite=FLAGS.overwrite)  # fails early: loading TensorFlow takes seconds
    describe(FLAGS.model)
    with starting_tensorflow():
        from .models import open_model

    tell(f"loading {FLAGS.model}")
    source = open_model(FLAGS.model, inputs=("clip", "boxes"))
    tell(f"exporting the network to {output}")
    folder = export_saved_model(source, output, FLAGS.version, overwrite=FLAGS.overwrite, device=FLAGS.device)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    print(f"written: {folder} ({size / 1e6:.1f} MB)")
    for name, signature in card["signatures"].items():
        inputs = ", ".join(
            f"{key}: {value['dtype']} ({', '.join(map(str, value['shape']))})" for key, value in signature.items()
        )
        print(f"  {name:16} {inputs}")


def export_saved_model(
    source: "ExportableModel",
    output: Path,
    version: int | None = None,
    *,
    overwrite: bool = False,
    device: "Device" = "cpu",
) -> Path:
    """Writes a version of a served model, atomically.

    Args:
        source: the model, from `open_model`.
        output: folder of the served model, created if missing; clients address the model by its name.
        version: version number. Defaults to the highest existing version plus 1.
        overwrite: whether to replace an existing version.
        device: device to optimize for: "cpu" processes the clips of a request in parallel, "gpu" as one batch.

    Returns:
        The folder of the version, `output/version`.

    Raises:
        UserError: see `version_folder`.
        WriteError: the version cannot be written; nothing is left behind.
    """
    from .signatures import signatures_of

    folder = version_folder(output, version, overwrite=overwrite)
    with _atomic_folder(folder) as partial, tempfile.TemporaryDirectory() as scratch:
        labels = Path(scratch) / LABELS
        labels.write_text("".join(f"{name}\n" for name in source.class_names), encoding="utf-8")
        signatures = signatures_of(source, labels, device)
        card = _save(source, signatures, partial)
        (partial / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (partial / "assets.extra").mkdir()
        _write_warmup(partial / "assets.extra" / WARMUP, signatures, output.resolve().name)
    return folder


def version_folder(output: Path, version: int | None, *, overwrite: bool = False) -> Path:
    """Returns the folder to write a version to.

    Raises:
        UserError: the version exists and `overwrite` is false; `overwrite` is set without a version; `output` is a
            file, or its name is a number or has other characters than letters, digits, `_`, `.` and `-`.
    """
    name = output.resolve().name
    ok = re.fullmatch(r"[\w.-]+", name, re.ASCII) is not None and not name.isdigit()
    rule = "end in the model's name, which has letters, digits, _, . and - and is not a number as versions are"
    require(ok, "--output", rule, name)
    require(not output.is_file(), "--output", "be a folder", str(output))
    require(
        version is not None or not overwrite, "--overwrite", "be used together with --version, the version to replace"
    )
    if version is None:
        names = [path.name for path in output.iterdir()] if output.is_dir() else []
        version = max((int(name) for name in names if name.isdecimal()), default=0) + 1
    folder = output / str(version)
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} exists; omit --version to write the next one, or replace it with --overwrite")
    return folder


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a hidden folder, which servers ignore; it is renamed to `folder` on success and deleted on failure."""
    partial, replaced = temporary_path(folder), folder.with_name(f".{folder.name}.replaced")
    with os_errors_as_write_error(folder):
        try:
            shutil.rmtree(partial, ignore_errors=True)  # left by an export that was killed
            shutil.rmtree(replaced, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            if folder.exists():
                folder.rename(replaced)
            partial.rename(folder)
        finally:
            if replaced.exists() and not folder.exists():
                replaced.rename(folder)
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)


def _save(source: "ExportableModel", signatures: "ServedNetwork", folder: Path) -> dict[str, Any]:
    """Writes TensorFlow's files and returns the model card."""
    import tensorflow as tf

    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)  # for inference only
    tf.saved_model.save(signatures, str(folder), signatures=signatures.by_name(), options=options)
    inputs = {
        name: {
            spec.name: {"dtype": spec.dtype.name, "shape": ["N", *spec.shape[1:]]} for spec in function.input_signature
        }
        for name, function in signatures.by_name().items()
    }
    return {**source.card(), "artefact": "SavedModel", "tensorflow": tf.__version__, "signatures": inputs}


def _write_warmup(path: Path, signatures: "ServedNetwork", model: str) -> None:
    """Writes one request per signature, each with one grey clip, as a TFRecord file of PredictionLog messages."""
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature, inputs in signatures.requests().items():
            tensors = {name: tensor.SerializeToString() for name, tensor in inputs.items()}
            writer.write(prediction_log(model, signature, tensors))


def prediction_log(model: str, signature: str, inputs: Mapping[str, bytes]) -> bytes:
    """Returns a serialized `tensorflow.serving.PredictionLog` message with one request.

    The message is encoded by hand, because its Python classes require the package tensorflow-serving-api.

    Args:
        model: name of the model.
        signature: name of the signature.
        inputs: serialized `tensorflow.TensorProto` messages by input name.
    """
    spec = _message((1, model.encode()), (3, signature.encode()))  # ModelSpec: name, signature_name
    entries = [_message((1, name.encode()), (2, tensor)) for name, tensor in inputs.items()]  # map entries: key, value
    request = _message((1, spec), *((2, entry) for entry in entries))  # PredictRequest: model_spec, inputs
    return _message((6, _message((1, request))))  # PredictionLog: predict_log; PredictLog: request


def _message(*fields: tuple[int, bytes]) -> bytes:
    """Returns a protocol buffer message, from field numbers and length-delimited contents."""
    message = b""
    for number, content in fields:
        length, remaining = b"", len(content)
        while remaining >= 0x80:
            length += bytes([remaining & 0x7F | 0x80])
            remaining >>= 7
        message += bytes([number << 3 | 2]) + length + bytes([remaining]) + content
    return message


if __name__ == "__main__":
    define_flags()
    commands.run(main)
