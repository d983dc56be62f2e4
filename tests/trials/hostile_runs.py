"""Resumes and evaluates untrusted run folders: no file outside may change, no code may be executed, nothing may hang.

A tiny run is trained once and cut back to its second-last checkpoint. Each trial manipulates a copy of it, with canary
files outside, and resumes it. The canaries must not change. If the run's own files are intact, the final weights must
equal those of the original run; if files are missing, an error must report it and history.csv must be kept. --count
limits the number of trials.

  python tests/trials/hostile_runs.py
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from harness import (
    Ended,
    Report,
    arguments,
    contents,
    copy,
    difference_of_weights,
    half_written,
    make_records,
    recipe,
    refused,
    run,
    scratch,
    succeeded,
)

STEPS, EVERY = 9, 3
DATA = ".data-00000-of-00001"
Change = Callable[[Path, Path], Any]  # manipulates a run folder; the second argument is the folder of canaries


def outside(folder: Path) -> Path:
    """Creates and returns the folder of canaries, whose names look like checkpoints."""
    for name in ("canary.index", "canary.data-00000-of-00001", "canary", "ckpt-1.index", "ckpt-1.data-00000-of-00001"):
        path = folder / "canaries" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"canary {name}\n")
    (folder / "canaries" / "folder").mkdir()
    (folder / "canaries" / "folder" / "file").write_text("canary\n")
    return folder / "canaries"


def listed(*names: str) -> Change:
    """Lists further files in `checkpoints/checkpoint`; {canaries} stands for the folder of canaries."""

    def change(workdir: Path, canaries: Path) -> None:
        newest = f"ckpt-{STEPS - EVERY}"
        lines = [f'model_checkpoint_path: "{newest}"']
        lines += [f'all_model_checkpoint_paths: "{name.format(canaries=canaries)}"' for name in (*names, newest)]
        (workdir / "checkpoints" / "checkpoint").write_text("\n".join(lines) + "\n")

    return change


def written(name: str, content: bytes) -> Change:
    return lambda workdir, _: (workdir / name).write_bytes(content)


def removed(*patterns: str) -> Change:
    def change(workdir: Path, _: Path) -> None:
        for pattern in patterns:
            for path in workdir.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def replaced_by_folder(name: str) -> Change:
    def change(workdir: Path, _: Path) -> None:
        (workdir / name).unlink()
        (workdir / name).mkdir()

    return change


def linked(name: str, target: str) -> Change:
    """Replaces a file or folder of the run by a symbolic link."""

    def change(workdir: Path, canaries: Path) -> None:
        path = workdir / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(canaries / target)

    return change


# After these changes the run must end with the same result.
RESUMES: dict[str, Change] = {
    "nothing changed": lambda *_: None,
    "list of absolute paths": listed("{canaries}/canary", "{canaries}/ckpt-1"),
    "list of relative paths": listed("../../canaries/canary", "../../canaries/ckpt-1"),
    "list of wildcards": listed("{canaries}/*", "{canaries}/c", "../../canaries/can*", "../*"),
    "list of its own folder": listed("", ".", "..", "../history.csv"),
    "list of 100,000": listed(*(f"ckpt-{number}" for number in range(100_000))),
    "list of garbage": written("checkpoints/checkpoint", os.urandom(5000)),
    "empty list": written("checkpoints/checkpoint", b""),
    "list without an end": written("checkpoints/checkpoint", b'model_checkpoint_path: "' + b"a" * 10_000_000),
    "no list": removed("checkpoints/checkpoint"),
    "a temporary checkpoint": lambda workdir, _: (workdir / "checkpoints" / "ckpt-12_temp").mkdir(),
    "a third checkpoint without data": written("checkpoints/ckpt-1000.index", b"x"),
    "odd names of checkpoints": lambda workdir, _: [
        (workdir / "checkpoints" / f"ckpt-{name}.index").write_bytes(b"x")
        for name in ("", "-1", "1e9", "٣", "9" * 200, "6.index")
    ],
    **{
        f"checkpoints/{name} is a link outside": linked(f"checkpoints/{name}", target)
        for name, target in {
            "ckpt-3.index": "canary",
            f"ckpt-3{DATA}": "canary",
            ".partial-ckpt.index": "canary",
            f".partial-ckpt{DATA}": "canary",
            ".partial-ckpt_temp": "folder",
            "ckpt-9_temp": "folder",
            "ckpt-9.index": "missing",
            f"ckpt-9{DATA}": "canary",
        }.items()
    },
    "tensorboard is a link outside": linked("tensorboard", "folder"),
    "evaluation is a link outside": linked("evaluation", "folder"),
}

# After these changes the command must report an error and keep history.csv.
REJECTED: dict[str, Change] = {
    **{
        f"{name} is a link outside": linked(name, "canary")
        for name in (
            ".history.csv.partial",
            ".input.json.partial",
            ".best.partial.keras",
            ".model.partial.keras",
            ".curves.png.partial",
            "curves.png",
            "labels.txt",
            "input.json",
            "trained.txt",
            ".lock",
        )
    },
    "both indexes are missing": removed("checkpoints/*.index"),
    "the folder of checkpoints is missing": removed("checkpoints"),
    "checkpoints is a link outside": linked("checkpoints", "folder"),
    "all data is missing": removed("checkpoints/*.data-*"),
    "all checkpoints are garbage": lambda workdir, _: [
        path.write_bytes(os.urandom(1000)) for path in (workdir / "checkpoints").glob("ckpt-*")
    ],
    "config.json is nested": written("config.json", b"[" * 100_000),
    "config.json is not JSON": written("config.json", b"\x00\xff\x1b[2J"),
    "config.json is endless": linked("config.json", "../../../../../../../../dev/zero"),
    "config.json has a number of 10,000 digits": lambda workdir, _: (workdir / "config.json").write_text(
        (workdir / "config.json").read_text().replace('"Recipe.steps": 9', '"Recipe.steps": ' + "9" * 10_000)
    ),
    "config.json is a folder": replaced_by_folder("config.json"),
}


def train(report: Report, config: Path, workdir: Path) -> Ended:
    words = (f"--gin_file={config}", f"--workdir={workdir}")
    return run("x3d_tf.train", *words, folder=config.parent, seconds=report.chosen.seconds, megabytes=2500)


def attempt(report: Report, folder: Path, reference: Path, cut: Path, change: Change, resumes: bool) -> str | None:
    """Changes a copy of the run and resumes it."""
    folder.mkdir()
    canaries, workdir = outside(folder), copy(cut, folder / "runs" / "evil")
    change(workdir, canaries)
    before = contents(canaries)
    history = (workdir / "history.csv").read_bytes()
    ended = train(report, cut.parent / "tiny.gin", workdir)
    after = contents(canaries)
    # links of tensorboard and evaluation to other disks are allowed, so new files there are expected
    new = [name for name in after if name not in before and not (resumes and name.startswith("folder/"))]
    if harmed := sorted(name for name in before if after.get(name) != before[name]) + new:
        deleted = [name for name in harmed if name not in after]
        return f"FILES OUTSIDE WERE CHANGED: {harmed}; deleted: {deleted}; new: {new}"
    if not resumes:
        unchanged = (workdir / "history.csv").is_file() and (workdir / "history.csv").read_bytes() == history
        return refused(ended) or (None if unchanged else "history.csv has changed")
    if problem := succeeded(ended):
        return problem
    if "from the checkpoint of step" not in ended.out:
        return "trained from scratch"
    if left := half_written(workdir):
        return f"{left} were left behind"
    return difference_of_weights(workdir / "model.keras", reference / "model.keras")


def evaluations(folder: Path, reference: Path) -> Iterator[tuple[str, Path]]:
    """Yields finished run folders that evaluation must reject."""
    settings = json.loads((reference / "config.json").read_text())
    changes: dict[str, Any] = {
        "a wrong type": {**settings, "Recipe.steps": "x\x1b[2J"},
        "an unknown setting": {**settings, "Evil.setting": 1},
        "clips of a million frames": {**settings, "Expansion.gamma_t": 10**6},
        "records that are a device": {**settings, "DatasetSpec.records": "/dev/zero"},
        "no views": {**settings, "TrainConfig.test_views": 0},
        "a list": [],
    }
    for number, (name, content) in enumerate(changes.items()):
        workdir = copy(reference, folder / f"evaluated{number}")
        shutil.rmtree(workdir / "evaluation", ignore_errors=True)
        (workdir / "config.json").write_text(json.dumps(content))
        yield name, workdir


def main() -> None:
    """Runs the trials."""
    report = Report("hostile_runs", arguments(__doc__ or "", count=1000, seconds=240))
    with scratch() as folder:
        config, reference = folder / "tiny.gin", folder / "reference"
        config.write_text(recipe(make_records(folder / "records"), steps=STEPS, checkpoint=EVERY))
        print("training a tiny run ...", flush=True)
        if problem := succeeded(train(report, config, reference)):
            raise SystemExit(problem)
        cut = copy(reference, folder / "cut")
        for pattern in ("model.keras", f"checkpoints/ckpt-{STEPS}.*", "evaluation", "labels.txt", "input.json"):
            removed(pattern)(cut, cut)
        kinds = [(RESUMES, True), (REJECTED, False)]
        named = [(name, change, resumes) for changes, resumes in kinds for name, change in changes.items()]
        trials = [
            (name, partial(attempt, report, folder / str(number), reference, cut, change, resumes))
            for number, (name, change, resumes) in enumerate(named)
        ]
        for name, workdir in evaluations(folder, reference):
            words = ("x3d_tf.evaluate", f"--run={workdir}")
            limits: dict[str, Any] = {"folder": folder, "seconds": 60, "megabytes": 2500}
            trials.append(
                (f"evaluate with {name}", partial(lambda words, limits: refused(run(*words, **limits)), words, limits))
            )
        report.run(trials[: report.chosen.count])
    report.close()


if __name__ == "__main__":
    main()
