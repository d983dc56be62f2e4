"""Brings X3D weights over from PyTorch, and back.

A checkpoint of PySlowFast, pytorchvideo (also its mobile form) or mmaction2, recognised by its names, becomes a model
file, and x3d_m_k400.tensors.txt beside it lists where every tensor went. PyTorch is not needed, and nothing in the
checkpoint is executed:
  python -m x3d_tf.import_weights x3d_m.pyth --variant=x3d_m --output=x3d_m_k400.keras
  python -m x3d_tf.predict --model=x3d_m_k400.keras party.mp4

With a fresh classifier of 10 classes:
  python -m x3d_tf.import_weights x3d_m.pyth --variant=x3d_m --num_classes=10 --keep_head=false --output=backbone.keras

The way back, from a run folder or a model file to a state dict that loads there with strict=True:
  python -m x3d_tf.import_weights runs/mine --to=pytorchvideo --output=mine.pyth

The network may lie under any key of the file, and have any prefix before its names, as training programs write it
(model_state_dict, net; module., model., _orig_mod.), as long as one network in the file fits --variant.

The outputs of a classifier of 400 classes get the names of Kinetics-400, which all of these implementations sort by
letters; --classes gives others.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from x3d_tf import commands
from x3d_tf.data.build.sources import kinetics_classes, read_classes
from x3d_tf.errors import UserError, require
from x3d_tf.files import atomic_write
from x3d_tf.modeling.architecture import ModelOptions
from x3d_tf.modeling.archive import require_classifier
from x3d_tf.modeling.expansion import VARIANTS
from x3d_tf.modeling.pytorch.state_dicts import read_state_dict
from x3d_tf.modeling.pytorch.weight_names import NAMINGS
from x3d_tf.startup import starting_tensorflow
from x3d_tf.terminal import tell
from x3d_tf.text import binding_flag, counted

if TYPE_CHECKING:
    from x3d_tf.modeling.pytorch.convert import Report

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_enum("variant", None, list(VARIANTS), "The network that the checkpoint is of.")
    flags.DEFINE_string("output", None, "The file to write: .keras, or with --to any name.", required=True)
    flags.DEFINE_integer("num_classes", None, "Outputs; the checkpoint's unless given.", lower_bound=1)
    flags.DEFINE_bool("keep_head", True, "Take the classifier over; false makes a fresh one of --num_classes.")
    flags.DEFINE_enum(
        "head_pool",
        None,
        ["global", "fixed_probabilities", "fixed_logits"],
        "What the head does with clips larger than the training crop; as the source unless given.",
    )
    flags.DEFINE_string("classes", None, "Text file of the names of the outputs, one a line.")
    flags.DEFINE_enum("to", None, list(NAMINGS), "Write a PyTorch checkpoint with these names instead of reading one.")
    flags.DEFINE_bool("overwrite", False, "Replace an output that is there already.")


def main(paths: list[str]) -> None:
    """Converts what the flags say."""
    require(len(paths) == 1, "the command line", "name one checkpoint, or with --to one model", paths)
    source, output = Path(paths[0]), Path(FLAGS.output)
    require(not output.is_dir(), "--output", "be a file", f"the folder {output}")
    for path in (output, table_of(output)):
        if path.exists() and not FLAGS.overwrite:
            raise UserError(f"{path} exists; give another --output, or replace it with --overwrite")
    _check_flags(output)
    if FLAGS.to:
        require_classifier(source)
        _to_pytorch(source, output)
        return
    if not source.is_file():
        raise UserError(f"{source}: no such checkpoint")
    _from_pytorch(source, output)


def table_of(output: Path) -> Path:
    """The list of tensors beside an output: `x3d_s.tensors.txt` of `x3d_s.keras`."""
    return output.with_suffix(".tensors.txt")


def _check_flags(output: Path) -> None:
    if FLAGS.to:
        for name in ("variant", "num_classes", "head_pool", "classes"):
            require(
                FLAGS[name].value is None,
                f"--{name}",
                "not stand beside --to, which takes the model as it is",
                FLAGS[name].value,
            )
        require(
            FLAGS.keep_head, "--keep_head", "not stand beside --to, which takes the model as it is", FLAGS.keep_head
        )
        return
    require(FLAGS.variant is not None, "--variant", f"name the checkpoint's network: {', '.join(VARIANTS)}", "nothing")
    require(output.suffix == ".keras", "--output", "end in .keras", FLAGS.output)
    head = FLAGS.keep_head or FLAGS.num_classes is not None
    require(head, "--keep_head=false", "come with --num_classes, for the fresh classifier", "it alone")


def _from_pytorch(checkpoint: Path, output: Path) -> None:
    names = read_classes(Path(FLAGS.classes)) if FLAGS.classes else None
    tell(f"reading {checkpoint}")
    state = read_state_dict(checkpoint, FLAGS.variant, keep_head=FLAGS.keep_head)
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
    if names:
        require(
            len(names) == model.num_classes, FLAGS.classes, f"name {counted(model.num_classes, 'class')}", len(names)
        )
    print(report.summary())
    if names is None and not FLAGS.keep_head:
        names = tuple(map(str, range(model.num_classes)))  # nothing yet that names could mean
    elif names is None and model.num_classes == len(kinetics_classes()):
        names = kinetics_classes()
        print("classes: 400, so they are named as those of Kinetics-400; --classes gives other names")
    tell(f"writing {output}")
    output.parent.mkdir(parents=True, exist_ok=True)
    save(portable(model, names), output, overwrite=True)
    _write_table(report, output)
    print("To train it further, on records of your own (python -m x3d_tf.build_records):")
    print(_training(output, FLAGS.variant, model.options))


def _write_table(report: "Report", output: Path) -> None:
    atomic_write(table_of(output), f"{report}\n".encode("utf-8", "backslashreplace"))
    print(f"written: {output}, and the list of its tensors, {table_of(output)}")


def _training(model: Path, variant: str, options: ModelOptions) -> str:
    """The command that starts from an imported model, with the options that it has."""
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
