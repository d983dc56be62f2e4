"""Writes TFLite files, for phones and for whatever else LiteRT runs on.

  python -m export.tflite --model=runs/mine --output=exported/mine
  python -m export.tflite --model=runs/mine --output=exported/mine --calibration=data/mine

The second also writes the int8 file, whose ranges are those of training clips from these records. For each format there
are NAME_FORMAT.tflite, where NAME is the run folder's or the .keras file's, and NAME_FORMAT.json, a report of its
operators, its quantisation and the model card:
  float32  as the network is
  float16  weights of half the size; computes in float32 on CPUs
  dynamic  weights in int8, one scale a channel; what goes between layers stays float32
  int8     weights and what goes between layers in int8, but for the stem and the first stage, because later
           layers cannot mend what is lost there, and the classifier (fc2), because 8 bits of a logit are coarse. Then
           biases are corrected, so that each layer is right in the mean. --float_until=none, for chips that only know
           integers, leaves nothing in float; it costs accuracy

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

    from .models import Source

FLAGS = flags.FLAGS

FORMATS = ("float32", "float16", "dynamic", "int8")
CALIBRATION_CLIPS = 100
FLOAT_UNTIL = {"none": "", "stem": "conv1_", "res2": "res2"}  # how names of layers of the last part in float begin
CLASSIFIER = "fc2"
_CONVERSIONS = ("QUANTIZE", "DEQUANTIZE")  # between integers and float, of which an int8 file has some


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("model", None, "A run folder, or a .keras file that this package saved.", required=True)
    flags.DEFINE_string("output", None, "Folder to write to.", required=True)
    flags.DEFINE_list("formats", None, f"Of {', '.join(FORMATS)}; all, int8 with --calibration only, unless given.")
    flags.DEFINE_string("calibration", None, "Folder of records: int8 takes its ranges from their training clips.")
    flags.DEFINE_string("split", None, "Part of those records; the run's training part, or train, unless given.")
    flags.DEFINE_integer("calibration_clips", CALIBRATION_CLIPS, "How many clips to calibrate with.", lower_bound=1)
    flags.DEFINE_enum("float_until", "res2", list(FLOAT_UNTIL), "What of the int8 file stays in float, besides fc2.")
    flags.DEFINE_integer("batch", 1, "Clips of a call.", lower_bound=1)
    flags.DEFINE_bool("force", False, "Replace files that are there already.")


def main() -> None:
    """Exports what the flags say."""
    formats = FLAGS.formats
    if formats is None:
        formats = [form for form in FORMATS if form != "int8" or FLAGS.calibration]
    _require_formats(formats, FLAGS.calibration)
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
        source, Path(FLAGS.output), formats, batch=FLAGS.batch, calibration=calibration, force=FLAGS.force
    ):
        print(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)", flush=True)
    print(
        "To hold them against the model, on real videos:\n"
        f"  python -m {__spec__.parent}.verify --model={FLAGS.model} --artefacts={FLAGS.output} --clips=FOLDER"
    )


@dataclass(frozen=True)
class Calibration:
    """How an int8 file is made.

    Attributes:
        records: the folder that ranges come from; None where nothing is to be calibrated.
        split: part of the records.
        clips: how many.
        float_until: a key of `FLOAT_UNTIL`: the last part of the network, from the pixels on, that stays in float; the
            classifier does, too, but with "none".
    """

    records: str | Path | None
    split: str = "train"
    clips: int = CALIBRATION_CLIPS
    float_until: str = "res2"


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
        raise UserError(f"there already: {', '.join(taken)}; give another --output, or replace with --force")
    # Before the first conversion, so that wrong records cost no waiting.
    clips = calibration_clips(source, calibration, batch) if "int8" in formats else None
    with os_errors_as_write_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
    from x3d_tf.modeling.folded import deployed

    app = deployed(source.model, batch=batch)
    for form, path in paths.items():
        tell(f"{'quantising' if form in ('dynamic', 'int8') else 'converting to'} {path}")
        content = convert(app, form, clips, float_until=calibration.float_until)
        card = {**source.card(batch), "artefact": f"TFLite {form}"}
        report = _report(content, form, card, calibration if form == "int8" else None)
        content = _with_files(content, source, card)
        report |= {"file": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        atomic_write(path, content)
        atomic_write(path.with_suffix(".json"), (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
        yield path


def calibration_clips(source: "Source", calibration: Calibration, batch: int) -> NDArray[np.uint8]:
    """Clips as training sees them, at random times, scales and places: uint8 (calls, batch, T, S, S, 3).

    One pixel of the first clip is made black and one white, in all frames: the pixels' range is 0..255 then, so that a
    byte is its own quantised value, and no difference between frames grows.

    Raises:
        UserError: no records there, no such split, or damaged ones.
    """
    from x3d_tf.data.input_pipeline import record_errors_as_user_errors, training_dataset

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
        stretch=model.stretch,
    )
    calls = -(-calibration.clips // batch)
    with record_errors_as_user_errors():
        drawn = itertools.islice(stream.as_numpy_iterator(), calls * batch)
        clips = np.concatenate(
            [
                np.rint(clip).astype(np.uint8)
                for clip, _ in tqdm(drawn, "calibration clips", calls * batch, leave=False, disable=None)
            ]
        )
    clips[0, :, 0, :2] = [[0] * 3, [255] * 3]
    return clips.reshape(calls, batch, *clips.shape[1:])


@dataclass(frozen=True)
class Operator:
    """An operator of a TFLite file.

    Attributes:
        kind: such as CONV_2D; of a custom one CUSTOM and its own name.
        name: of what it writes: names of Keras layers, one behind the other where several became one operator.
        types: of the tensors that it reads and writes, such as FLOAT32.
    """

    kind: str
    name: str
    types: frozenset[str]

    @property
    def in_float(self) -> bool:
        return bool({"FLOAT16", "FLOAT32"} & self.types)

    def is_of(self, start: str) -> bool:
        """Whether the name of one of its layers begins so."""
        return any(part.startswith(start) for part in self.name.split(";"))


def convert(
    app: "keras.Model", form: str, clips: NDArray[np.uint8] | None = None, *, float_until: str = "res2"
) -> bytes:
    """Makes a TFLite file.

    Args:
        app: from `deployed`, of a fixed batch.
        form: of `FORMATS`.
        clips: from `calibration_clips`; for int8 only.
        float_until: see `Calibration`; for int8 only.

    Raises:
        RuntimeError: the converter gave what this package does not promise: an operator that is not builtin, or in an
            int8 file one in float that was not to be.
    """
    import tensorflow as tf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the converter does inside
        if form == "int8":
            assert clips is not None
            content = _int8(app, clips, float_until)
        else:
            converter = _converter(app, tf.uint8)
            if form != "float32":
                converter.optimizations = [tf.lite.Optimize.DEFAULT]
            if form == "float16":
                converter.target_spec.supported_types = [tf.float16]
            content = converter.convert()
    _check(content, form, float_until)
    return content


def _converter(app: "keras.Model", dtype: Any) -> Any:
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_concrete_functions([_frozen(app, dtype)], tf.Module())
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    return converter


def _int8(app: "keras.Model", clips: NDArray[np.uint8], float_until: str) -> bytes:
    import tensorflow as tf

    # Of what `TFLiteConverter.convert` calls; the converter itself has no way to leave operators out.
    from tensorflow.lite.python.convert import mlir_quantize

    reference = _converter(app, tf.float32).convert()
    converter = _converter(app, tf.float32)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    calls = tqdm(clips, "calibrating", leave=False, disable=None)
    converter.representative_dataset = lambda: ([call.astype(np.float32)] for call in calls)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter._experimental_calibrate_only = True
    calibrated = converter.convert()
    left = [operator.name for operator in _to_leave(operators(calibrated), float_until)]
    with kept_back():
        content = mlir_quantize(calibrated, denylisted_nodes=left or None, input_data_type=tf.uint8)
    return correct_biases(content, reference, clips)


def _to_leave(found: Sequence[Operator], float_until: str) -> list[Operator]:
    """The operators of a file, in their order, that an int8 file has in float."""
    if float_until == "none":
        return []
    (*_, last), (classifier, *_) = (
        [place for place, operator in enumerate(found) if operator.is_of(start)]
        for start in (FLOAT_UNTIL[float_until], CLASSIFIER)
    )
    return [*found[: last + 1], *found[classifier:]]


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


def operators(content: bytes) -> list[Operator]:
    """The operators of a TFLite file in their order."""
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
    """The operators of an int8 file that compute in float."""
    return [operator for operator in operators(content) if operator.in_float and operator.kind not in _CONVERSIONS]


def _check(content: bytes, form: str, float_until: str) -> None:
    found = operators(content)
    custom = sorted({operator.kind for operator in found if operator.kind.startswith("CUSTOM")})
    if custom:
        raise RuntimeError(f"the {form} file has operators that are not TFLite's own: {', '.join(custom)}")
    if form != "int8":
        return
    stray = sorted({operator.kind for operator in set(left_in_float(content)) - set(_to_leave(found, float_until))})
    if stray:
        raise RuntimeError(f"the int8 file computes these in float: {', '.join(stray)}")


def _report(content: bytes, form: str, card: Mapping[str, Any], calibration: Calibration | None) -> dict[str, Any]:
    left = left_in_float(content) if form == "int8" else []
    return {
        "format": form,
        "operators": dict(Counter(operator.kind for operator in operators(content)).most_common()),
        "left_in_float": [{"operator": operator.kind, "name": operator.name} for operator in left],
        "calibration": calibration and {**asdict(calibration), "records": str(calibration.records)},
        "card": card,
    }


def _with_files(content: bytes, source: "Source", card: Mapping[str, Any]) -> bytes:
    """The file with labels and card behind it, as a ZIP archive whose beginning no reader of TFLite files minds."""
    files = {
        "labels.txt": "\n".join(source.class_names) + "\n",
        "model_card.json": json.dumps(card, indent=1, ensure_ascii=False) + "\n",
    }
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text)  # of no date: the same network makes the same bytes
    return buffer.getvalue()


if __name__ == "__main__":
    define_flags()
    commands.run(main)
