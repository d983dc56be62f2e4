"""How fast is a training step, ours and its peers'?

Ours is the step of `x3d_tf.train`: forward, backward, SGD with Nesterov momentum and L2, under its distribution
strategy. The peers' is the same in PyTorch. The batch stays in memory, and the clips of a step share batch-norm
statistics. Each framework has a process of its own, and in each round each form has its turn: one step that does not
count, then one that is timed. Columns:

  ms/clip    median over the rounds, of a step divided by its clips; then 10th and 90th percentile
  of peak    three times the operations of a forward pass, two for each multiply-add, as a part of what a float32 matrix
             product of NumPy's reaches, which has its turn in each round, too. Forms in fewer bits may exceed it
  speed      how many times as fast as the fastest float32 mode of PyTorch: the median of the rounds' ratios

Forms whose packages are missing say so in their row. Keras' own grouped convolution is so slow that it gets two steps
of one clip.

  python benchmarks/train_step.py
  python benchmarks/train_step.py --networks x3d_s x3d_m --batches 8 --threads 2 --rounds 10 --json=train_step.json
  python benchmarks/train_step.py --forms ours 'torch channels_last_3d' --rounds 5
"""

from command import measure_networks, parser, run
from measuring import Form, Work


def ours(name: str, **settings: object) -> Form:
    """Our step, with settings of `tensorflow_forms.train`: fields of `Execution`, and `options` of the network."""
    return Form(name, "ours", Work("TensorFlow", "tensorflow_forms:train", settings))


def torch(name: str, precision: str = "float32", **settings: object) -> Form:
    """A mode of PyTorch's."""
    work = Work("PyTorch", "torch_forms:train", {"precision": precision, **settings})
    return Form(name, "peers", work, reference=precision == "float32")


# A further form is a line here.
FORMS = (
    ours("ours"),
    ours("ours, recomputing activations", recompute="activations"),
    ours("ours, recomputing blocks", recompute="blocks"),
    ours("ours bfloat16", precision="bfloat16"),
    torch("torch eager"),
    torch("torch channels_last_3d", layout="channels_last_3d"),
    torch("torch compile", compiled=True),
    torch("torch compile channels_last_3d", layout="channels_last_3d", compiled=True),
    torch("torch bf16 channels_last_3d", "bfloat16", layout="channels_last_3d"),
    # in a process of its own: XLA compiles it, and it takes long
    Form("Keras Conv3D(groups=C)", "ours", Work("Keras", "tensorflow_forms:train", {"grouped": True}), slow=True),
)


def main() -> None:
    """Measures, prints the tables and writes the JSON file."""
    settings = parser(__doc__, FORMS, networks=["x3d_s"], batches=[8], rounds=10, json="train_step.json").parse_args()
    measure_networks(FORMS, settings, passes=3)


if __name__ == "__main__":
    run(main)
