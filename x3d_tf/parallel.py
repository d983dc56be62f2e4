"""Parallel processing of clips on CPUs: op threads and batch slices."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from x3d_tf.errors import require
from x3d_tf.modeling.kernels import active_kernels
from x3d_tf.processes import available_cpus


def map_clips_in_parallel(network: Callable[[Any], Any], chains: int | None = None) -> Callable[[Any], Any]:
    """Maps a single-clip function over a batch, several clips in parallel.

    On a CPU the ops of one clip are too small to benefit from a second thread, and a complete batch does not fit into
    the caches. Independent clips keep every core busy with its own data. They only run in parallel inside a
    `tf.function`.

    Args:
        network: function from clips of shape (1, T, H, W, 3), or a structure of tensors for one clip, to float32
            (1, ...).
        chains: number of clips processed in parallel, fixed when the function is traced. Defaults to the number of
            cores.

    Returns:
        The function from clips of shape (N, T, H, W, 3), or such a structure for N clips, to float32 (N, ...). N may be
        unknown when the function is traced.

    Raises:
        ValueError: `chains` is less than 1.
    """
    require(chains is None or chains >= 1, "chains", "be at least 1", chains)

    def call(clips: Any) -> Any:
        if tf.nest.flatten(clips)[0].shape[0] == 1:
            return network(clips)
        return tf.map_fn(
            lambda clip: network(tf.nest.map_structure(lambda tensor: tensor[None], clip))[0],
            clips,
            parallel_iterations=chains or _num_cores(),
            fn_output_signature=tf.float32,
        )

    return call


def optimize_for_device(network: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns the faster form of a batch function: `map_clips_in_parallel` on CPUs, unchanged on GPUs."""
    return map_clips_in_parallel(network) if active_kernels() == "cpu" else network


def use_single_threaded_ops(num_parallel: int) -> None:
    """Runs each TensorFlow op on a single thread, which is faster on CPUs when clips are processed in parallel.

    Must be called before TensorFlow computes anything. Has no effect later, with a GPU, or if the environment variable
    `TF_NUM_INTRAOP_THREADS` is set.

    Args:
        num_parallel: number of independent clips or batch slices. If it is less than the number of cores, ops keep
            their threads so that no core is idle.
    """
    if active_kernels() == "cpu" and num_parallel >= _num_cores() and "TF_NUM_INTRAOP_THREADS" not in os.environ:
        with contextlib.suppress(RuntimeError):  # TensorFlow is already initialised
            tf.config.threading.set_intra_op_parallelism_threads(1)


def divide_devices(number: int, processes: int, cores: int | None = None) -> None:
    """Gives this process its share of the CPU cores, and one GPU if there are several processes.

    GPU memory is allocated as needed, because processes may share a GPU. Must be called before TensorFlow computes
    anything; has no effect later.

    Args:
        number: number of this process, from 0.
        processes: number of processes.
        cores: number of threads, for results that do not depend on the number of cores of the machine. Defaults to an
            equal share of the cores if there are several processes, and to all of them for a single one.
    """
    gpus = tf.config.list_physical_devices("GPU")
    with contextlib.suppress(RuntimeError):  # TensorFlow is already initialised
        if processes > 1 or cores:
            cores = cores or max(1, available_cpus() // processes)
            tf.config.threading.set_inter_op_parallelism_threads(cores)
            tf.config.threading.set_intra_op_parallelism_threads(cores)
        if processes > 1:
            gpus = gpus[number % len(gpus) :][:1] if gpus else []
            tf.config.set_visible_devices(gpus, "GPU")
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)


def num_batch_slices(clips: int | None, group: int) -> int:
    """Returns the number of equal slices of a training batch to process in parallel, at most the number of cores.

    Args:
        clips: batch size, or None if it is unknown, which gives one slice.
        group: clips per batch-norm group. A slice must hold complete groups, or a group complete slices.
    """
    if clips is None or active_kernels() != "cpu":
        return 1
    group = min(clips, group)
    for slices in range(min(_num_cores(), clips), 1, -1):
        size = clips // slices
        if clips % slices == 0 and (group % size == 0 or size % group == 0):
            return slices
    return 1


def _num_cores() -> int:
    """Returns the number of ops that TensorFlow runs at a time."""
    return tf.config.threading.get_inter_op_parallelism_threads() or available_cpus()
