"""Writes a SavedModel for TF Serving, or for whatever else loads one: C, C++, Java, Go, or Python without this package.

  python -m export.saved_model --model=runs/mine --output=serving/mine

writes version 1 of a model called "mine" to serving/mine/1, and the next time version 2. A server that watches
serving/mine takes the new version over by itself. The model can then be asked with uint8 clips (serving_default),
float32 clips (float_clips) and the JPEG or PNG files of frames (encoded_frames), any number of clips at a time. A
detector is asked with uint8 clips and boxes (detect, and serving_default, which is the same).

The folder of a version holds, beside TensorFlow's files, model_card.json (what to feed, what comes out, what it costs,
how it was trained), assets/labels.txt (class names) and assets.extra/tf_serving_warmup_requests, which a server answers
before it takes the version into service.
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
from x3d_tf.startup import starting_tensorflow
from x3d_tf.terminal import tell

if TYPE_CHECKING:
    from .models import Source
    from .signatures import Device

FLAGS = flags.FLAGS

LABELS, CARD, WARMUP = "labels.txt", "model_card.json", "tf_serving_warmup_requests"
_GREY = 114  # of warm-up clips: the mean that the network takes off


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("model", None, "A run folder, or a .keras file that this package saved.", required=True)
    flags.DEFINE_string("output", None, "The served model's folder, whose name is its name.", required=True)
    flags.DEFINE_integer("version", None, "Its version; one more than the highest unless given.", lower_bound=1)
    flags.DEFINE_enum("device", "cpu", ["cpu", "gpu"], "What it is made fast on. It runs on both.")
    flags.DEFINE_bool("force", False, "Replace the version, which --version must name, where it exists.")


def main() -> None:
    """Exports what the flags say."""
    output = Path(FLAGS.output)
    place(output, FLAGS.version, force=FLAGS.force)  # before TensorFlow is loaded, which takes seconds
    describe(FLAGS.model)
    with starting_tensorflow():
        from .models import open_model

    tell(f"loading {FLAGS.model}")
    source = open_model(FLAGS.model, detectors=True)
    tell(f"compiling the network and writing a version into {output}")
    folder = export_saved_model(source, output, FLAGS.version, force=FLAGS.force, device=FLAGS.device)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    print(f"written: {folder} ({size / 1e6:.1f} MB)")
    for name, signature in card["signatures"].items():
        inputs = ", ".join(
            f"{key}: {value['dtype']} ({', '.join(map(str, value['shape']))})" for key, value in signature.items()
        )
        print(f"  {name:16} {inputs}")


def export_saved_model(
    source: "Source", output: Path, version: int | None = None, *, force: bool = False, device: "Device" = "cpu"
) -> Path:
    """Writes a version of a served model, whole or not at all.

    Args:
        source: from `open_model`.
        output: folder of the served model, made where it is missing; its name is what clients ask for.
        version: one more than the highest that is there unless given.
        force: whether the version may be replaced.
        device: what it is made fast on: "cpu" computes the clips of a request side by side, "gpu" as one batch.

    Returns:
        The version's folder, `output/version`.

    Raises:
        UserError: see `place`.
        WriteError: it cannot be written; nothing is left behind.
    """
    folder = place(output, version, force=force)
    with _appearing(folder) as partial, tempfile.TemporaryDirectory() as scratch:
        labels = Path(scratch) / LABELS
        labels.write_text("".join(f"{name}\n" for name in source.class_names), encoding="utf-8")
        card = _save(source, labels, partial, device)
        (partial / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (partial / "assets.extra").mkdir()
        _write_warmup(partial / "assets.extra" / WARMUP, source, output.resolve().name)
    return folder


def place(output: Path, version: int | None, *, force: bool = False) -> Path:
    """Where a version goes.

    Raises:
        UserError: a version that is there and may not be replaced; `force` without a version; an `output` that is a
            file, or named by a number as versions are.
    """
    name = output.resolve().name
    ok = re.fullmatch(r"[\w.-]+", name, re.ASCII) is not None and not name.isdigit()
    require(ok, "--output", "end in the model's name, letters, digits, _, . and -; versions get folders in it", name)
    require(not output.is_file(), "--output", "be a folder", str(output))
    require(version is not None or not force, "--force", "come with --version, which it replaces", "it alone")
    if version is None:
        names = [path.name for path in output.iterdir()] if output.is_dir() else []
        version = max((int(name) for name in names if name.isdecimal()), default=0) + 1
    folder = output / str(version)
    if folder.exists() and not force:
        raise UserError(f"{folder} exists; leave --version out for the next one, or replace it with --force")
    return folder


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder that gets its name when the block has ended well. Servers pass over hidden ones."""
    partial, replaced = temporary_path(folder), folder.with_name(f".{folder.name}.replaced")
    with os_errors_as_write_error(folder):
        try:
            shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
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


def _save(source: "Source", labels: Path, folder: Path, device: "Device") -> dict[str, Any]:
    """Writes TensorFlow's part; returns the model card."""
    import tensorflow as tf

    from .signatures import DetectorSignatures, Signatures

    of = DetectorSignatures if source.model.task == "detection" else Signatures
    module = of(source, labels, device)
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)  # nobody trains it further
    tf.saved_model.save(module, str(folder), signatures=module.by_name(), options=options)
    inputs = {
        name: {
            spec.name: {"dtype": spec.dtype.name, "shape": ["N", *spec.shape[1:]]} for spec in function.input_signature
        }
        for name, function in module.by_name().items()
    }
    return {**source.card(), "artefact": "SavedModel", "tensorflow": tf.__version__, "signatures": inputs}


def _write_warmup(path: Path, source: "Source", model: str) -> None:
    """Writes a request of one clip for each signature, all grey, as a TFRecord of PredictionLog messages."""
    import tensorflow as tf

    clip = source.model.clip
    shape = (1, clip.frames, source.model.eval_size, source.model.eval_size, 3)
    grey = tf.make_tensor_proto(_GREY, tf.uint8, shape)  # one value that stands for all
    if source.model.task == "detection":
        asked = {"clips": grey, "boxes": tf.make_tensor_proto([[[0.0, 0.0, 1.0, 1.0]]], tf.float32)}
        requests = {"serving_default": asked, "detect": asked}
    else:
        frame = _grey_frame(source.views.resize)
        requests = {
            "serving_default": {"clips": grey},
            "float_clips": {"clips": tf.make_tensor_proto(_GREY, tf.float32, shape)},
            "encoded_frames": {"frames": tf.make_tensor_proto(frame, tf.string, shape[:2])},
        }
    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature, inputs in requests.items():
            tensors = {name: tensor.SerializeToString() for name, tensor in inputs.items()}
            writer.write(prediction_log(model, signature, tensors))


def _grey_frame(side: int) -> bytes:
    """A JPEG file."""
    import numpy as np

    from x3d_tf.data.video.decode import encode_jpeg

    return encode_jpeg(np.full((side, side * 4 // 3, 3), _GREY, np.uint8))


def prediction_log(model: str, signature: str, inputs: Mapping[str, bytes]) -> bytes:
    """A `tensorflow.serving.PredictionLog` of one request, spelt out: its classes are in a package of their own.

    Args:
        model, signature: what is asked.
        inputs: by their names, as serialised `tensorflow.TensorProto`s.
    """
    spec = _message((1, model.encode()), (3, signature.encode()))  # ModelSpec: name, signature_name
    entries = [_message((1, name.encode()), (2, tensor)) for name, tensor in inputs.items()]  # of a map: key, value
    request = _message((1, spec), *((2, entry) for entry in entries))  # PredictRequest: model_spec, inputs
    return _message((6, _message((1, request))))  # PredictionLog: predict_log; PredictLog: request


def _message(*fields: tuple[int, bytes]) -> bytes:
    """A protocol buffer message: numbers of its fields, with what they hold."""
    written = b""
    for number, content in fields:
        length, remaining = b"", len(content)
        while remaining >= 0x80:
            length += bytes([remaining & 0x7F | 0x80])
            remaining >>= 7
        written += bytes([number << 3 | 2]) + length + bytes([remaining]) + content
    return written


if __name__ == "__main__":
    define_flags()
    commands.run(main)
