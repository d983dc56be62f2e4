"""The expansion search on a Ray cluster of several nodes on this machine. No TensorFlow but in the slow test."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_cluster import add_node, local_cluster
from stub_trainings import SMALL_SEARCH, TINY, Steps, noise

from x3d_tf import ray_cluster
from x3d_tf.errors import UserError
from x3d_tf.files import WriteError
from x3d_tf.search import ray_executor
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


def undisturbed(folder: Path) -> Search:
    return run_search(folder, SMALL_SEARCH, SerialExecutor(noise), TINY, num_classes=4)


@pytest.mark.parametrize(
    ("asked", "named"),
    [({"cpus": 64}, "64 CPUs and 0 GPUs"), ({"cpus": 1, "gpus": 2}, "1 CPU and 2 GPUs")],
)
def test_resources_that_no_node_has(ray: Any, asked: dict[str, int], named: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=f"no node of the cluster has {named}.*the largest of its 3 nodes has 1 CPU and"
    ):
        search_on(ray, Steps(tmp_path / "search"), **asked)


def test_a_folder_that_a_node_does_not_see(ray: Any, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"the node 127\.0\.0\.2 does not see /absent/records: .* the same path on all nodes"
    ):
        search_on(ray, Steps(tmp_path / "search"), (Path("/absent/records"),))
    assert not (tmp_path / "search" / "candidates").exists()


def test_a_folder_of_another_file_system(tmp_path: Path) -> None:
    """It has the same path, but is not shared, or is shared without its locks."""

    def problem(owner: str) -> str | None:
        return ray_executor._problem([tmp_path], owner)

    another, unseen = f"sees another {tmp_path}: ", f"does not see the locks of other nodes in {tmp_path}: "
    with open_trace(tmp_path, {}):
        owner = (tmp_path / LOCK_NAME).read_text()
        assert problem(owner) is None
        assert str(problem("process 1 on other")).startswith(another)
    assert str(problem(owner)).startswith(another)
    (tmp_path / LOCK_NAME).write_text(owner)
    assert str(problem(owner)).startswith(unseen)


def test_candidates_that_fail(ray: Any, tmp_path: Path) -> None:
    """One raises an exception, another one is killed each time, as by the system without memory."""
    training = Steps(tmp_path / "search", failing=(("depth", "SIGKILL"), ("width", "raise")))
    with pytest.raises(UserError, match="every candidate of step 1 failed") as error:
        search_on(ray, training)
    reason = f"depth: {MOST_KILLS} processes were killed in a row while they trained it"
    assert reason in str(error.value) and "width: ValueError: no width" in str(error.value)


def test_a_full_disk_stops_the_search(ray: Any, tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="checkpoint cannot be written: No space left on device"):
        search_on(ray, Steps(tmp_path / "search", failing=(("depth", "write"),)))


def test_a_stopped_search_continues(ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainings are asked to stop and waited for; otherwise they would count as killed."""
    training = Steps(tmp_path / "search", steps=3, seconds=0.3)
    sleep = time.sleep

    def interrupted(seconds: float) -> None:
        if [*tmp_path.rglob("*.steps")]:
            monkeypatch.setattr(time, "sleep", sleep)
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search_on(ray, training)
    assert not [*tmp_path.rglob("*.starts")] and not [*tmp_path.rglob("*.claim")]
    before = [len(path.read_text().split()) for path in tmp_path.rglob("*.steps")]
    time.sleep(0.5)
    assert [len(path.read_text().split()) for path in tmp_path.rglob("*.steps")] == before
    assert search_on(ray, training).steps == undisturbed(tmp_path / "undisturbed").steps
    assert {len(path.read_text().split()) for path in tmp_path.rglob("*.steps")} == {3}


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
    while not [*tmp_path.rglob("*.steps")]:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == status and "Traceback" not in error, error
    assert not [*tmp_path.rglob("*.starts")]


def test_a_node_that_dies_changes_nothing(
    cluster: tuple[Any, list[Any]], ray: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its candidate is trained on the other node, from its last checkpoint."""
    training = Steps(tmp_path / "search", steps=8, seconds=0.3)

    def kill_node() -> None:
        while not [path for path in tmp_path.rglob("*.steps") if path.read_text()]:
            time.sleep(0.02)
        cluster[0].remove_node(cluster[1].pop(), allow_graceful=False)

    killer = threading.Thread(target=kill_node)
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
        while not [path for path in tmp_path.rglob("*.steps") if path.read_text()]:
            time.sleep(0.02)
        for node in cluster[1]:
            cluster[0].remove_node(node, allow_graceful=False)

    def tell(line: str) -> None:
        lines.append(line)
        if line.startswith("waiting: no node of the cluster has 1 CPU and 0 GPUs any more"):
            killer.join()
            cluster[1][:] = [add_node(cluster[0])]

    monkeypatch.setattr(ray_executor, "tell", tell)
    killer = threading.Thread(target=kill_nodes)
    killer.start()
    assert search_on(ray, training).steps == undisturbed(tmp_path / "undisturbed").steps
    assert any(line.startswith("waiting: no node") for line in lines)
