"""Measures the speed of a training step, ours and the peers'.

Ours is the step of `x3d_tf.train`: forward pass, backward pass, and SGD with Nesterov momentum and L2, under the
trainer's distribution strategy. The peers' step is the same in PyTorch. The batch stays in memory, and all clips of a
step share batch-norm statistics. Each framework runs in a separate process. In each round, every implementation makes
one warm-up step and one timed step. Columns:

  ms/clip    median over the rounds of the time per clip, followed by the 10th and 90th percentile
  of peak    floating-point operations per second (two per multiply-add, three times those of a forward pass), relative
             to a float32 matrix product in NumPy that is also timed in each round. Implementations with lower precision
             may exceed 100 %
  speed      speed relative to the fastest float32 mode of PyTorch: the median of the ratios within each round

If the packages of an implementation are missing, its row says so. Keras' grouped convolution is very slow and therefore
measured with two steps of one clip.

  python benchmarks/train_step.py
  python benchmarks/train_step.py --networks x3d_s x3d_m --batches 8 --threads 2 --rounds 10 --json=train_step.json
  python benchmarks/train_step.py --forms ours 'torch channels_last_3d' --rounds 5
"""

from command import measure_networks, parser, run
from measuring import Implementation, Job


# No implementation is marked exact: with dropout, losses differ.
def ours(name: str, **settings: object) -> Implementation:
    """Returns our step; the settings are keyword arguments of `tensorflow_networks.train`."""
    return Implementation(name, "ours", Job("TensorFlow", "tensorflow_networks:train", settings), exact=False)


def torch(name: str, precision: str = "float32", **settings: object) -> Implementation:
    """Returns a mode of PyTorch."""
    job = Job("PyTorch", "torch_networks:train", {"precision": precision, **settings})
    return Implementation(name, "peers", job, exact=False, reference=precision == "float32")


# To add an implementation, add a line here.
IMPLEMENTATIONS = (
    ours("ours"),
    ours("ours, recomputing activations", recompute="activations"),
    ours("ours, recomputing blocks", recompute="blocks"),
    ours("ours bfloat16", precision="bfloat16"),
    torch("torch eager"),
    torch("torch channels_last_3d", layout="channels_last_3d"),
    torch("torch compile", compiled=True),
    torch("torch compile channels_last_3d", layout="channels_last_3d", compiled=True),
    torch("torch bf16 channels_last_3d", "bfloat16", layout="channels_last_3d"),
    # In a separate process, because it is compiled by XLA and slow.
    Implementation(
        "Keras Conv3D(groups=C)",
        "ours",
        Job("Keras", "tensorflow_networks:train", {"grouped": True}),
        exact=False,
        slow=True,
    ),
)


def main() -> None:
    """Measures, prints the tables and writes the JSON file."""
    arguments = parser(__doc__, IMPLEMENTATIONS, networks=["x3d_s"], batches=[8], rounds=10, json="train_step.json")
    measure_networks(IMPLEMENTATIONS, arguments.parse_args(), passes=3)


if __name__ == "__main__":
    run(main)
