"""Writes ONNX and OpenVINO files, by Keras' own exporters.

  python -m export.onnx --model=runs/mine --output=exported/mine
  python -m export.onnx --model=runs/mine --output=exported/mine --formats=onnx --batch=0

The first writes NAME.onnx, and NAME.xml with NAME.bin, where NAME is the run folder's or the .keras file's: clips,
uint8 (N, T, S, S, 3), RGB, to probabilities, float32 (N, classes). N is 1, another --batch, or with 0 any, which costs
OpenVINO much of its speed.
Class names and the model card go with them: as metadata "labels" and "card" of ONNX, and as runtime information of
those names under "x3d_tf" of OpenVINO.

ONNX requires pip install 'x3d_tf[onnx]', OpenVINO pip install 'x3d_tf[openvino]'. Both files are of the network's
folded inference form. What Keras' exporters make of other forms does not do: of a normalisation layer the ONNX one
makes two further inputs, its mean and its variance, which a caller would have to feed. And to OpenVINO's graph every
swish adds an output, which is taken off here.

On CPUs that have bfloat16 OpenVINO computes in it unless it is told otherwise: faster, and with probabilities that are
off in the third digit. compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}) tells it.
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
    from .models import Source

FLAGS = flags.FLAGS

SUFFIXES = {"onnx": (".onnx",), "openvino": (".bin", ".xml")}  # .xml, by which OpenVINO's are found, comes last
PACKAGES = {"onnx": ("onnx", "tf2onnx"), "openvino": ("openvino", "scipy")}  # that Keras' exporters import


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("model", None, "A run folder, or a .keras file that this package saved.", required=True)
    flags.DEFINE_string("output", None, "Folder to write to.", required=True)
    flags.DEFINE_list("formats", ["onnx", "openvino"], "What to write: onnx, openvino.")
    flags.DEFINE_integer("batch", 1, "Clips of a call; 0 is any number.", lower_bound=0)
    flags.DEFINE_bool("force", False, "Replace files that are there already.")


def main() -> None:
    """Exports what the flags say."""
    require_formats(FLAGS.formats)
    require_classifier(FLAGS.model)
    with starting_tensorflow():
        from .models import open_model

    tell(f"loading {FLAGS.model}")
    written = export_formats(
        open_model(FLAGS.model), Path(FLAGS.output), FLAGS.formats, batch=FLAGS.batch or None, force=FLAGS.force
    )
    for path in written:
        print(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    print(
        "To hold them against the model, on real videos:\n"
        f"  python -m {__spec__.parent}.verify --model={FLAGS.model} --artefacts={FLAGS.output} --clips=FOLDER"
    )


def require_formats(formats: list[str]) -> None:
    """Raises UserError for an unknown format, or one whose packages are not installed."""
    known = ", ".join(SUFFIXES)
    require(bool(formats) and set(formats) <= set(SUFFIXES), "--formats", f"be of {known}", ",".join(formats))
    for form in formats:
        missing = [name for name in PACKAGES[form] if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"--formats={form} needs {', '.join(missing)}, not installed: pip install 'x3d_tf[{form}]'")


def export_formats(
    source: "Source", folder: Path, formats: list[str], *, batch: int | None = 1, force: bool = False
) -> list[Path]:
    """Writes a model in other formats, each whole or not at all.

    Args:
        source: from `open_model`.
        folder: made where it is missing.
        formats: of "onnx" and "openvino".
        batch: clips of a call; None is any number.
        force: whether files that are there may be replaced.

    Returns:
        The files.

    Raises:
        UserError: an unknown format, or one whose packages are not installed; a file that may not be replaced.
        WriteError: a file cannot be written.
    """
    require_formats(formats)
    wanted = [folder / f"{source.name}{suffix}" for form in formats for suffix in SUFFIXES[form]]
    taken = [str(path) for path in wanted if path.exists()]
    if taken and not force:
        raise UserError(f"there already: {', '.join(taken)}; give another --output, or replace with --force")
    import keras

    from x3d_tf.modeling.folded import deployed

    app = deployed(source.model, batch=batch)
    spec = keras.InputSpec(shape=app.input_shape, dtype="uint8", name="clips")
    for form in formats:
        with _scratch(folder / source.name) as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Keras' exporters do inside
            path = scratch / f"{source.name}{SUFFIXES[form][-1]}"
            tell(f"converting to {folder / path.name}")
            try:
                app.export(str(path), verbose=False, format=form, input_signature=[spec])
                _FINISHERS[form](path, source, batch)
            except ImportError as error:  # of a package that is there and cannot be imported, or that is new to Keras
                told = " ".join(str(error).split())
                raise UserError(f"--formats={form} fails: {told}; pip install 'x3d_tf[{form}]'") from error
            for suffix in SUFFIXES[form]:
                path.with_suffix(suffix).replace(folder / f"{source.name}{suffix}")
    return wanted


@contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    """A hidden folder beside what is to be written."""
    partial = temporary_path(place)
    new = [folder for folder in place.parents if not folder.exists()]  # innermost first
    with os_errors_as_write_error(place):
        try:
            shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
            partial.mkdir(parents=True)
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):  # not empty: what was to be written is there
                for folder in new:
                    folder.rmdir()


def _finish_onnx(path: Path, source: "Source", batch: int | None) -> None:
    """Gives the output and the open batch their names, and puts labels and card in."""
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
    onnx.helper.set_model_props(model, _facts(source, batch))
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _finish_openvino(path: Path, source: "Source", batch: int | None) -> None:
    """Takes further outputs off, names the one that is left, and puts labels and card in."""
    import openvino

    model = openvino.Core().read_model(path)
    probabilities = model.outputs[0]
    probabilities.tensor.set_names({"probabilities"})
    model = openvino.Model([probabilities], model.get_parameters(), source.name)
    for name, text in _facts(source, batch).items():
        model.set_rt_info(text, ["x3d_tf", name])
    finished = path.with_name("finished.xml")  # what was read is still mapped
    openvino.serialize(model, str(finished))
    for suffix in SUFFIXES["openvino"]:
        finished.with_suffix(suffix).replace(path.with_suffix(suffix))


def _facts(source: "Source", batch: int | None) -> dict[str, str]:
    return {"labels": "\n".join(source.class_names), "card": json.dumps(source.card(batch), ensure_ascii=False)}


_FINISHERS: dict[str, Any] = {"onnx": _finish_onnx, "openvino": _finish_openvino}

if __name__ == "__main__":
    define_flags()
    commands.run(main)
