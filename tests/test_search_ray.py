"""The expansion search on a Ray cluster of several nodes on this machine. No TensorFlow."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from local_cluster import add_node, local_cluster
from stub_trainings import SMALL_SEARCH, TINY, Steps, noise

from x3d_tf import ray_cluster
from x3d_tf.errors import UserError
from x3d_tf.files import WriteError
from x3d_tf.locks import owner_of
from x3d_tf.search import ray_executor
from x3d_tf.search.candidates import Score
from x3d_tf.search.executor import SerialExecutor
from x3d_tf.search.loop import run_search
from x3d_tf.search.ray_executor import RayExecutor
from x3d_tf.search.search import Search
from x3d_tf.search.shared import MOST_KILLS, SharedTraining
from x3d_tf.search.trace import LOCK_NAME, open_trace

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Any, list[Any]]]:
    with local_cluster(nodes=2) as found:
        yield found


@pytest.fixture
def ray(cluster: tuple[Any, list[Any]]) -> Iterator[Any]:
    with ray_cluster.connected(cluster[0].address) as module:
        yield module


def search_on(ray: Any, training: Steps, paths: tuple[Path, ...] = (), **options: Any) -> Search:
    executor = RayExecutor(ray, SharedTraining(training, "search"), training.folder, paths, **{"cpus": 1, **options})
    return run_search(training.folder, SMALL_SEARCH, executor, TINY, num_classes=4, shared=executor._training)


def wait_for_steps(folder: Path) -> None:
    """Waits until a training has a checkpoint."""
    until = time.monotonic() + 120
    while not [path for path in folder.rglob("*.steps") if path.read_text()]:
        assert time.monotonic() < until
        time.sleep(0.02)


def undisturbed(folder: Path) -> Search:
    return run_search(folder, SMALL_SEARCH, SerialExecutor(noise), TINY, num_classes=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "named"),
    [({"cpus": 64}, "64 CPUs and 0 GPUs"), ({"cpus": 1, "gpus": 2}, "1 CPU and 2 GPUs")],
)
def test_resources_that_no_node_has(ray: Any, asked: dict[str, int], named: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=f"no node of the cluster has {named}.*the largest of its 3 nodes has 1 CPU and"
    ):
        search_on(ray, Steps(tmp_path / "search"), **asked)


@pytest.mark.slow
def test_a_folder_that_a_node_does_not_see(ray: Any, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"the node 127\.0\.0\.2 does not see /absent/records: .* the same path on all nodes"
    ):
        search_on(ray, Steps(tmp_path / "search"), (Path("/absent/records"),))
    assert not [*tmp_path.rglob("*.log"), *tmp_path.rglob("*.steps")]


def test_a_folder_of_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the same path, but is not shared, or is shared without its locks."""

    monkeypatch.setattr(ray_executor, "_SEES_SECONDS", 0.1)

    def problem(owner: str) -> str | None:
        return ray_executor._problem([tmp_path], owner)

    another, unseen = f"sees another {tmp_path}: ", f"does not see the locks of other nodes in {tmp_path}: "
    with open_trace(tmp_path, {}):
        owner = owner_of(tmp_path / LOCK_NAME)
        assert problem(owner) is None
        assert (tmp_path / LOCK_NAME).read_text().strip() == owner  # as it was
        assert str(problem("process 1 on other")).startswith(another)
    assert str(problem(owner)).startswith(another)
    (tmp_path / LOCK_NAME).write_text(owner)
    assert str(problem(owner)).startswith(unseen)
    assert (tmp_path / LOCK_NAME).exists()


def test_a_node_may_see_the_lock_later(tmp_path: Path) -> None:
    """NFS shows another machine's text after some seconds."""
    with open_trace(tmp_path, {}):
        owner = owner_of(tmp_path / LOCK_NAME)
        (tmp_path / LOCK_NAME).write_text("")
        timer = threading.Timer(0.5, (tmp_path / LOCK_NAME).write_text, [owner])
        timer.start()
        assert ray_executor._problem([tmp_path], owner) is None


class FakeRay:
    """A cluster of one node. `replies` are those of its tasks, exceptions included."""

    def __init__(self, *replies: object) -> None:
        self.replies = [*replies]

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": "ab" * 28, "NodeManagerAddress": "host", "Alive": True, "Resources": {"CPU": 1.0}}]

    def remote(self, **_: object) -> Any:
        task = SimpleNamespace(remote=lambda *_: object())
        return lambda _: SimpleNamespace(options=lambda **_: task)

    def wait(self, tasks: list[object], **_: object) -> tuple[list[object], list[object]]:
        return tasks[:1], tasks[1:]

    def get(self, _: object) -> object:
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def cancel(self, *_: object, **__: object) -> None:
        pass


def scores_of(ray: Any, folder: Path, progress: Iterator[int] | None = None) -> list[Score]:
    """Returns the scores of one candidate whose node is not checked at the beginning."""
    training = SharedTraining(Steps(folder), "search")
    if progress:
        object.__setattr__(training, "progress", lambda _: next(progress))
    executor = RayExecutor(ray, training, folder, cpus=1)
    executor._checked = True
    candidate = Search(SMALL_SEARCH, TINY, num_classes=4).pending()[0]
    return [score for _, score in executor.scores([candidate])]


@pytest.fixture
def no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "_LONGEST_DELAY", 0.0)
    monkeypatch.setattr(ray_executor, "_BAD_NODE_DELAY", 0.0)
    monkeypatch.setattr(ray_executor, "_POLL", 0.0)


@pytest.mark.usefixtures("no_delays")
def test_losses_count_since_the_last_checkpoint(tmp_path: Path) -> None:
    losses, score = ["the node died"] * (ray_executor._MOST_LOSSES + 1), Score(0.5)
    assert scores_of(FakeRay(*losses, score), tmp_path, itertools.count(1)) == [score]
    with pytest.raises(UserError, match="step01_depth_seed0 was lost 21 times; the last time: the node died"):
        scores_of(FakeRay(*losses, score), tmp_path)


def test_a_lost_task_waits_before_it_starts_again(tmp_path: Path) -> None:
    executor = RayExecutor(FakeRay(), SharedTraining(Steps(tmp_path), "search"), tmp_path, cpus=1)
    candidate = Search(SMALL_SEARCH, TINY, num_classes=4).pending()[0]
    assert [executor._delay(candidate, "lost") for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.usefixtures("no_delays")
def test_a_bad_node_ends_no_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other nodes continue the search; the line is printed once per node."""
    replies = [ray_executor._BadNode("bad", "does not see /records"), ray_executor._BadNode("worse", "has no folder")]
    assert scores_of(FakeRay(*replies * 30, Score(0.5)), tmp_path) == [Score(0.5)]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "warning: ray: the node bad does not see /records. Its trainings are submitted again",
        "warning: ray: the node worse has no folder. Its trainings are submitted again",
    ]


@pytest.mark.usefixtures("no_delays")
def test_tasks_that_ray_kills_for_their_memory_are_counted(tmp_path: Path) -> None:
    from ray.exceptions import OutOfMemoryError

    training = SharedTraining(Steps(tmp_path), "search")
    candidate = Search(SMALL_SEARCH, TINY, num_classes=4).pending()[0]
    assert scores_of(FakeRay(*[OutOfMemoryError("killed")] * MOST_KILLS, Score(0.5)), tmp_path) == [Score(0.5)]
    assert str(training(candidate).reason).startswith(f"{MOST_KILLS} processes were killed in a row")


def test_trainings_that_do_not_stop_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_executor, "_STOP_SECONDS", 0.0)
    executor = RayExecutor(FakeRay(), SharedTraining(Steps(tmp_path), "search"), tmp_path, cpus=1)
    executor._cancel([object(), object()])
    assert "warning: 2 trainings did not stop within 0 s" in capsys.readouterr().err


def test_a_node_that_dies_during_the_check_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import RayError

    ray = FakeRay(RayError("the node died"))
    executor = RayExecutor(ray, SharedTraining(Steps(tmp_path), "search"), tmp_path, cpus=1)
    nodes, lists = ray.nodes(), iter([ray.nodes(), ray.nodes()])
    monkeypatch.setattr(ray, "nodes", lambda: next(lists, [{**nodes[0], "Alive": False}]))
    executor._check_nodes()
    ray.replies, lists = [RayError("no Python")], iter([nodes] * 9)
    with pytest.raises(UserError, match="the node host cannot run tasks: no Python"):
        executor._check_nodes()


@pytest.mark.slow
def test_candidates_that_fail(ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One raises an exception, another one is killed each time, as by the system without memory."""
    monkeypatch.setattr(ray_executor, "_LONGEST_DELAY", 0.5)
    training = Steps(tmp_path / "search", failing=(("depth", "SIGKILL"), ("width", "raise")))
    with pytest.raises(UserError, match="every candidate of step 1 failed") as error:
        search_on(ray, training)
    reason = f"depth: {MOST_KILLS} processes were killed in a row while they trained it"
    assert reason in str(error.value) and "width: ValueError: no width" in str(error.value)


@pytest.mark.slow
def test_a_full_disk_stops_the_search(ray: Any, tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="checkpoint cannot be written: No space left on device"):
        search_on(ray, Steps(tmp_path / "search", failing=(("depth", "write"),)))


@pytest.mark.slow
def test_a_stopped_search_continues(ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainings are asked to stop and waited for; otherwise they would count as killed."""
    training = Steps(tmp_path / "search", steps=3, seconds=0.3)
    sleep = time.sleep

    def interrupted(seconds: float) -> None:
        if threading.current_thread() is threading.main_thread() and [*tmp_path.rglob("*.steps")]:
            monkeypatch.setattr(time, "sleep", sleep)
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search_on(ray, training)
    assert not [*tmp_path.rglob("*.kills")] and not [*tmp_path.rglob("*.claim")]
    before = [len(path.read_text().split()) for path in tmp_path.rglob("*.steps")]
    time.sleep(0.5)
    assert [len(path.read_text().split()) for path in tmp_path.rglob("*.steps")] == before
    assert search_on(ray, training).steps == undisturbed(tmp_path / "undisturbed").steps
    assert {len(path.read_text().split()) for path in tmp_path.rglob("*.steps")} == {3}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_reach_the_driver(
    cluster: tuple[Any, list[Any]], tmp_path: Path, number: signal.Signals, status: int
) -> None:
    """Ray itself would turn both into KeyboardInterrupt."""
    helpers = Path(__file__).parent / "helpers"
    command = [
        sys.executable,
        str(helpers / "ray_process.py"),
        cluster[0].address,
        str(tmp_path / "search"),
        "99",
        "0.1",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(helpers.parents[1]), str(helpers)])}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_steps(tmp_path)
    finally:
        process.send_signal(number)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == status and "Traceback" not in error, error
    assert not [*tmp_path.rglob("*.kills")]


@pytest.mark.slow
def test_a_node_that_dies_changes_nothing(
    cluster: tuple[Any, list[Any]], ray: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its candidate is trained on the other node, from its last checkpoint."""
    training = Steps(tmp_path / "search", steps=8, seconds=0.3)

    def kill_node() -> None:
        wait_for_steps(tmp_path)
        cluster[0].remove_node(cluster[1].pop(), allow_graceful=False)

    killer = threading.Thread(target=kill_node, daemon=True)
    killer.start()
    search = search_on(ray, training)
    killer.join()
    expected = undisturbed(tmp_path / "undisturbed")
    assert (search.steps, search.family) == (expected.steps, expected.family)
    steps = [path.read_text().split() for path in (tmp_path / "search").rglob("*.steps")]
    assert len(steps) == 4 and {len(processes) for processes in steps} == {8}
    assert max(len(set(processes)) for processes in steps) == 2  # two processes shared the work of one candidate
    assert "was lost and starts again from its last checkpoint" in capsys.readouterr().err
    assert next(tmp_path.rglob("*.log")).read_text().startswith("training ")
    assert {path.suffix for path in (tmp_path / "search" / "candidates").iterdir()} == {".steps", ".log", ".json"}


@pytest.mark.slow
def test_nodes_may_join_later(
    cluster: tuple[Any, list[Any]], ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last node is lost; another one joins when that has been told."""
    training, lines = Steps(tmp_path / "search", steps=5, seconds=0.3), list[str]()

    def kill_nodes() -> None:
        wait_for_steps(tmp_path)
        for node in cluster[1]:
            cluster[0].remove_node(node, allow_graceful=False)

    def tell(line: str) -> None:
        lines.append(line)
        if line.startswith("waiting: no node of the cluster has 1 CPU and 0 GPUs any more"):
            killer.join()
            cluster[1][:] = [add_node(cluster[0])]

    monkeypatch.setattr(ray_executor, "tell", tell)
    killer = threading.Thread(target=kill_nodes, daemon=True)
    killer.start()
    assert search_on(ray, training).steps == undisturbed(tmp_path / "undisturbed").steps
    assert any(line.startswith("waiting: no node") for line in lines)
