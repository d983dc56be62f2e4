"""Builds records on a Ray cluster: one task per shard. Imports neither Ray nor TensorFlow at the top.

The process that connects to the cluster, the driver, plans the build, locks the output folder and writes the manifest.
Tasks write the shards, each in a folder of its own in the driver's folder `.build/work-...`. Once that folder is
deleted, tasks that still run on an unreachable machine fail instead of writing into another build.
"""

import os
import socket
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Unpack

from x3d_tf import ray_cluster
from x3d_tf.data.building import builder
from x3d_tf.data.building.builder import Build, BuildResult
from x3d_tf.data.building.encoding import encode_all, file_state
from x3d_tf.data.building.plan import BuildOptions, EncodingSettings, PlannedShard, plan_build
from x3d_tf.data.building.sources import Video
from x3d_tf.data.building.state import BuildFolder, FinishedShard, open_build
from x3d_tf.data.datasets.base import Inputs
from x3d_tf.errors import UserError, first_line, require
from x3d_tf.files import WriteError, os_errors_as_write_error
from x3d_tf.terminal import tell
from x3d_tf.text import counted
from x3d_tf.types import AnnotationKind

_RETRIES = 10  # of a task whose process or machine was lost; more would repeat a task that always crashes
_CHECK_SECONDS = 300.0  # for starting a task on each node, which imports this package from a cold disk
_POLL_SECONDS = 10.0
_PACKAGES = ("x3d-tf", "av", "pillow")  # their versions determine the bytes of the records


@dataclass(frozen=True)
class _Task:
    """Settings that all tasks of a build share; they are sent to the nodes.

    Attributes:
        root: absolute path of the output folder.
        work: the driver's folder in it, which exists while the driver runs.
        folder: the driver's working folder, to which the paths of videos are relative; None if they are absolute.
        classes: names of all classes.
        annotations: kind of annotation.
        encoding: how videos are encoded.
    """

    root: Path
    work: Path
    folder: Path | None
    classes: tuple[str, ...]
    annotations: AnnotationKind
    encoding: EncodingSettings

    def enter(self) -> None:
        """Changes to the driver's working folder.

        Raises:
            UserError: it does not exist, or the output folder is not that of the driver.
        """
        try:
            is_same = self.work.is_dir()
        except PermissionError:  # to look into the output folder
            is_same = False
        if not is_same:
            raise UserError(
                f"output: {self.root} is not the same folder on all nodes: {socket.gethostname()} does not see the "
                "files of this build in it. Use a folder on a file system that all nodes have under the same path"
            )
        if self.folder is not None:
            try:
                os.chdir(self.folder)
            except OSError as error:
                raise UserError(
                    f"videos: the working folder {self.folder} cannot be entered on {socket.gethostname()} "
                    f"({error.strerror}), but paths of videos are relative to it. Use absolute paths"
                ) from error


def build_on_ray(inputs: Inputs, output: str | Path, address: str, **options: Unpack[BuildOptions]) -> BuildResult:
    """Builds the records of a data set on all nodes of a Ray cluster, as `build_records` would on one machine.

    Each shard is a task. If a node or a process is lost, its tasks run on other nodes. All nodes must see the videos
    and the output folder under the same paths, and have the same versions of this package, PyAV and Pillow.

    Args:
        inputs: what the data set is read from, on this machine.
        output: folder for the records.
        address: HOST:PORT of the cluster's head node.
        **options: see `BuildOptions`. `workers` is the number of decoder processes of a task, which is also the number
            of CPUs that it reserves. Defaults to 1.

    Raises:
        UserError: as for `build_records`. Also if Ray is not installed, no cluster answers, no node has `workers` CPUs,
            or a node sees another output folder or other videos (the message names the node).
    """
    ray_cluster.check_address(address)
    plan = plan_build(inputs, **options)
    shards = plan.shards
    with open_build(Path(output), plan.identity, plan.sources, builder.names_of(shards)) as folder:
        if folder.is_finished:
            result = builder.already_finished(folder)
        else:
            build = Build(folder, plan, shards, progress=options.get("progress", True))
            build.write_failures()
            if build.missing:
                with ray_cluster.connected(address) as ray:
                    _write_missing(ray, build)
            result = build.conclude(builder.AGAIN)
        folder.clean()
    return result


def _write_missing(ray: Any, build: Build) -> None:
    """Writes the shards of a build that are not finished, and adds them to it."""
    build.tell_existing()
    shards, plan = build.missing, build.plan
    encoding = replace(plan.encoding, workers=plan.encoding.workers or 1)
    paths = [video.path for shard in shards for video in shard.videos]
    cwd = None if all(path.is_absolute() for path in paths) else Path.cwd()
    root, work = build.folder.root.absolute(), build.folder.work.absolute()
    task = _Task(root, work, cwd, plan.sources.classes, plan.sources.task, encoding)
    _check_nodes(ray, task, shards)
    videos = written = 0
    with build.bar() as bar:
        for shard, finished in _results(ray, task, shards):
            if isinstance(finished, WriteError):
                raise build.cannot_write(finished)
            if isinstance(finished, UserError):
                raise finished
            build.finished[shard.file] = finished
            build.write_failures()
            bar.update(len(shard.videos))
            build.tell_progress(bar)
            before, videos = videos, videos + len(shard.videos)
            written += sum(entry.bytes for entry in finished.part.shards)
            if before < builder.ESTIMATE_AFTER <= videos < len(paths):
                builder.check_disk(build.folder.root, written / videos * (len(paths) - videos), written, bar)


def _check_nodes(ray: Any, task: _Task, shards: Sequence[PlannedShard]) -> None:
    """Raises `UserError` unless each node sees the folders and the videos of the driver, and one has enough CPUs."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cpus = _cpus(ray)
    most = max(cpus.values(), default=0)
    require(most > 0, "ray", "be a cluster that has a node with CPUs")
    workers = task.encoding.workers or 1
    require(workers <= most, "workers", f"be at most {most}, the most CPUs of a node of the cluster", workers)
    samples = [next(shard.videos[0] for shard in shards if shard.split == split) for split in {s.split for s in shards}]
    hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
    checks = {}
    for identity in cpus:
        strategy = NodeAffinitySchedulingStrategy(identity, soft=False)
        check = ray.remote(_check_node).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
        checks[check.remote(task, samples, _versions())] = hosts[identity]
    tell(f"checking that {counted(len(checks), 'node')} can read the videos and write the records")
    for reference, host in checks.items():
        try:
            problem = ray.get(reference, timeout=_CHECK_SECONDS)
        except ray.exceptions.GetTimeoutError as error:
            raise UserError(f"ray: node {host} does not run a task within {_CHECK_SECONDS:.0f} s") from error
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            raise UserError(
                f"ray: a task fails on node {host}: {first_line(cause)}. Every node needs this package and its plugins"
            ) from error
        if problem is not None:
            raise problem


def _cpus(ray: Any) -> dict[str, int]:
    """Returns the number of CPUs of each node that has any, by the node's identity."""
    nodes = ((node["NodeID"], int(node["Resources"].get("CPU", 0))) for node in ray.nodes() if node["Alive"])
    return {identity: cpus for identity, cpus in nodes if cpus}


def _check_node(task: _Task, samples: Sequence[Video], versions: dict[str, str]) -> UserError | None:
    """Returns an error unless this node sees the folders and the videos of the driver and has its versions."""
    host = socket.gethostname()
    try:
        task.enter()
    except UserError as error:
        return error
    try:
        with tempfile.NamedTemporaryFile(prefix="check-", dir=task.work):
            pass
    except OSError as error:
        return UserError(
            f"output: {task.root} cannot be written on {host}: {error.strerror}. Run Ray as the user who builds the "
            "records, on nodes that may write to the folder"
        )
    for video in samples:
        if file_state(video.path) != video.state:
            return UserError(
                f"videos: {video.path} does not exist on {host}, or is another file there. All nodes must have the "
                "same videos under the same paths"
            )
    for name, found in _versions().items():
        if found != versions[name]:
            return UserError(
                f"ray: {name} is {found} on {host}, but {versions[name]} here. Install the same versions on all nodes, "
                "or else records differ between nodes"
            )
    return None


def _versions() -> dict[str, str]:
    """Returns the versions of the packages that determine the bytes of records."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a checkout that is not installed
            found[name] = "not installed"
    return found


def _results(
    ray: Any, task: _Task, shards: Sequence[PlannedShard]
) -> Iterator[tuple[PlannedShard, FinishedShard | UserError]]:
    """Builds shards in tasks and yields each with its result, in the order in which they end.

    Ray cancels the tasks of a driver that disconnects. `ray.cancel(force=True)` can end the driver in a failed check of
    Ray if a task ends at that moment (measured with Ray 2.60).

    Raises:
        UserError: a task was lost too often.
    """
    workers = task.encoding.workers or 1
    remote = ray.remote(_build_shard).options(num_cpus=workers, max_retries=_RETRIES)
    shared, waiting = ray.put(task), deque(shards)
    running: dict[Any, PlannedShard] = {}
    was_idle = False
    while waiting or running:
        at_once = sum(cpus // workers for cpus in _cpus(ray).values())
        if at_once == 0 and not was_idle:
            tell(f"the cluster has no node with {counted(workers, 'CPU')} now; waiting for one")
        was_idle = at_once == 0
        while waiting and len(running) < 2 * max(at_once, 1):  # so that each node has a next task
            shard = waiting.popleft()
            running[remote.remote(shared, shard)] = shard
        for reference in ray.wait([*running], timeout=_POLL_SECONDS)[0]:
            shard = running.pop(reference)
            yield shard, _result(ray, reference, shard)


def _result(ray: Any, reference: Any, shard: PlannedShard) -> FinishedShard | UserError:
    """Returns the result of a task; raises `UserError` if its processes or nodes were lost too often."""
    try:
        finished: FinishedShard | UserError = ray.get(reference)
    except ray.exceptions.RayTaskError:  # a bug in this package
        raise
    except ray.exceptions.RayError as error:
        raise UserError(
            f"ray: the task of {shard.file} was lost {_RETRIES + 1} times: {first_line(error)} Finished shards stay; "
            f"{builder.AGAIN} to resume"
        ) from error
    return finished


def _build_shard(task: _Task, shard: PlannedShard) -> FinishedShard | UserError:
    """Builds a shard in a task, or returns the error that ends the build."""
    try:
        task.enter()
        with os_errors_as_write_error(task.work):
            work = tempfile.TemporaryDirectory(prefix="task-", dir=task.work, ignore_cleanup_errors=True)
        with work as name:
            folder = BuildFolder(task.root, Path(name), {}, len(task.classes), task.annotations)
            finished = folder.load_finished(shard.file)  # by an attempt whose node was lost after its end
            if finished is None:
                settings = task.encoding
                workers, encode = settings.workers or 1, builder.encoder(settings)
                with closing(encode_all(shard.videos, encode, workers, settings.timeout)) as encoded:
                    finished = builder.write_shard(folder, shard, task.classes, encoded, lambda _: None)
        return finished
    except UserError as error:
        return error
