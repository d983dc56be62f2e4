"""Writes TFLite files, for phones and for whatever else LiteRT runs on.

  python -m export.tflite --model=runs/mine --output=exported/mine
  python -m export.tflite --model=runs/mine --output=exported/mine --calibration=data/mine

The second also writes the int8 file, whose ranges are those of training clips from these records. For each format there
are NAME_FORMAT.tflite, where NAME is the network's, and NAME_FORMAT.json, a report of its operators, its quantisation
and the model card:
  float32  as the network is
  float16  weights of half the size; computes in float32 on CPUs
  dynamic  weights in int8, one scale a channel; what goes between layers stays float32
  int8     weights and what goes between layers in int8: integers from the pixels to the classes

All have the same face: clips, uint8 (1, T, S, S, 3), RGB bytes as a camera gives them, to probabilities, float32 (1,
classes). The normalisation is inside, the number of clips is fixed (--batch for more than 1: an open one is slower) and
only TFLite's builtin operators are used. labels.txt and model_card.json are within each file: it is a ZIP archive, too,
as Android's metadata library and `unzip` read it. The TFLite metadata schema itself has no words for video.
"""

import hashlib
import io
import itertools
import json
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags
from numpy.typing import NDArray
from tqdm import tqdm

from x3d_tf import _command
from x3d_tf._checks import UserError, require
from x3d_tf._files import write_whole, writing

if TYPE_CHECKING:
    import keras

    from .models import Source

FLAGS = flags.FLAGS

FORMATS = ("float32", "float16", "dynamic", "int8")
CALIBRATION_CLIPS = 100
CONVOLUTIONS = ("CONV_2D", "CONV_3D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")  # all that has trained weights
LEFT_IN_FLOAT: dict[str, str] = {"DEQUANTIZE": "the probabilities' way out"}  # of int8 files: operator to reason


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("model", None, "A run folder, or a .keras file that this package saved.", required=True)
    flags.DEFINE_string("output", None, "Folder to write to.", required=True)
    flags.DEFINE_list("formats", None, f"Of {', '.join(FORMATS)}; all, int8 with --calibration only, unless given.")
    flags.DEFINE_string("calibration", None, "Folder of records: int8 takes its ranges from their training clips.")
    flags.DEFINE_string("split", None, "Part of those records; the run's training part, or train, unless given.")
    flags.DEFINE_integer("calibration_clips", CALIBRATION_CLIPS, "How many clips to calibrate with.", lower_bound=1)
    flags.DEFINE_integer("batch", 1, "Clips of a call.", lower_bound=1)
    flags.DEFINE_bool("force", False, "Replace files that are there already.")


def main() -> None:
    """Exports what the flags say."""
    formats = FLAGS.formats
    if formats is None:
        formats = [form for form in FORMATS if form != "int8" or FLAGS.calibration]
    _require_formats(formats, FLAGS.calibration)
    _command.quiet_tensorflow()
    from .models import open_model

    source = open_model(FLAGS.model)
    calibration = Calibration(FLAGS.calibration, FLAGS.split or _training_split(source), FLAGS.calibration_clips)
    for path in export_tflite(
        source, Path(FLAGS.output), formats, batch=FLAGS.batch, calibration=calibration, force=FLAGS.force
    ):
        print(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)", flush=True)
    print(
        "To hold them against the model, on real videos:\n"
        f"  python -m {__spec__.parent}.verify --model={FLAGS.model} --artefacts={FLAGS.output} --clips=FOLDER"
    )


@dataclass(frozen=True)
class Calibration:
    """Where the ranges of an int8 file come from.

    Attributes:
        records: the folder; None where nothing is to be calibrated.
        split: part of the records.
        clips: how many.
    """

    records: str | Path | None
    split: str = "train"
    clips: int = CALIBRATION_CLIPS


def _training_split(source: "Source") -> str:
    return source.run.dataset.train_split if source.run else "train"


def _require_formats(formats: Sequence[str], calibration: str | Path | None) -> None:
    known = ", ".join(FORMATS)
    require(bool(formats) and set(formats) <= set(FORMATS), "--formats", f"be of {known}", ",".join(formats))
    if "int8" in formats and calibration is None:
        raise UserError("int8 takes its ranges from real clips: give --calibration=RECORDS, or leave int8 out")


def export_tflite(
    source: "Source",
    folder: Path,
    formats: Sequence[str],
    *,
    batch: int = 1,
    calibration: Calibration | None = None,
    force: bool = False,
) -> Iterator[Path]:
    """Writes a model as TFLite files, each whole or not at all, and yields each when it is there.

    Args:
        source: from `open_model`.
        folder: made where it is missing.
        formats: of `FORMATS`.
        batch: clips of a call.
        calibration: for int8.
        force: whether files that are there may be replaced.

    Raises:
        UserError: an unknown format; int8 without calibration clips; records without such a split, or damaged ones;
            files that may not be replaced.
        WriteError: a file cannot be written.
    """
    calibration = calibration or Calibration(None)
    _require_formats(formats, calibration.records)
    paths = {form: folder / f"{source.name}_{form}.tflite" for form in formats}
    taken = [str(path) for path in paths.values() if path.exists()]
    if taken and not force:
        raise UserError(f"{', '.join(taken)} exists; give another --output, or replace it with --force")
    # Before the first conversion, so that wrong records cost no waiting.
    clips = calibration_clips(source, calibration, batch) if "int8" in formats else None
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    from x3d_tf.modeling.deployed import deployed

    app = deployed(source.model, batch=batch)
    for form, path in paths.items():
        content = convert(app, form, clips)
        report = _report(content, form, source, calibration if form == "int8" else None)
        content = _with_files(content, source)
        report |= {"file": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        write_whole(path, content)
        write_whole(path.with_suffix(".json"), (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
        yield path


def calibration_clips(source: "Source", calibration: Calibration, batch: int) -> NDArray[np.uint8]:
    """Clips as training sees them, at random times, scales and places: uint8 (calls, batch, T, S, S, 3).

    One pixel each of the first clip is made black and white, so that the pixels' range is 0..255 for sure: only then
    is a byte its own quantised value.

    Raises:
        UserError: no records there, no such split, or damaged ones.
    """
    from x3d_tf.data.pipeline import naming_records, training_dataset

    require(calibration.records is not None, "calibration", "name records", None)
    model, run = source.model, source.run
    stream = training_dataset(
        calibration.records,  # type: ignore[arg-type]  # checked above
        calibration.split,
        model.clip,
        jitter=model.expansion.jitter,
        flip=run.dataset.flip if run else False,
        batch=1,
        seed=0,
        frame_sampling=source.frame_sampling,
        squeeze=model.squeeze,
    )
    calls = -(-calibration.clips // batch)
    with naming_records():
        drawn = itertools.islice(stream.as_numpy_iterator(), calls * batch)
        clips = np.concatenate(
            [
                np.rint(clip).astype(np.uint8)
                for clip, _ in tqdm(drawn, "calibration clips", calls * batch, leave=False, disable=None)
            ]
        )
    clips[0, 0, 0, :2] = [[0] * 3, [255] * 3]
    return clips.reshape(calls, batch, *clips.shape[1:])


def convert(app: "keras.Model", form: str, clips: NDArray[np.uint8] | None = None) -> bytes:
    """Makes a TFLite file.

    Args:
        app: from `deployed`, of a fixed batch.
        form: of `FORMATS`.
        clips: from `calibration_clips`; for int8 only.

    Raises:
        RuntimeError: the converter gave what this package does not promise: an operator that is not builtin, or in an
            int8 file one in float that `LEFT_IN_FLOAT` does not list.
    """
    import tensorflow as tf

    function = _frozen(app, tf.float32 if form == "int8" else tf.uint8)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], tf.Module())
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    if form != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if form == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if form == "int8":
        assert clips is not None
        calls = tqdm(clips, "calibrating", leave=False, disable=None)
        converter.representative_dataset = lambda: ([call.astype(np.float32)] for call in calls)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = tf.uint8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the converter does inside
        content = converter.convert()
    _check(content, form)
    return content


def _frozen(app: "keras.Model", dtype: Any) -> Any:
    """The model as a concrete function whose weights are constants: from variables the converter makes operators."""
    import tensorflow as tf

    weights = [
        [tf.constant(value) for value in part] for part in (app.trainable_variables, app.non_trainable_variables)
    ]

    @tf.function(input_signature=[tf.TensorSpec(app.input_shape, dtype, name="clips")])
    def probabilities(clips: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs, _ = app.stateless_call(*weights, tf.cast(clips, tf.float32), training=False)
        return {"probabilities": outputs}

    return probabilities.get_concrete_function()


@dataclass(frozen=True)
class Operator:
    """An operator of a TFLite file, with the types of the tensors that it reads and writes, such as FLOAT32."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def operators(content: bytes) -> list[Operator]:
    """The operators of a TFLite file in their order; a custom one is called CUSTOM and its own name."""
    from tensorflow.lite.python import schema_py_generated as schema

    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    types = {value: name for name, value in vars(schema.TensorType).items() if not name.startswith("_")}
    model = schema.ModelT.InitFromPackedBuf(content, 0)

    def name(code: Any) -> str:
        builtin = names[max(code.builtinCode, code.deprecatedBuiltinCode)]  # small codes may stand in either field
        return f"CUSTOM {code.customCode.decode()}" if builtin == "CUSTOM" else builtin

    def kinds(graph: Any, indices: Sequence[int]) -> tuple[str, ...]:
        return tuple(types[graph.tensors[index].type] for index in indices if index >= 0)  # -1 is one left out

    return [
        Operator(
            name(model.operatorCodes[operator.opcodeIndex]),
            kinds(graph, operator.inputs),
            kinds(graph, operator.outputs),
        )
        for graph in model.subgraphs
        for operator in graph.operators
    ]


def in_float(content: bytes) -> Counter[str]:
    """How often each operator of a TFLite file reads or writes floating-point numbers."""
    return Counter(
        operator.name
        for operator in operators(content)
        if {"FLOAT16", "FLOAT32"} & {*operator.inputs, *operator.outputs}
    )


def _check(content: bytes, form: str) -> None:
    custom = sorted({operator.name for operator in operators(content) if operator.name.startswith("CUSTOM")})
    if custom:
        raise RuntimeError(f"the {form} file has operators that are not TFLite's own: {', '.join(custom)}")
    if form != "int8":
        return
    stray = sorted(set(in_float(content)) - set(LEFT_IN_FLOAT))
    if stray:
        raise RuntimeError(f"the int8 file computes these in float: {', '.join(stray)}")


def _report(content: bytes, form: str, source: "Source", calibration: Calibration | None) -> dict[str, Any]:
    found = operators(content)
    left = in_float(content) if form == "int8" else {}
    return {
        "format": form,
        "operators": dict(Counter(operator.name for operator in found).most_common()),
        "left_in_float": [
            {"operator": name, "count": count, "reason": LEFT_IN_FLOAT[name]} for name, count in left.items()
        ],
        "calibration": calibration
        and {
            "records": str(calibration.records),
            "split": calibration.split,
            "clips": calibration.clips,
        },
        "card": source.card(),
    }


def _with_files(content: bytes, source: "Source") -> bytes:
    """The file with labels and card behind it, as a ZIP archive whose beginning no reader of TFLite files minds."""
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("labels.txt", "\n".join(source.class_names) + "\n")
        archive.writestr("model_card.json", json.dumps(source.card(), indent=1, ensure_ascii=False) + "\n")
    return buffer.getvalue()


if __name__ == "__main__":
    define_flags()
    _command.run(main)
