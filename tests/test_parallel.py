"""Clips in parallel: one clip at a time on CPUs, complete batches on GPUs, and equal slices."""

import numpy as np
import pytest
import tensorflow as tf
from layer_checks import assert_close

from x3d_tf import parallel


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("dynamic", [False, True])
def test_clips_are_mapped_one_at_a_time(count: int, dynamic: bool) -> None:
    """The network accepts a single clip only, so the results prove that clips are processed one at a time."""
    clips = np.arange(count * 6, dtype="float32").reshape(count, 2, 3)
    network = lambda clip: tf.reduce_sum(tf.ensure_shape(clip, (1, 2, 3)) ** 2, axis=1)  # noqa: E731
    signature = tf.TensorSpec((None if dynamic else count, 2, 3), tf.float32)
    call = tf.function(parallel.map_clips_in_parallel(network, chains=3), input_signature=[signature])
    assert_close(call(clips), (clips**2).sum(1), 1e-3)
    assert call.get_concrete_function().structured_outputs.shape.as_list() == [None if dynamic else count, 3]
    loops = [op for op in call.get_concrete_function().graph.get_operations() if op.type.endswith("While")]
    assert [op.get_attr("parallel_iterations") for op in loops] == ([3] if dynamic or count > 1 else [])


@pytest.mark.parametrize(
    ("chosen", "shapes"), [("gpu", [(5, 2)]), ("ops", [(5, 2)]), ("cpu", [(1, 2)])], indirect=["chosen"]
)
def test_gpus_process_complete_batches(chosen: None, shapes: list[tuple[int, ...]]) -> None:
    input_shapes = []

    def network(clips: tf.Tensor) -> tf.Tensor:
        input_shapes.append(tuple(clips.shape))
        return 2 * clips

    assert_close(tf.function(parallel.optimize_for_device(network))(tf.ones((5, 2))), np.full((5, 2), 2), 0)
    assert input_shapes == shapes


def test_chains_must_be_positive() -> None:
    with pytest.raises(ValueError, match="chains must be at least 1, got 0"):
        parallel.map_clips_in_parallel(tf.identity, chains=0)


@pytest.mark.parametrize(
    ("cores", "clips", "group", "parts"),
    [
        *((2, 8, 8, 2), (2, 8, 16, 2), (2, 16, 8, 2), (2, 1, 8, 1), (2, None, 8, 1), (2, 7, 8, 1), (3, 8, 8, 2)),
        *((8, 8, 8, 8), (6, 12, 12, 6), (4, 24, 8, 3), (16, 8, 8, 8), (1, 8, 8, 1)),
    ],
)
def test_slices_divide_groups_evenly(
    monkeypatch: pytest.MonkeyPatch, cores: int, clips: int | None, group: int, parts: int
) -> None:
    monkeypatch.setattr(parallel, "_num_cores", lambda: cores)
    assert parallel.num_batch_slices(clips, group) == parts


def test_gpus_compute_the_batch_at_once(uncompiled: None) -> None:
    assert parallel.num_batch_slices(8, 8) == 1


@pytest.mark.parametrize(
    ("number", "processes", "cores", "visible"),
    [(0, 1, None, ["a", "b"]), (0, 2, 4, ["a"]), (1, 2, 4, ["b"]), (2, 3, 2, ["a"]), (9, 20, 1, ["b"])],
)
def test_processes_share_cores_and_gpus(
    monkeypatch: pytest.MonkeyPatch, number: int, processes: int, cores: int | None, visible: list[str]
) -> None:
    """There are two GPUs and eight cores."""
    calls: dict[str, list[object]] = {"threads": [], "visible": [], "growth": []}
    monkeypatch.setattr(parallel, "available_cpus", lambda: 8)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["a", "b"])
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda gpus, kind: calls["visible"].append(gpus))
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", lambda gpu, grows: calls["growth"].append(gpu))
    for name in ("inter", "intra"):
        monkeypatch.setattr(tf.config.threading, f"set_{name}_op_parallelism_threads", calls["threads"].append)
    parallel.divide_devices(number, processes)
    assert calls["growth"] == visible
    assert (calls["threads"], calls["visible"]) == (([cores] * 2, [visible]) if cores else ([], []))
    for found in calls.values():
        found.clear()
    parallel.divide_devices(number, processes, 3)  # whatever the machine has
    assert (calls["growth"], calls["threads"]) == (visible, [3, 3])
    assert calls["visible"] == ([visible] if processes > 1 else [])
