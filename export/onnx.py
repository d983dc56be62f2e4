"""Exports ONNX and OpenVINO files with Keras' exporters.

  python -m export.onnx --model=runs/mine --output=exported/mine
  python -m export.onnx --model=runs/mine --output=exported/mine --formats=onnx --batch=0

The first command writes NAME.onnx, and NAME.xml with NAME.bin, where NAME is the name of the run folder or .keras file.
Input: clips, uint8 (N, T, S, S, 3), RGB. Output: probabilities, float32 (N, classes). The batch size N is 1, or the
value of --batch; --batch=0 makes it dynamic, which is much slower in OpenVINO.
The files contain the class names and the model card: as the metadata properties "labels" and "card" in ONNX, and as
runtime information of the same names under "x3d_tf" in OpenVINO.

ONNX requires pip install 'x3d_tf[onnx]', OpenVINO requires pip install 'x3d_tf[openvino]'. Both formats are exported
from the inference network with folded batch norms. Keras' ONNX exporter does not support networks with separate batch
norms: it turns the mean and the variance of a normalization layer into model inputs. Keras' OpenVINO exporter adds an
output for every swish; these outputs are removed here.

On CPUs with bfloat16, OpenVINO computes in bfloat16 by default, which is faster but changes the third significant digit
of the probabilities. For float32 use compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).
"""

import importlib.util
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from x3d_tf import commands
from x3d_tf.errors import UserError, require
from x3d_tf.files import os_errors_as_write_error, temporary_path
from x3d_tf.modeling.archive import require_classifier
from x3d_tf.startup import starting_tensorflow
from x3d_tf.terminal import tell

if TYPE_CHECKING:
    from .models import ExportableModel

FLAGS = flags.FLAGS

SUFFIXES = {"onnx": (".onnx",), "openvino": (".bin", ".xml")}  # the last one identifies the artefact
PACKAGES = {"onnx": ("onnx", "tf2onnx"), "openvino": ("openvino", "scipy")}  # imported by Keras' exporters


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("model", None, "Run folder, or .keras file saved by this package.", required=True)
    flags.DEFINE_string("output", None, "Folder to write to.", required=True)
    flags.DEFINE_list("formats", ["onnx", "openvino"], "Comma-separated formats to write: onnx, openvino.")
    flags.DEFINE_integer("batch", 1, "Batch size; 0 makes it dynamic.", lower_bound=0)
    flags.DEFINE_bool("overwrite", False, "Replace existing files. Defaults to false.")


def main() -> None:
    """Runs the command."""
    require_formats(FLAGS.formats)
    require_classifier(FLAGS.model)
    with starting_tensorflow():
        from .models import open_model

    tell(f"loading {FLAGS.model}")
    written = export_formats(
        open_model(FLAGS.model), Path(FLAGS.output), FLAGS.formats, batch=FLAGS.batch or None, overwrite=FLAGS.overwrite
    )
    for path in written:
        print(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    print(
        "To verify them against the model on real videos:\n"
        f"  python -m {__spec__.parent}.verify --model={FLAGS.model} --artefacts={FLAGS.output} --clips=FOLDER"
    )


def require_formats(formats: list[str]) -> None:
    """Raises UserError if a format is unknown or its packages are not installed."""
    known = ", ".join(SUFFIXES)
    require(bool(formats) and set(formats) <= set(SUFFIXES), "--formats", f"be a list of {known}", ",".join(formats))
    for format_name in formats:
        missing = [name for name in PACKAGES[format_name] if importlib.util.find_spec(name) is None]
        if missing:
            install = f"pip install 'x3d_tf[{format_name}]'"
            raise UserError(f"--formats={format_name} requires {', '.join(missing)}, not installed; {install}")


def export_formats(
    source: "ExportableModel", folder: Path, formats: list[str], *, batch: int | None = 1, overwrite: bool = False
) -> list[Path]:
    """Writes a model as ONNX and OpenVINO files, atomically.

    Args:
        source: the model, from `open_model`.
        folder: output folder, created if missing.
        formats: list of "onnx" and "openvino".
        batch: batch size; None is dynamic.
        overwrite: whether to replace existing files.

    Returns:
        The written files.

    Raises:
        UserError: a format is unknown, or its packages are not installed; a file exists and `overwrite` is false.
        WriteError: a file cannot be written.
    """
    require_formats(formats)
    outputs = [folder / f"{source.name}{suffix}" for format_name in formats for suffix in SUFFIXES[format_name]]
    existing = [str(path) for path in outputs if path.exists()]
    if existing and not overwrite:
        raise UserError(f"already exists: {', '.join(existing)}; choose another --output, or replace with --overwrite")
    import keras

    from x3d_tf.modeling.folded import fold

    network = fold(source.model, batch=batch)
    spec = keras.InputSpec(shape=network.input_shape, dtype="uint8", name="clips")
    for format_name in formats:
        with _scratch_folder(folder / source.name) as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations within Keras' exporters
            path = scratch / f"{source.name}{SUFFIXES[format_name][-1]}"
            tell(f"converting to {folder / path.name}")
            try:
                network.export(str(path), verbose=False, format=format_name, input_signature=[spec])
                _FINISHERS[format_name](path, source, batch)
            except ImportError as error:  # an installed package is broken, or Keras requires another one
                reason, install = " ".join(str(error).split()), f"pip install 'x3d_tf[{format_name}]'"
                raise UserError(f"--formats={format_name} failed: {reason}; {install}") from error
            for suffix in SUFFIXES[format_name]:
                path.with_suffix(suffix).replace(folder / f"{source.name}{suffix}")
    return outputs


@contextmanager
def _scratch_folder(output: Path) -> Iterator[Path]:
    """Yields a hidden folder beside the output, which is deleted at the end."""
    partial = temporary_path(output)
    new = [folder for folder in output.parents if not folder.exists()]  # innermost first
    with os_errors_as_write_error(output):
        try:
            shutil.rmtree(partial, ignore_errors=True)  # left by an export that was killed
            partial.mkdir(parents=True)
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):  # not empty: the export succeeded
                for folder in new:
                    folder.rmdir()


def _finish_onnx(path: Path, source: "ExportableModel", batch: int | None) -> None:
    """Names the output and the dynamic batch dimension, and adds the labels and the model card."""
    import onnx

    model = onnx.load(path)
    (output,) = model.graph.output
    for node in model.graph.node:
        node.output[:] = ["probabilities" if name == output.name else name for name in node.output]
    output.name = "probabilities"
    for tensor in (*model.graph.input, output):
        clips = tensor.type.tensor_type.shape.dim[0]
        if not clips.HasField("dim_value"):
            clips.dim_param = "N"
    onnx.helper.set_model_props(model, _metadata(source, batch))
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _finish_openvino(path: Path, source: "ExportableModel", batch: int | None) -> None:
    """Removes the extra outputs, names the remaining one, and adds the labels and the model card."""
    import openvino

    model = openvino.Core().read_model(path)
    probabilities = model.outputs[0]
    probabilities.tensor.set_names({"probabilities"})
    model = openvino.Model([probabilities], model.get_parameters(), source.name)
    for name, text in _metadata(source, batch).items():
        model.set_rt_info(text, ["x3d_tf", name])
    finished = path.with_name("finished.xml")  # the original file is still memory-mapped
    openvino.serialize(model, str(finished))
    for suffix in SUFFIXES["openvino"]:
        finished.with_suffix(suffix).replace(path.with_suffix(suffix))


def _metadata(source: "ExportableModel", batch: int | None) -> dict[str, str]:
    return {"labels": "\n".join(source.class_names), "card": json.dumps(source.card(batch), ensure_ascii=False)}


_FINISHERS: dict[str, Any] = {"onnx": _finish_onnx, "openvino": _finish_openvino}

if __name__ == "__main__":
    define_flags()
    commands.run(main)
