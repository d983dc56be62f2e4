"""Builds on a Ray cluster: the bytes of one process, lost nodes and processes, and errors."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from video_fixtures import die_on_three, numbered_frames, write_class_folders, write_video

from x3d_tf import ray_cluster
from x3d_tf.data.building import builder, distributed
from x3d_tf.data.building.builder import build_records
from x3d_tf.data.building.distributed import _build_shard, _Task, build_on_ray
from x3d_tf.data.building.plan import EncodingSettings, PlannedShard, plan_build
from x3d_tf.data.building.sources import Video
from x3d_tf.data.building.state import FinishedShard
from x3d_tf.data.datasets.base import Inputs
from x3d_tf.errors import UserError

ADDRESS = "127.0.0.2"  # Ray replaces 127.0.0.1 by the address of the machine
SPLITS = tuple(f"split{number}" for number in range(8))  # a shard each


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_splits(folder: Path, splits: tuple[str, ...] = SPLITS, videos: int = 3) -> Inputs:
    for seed, split in enumerate(splits):
        for number in range(videos):
            write_video(folder / split / "ab"[number % 2] / f"{number}.mp4", numbered_frames(5 + seed + number))
    return Inputs(videos=folder, splits=splits)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs and two nodes with one CPU each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    node = {"object_store_memory": 80 * 2**20, "node_ip_address": ADDRESS}
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **node})
    try:
        for _ in range(2):
            started.add_node(num_cpus=1, **node)
        yield started
    finally:
        started.shutdown()


def task_of(folder: Path, videos: Path, **encoding: Any) -> tuple[_Task, list[PlannedShard]]:
    """Returns what a driver sends to its tasks."""
    work = folder / ".build" / "work-all-1"
    work.mkdir(parents=True)
    plan = plan_build(Inputs(videos=videos), progress=False, **encoding)
    return _Task(
        folder, work, None, plan.sources.classes, plan.sources.task, EncodingSettings(workers=1, **encoding)
    ), plan.shards


def test_a_task_survives_a_video_that_crashes_its_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2, 5):
        (tmp_path / "in" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "a" / str(number)).touch()
    task, shards = task_of(tmp_path / "out", tmp_path / "in")
    monkeypatch.setattr(builder, "encoder", lambda _: die_on_three)
    monkeypatch.setattr("x3d_tf.data.records.format.spans_of", lambda *_: [(0, 0, 0)])  # no JPEG frames
    monkeypatch.setattr("x3d_tf.data.records.format.write_frames", lambda path, *_: Path(f"{path}.frames").touch())
    finished = _build_shard(task, shards[0])
    assert isinstance(finished, FinishedShard)
    assert [(Path(failure.path).name, failure.reason) for failure in finished.failures] == [
        ("3", "crashes the decoder process")
    ]
    assert sorted(Path(record.video).name for record in finished.part.records) == ["2", "4"]
    assert [*task.work.iterdir()] == []


def test_a_task_whose_predecessor_had_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node may be lost after a shard is finished and before its result arrives."""
    task, shards = task_of(tmp_path / "out", write_class_folders(tmp_path / "in"))
    first = _build_shard(task, shards[0])
    assert isinstance(first, FinishedShard) and len(first.part.records) == 7
    before = all_files(tmp_path / "out")
    monkeypatch.setattr(distributed, "encode_all", None)
    assert _build_shard(task, shards[0]) == first
    assert all_files(tmp_path / "out") == before


def test_a_task_of_a_build_that_has_ended(tmp_path: Path) -> None:
    task, shards = task_of(tmp_path / "out", write_class_folders(tmp_path / "in"))
    task.work.rmdir()
    error = _build_shard(task, shards[0])
    assert isinstance(error, UserError) and "out is not the same folder on all nodes" in str(error)
    assert all_files(tmp_path / "out") == {}


def test_a_node_that_sees_other_folders_or_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_class_folders(tmp_path / "in")
    task, _ = task_of(tmp_path / "out", folder)
    video, versions = Video(folder / "run" / "clip 0.mp4", "a", (), state=(1, 1)), distributed._versions()
    monkeypatch.chdir(tmp_path)

    def problem(task: _Task = task, samples: tuple[Video, ...] = (), **other: str) -> str:
        return str(distributed._check_node(task, samples, versions | other))

    assert problem() == "None"
    host = socket.gethostname()
    assert f"clip 0.mp4 does not exist on {host}, or is another file there" in problem(samples=(video,))
    assert f"on {host}, but 1.2.3 here. Install the same versions" in problem(pillow="1.2.3")
    elsewhere = replace(task, folder=tmp_path / "none")
    assert f"none cannot be entered on {host} (No such file or directory)" in problem(elsewhere)
    task.work.rmdir()
    assert f"out is not the same folder on all nodes: {host} does not see" in problem()


def test_a_node_whose_user_may_not_write(tmp_path: Path) -> None:
    """The work folder of the driver is closed to other users, and so may be the output folder."""
    with tempfile.TemporaryDirectory() as name:  # unlike the parents of tmp_path, it can be opened to other users
        task, _ = task_of(Path(name) / "out", write_class_folders(tmp_path / "in"))
        Path(name).chmod(0o755)
        user = os.geteuid()
        for folder, message in (
            (task.work, f"out cannot be written on {socket.gethostname()}: Permission denied. Run Ray as the user who"),
            (task.root, "is not the same folder on all nodes"),
        ):
            folder.chmod(0o700 if user == 0 else 0o500 if folder == task.work else 0)
            try:
                if user == 0:
                    os.seteuid(65534)
                problem = distributed._check_node(task, (), distributed._versions())
            finally:
                os.seteuid(user)
                folder.chmod(0o755)
            assert isinstance(problem, UserError) and message in str(problem)
        assert distributed._check_node(task, (), distributed._versions()) is None
        assert [*task.work.iterdir()] == []


class RayError(Exception):
    pass


class RayTaskError(RayError):
    cause = ModuleNotFoundError("No module named 'x3d_tf'")


class GetTimeoutError(RayError):
    pass


class OneProcess:
    """A cluster that runs tasks when their results are asked for, or whose tasks all fail with an error."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError, GetTimeoutError=GetTimeoutError)

    def __init__(self, *cpus: int, error: type[RayError] | None = None) -> None:
        self.cpus, self.error, self.pending, self.most = [*cpus], error, list[Any](), 0

    def nodes(self) -> list[dict[str, Any]]:
        found = enumerate(self.cpus)
        host = {"NodeManagerHostname": "one"}
        return [
            {"NodeID": f"{i + 1:056x}", "Alive": True, "Resources": {"CPU": float(cpus)}, **host} for i, cpus in found
        ]

    def put(self, value: Any) -> Any:
        return value

    def remote(self, function: Any) -> Any:
        def start(*arguments: Any) -> Any:
            self.pending.append(lambda: function(*arguments))
            self.most = max(self.most, len(self.pending))
            return self.pending[-1]

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))

    def wait(self, references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return references[-1:], references[:-1]

    def get(self, reference: Any, timeout: float | None = None) -> Any:
        self.pending.remove(reference)
        if self.error is not None:
            raise self.error("lost\nwith details")
        return reference()


def test_tasks_are_sent_to_busy_nodes_in_small_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task, _ = task_of(tmp_path / "out", write_class_folders(tmp_path / "in"))
    shards = [PlannedShard("train", str(number), []) for number in range(20)]
    monkeypatch.setattr(distributed, "_build_shard", lambda task, shard: f"built {shard.file}")
    cluster = OneProcess(1, 0, 2)
    results = list(distributed._results(cluster, task, shards))
    assert sorted(results) == sorted((shard, f"built {shard.file}") for shard in shards)
    assert cluster.most == 6
    assert "waiting" not in capsys.readouterr().err
    assert len(list(distributed._results(OneProcess(0), task, shards))) == 20  # a node may come later
    assert capsys.readouterr().err == "the cluster has no node with 1 CPU now; waiting for one\n"
    lost = distributed._results(OneProcess(1, error=RayError), task, shards)
    with pytest.raises(
        UserError, match=r"ray: the task of 1 was lost 11 times: lost Finished shards stay; run the same"
    ):
        next(lost)
    with pytest.raises(RayTaskError):  # a bug keeps its traceback
        next(distributed._results(OneProcess(1, error=RayTaskError), task, shards))


@pytest.mark.parametrize(
    ("cluster", "workers", "message"),
    [
        (OneProcess(0), 1, "ray must be a cluster that has a node with CPUs"),
        (OneProcess(4, 2), 5, "workers must be at most 4, the most CPUs of a node of the cluster, got 5"),
        (OneProcess(4, error=GetTimeoutError), 1, "ray: node one does not run a task within 300 s"),
        (
            OneProcess(4, error=RayTaskError),
            1,
            "ray: a task fails on node one: No module named 'x3d_tf'. Every node needs this package and its plugins",
        ),
    ],
)
def test_clusters_that_cannot_build(tmp_path: Path, cluster: OneProcess, workers: int, message: str) -> None:
    pytest.importorskip("ray")
    task, shards = task_of(tmp_path / "out", write_class_folders(tmp_path / "in"))
    task = replace(task, encoding=replace(task.encoding, workers=workers))
    with pytest.raises(UserError, match=f"^{message}$"):
        distributed._check_nodes(cluster, task, shards)


@pytest.mark.parametrize("address", ["nonsense", "", "host:port", "ray://host:1", "a:1:2"])
def test_addresses(tmp_path: Path, address: str) -> None:
    with pytest.raises(
        UserError, match=f"ray must be HOST:PORT, the address of the cluster's head node, got '{address}'"
    ):
        build_on_ray(Inputs(videos=tmp_path), tmp_path / "out", address)
    assert not (tmp_path / "out").exists()


def test_an_address_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(ray_cluster, "CONNECT_SECONDS", 4.0)
    write_class_folders(tmp_path / "in")
    with socket.create_server((ADDRESS, 0)) as silent:  # accepts connections and sends nothing
        address = f"{ADDRESS}:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=f"ray: no Ray cluster answers at {address} within 4 s"):
            build_on_ray(Inputs(videos=tmp_path / "in"), tmp_path / "out", address, progress=False)
    assert not [*(tmp_path / "out").glob(".build/*")]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("echo Traceback >&2; echo 'ImportError: no grpc' >&2; echo >&2; exit 1", "ImportError: no grpc"),
        ("exit 3", "exit status 3"),
    ],
)
def test_a_health_check_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, reason: str) -> None:
    """Such as by a broken installation of Ray, where waiting for the cluster would not help."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{command}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    message = f"^ray: the health check of the cluster at host:1 fails: {reason}. Check that it is the address"
    with pytest.raises(UserError, match=message):
        ray_cluster._require_answer("host:1")


@pytest.mark.slow
def test_a_closed_port(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    write_class_folders(tmp_path / "in")
    with socket.create_server((ADDRESS, 0)) as server:
        port = server.getsockname()[1]
    words = [f"--videos={tmp_path / 'in'}", f"--output={tmp_path / 'out'}", f"--ray={ADDRESS}:{port}"]
    command = [sys.executable, "-m", "x3d_tf.build_records", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 1
    assert f"error: --ray: no Ray cluster answers at {ADDRESS}:{port} within 30 s" in ended.stderr


@pytest.mark.slow
def test_two_nodes_one_of_which_is_lost(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    inputs = write_splits(tmp_path / "in", videos=12)
    (tmp_path / "in" / "split0" / "a" / "broken.mp4").write_text("no video")
    build_records(inputs, tmp_path / "one", workers=1, progress=False)
    monkeypatch.chdir(tmp_path)  # paths of videos may be relative
    relative = Inputs(videos=Path("in"), splits=SPLITS)
    output = tmp_path / "out"
    lost = cluster.worker_nodes.copy().pop()

    def kill_node() -> None:
        while len([*output.glob(".build/*.json")]) < 2:
            time.sleep(0.01)
        cluster.remove_node(lost, allow_graceful=False)

    killer = threading.Thread(target=kill_node)
    killer.start()
    result = build_on_ray(relative, output, cluster.address)
    killer.join()
    assert len(cluster.worker_nodes) == 1
    assert result.failures == 1
    build_records(relative, tmp_path / "relative", workers=1, progress=False)
    assert all_files(output) == all_files(tmp_path / "relative")  # failures.csv has the paths as they were given
    different = {name for name, data in all_files(tmp_path / "one").items() if all_files(output)[name] != data}
    assert different == {"failures.csv", ".build/split0-00000-of-00001.tfrecord.json"}
    assert "8 of 8 shards" in capfd.readouterr().out
    assert build_on_ray(relative, output, cluster.address).was_finished
    with pytest.raises(UserError, match="workers must be at most 1, the most CPUs of a node of the cluster, got 2"):
        build_on_ray(inputs, tmp_path / "two", cluster.address, workers=2, progress=False)


@pytest.mark.slow
def test_ctrl_c_and_killed_processes(cluster: Any, tmp_path: Path) -> None:
    """Kills a process of a task, interrupts the driver, and runs the command again."""
    inputs = write_splits(tmp_path / "in", videos=12)
    output = tmp_path / "out"
    words = [f"--videos={tmp_path / 'in'}", f"--output={output}", f"--splits={','.join(SPLITS)}"]
    command = [sys.executable, "-m", "x3d_tf.build_records", *words, f"--ray={cluster.address}"]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_notes(output, 1, driver)
    os.kill(running_tasks()[0], signal.SIGKILL)
    wait_for_notes(output, 3, driver)
    driver.send_signal(signal.SIGINT)
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 130, errors
    assert "Run the same command again to resume after the last finished shard." in errors
    assert "Traceback" not in errors
    deadline = time.monotonic() + 30
    while running_tasks() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running_tasks() == [] and not [*output.glob(".build/work-*")]
    notes = {path: path.stat().st_mtime_ns for path in output.glob(".build/*.json")}
    assert not (output / "manifest.json").exists()
    resumed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert resumed.returncode == 0, resumed.stderr
    assert f"{len(notes)} of 8 shards exist already" in resumed.stdout
    build_records(inputs, tmp_path / "one", workers=1, progress=False)
    assert all_files(output) == all_files(tmp_path / "one")


def wait_for_notes(output: Path, count: int, driver: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while len([*output.glob(".build/*.json")]) < count and time.monotonic() < deadline:
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.01)


def running_tasks() -> list[int]:
    """Returns the processes of our tasks, whose titles Ray sets."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(b"ray::_build_shard"):
                found.append(int(entry.name))
    return found
