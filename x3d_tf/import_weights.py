"""Imports X3D weights from PyTorch checkpoints, and exports models to them.

Convert a checkpoint of PySlowFast, pytorchvideo (including its mobile form) or mmaction2 to a model file. The format is
recognised by the weight names. x3d_m_k400.tensors.txt, beside the model file, lists the source and destination of every
tensor:
  python -m x3d_tf.import_weights x3d_m.pyth --variant=x3d_m --output=x3d_m_k400.keras
  python -m x3d_tf.predict --model=x3d_m_k400.keras party.mp4

Replace the classifier by a newly initialised one for 10 classes:
  python -m x3d_tf.import_weights x3d_m.pyth --variant=x3d_m --num_classes=10 --keep_head=false --output=backbone.keras

Export a run folder or a model file to a state dict that PyTorch loads with strict=True:
  python -m x3d_tf.import_weights runs/mine --to=pytorchvideo --output=mine.pyth

PyTorch is not required, and no code in the checkpoint is executed. The network may be stored under any key of the
checkpoint (model_state_dict, net), and its weight names may have any prefix (module., model., _orig_mod.), as training
programs write them. Exactly one network in the file must match --variant.

A classifier with 400 outputs gets the class names of Kinetics-400 in alphabetical order, which PySlowFast,
pytorchvideo and mmaction2 use. Use --classes for other names.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from x3d_tf import commands
from x3d_tf.data.class_lists import kinetics_classes, read_classes
from x3d_tf.errors import UserError, require
from x3d_tf.files import atomic_write
from x3d_tf.modeling.architecture import ModelOptions
from x3d_tf.modeling.archive import require_classifier
from x3d_tf.modeling.expansion import VARIANTS
from x3d_tf.modeling.pytorch.state_dicts import MismatchError, StateDict, read_state_dict
from x3d_tf.modeling.pytorch.weight_names import NAMINGS
from x3d_tf.startup import starting_tensorflow
from x3d_tf.terminal import tell
from x3d_tf.text import binding_flag, counted

if TYPE_CHECKING:
    from x3d_tf.modeling.pytorch.convert import Report

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_enum("variant", None, list(VARIANTS), "X3D variant of the checkpoint. Required to import.")
    flags.DEFINE_string("output", None, "File to write: a .keras file, or any name with --to. Required.", required=True)
    flags.DEFINE_integer(
        "num_classes",
        None,
        "Number of classifier outputs. Defaults to that of the checkpoint.",
        lower_bound=1,
    )
    flags.DEFINE_bool(
        "keep_head",
        True,
        "Import the classifier; false initialises a new one with --num_classes outputs.",
    )
    flags.DEFINE_enum(
        "head_pool",
        None,
        ["global", "fixed_probabilities", "fixed_logits"],
        "Pooling of the head for clips larger than the training crop: global, over all positions; or fixed, over "
        "windows of the training size, whose probabilities or logits are averaged. Defaults to that of the source.",
    )
    flags.DEFINE_string(
        "classes",
        None,
        "Text file of class names, one per line. Defaults to the names of Kinetics-400 for 400 outputs.",
    )
    flags.DEFINE_enum(
        "to",
        None,
        list(NAMINGS),
        "Library whose weight names the exported PyTorch checkpoint uses. Exports instead of importing.",
    )
    flags.DEFINE_bool("overwrite", False, "Replace an existing output.")


def main(paths: list[str]) -> None:
    """Imports or exports weights."""
    require(len(paths) == 1, "the command line", "name one checkpoint, or one model with --to", paths)
    source, output = Path(paths[0]), Path(FLAGS.output)
    require(not output.is_dir(), "--output", f"be a file, but {output} is a folder")
    for path in (output, tensor_table_path(output)):
        commands.require_free(path, FLAGS.overwrite, "another --output")
    _check_flags(output)
    if FLAGS.to:
        require_classifier(source)
        _to_pytorch(source, output)
        return
    if not source.is_file():
        raise UserError(f"{source}: no such checkpoint")
    _from_pytorch(source, output)


def tensor_table_path(output: Path) -> Path:
    """Returns the path of an output's list of tensors: `x3d_s.tensors.txt` for `x3d_s.keras`."""
    return output.with_suffix(".tensors.txt")


def _check_flags(output: Path) -> None:
    if FLAGS.to:
        for name in ("variant", "num_classes", "head_pool", "classes"):
            require(
                FLAGS[name].value is None,
                f"--{name}",
                "not be given with --to, which exports the model unchanged",
                FLAGS[name].value,
            )
        require(
            FLAGS.keep_head, "--keep_head", "not be given with --to, which exports the model unchanged", FLAGS.keep_head
        )
        return
    require(FLAGS.variant is not None, "--variant", f"be given to import a checkpoint: one of {', '.join(VARIANTS)}")
    require(output.suffix == ".keras", "--output", "end in .keras", FLAGS.output)
    sized = FLAGS.keep_head or FLAGS.num_classes is not None
    require(sized, "--num_classes", "be given with --keep_head=false: the number of outputs of the new classifier")


def _from_pytorch(checkpoint: Path, output: Path) -> None:
    names = read_classes(Path(FLAGS.classes)) if FLAGS.classes else None
    tell(f"reading {checkpoint}")
    state = _read(checkpoint, output)
    count = state.outputs(FLAGS.num_classes) if FLAGS.keep_head else FLAGS.num_classes
    if names:
        require(len(names) == count, f"--classes={FLAGS.classes}", f"name {counted(count, 'class')}", len(names))
    with starting_tensorflow():
        from x3d_tf.modeling.portable import portable
        from x3d_tf.modeling.pytorch.convert import import_state_dict
        from x3d_tf.modeling.saving import save

    tell(f"building {FLAGS.variant}")
    model, report = import_state_dict(
        state,
        FLAGS.variant,
        num_classes=FLAGS.num_classes,
        keep_head=FLAGS.keep_head,
        head_pool=FLAGS.head_pool,
    )
    print(report.summary())
    if names is None:
        names = _default_names(count)
    tell(f"writing {output}")
    output.parent.mkdir(parents=True, exist_ok=True)
    save(portable(model, names), output, overwrite=True)
    _write_table(report, output)
    print("To fine-tune it on your own records (python -m x3d_tf.build_records):")
    print(_training_command(output, FLAGS.variant, model.options))


def _read(checkpoint: Path, output: Path) -> StateDict:
    """Reads the weights of a checkpoint, or writes all its mismatches to a file beside the output."""
    try:
        return read_state_dict(checkpoint, FLAGS.variant, keep_head=FLAGS.keep_head)
    except MismatchError as error:
        table = output.with_suffix(".mismatches.txt")  # not that of the tensors, which would block the next attempt
        table.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(table, "".join(f"{line}\n" for line in error.mismatches).encode("utf-8", "backslashreplace"))
        raise UserError(f"{error}. {table} lists all of them") from None


def _default_names(count: int) -> tuple[str, ...]:
    """Returns the class names of Kinetics-400 or, for another number of outputs or a new classifier, numbers."""
    if FLAGS.keep_head and count == len(kinetics_classes()):
        print("classes: 400, assumed to be those of Kinetics-400; use --classes for other names")
        return kinetics_classes()
    print(f"classes: {count}, numbered from 0; use --classes to name them")
    return tuple(map(str, range(count)))


def _write_table(report: "Report", output: Path) -> None:
    atomic_write(tensor_table_path(output), f"{report}\n".encode("utf-8", "backslashreplace"))
    print(f"written: {output} and the list of its tensors, {tensor_table_path(output)}")


def _training_command(model: Path, variant: str, options: ModelOptions) -> str:
    """Returns the command that fine-tunes an imported model, with the model's own options."""
    bindings = {"TrainConfig.init": str(model), "DatasetSpec.records": "data/mine"}
    for name, default in vars(ModelOptions()).items():
        if getattr(options, name) != default:
            bindings[f"ModelOptions.{name}"] = getattr(options, name)
    lines = [f"  python -m x3d_tf.train --gin_file=gin/{variant}.gin --gin_file=gin/data/records.gin"]
    lines += ["--gin_file=gin/finetune.gin --workdir=runs/mine"]
    lines += [binding_flag(name, value) for name, value in bindings.items()]
    return " \\\n    ".join(lines)


def _to_pytorch(model: Path, output: Path) -> None:
    with starting_tensorflow():
        from x3d_tf.modeling.pytorch.convert import export_checkpoint
        from x3d_tf.modeling.saving import load_classifier

    tell(f"loading {model}")
    network = load_classifier(model)
    output.parent.mkdir(parents=True, exist_ok=True)
    report = export_checkpoint(network, output, FLAGS.to)
    print(report.summary())
    _write_table(report, output)


if __name__ == "__main__":
    define_flags()
    commands.run(main, positional=True)
