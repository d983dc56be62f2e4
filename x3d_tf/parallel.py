"""Clips in parallel on CPUs: threads of operations, and slices of a batch."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from x3d_tf.errors import require
from x3d_tf.modeling.kernels import active_kernels
from x3d_tf.processes import available_cpus


def map_clips_in_parallel(network: Callable[[Any], Any], chains: int | None = None) -> Callable[[Any], Any]:
    """Makes a function of one clip one of many, which runs several of them side by side.

    On a CPU the operations of one clip are too small to gain from a second thread, and a whole batch does not fit its
    caches. Clips that need not wait for each other keep each core busy with data of its own. They run side by side
    inside a `tf.function` only.

    Args:
        network: from clips (1, T, H, W, 3), or a structure of tensors of one clip, to float32 (1, ...).
        chains: clips that run at a time, fixed when the function is traced; as many as there are cores unless given.

    Returns:
        The function from clips (N, T, H, W, 3), or such a structure of N, to float32 (N, ...), of any N, static or
        open.

    Raises:
        ValueError: `chains` below 1.
    """
    require(chains is None or chains >= 1, "chains", "be at least 1", chains)

    def call(clips: Any) -> Any:
        if tf.nest.flatten(clips)[0].shape[0] == 1:
            return network(clips)
        return tf.map_fn(
            lambda clip: network(tf.nest.map_structure(lambda part: part[None], clip))[0],
            clips,
            parallel_iterations=chains or _cores(),
            fn_output_signature=tf.float32,
        )

    return call


def optimize_for_device(network: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of any number of clips in its fast form: `map_clips_in_parallel` on CPUs, itself on GPUs."""
    return map_clips_in_parallel(network) if active_kernels() == "cpu" else network


def use_single_threaded_ops(side_by_side: int) -> None:
    """Has TensorFlow run operations of clips that are side by side on one thread each, which is faster on CPUs.

    To be called before TensorFlow computes anything; does nothing later, where there is a GPU, or where the environment
    sets `TF_NUM_INTRAOP_THREADS`.

    Args:
        side_by_side: parts that do not wait for each other. Where they are fewer than the cores, which would leave some
            idle, operations keep their threads.
    """
    if active_kernels() == "cpu" and side_by_side >= _cores() and "TF_NUM_INTRAOP_THREADS" not in os.environ:
        with contextlib.suppress(RuntimeError):  # it has computed something
            tf.config.threading.set_intra_op_parallelism_threads(1)


def num_batch_slices(clips: int | None, group: int) -> int:
    """Into how many equal parts to take a training batch so that they run side by side: as many as there are cores.

    Args:
        clips: of the batch; None, which makes one part, where it is open.
        group: clips of a batch-norm group, which share a part or make several.
    """
    if clips is None or active_kernels() != "cpu":
        return 1
    group = min(clips, group)
    for parts in range(min(_cores(), clips), 1, -1):
        part = clips // parts
        if clips % parts == 0 and (group % part == 0 or part % group == 0):
            return parts
    return 1


def _cores() -> int:
    """How many operations TensorFlow runs at a time."""
    return tf.config.threading.get_inter_op_parallelism_threads() or available_cpus()
