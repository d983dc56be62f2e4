"""Prints the computational cost of X3D and EfficientNet3D networks next to the paper's figures.

All published networks:
  python -m x3d_tf.complexity

One network, with a table of its layers; bindings change any setting:
  python -m x3d_tf.complexity --gin_file=gin/x3d_s.gin --gin_bindings='Expansion.gamma_b=1.5' --layers

The paper's tables, with our costs beside the printed ones, and the steps of its expansion:
  python -m x3d_tf.complexity --paper

What a training run will need: size of the records, steps, reads per second, decoder cores and hours, each figure with
its source. The speed of a device is your own measurement, such as the column clips_per_second in history.csv:
  python -m x3d_tf.complexity --plan --gin_file=gin/kinetics400/x3d_m.gin --devices=8 --clips_per_second=150

One GMAC is 1e9 multiply-accumulates. Counted per clip are convolutions, squeeze-excitation and fully connected layers;
batch norm and activations are not. Parameters are counted in two ways: all trainable ones, and the paper's convention,
which excludes batch norm and the biases of squeeze-excitation and adds a bias to fc1."""

from collections.abc import Sequence
from dataclasses import replace

from absl import flags

from x3d_tf import commands, gin_config
from x3d_tf.errors import UserError
from x3d_tf.evaluation.paper_tables import EFFICIENTNET_NOTE, paper_tables
from x3d_tf.modeling.architecture import ModelOptions
from x3d_tf.modeling.cost import Cost, cost, layer_costs
from x3d_tf.modeling.expansion import EFFICIENTNETS, VARIANTS, Expansion, Variant, name_of
from x3d_tf.search.replay import path_table
from x3d_tf.training.planning import Needs, Speed, plan_lines

FLAGS = flags.FLAGS
_VARIANTS = VARIANTS | EFFICIENTNETS
_OF_PLAN = ("devices", "clips_per_second", "device_tflops")


def define_flags() -> None:
    """Defines the flags of this command."""
    gin_config.define_flags(required=False)
    flags.DEFINE_bool(
        "paper", False, "Print the paper's tables and expansion path instead, with the costs counted here."
    )
    flags.DEFINE_bool("layers", False, "Also print a table of the layers of each network.")
    flags.DEFINE_integer(
        "num_classes",
        None,
        "Number of classifier outputs. Defaults to 400, or with --plan to that of the records if they exist.",
        lower_bound=1,
    )
    flags.DEFINE_bool(
        "plan", False, "Print what the training run of --gin_file needs instead, with the source of each figure."
    )
    flags.DEFINE_integer("devices", 1, "For --plan: number of GPUs over all machines.", lower_bound=1)
    flags.DEFINE_float(
        "clips_per_second", None, "For --plan: training clips per second of one device, measured with this network."
    )
    flags.DEFINE_float(
        "device_tflops",
        None,
        "For --plan, instead of --clips_per_second: 1e12 floating-point operations per second that one device sustains "
        "in training steps of such a network, as benchmarks/gpu.py prints them. Not the peak of a data sheet, which "
        "these networks do not reach.",
    )


def main() -> None:
    """Prints the tables that the flags select."""
    if FLAGS.gin_bindings and not FLAGS.gin_file:
        raise UserError("--gin_bindings requires --gin_file, the configuration to change")
    if FLAGS.plan:
        _print_plan()
        return
    given = [f"--{name}" for name in _OF_PLAN if FLAGS[name].present]
    if given:
        raise UserError(f"{', '.join(given)} must not be given without --plan")
    num_classes = FLAGS.num_classes or 400
    if FLAGS.paper:
        if FLAGS.gin_file or FLAGS.layers:
            raise UserError("--paper prints fixed tables; omit --gin_file and --layers")
        print("\n".join([*paper_tables(), "", "Figure 2: the expansion path", *path_table()]))
        return
    if FLAGS.gin_file:
        parsed = gin_config.parse(FLAGS.gin_file, FLAGS.gin_bindings or [])
        networks = [(parsed.config.expansion, parsed.config.model)]
    else:
        networks = [(row.expansion, ModelOptions(family=row.family)) for row in _VARIANTS.values()]
    print("\n".join(variant_table(networks, num_classes)))
    if FLAGS.layers:
        for expansion, options in networks:
            print("\n" + "\n".join(layer_table(expansion, options, num_classes)))


def _print_plan() -> None:
    if not FLAGS.gin_file:
        raise UserError("--plan requires --gin_file, the configuration of the training run")
    if FLAGS.paper or FLAGS.layers:
        raise UserError("--plan prints no tables of networks; omit --paper and --layers")
    speed = Speed(FLAGS.clips_per_second, FLAGS.device_tflops)
    config = gin_config.parse(FLAGS.gin_file, FLAGS.gin_bindings or []).config
    print("\n".join(plan_lines(Needs(config, FLAGS.devices, FLAGS.num_classes), speed)))


def variant_table(networks: Sequence[tuple[Expansion, ModelOptions]], num_classes: int) -> list[str]:
    """Returns the lines of a table with one row per network: our cost, the paper's, and the relative difference."""
    lines = [
        f"{'':12} {'one training clip':^31}   {'one clip, three-crop size':^31}   {'M parameters':^36}",
        f"{'network':12} {'T x S²':>9} {'GMACs':>8} {'paper':>6} {'diff':>6}"
        f"   {'T x S²':>9} {'GMACs':>8} {'paper':>6} {'diff':>6}"
        f"   {'trainable':>9} {'as in the paper':>15} {'paper':>6} {'diff':>6}",
    ]
    for expansion, options in networks:
        lines += _variant_row(expansion, options, num_classes)
    has_efficientnet = any(options.family != "x3d" for _, options in networks)
    return [*lines, EFFICIENTNET_NOTE] if has_efficientnet else lines


def _variant_row(expansion: Expansion, options: ModelOptions, num_classes: int) -> list[str]:
    name, clip = name_of(expansion, options.family), expansion.clip
    is_unchanged = (options, num_classes) == (ModelOptions(family=options.family), 400)
    published = _VARIANTS.get(name) if is_unchanged else None
    test_clip = replace(clip, size=expansion.test_size)
    count = cost(expansion, num_classes=num_classes, options=options)
    test = cost(expansion, test_clip, num_classes=num_classes, options=options)
    is_short = published is not None and len(name) <= 12
    row = (
        f"{name if is_short else '':12}"
        f" {_shape(clip.frames, clip.size)} {_beside_published(count.macs / 1e9, published, 'macs')}"
        f"   {_shape(clip.frames, test_clip.size)} {_beside_published(test.macs / 1e9, published, 'test_macs')}"
        f"   {count.params / 1e6:9.4f} {_beside_published(count.params_paper / 1e6, published, 'params', width=15)}"
    )
    return [row] if is_short else [name + (f" with {_changes(options)}" if _changes(options) else ""), row]


def _changes(options: ModelOptions) -> str:
    default = ModelOptions(family=options.family)
    return ", ".join(f"{key}={value}" for key, value in vars(options).items() if value != getattr(default, key))


def _shape(frames: int, size: int) -> str:
    return f"{f'{frames} x {size}²':>9}"


def _beside_published(value: float, published: Variant | None, figure: str, width: int = 8) -> str:
    paper = getattr(published, f"published_{figure}") if published else None
    if paper is None:
        return f"{value:{width}.4f} {'-':>6} {'-':>6}"
    return f"{value:{width}.4f} {paper:6.4g} {value / paper - 1:+6.2%}"


def layer_table(expansion: Expansion, options: ModelOptions, num_classes: int) -> list[str]:
    """Returns the lines of a table with one row per layer, for the training clip."""
    rows = layer_costs(expansion, num_classes=num_classes, options=options)
    total, name = sum((row.cost for row in rows), Cost()), name_of(expansion, options.family)
    lines = [f"{name:24} {'T x H x W x C':>20} {'MACs':>16} {'share':>6} {'parameters':>11} {'outputs':>11}"]
    for row in rows:
        shape, count = " x ".join(map(str, row.shape)), row.cost
        lines.append(
            f"{row.name:24} {shape:>20} {count.macs:16,} {count.macs / total.macs:6.1%} {count.params:11,}"
            f" {count.activations:11,}"
        )
    lines.append(f"{'total':24} {'':20} {total.macs:16,} {1:6.1%} {total.params:11,} {total.activations:11,}")
    return lines


if __name__ == "__main__":
    define_flags()
    commands.run(main)
