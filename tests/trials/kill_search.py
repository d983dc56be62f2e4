"""Kills the processes of expansion searches: the scores must equal those of an undisturbed search.

The trials are searches on a Ray cluster of two worker nodes on this machine, with one CPU each. At a random moment one
node is killed, or the driver (the command), or the node and then the driver. A driver that was killed is started again.
Two kinds need no Ray: "array" kills one of two processes over a shared folder and starts it again, and "ten times"
kills the only process of an array ten times in turn, with its training, before it lets the search end.

The first trials (--count) train nothing: a stub takes 8 steps of 0.2 seconds for each of four candidates, with a
checkpoint after each step. No step may be taken twice. The last ones (--real) are tiny trainings of two candidates,
with a checkpoint after each of 12 steps, on Ray. Their trace must equal, except for durations, that of a search in
processes on this machine, and the weights of the found network must be bit-equal. The trials run one after another.

  python tests/trials/kill_search.py --count=10 --real=3 --seed=0
"""

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness import ROOT, Command, Report, arguments, difference_of_weights, half_written, make_records, run, scratch
from harness import succeeded as problem_of

STEPS, PAUSE = 8, 0.2
CANDIDATES = 4
KINDS = ("node", "driver", "node", "node and driver")  # in turn
STUB_KINDS = ("node", "array", "driver", "ten times", "node and driver", "array")  # in turn
KILLS = 10
SETTINGS = {
    "Expansion.gamma_tau": 1.0,
    "Expansion.gamma_t": 1,
    "Expansion.gamma_s": 32 / 112,
    "Expansion.gamma_d": 0.2,
    "DatasetSpec.validation_fraction": 0.34,
    "DatasetSpec.flip": False,
    "Recipe.batch": 4,
    "Recipe.reference_batch": 4,
    "Recipe.learning_rate": 0.05,
    "Recipe.steps": 24,  # of batches that are twice as large: 12
    "TrainConfig.checkpoint_steps": 1,
    "TrainConfig.test_views": 1,
    "ExpandConfig.axes": ("fast", "bottleneck"),
    "ExpandConfig.budget_gmacs": 0.0027,
}
Start = Callable[[str, Path], Command]  # of a driver, with the address of the cluster and the work folder


def scores(folder: Path) -> list[dict[str, Any]]:
    """Returns the scores in a trace without durations, in the order of steps and axes."""
    complete = (folder / "trace.jsonl").read_text().rpartition("\n")[0]  # the last line may be incomplete
    lines = [json.loads(line) for line in complete.splitlines()[1:]]
    lines = [{name: value for name, value in line.items() if name != "seconds"} for line in lines if "score" in line]
    return sorted(lines, key=lambda line: (line["step"], line["axis"]))


def wait_until(moment: float, begun: Callable[[], object], command: Command) -> None:
    """Waits until `moment` seconds after the first training began, or until the command has ended."""
    while command.process.poll() is None and not begun():
        time.sleep(0.01)
    until = time.monotonic() + moment
    while command.process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)


def trial(
    kind: str, moments: tuple[float, float], folder: Path, sign: str, start: Start, report: Report
) -> Iterator[str]:
    """Runs and disturbs a search; yields the problems. `sign` is a pattern of files that a training creates."""
    import signal

    from local_cluster import local_cluster  # type: ignore[import-not-found]

    with local_cluster(nodes=2) as (cluster, nodes):
        command = start(cluster.address, folder)
        wait_until(moments[0], lambda: [*folder.glob(sign)], command)
        done = len(scores(folder)) if (folder / "trace.jsonl").exists() else 0
        if "node" in kind:
            cluster.remove_node(nodes[0], allow_graceful=False)
        if kind == "node and driver":
            wait_until(moments[1], lambda: True, command)
        if "driver" in kind:
            if not command.signal(signal.SIGKILL):
                report.note("kills after the end")
            command.wait()
            command.end()
            command = start(cluster.address, folder)
        ended = command.wait()
    print(f"       {folder.name}: {kind} {moments[0]:.1f} s after the first training, {done} scores", flush=True)
    if problem := problem_of(ended):
        yield f"{kind}: {problem}"
    if "was lost and starts again" in ended.err:
        report.note("searches that lost a training")
    if names := [name for name in half_written(folder) if "events" not in name]:
        yield f"{kind}: {names} were left behind"
    if names := [path.name for path in folder.rglob("*.kills")]:
        yield f"{kind}: {names} were left behind"


def array_trial(kind: str, length: float, rng: random.Random, folder: Path, report: Report) -> Iterator[str]:
    """Runs and disturbs a search by processes over a shared folder; yields the problems."""
    import signal

    from x3d_tf.locks import owner_of

    def begin() -> Command:
        words = (str(ROOT / "tests" / "helpers" / "array_process.py"), str(folder), str(PAUSE), f"steps={STEPS}")
        return Command(*words, folder=folder.parent, seconds=report.chosen.seconds)

    def owners() -> set[str]:
        return {owner_of(path) for path in folder.glob("candidates/*.claim")}

    repeated = kind == "ten times"
    commands, known = [begin() for _ in range(1 if repeated else 2)], set[str]()
    killed = commands[-1]
    moments = [rng.uniform(0, 3 * PAUSE if repeated else length) for _ in range(KILLS if repeated else 1)]
    for moment in moments:
        wait_until(moment, lambda: owners() - known, killed)  # after a training began
        known.update(owners())
        if not killed.signal(signal.SIGKILL):
            report.note("kills after the end")
        killed.wait()
        killed.end()
        commands.remove(killed)
        commands.append(killed := begin())
    for command in commands:
        if problem := problem_of(command.wait()):
            yield f"{kind}: {problem}"
    print(f"       {folder.name}: {kind}, kills {', '.join(f'{moment:.1f}' for moment in moments)} s", flush=True)
    if names := half_written(folder) + [path.name for path in folder.rglob("*.kills")]:
        yield f"{kind}: {names} were left behind"


def stub_trial(
    number: int, length: float, folder: Path, expected: list[dict[str, Any]], report: Report
) -> Iterator[str]:
    """Runs a search without trainings, which takes `length` seconds undisturbed; yields the problems."""

    def start(address: str, workdir: Path) -> Command:
        words = (str(ROOT / "tests" / "helpers" / "ray_process.py"), address, str(workdir), str(STEPS), str(PAUSE))
        return Command(*words, folder=folder.parent, seconds=report.chosen.seconds)

    rng = random.Random(f"{report.chosen.seed}/{number}")
    kind = STUB_KINDS[number % len(STUB_KINDS)]
    if kind in ("array", "ten times"):
        yield from array_trial(kind, CANDIDATES / 2 * STEPS * PAUSE, rng, folder, report)
    else:
        moments = (rng.uniform(0, length), rng.uniform(0, 4))
        yield from trial(kind, moments, folder, "candidates/*.steps", start, report)
    if scores(folder) != expected:
        yield "the scores differ"
    taken = [path.read_text().split() for path in folder.rglob("*.steps")]
    if [len(processes) for processes in taken] != CANDIDATES * [STEPS]:
        yield f"steps were lost: {[len(processes) for processes in taken]}"
    report.note("candidates that resumed", sum(len(set(processes)) > 1 for processes in taken))


def stub_length(folder: Path, report: Report) -> float:
    """Returns the seconds from the first step to the end of a search without trainings that nothing disturbs."""
    from local_cluster import local_cluster

    words = (str(ROOT / "tests" / "helpers" / "ray_process.py"), str(folder), str(STEPS), str(PAUSE))
    with local_cluster(nodes=2) as (cluster, _):
        words = (words[0], cluster.address, *words[1:])
        command = Command(*words, folder=folder.parent, seconds=report.chosen.seconds)
        wait_until(0, lambda: [*folder.glob("candidates/*.steps")], command)
        begun = time.monotonic()
        if problem := problem_of(command.wait()):
            raise SystemExit(f"the undisturbed search: {problem}")
    return time.monotonic() - begun


def real_trial(number: int, config: Path, reference: Path, length: float, report: Report) -> Iterator[str]:
    """Runs a search with tiny trainings; yields the problems."""

    def start(address: str, workdir: Path) -> Command:
        flags = (f"--gin_file={config}", f"--workdir={workdir}", f"--ray={address}", "--cpus=1")
        return Command("x3d_tf.expand", *flags, folder=config.parent, seconds=report.chosen.seconds)

    folder, rng = config.parent / f"real{number}", random.Random(f"{report.chosen.seed}/real{number}")
    moments = (rng.uniform(0, length), rng.uniform(0, 10))
    yield from trial(KINDS[number % len(KINDS)], moments, folder, "candidates/*.log", start, report)
    if scores(folder) != scores(reference):
        yield "the scores differ"
    if problem := difference_of_weights(folder / "found" / "model.keras", reference / "found" / "model.keras"):
        yield problem
    for log in folder.glob("candidates/*.log"):
        report.note("real trainings resumed from a checkpoint", log.read_text().count("resuming from the checkpoint"))


def main() -> None:
    """Runs the trials."""
    report = Report("kill_search", arguments(__doc__ or "", count=10, seconds=240, real=3))
    with scratch() as folder:
        from stub_trainings import SMALL_SEARCH, TINY, noise  # type: ignore[import-not-found]

        from x3d_tf.search.executor import SerialExecutor
        from x3d_tf.search.loop import run_search

        run_search(folder / "stub", SMALL_SEARCH, SerialExecutor(noise), TINY, num_classes=4)
        expected, length = scores(folder / "stub"), 0.0
        if report.chosen.count:
            length = stub_length(folder / "measured", report)
            print(f"an undisturbed search on Ray takes {length:.1f} s after its first step", flush=True)
        for number in range(report.chosen.count):
            problems = [*stub_trial(number, length, folder / f"search{number}", expected, report)]
            report.add(f"search{number}", "; ".join(problems) or None)
            shutil.rmtree(folder / f"search{number}", ignore_errors=True)
        if report.chosen.real:
            config, reference = folder / "tiny.gin", folder / "reference"
            settings = {**SETTINGS, "DatasetSpec.records": str(make_records(folder / "records"))}
            config.write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()))
            print("searching without interruption ...", flush=True)
            flags = (f"--gin_file={config}", f"--workdir={reference}", "--cpus=1", "--parallel=2")
            ended = run("x3d_tf.expand", *flags, folder=folder, seconds=240)
            if problem := problem_of(ended):
                raise SystemExit(f"the uninterrupted search: {problem}\n{ended.err[-2000:]}")
            length = max(
                line["seconds"] for line in map(json.loads, (reference / "trace.jsonl").open()) if "score" in line
            )
            print(f"took {ended.seconds:.0f} s, of which {length:.0f} s for the longer training", flush=True)
            for number in range(report.chosen.real):
                problems = [*real_trial(number, config, reference, length, report)]
                report.add(f"real{number}", "; ".join(problems) or None)
    report.close()


if __name__ == "__main__":
    main()
