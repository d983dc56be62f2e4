"""Exports ONNX and OpenVINO files.

  python -m export.onnx --model=runs/mine --output=exported/mine
  python -m export.onnx --model=runs/mine --output=exported/mine --formats=onnx --runtime=openvino --batch=0

The first command writes NAME.onnx, and NAME.xml with NAME.bin, where NAME is the name of the run folder or .keras file.
Input: clips, uint8 (N, T, S, S, 3), RGB. Output: probabilities, float32 (N, classes). A detector also takes boxes,
float32 (N, B, 4), of any number B, and returns scores, float32 (N, B, classes). The batch size N is 1, or the value of
--batch; --batch=0 makes it dynamic. T, S and the number of classes are fixed.
The files contain the class names and the model card: as the metadata properties "labels" and "card" in ONNX, and as
runtime information of the same names under "x3d_tf" in OpenVINO.

The .onnx file has one of two forms, which both runtimes run. --runtime=onnxruntime, the default, writes a channel-wise
3-D convolution as one 2-D convolution per temporal tap, --runtime=openvino as one grouped 3-D convolution. The entry
"onnx" of the card states the form. The .xml file always has the form for OpenVINO.

ONNX requires pip install 'x3d_tf[onnx]', OpenVINO requires pip install 'x3d_tf[openvino]'. Both formats have folded
batch norms. The OpenVINO file is converted from the ONNX graph.

On CPUs with bfloat16, OpenVINO computes in bfloat16 by default, which is faster but changes the third significant digit
of the probabilities. For float32 use compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).
"""

import importlib.util
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from absl import flags

from x3d_tf import commands
from x3d_tf.errors import UserError, require
from x3d_tf.files import commit_file, os_errors_as_write_error, temporary_path
from x3d_tf.modeling.archive import describe
from x3d_tf.runtimes.runners import import_openvino
from x3d_tf.startup import starting_tensorflow
from x3d_tf.terminal import tell

if TYPE_CHECKING:
    from .models import ExportableModel
    from .onnx_parts import Form

FLAGS = flags.FLAGS

Runtime = Literal["onnxruntime", "openvino"]

SUFFIXES = {"onnx": (".onnx",), "openvino": (".bin", ".xml")}  # the last one identifies the artefact
PACKAGES = {"onnx": ("onnx",), "openvino": ("onnx", "openvino")}
# The forms intended for the runtimes.
FORMS: dict[Runtime, "Form"] = {"onnxruntime": "taps", "openvino": "grouped"}


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("model", None, "Run folder, or .keras file saved by this package.", required=True)
    flags.DEFINE_string("output", None, "Folder to write to.", required=True)
    flags.DEFINE_list(
        "formats", ["onnx", "openvino"], "Comma-separated formats to write: onnx, openvino. Defaults to both."
    )
    flags.DEFINE_enum(
        "runtime",
        "onnxruntime",
        get_args(Runtime),
        "Runtime that the .onnx file is intended for; it runs in both. No effect on the .xml file. "
        "Defaults to onnxruntime.",
    )
    flags.DEFINE_integer("batch", 1, "Batch size; 0 makes it dynamic. Defaults to 1.", lower_bound=0)
    flags.DEFINE_bool("overwrite", False, "Replace existing files. Defaults to false.")


def main() -> None:
    """Runs the command."""
    require_formats(FLAGS.formats)
    describe(FLAGS.model)  # errors in the file appear before TensorFlow starts
    with starting_tensorflow():
        from .models import open_model

    tell(f"loading {FLAGS.model}")
    source = open_model(FLAGS.model, inputs=("clip", "boxes"))
    written = export_formats(
        source,
        Path(FLAGS.output),
        FLAGS.formats,
        runtime=FLAGS.runtime,
        batch=FLAGS.batch or None,
        overwrite=FLAGS.overwrite,
    )
    for path in written:
        print(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    if source.inputs == ("clip",):  # export.verify runs classifiers
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
    source: "ExportableModel",
    folder: Path,
    formats: list[str],
    *,
    runtime: Runtime = "onnxruntime",
    batch: int | None = 1,
    overwrite: bool = False,
) -> list[Path]:
    """Writes a model as ONNX and OpenVINO files.

    Files appear when they are complete. An .xml file appears after its .bin file, and a replaced .xml file is deleted
    before, so that the two always belong together.

    Args:
        source: the model, from `open_model`.
        folder: output folder, created if missing.
        formats: list of "onnx" and "openvino".
        runtime: runtime that the .onnx file is intended for; it runs in both.
        batch: batch size; None is dynamic.
        overwrite: whether to replace existing files.

    Returns:
        The written files.

    Raises:
        UserError: a format or the runtime is unknown, or packages are not installed; a file exists and `overwrite` is
            false.
        WriteError: a file cannot be written.
    """
    require_formats(formats)
    require(runtime in FORMS, "runtime", f"be one of {', '.join(FORMS)}", runtime)
    outputs = [folder / f"{source.name}{suffix}" for format_name in formats for suffix in SUFFIXES[format_name]]
    existing = [str(path) for path in outputs if path.exists()]
    if existing and not overwrite:
        raise UserError(f"already exists: {', '.join(existing)}; choose another --output, or replace with --overwrite")
    for format_name in formats:
        with _scratch_folder(folder / source.name) as scratch:
            path = scratch / f"{source.name}{SUFFIXES[format_name][-1]}"
            tell(f"writing {folder / path.name}")
            try:
                _WRITERS[format_name](path, source, runtime, batch)
            except ImportError as error:  # an installed package is broken
                reason, install = " ".join(str(error).split()), f"pip install 'x3d_tf[{format_name}]'"
                raise UserError(f"--formats={format_name} failed: {reason}; {install}") from error
            _publish([path.with_suffix(suffix) for suffix in SUFFIXES[format_name]], folder)
    return outputs


def _publish(partial: list[Path], folder: Path) -> None:
    """Moves the complete files of an artefact to `folder`; the last one identifies the artefact."""
    if len(partial) > 1:
        (folder / partial[-1].name).unlink(missing_ok=True)  # it must not read the new weights
    for path in partial:
        commit_file(path, folder / path.name)


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


def _write_onnx(path: Path, source: "ExportableModel", runtime: Runtime, batch: int | None) -> None:
    import onnx

    from .onnx_parts import onnx_model

    model = onnx_model(source.model, FORMS[runtime], batch=batch)
    onnx.helper.set_model_props(model, _metadata(source, model, "ONNX", runtime))
    onnx.save(model, path)


def _write_openvino(path: Path, source: "ExportableModel", runtime: Runtime, batch: int | None) -> None:
    openvino = import_openvino()
    from openvino.passes import ConstantFolding, Manager

    from .onnx_parts import onnx_model

    graph, core = onnx_model(source.model, FORMS["openvino"], batch=batch), openvino.Core()
    model = core.read_model(graph.SerializeToString())
    passes = Manager()
    passes.register_pass(ConstantFolding())  # sizes that the runtime would otherwise compute when it loads the file
    passes.run_passes(model)
    for name, text in _metadata(source, graph, "OpenVINO", "openvino").items():
        model.set_rt_info(text, ["x3d_tf", name])
    try:
        openvino.save_model(model, path, compress_to_fp16=False)
        core.read_model(path)  # fails if the files are incomplete
    except RuntimeError as error:  # OpenVINO's form of an OSError
        raise OSError(" ".join(str(error).split())) from error


def _metadata(source: "ExportableModel", model: Any, artefact: str, runtime: Runtime) -> dict[str, str]:
    """Returns the class names and the model card, which describes the ONNX graph `model`."""
    from .onnx_parts import OPSET, shapes

    sizes = shapes(model)
    batch = sizes["clips"][0]
    card = {
        **source.card(batch if isinstance(batch, int) else None),
        "artefact": artefact,
        "onnx": {"opset": OPSET, "form": FORMS[runtime], "runtime": runtime, "shapes": sizes},
    }
    return {"labels": "\n".join(source.class_names), "card": json.dumps(card, ensure_ascii=False)}


_WRITERS: dict[str, Any] = {"onnx": _write_onnx, "openvino": _write_openvino}

if __name__ == "__main__":
    define_flags()
    commands.run(main)
