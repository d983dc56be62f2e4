"""Exports TFLite files, for phones and other devices that LiteRT supports.

  python -m export.tflite --model=runs/mine --output=exported/mine
  python -m export.tflite --model=runs/mine --output=exported/mine --calibration=data/mine

The second command also writes the int8 file, whose quantization ranges are calibrated on training clips from the given
records. Each format gives two files: NAME_FORMAT.tflite, where NAME is the name of the run folder or .keras file, and
NAME_FORMAT.json, which reports the operators, the quantization and the model card. The formats:
  float32  unchanged weights
  float16  float16 weights; computes in float32 on CPUs
  dynamic  int8 weights with one scale per channel; float32 activations
  int8     int8 weights and activations. The stem, the first stage and fc2 stay in float32: later layers cannot
           recover what the first ones lose, and 8-bit logits are too coarse. Then biases are corrected so that each
           layer's mean output matches the float model. For integer-only hardware,
           --float_until=none quantizes all layers, at a cost in accuracy.

All these files have the same interface. Input: clips, uint8 (1, T, S, S, 3), RGB. Output: probabilities, float32
(1, classes). Normalization is part of the model. The batch size is fixed, because a dynamic one is slower; set it with
--batch. Only builtin TFLite operators are used. Each file is also a ZIP archive that contains labels.txt and
model_card.json, which Android's metadata library and `unzip` can read. The TFLite metadata schema is not used, because
it does not cover video.

  python -m export.tflite --model=runs/mine --output=exported/mine --target=gpu

The third command writes NAME_gpu_float32.tflite and NAME_gpu_float16.tflite for LiteRT's GPU delegate. Their tensors
have at most four dimensions, and their operators are those that the delegate's documentation lists. Input: the frames
of one clip, float32 (T, S, S, 3), RGB in 0..255. Output as above. By default the delegate computes in float16 whatever
the format, so float16 only halves the file. The 8-bit formats are not written, because the delegate computes in float.
"""

import hashlib
import io
import itertools
import json
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags
from numpy.typing import NDArray
from tqdm import tqdm

from x3d_tf import commands
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.errors import UserError, require
from x3d_tf.files import atomic_write, os_errors_as_write_error
from x3d_tf.modeling.archive import require_classifier
from x3d_tf.startup import kept_back, starting_tensorflow
from x3d_tf.terminal import tell

from .bias_correction import correct_biases, operator_name, read_model

if TYPE_CHECKING:
    import keras

    from .models import ExportableModel

FLAGS = flags.FLAGS

FORMATS = ("float32", "float16", "dynamic", "int8")
TARGETS = {"cpu": FORMATS, "gpu": ("float32", "float16")}  # the formats of each target
CALIBRATION_CLIPS = 100
FLOAT_UNTIL = {"none": "", "stem": "conv1_", "res2": "res2"}  # name prefixes of the last layers kept in float
CLASSIFIER = "fc2"
_CONVERSIONS = ("QUANTIZE", "DEQUANTIZE")  # between float and integers; part of every int8 file


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("model", None, "Run folder, or .keras file saved by this package.", required=True)
    flags.DEFINE_string("output", None, "Folder to write to.", required=True)
    flags.DEFINE_enum("target", "cpu", list(TARGETS), "Processor that the files are for. Defaults to cpu.")
    flags.DEFINE_list(
        "formats",
        None,
        f"Comma-separated formats to write: {', '.join(FORMATS)}; {', '.join(TARGETS['gpu'])} with --target=gpu. "
        "Defaults to all; int8 only with --calibration.",
    )
    flags.DEFINE_string("calibration", None, "Folder of records whose training clips calibrate the int8 quantization.")
    flags.DEFINE_string(
        "split", None, "Split of the calibration records. Defaults to the run's training split, or train without a run."
    )
    flags.DEFINE_integer("calibration_clips", CALIBRATION_CLIPS, "Number of calibration clips.", lower_bound=1)
    flags.DEFINE_enum(
        "float_until",
        "res2",
        list(FLOAT_UNTIL),
        "Last part of the network that int8 keeps in float32; fc2 is kept, too. none quantizes all layers.",
    )
    flags.DEFINE_integer("batch", 1, "Batch size.", lower_bound=1)
    flags.DEFINE_bool("overwrite", False, "Replace existing files. Defaults to false.")


def main() -> None:
    """Runs the command."""
    formats = FLAGS.formats
    if formats is None:
        formats = [name for name in TARGETS[FLAGS.target] if name != "int8" or FLAGS.calibration]
    _require_formats(formats, FLAGS.target, FLAGS.batch, FLAGS.calibration)
    require_classifier(FLAGS.model)
    if FLAGS.calibration:
        Manifest.load(FLAGS.calibration)
    with starting_tensorflow():
        from .models import open_model

    tell(f"loading {FLAGS.model}")
    source = open_model(FLAGS.model)
    split = FLAGS.split or _training_split(source)
    calibration = Calibration(FLAGS.calibration, split, FLAGS.calibration_clips, FLAGS.float_until)
    for path in export_tflite(
        source,
        Path(FLAGS.output),
        formats,
        target=FLAGS.target,
        batch=FLAGS.batch,
        calibration=calibration,
        overwrite=FLAGS.overwrite,
    ):
        print(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)", flush=True)
    print(
        "To verify them against the model on real videos:\n"
        f"  python -m {__spec__.parent}.verify --model={FLAGS.model} --artefacts={FLAGS.output} --clips=FOLDER"
    )


@dataclass(frozen=True)
class Calibration:
    """Settings of the int8 quantization.

    Attributes:
        records: folder of the calibration records; None without an int8 file.
        split: split of the records.
        clips: number of calibration clips.
        float_until: key of `FLOAT_UNTIL`, the last part of the network that stays in float32, counted from the input.
            The classifier stays in float32 as well. "none" quantizes all layers.
    """

    records: str | Path | None
    split: str = "train"
    clips: int = CALIBRATION_CLIPS
    float_until: str = "res2"


def _training_split(source: "ExportableModel") -> str:
    return source.run.dataset.train_split if source.run else "train"


def _require_formats(formats: Sequence[str], target: str, batch: int, calibration: str | Path | None) -> None:
    require(target in TARGETS, "--target", f"be one of {', '.join(TARGETS)}", target)
    known = TARGETS[target]
    rule = f"be a list of {', '.join(known)}{' for --target=gpu' if target == 'gpu' else ''}"
    require(bool(formats) and set(formats) <= set(known), "--formats", rule, ",".join(formats))
    if target == "gpu" and calibration is not None:
        raise UserError("--calibration is for int8 files, which --target=gpu does not have; remove it")
    require(target == "cpu" or batch == 1, "--batch", "be 1 for --target=gpu, whose input is one clip", batch)
    if "int8" in formats and calibration is None:
        raise UserError("--formats=int8 requires --calibration=RECORDS; set it, or remove int8 from --formats")


def export_tflite(
    source: "ExportableModel",
    folder: Path,
    formats: Sequence[str],
    *,
    target: str = "cpu",
    batch: int = 1,
    calibration: Calibration | None = None,
    overwrite: bool = False,
) -> Iterator[Path]:
    """Writes a model as TFLite files, atomically, and yields the path of each file after it is written.

    Args:
        source: the model, from `open_model`.
        folder: output folder, created if missing.
        formats: names from `TARGETS[target]`.
        target: key of `TARGETS`, the processor that the files are for.
        batch: batch size; 1 for "gpu".
        calibration: settings of the int8 quantization; required for int8.
        overwrite: whether to replace existing files.

    Raises:
        UserError: the target does not have a format or the batch size; int8 has no calibration records; the records
            lack the split or are damaged; a file exists and `overwrite` is false.
        WriteError: a file cannot be written.
    """
    calibration = calibration or Calibration(None)
    _require_formats(formats, target, batch, calibration.records)
    stem = source.name if target == "cpu" else f"{source.name}_{target}"
    paths = {name: folder / f"{stem}_{name}.tflite" for name in formats}
    existing = [str(path) for path in paths.values() if path.exists()]
    if existing and not overwrite:
        raise UserError(f"already exists: {', '.join(existing)}; choose another --output, or replace with --overwrite")
    # Before the first conversion, so that errors in the records are reported early.
    clips = calibration_clips(source, calibration, batch) if "int8" in formats else None
    with os_errors_as_write_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
    network = _fold(source, target, batch)
    for name, path in paths.items():
        tell(f"{'quantizing' if name in ('dynamic', 'int8') else 'converting to'} {path}")
        content = convert(network, name, clips, target=target, float_until=calibration.float_until)
        card = _card(source, network, name, target)
        report = _report(content, name, card, calibration if name == "int8" else None)
        content = _with_metadata(content, source, card)
        report |= {"file": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        atomic_write(path, content)
        atomic_write(path.with_suffix(".json"), (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
        yield path


def _fold(source: "ExportableModel", target: str, batch: int) -> "keras.Model":
    if target == "gpu":
        from .tflite_gpu import fold_for_gpu

        return fold_for_gpu(source.model)
    from x3d_tf.modeling.folded import fold

    return fold(source.model, batch=batch)


def _card(source: "ExportableModel", network: "keras.Model", format_name: str, target: str) -> dict[str, Any]:
    """Returns the model card of a file, with the shape, the type and the range of its input."""
    card = source.card()
    tensor = {"shape": [*network.input_shape], "dtype": "float32" if target == "gpu" else "uint8", "range": [0, 255]}
    return {**card, "artefact": f"TFLite {format_name}", "target": target, "input": card["input"] | tensor}


def calibration_clips(source: "ExportableModel", calibration: Calibration, batch: int) -> NDArray[np.uint8]:
    """Returns clips with the augmentation of training: uint8 (calls, batch, T, S, S, 3).

    One pixel of the first clip is set to black and one to white, in all frames. The calibrated input range is then
    exactly 0..255, so that pixels are quantized without rounding.

    Raises:
        UserError: the records do not exist, lack the split or are damaged.
    """
    from x3d_tf.data.input_pipeline import training_dataset
    from x3d_tf.data.records.table import record_errors_as_user_errors

    require(calibration.records is not None, "calibration.records", "be a folder of records", None)
    model, run = source.model, source.run
    dataset = training_dataset(
        calibration.records,  # type: ignore[arg-type]  # checked above
        calibration.split,
        model.clip,
        jitter=model.expansion.jitter,
        flip=run.dataset.flip if run else False,
        batch=1,
        seed=0,
        frame_sampling=source.frame_sampling,
        stretch=model.stretch,
    )
    calls = -(-calibration.clips // batch)
    with record_errors_as_user_errors():
        batches = itertools.islice(dataset.as_numpy_iterator(), calls * batch)
        clips = np.concatenate(
            [
                np.rint(clip).astype(np.uint8)
                for clip, _ in tqdm(batches, "calibration clips", calls * batch, leave=False, disable=None)
            ]
        )
    clips[0, :, 0, :2] = [[0] * 3, [255] * 3]
    return clips.reshape(calls, batch, *clips.shape[1:])


@dataclass(frozen=True)
class Operator:
    """An operator of a TFLite file.

    Attributes:
        kind: type of the operator, such as CONV_2D. Custom operators are "CUSTOM" followed by their own name.
        name: name of the output tensor: the Keras layers that the operator implements, separated by ";".
        types: types of the input and output tensors, such as FLOAT32.
    """

    kind: str
    name: str
    types: frozenset[str]

    @property
    def in_float(self) -> bool:
        return bool({"FLOAT16", "FLOAT32"} & self.types)

    def implements(self, prefix: str) -> bool:
        """Returns whether the operator implements a layer whose name starts with `prefix`."""
        return any(part.startswith(prefix) for part in self.name.split(";"))


def convert(
    network: "keras.Model",
    format_name: str,
    clips: NDArray[np.uint8] | None = None,
    *,
    target: str = "cpu",
    float_until: str = "res2",
) -> bytes:
    """Converts a network to a TFLite file.

    Args:
        network: inference network from `fold`, with a fixed batch size, or from `fold_for_gpu`.
        format_name: name from `FORMATS`.
        clips: calibration clips from `calibration_clips`; for int8 only.
        target: key of `TARGETS`.
        float_until: see `Calibration`; for int8 only.

    Raises:
        RuntimeError: the converted file has an operator that is not builtin or, for "gpu", an operator or a tensor that
            GPU delegates refuse; an int8 file has an unexpected float operator.
    """
    import tensorflow as tf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the converter's own deprecations
        if format_name == "int8":
            assert clips is not None
            content = _convert_int8(network, clips, float_until)
        else:
            converter = _converter(network, tf.float32 if target == "gpu" else tf.uint8)
            if format_name != "float32":
                converter.optimizations = [tf.lite.Optimize.DEFAULT]
            if format_name == "float16":
                converter.target_spec.supported_types = [tf.float16]
            content = converter.convert()
    _check(content, format_name, float_until)
    if target == "gpu":
        from .tflite_gpu import require_gpu_operators

        require_gpu_operators(content)
    return content


def _converter(network: "keras.Model", dtype: Any) -> Any:
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_concrete_functions([_frozen_function(network, dtype)], tf.Module())
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    return converter


def _convert_int8(network: "keras.Model", clips: NDArray[np.uint8], float_until: str) -> bytes:
    import tensorflow as tf

    # An internal function of the converter: its public interface cannot exclude operators from quantization.
    from tensorflow.lite.python.convert import mlir_quantize

    reference = _converter(network, tf.float32).convert()
    converter = _converter(network, tf.float32)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    calls = tqdm(clips, "calibrating", leave=False, disable=None)
    converter.representative_dataset = lambda: ([call.astype(np.float32)] for call in calls)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter._experimental_calibrate_only = True
    calibrated = converter.convert()
    excluded = [operator.name for operator in _excluded_from_int8(operators(calibrated), float_until)]
    with kept_back():
        content = mlir_quantize(calibrated, denylisted_nodes=excluded or None, input_data_type=tf.uint8)
    return correct_biases(content, reference, clips)


def _excluded_from_int8(found: Sequence[Operator], float_until: str) -> list[Operator]:
    """Returns the operators that an int8 file keeps in float, in execution order."""
    if float_until == "none":
        return []
    (*_, last), (classifier, *_) = (
        [index for index, operator in enumerate(found) if operator.implements(prefix)]
        for prefix in (FLOAT_UNTIL[float_until], CLASSIFIER)
    )
    return [*found[: last + 1], *found[classifier:]]


def _frozen_function(network: "keras.Model", dtype: Any) -> Any:
    """Returns the network as a concrete function with constant weights; variables would become extra operators."""
    import tensorflow as tf

    variables = (network.trainable_variables, network.non_trainable_variables)
    weights = [[tf.constant(value) for value in group] for group in variables]
    name = "frames" if len(network.input_shape) == 4 else "clips"  # of one clip, for GPUs

    @tf.function(input_signature=[tf.TensorSpec(network.input_shape, dtype, name=name)])
    def probabilities(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs, _ = network.stateless_call(*weights, tf.cast(pixels, tf.float32), training=False)
        return {"probabilities": outputs}

    return probabilities.get_concrete_function()


def operators(content: bytes) -> list[Operator]:
    """Returns the operators of a TFLite file in execution order."""
    from tensorflow.lite.python import schema_py_generated as schema

    types = {value: name for name, value in vars(schema.TensorType).items() if not name.startswith("_")}
    model = read_model(content)
    found = []
    for graph in model.subgraphs:
        for operator in graph.operators:
            tensors = [graph.tensors[index] for index in (*operator.inputs, *operator.outputs) if index >= 0]
            found.append(
                Operator(
                    operator_name(model, operator),
                    graph.tensors[operator.outputs[0]].name.decode(),
                    frozenset(types[tensor.type] for tensor in tensors),
                )
            )
    return found


def left_in_float(content: bytes) -> list[Operator]:
    """Returns the operators of an int8 file that compute in float."""
    return [operator for operator in operators(content) if operator.in_float and operator.kind not in _CONVERSIONS]


def _check(content: bytes, format_name: str, float_until: str) -> None:
    found = operators(content)
    custom = sorted({operator.kind for operator in found if operator.kind.startswith("CUSTOM")})
    if custom:
        raise RuntimeError(f"the {format_name} file has operators that are not builtin: {', '.join(custom)}")
    if format_name != "int8":
        return
    unexpected = set(left_in_float(content)) - set(_excluded_from_int8(found, float_until))
    if unexpected:
        kinds = ", ".join(sorted({operator.kind for operator in unexpected}))
        raise RuntimeError(f"the int8 file has unexpected float operators: {kinds}")


def _report(
    content: bytes, format_name: str, card: Mapping[str, Any], calibration: Calibration | None
) -> dict[str, Any]:
    in_float = left_in_float(content) if format_name == "int8" else []
    return {
        "format": format_name,
        "target": card["target"],
        "operators": dict(Counter(operator.kind for operator in operators(content)).most_common()),
        "left_in_float": [{"operator": operator.kind, "name": operator.name} for operator in in_float],
        "calibration": calibration and {**asdict(calibration), "records": str(calibration.records)},
        "card": card,
    }


def _with_metadata(content: bytes, source: "ExportableModel", card: Mapping[str, Any]) -> bytes:
    """Appends the labels and the model card as a ZIP archive, which readers of TFLite files ignore."""
    files = {
        "labels.txt": "\n".join(source.class_names) + "\n",
        "model_card.json": json.dumps(card, indent=1, ensure_ascii=False) + "\n",
    }
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text)  # without a date, so that exports are reproducible
    return buffer.getvalue()


if __name__ == "__main__":
    define_flags()
    commands.run(main)
