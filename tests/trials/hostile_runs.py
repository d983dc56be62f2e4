"""Resumes and evaluates run folders that came from someone else: no file outside may change, nothing may run or hang.

A tiny run is trained once and cut back to before its last checkpoint; each trial changes a copy, with canary files
outside, and gives the same command again. The canaries must survive unchanged. A run whose own files are intact must
end with the weights that it had; where something is missing, an error must say so and history.csv must stay. --count
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
Change = Callable[[Path, Path], Any]  # of a run folder, given that of the canaries


def outside(folder: Path) -> Path:
    """The folder of canaries, with names that checkpoints have."""
    for name in ("canary.index", "canary.data-00000-of-00001", "canary", "ckpt-1.index", "ckpt-1.data-00000-of-00001"):
        path = folder / "canaries" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"canary {name}\n")
    (folder / "canaries" / "folder").mkdir()
    (folder / "canaries" / "folder" / "file").write_text("canary\n")
    return folder / "canaries"


def listed(*names: str) -> Change:
    """The text `checkpoints/checkpoint` that lists further files, with {canaries} for their folder."""

    def change(workdir: Path, canaries: Path) -> None:
        own = f"ckpt-{STEPS - EVERY}"
        lines = [f'model_checkpoint_path: "{own}"']
        lines += [f'all_model_checkpoint_paths: "{name.format(canaries=canaries)}"' for name in (*names, own)]
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
    """A link in place of a file or folder of the run."""

    def change(workdir: Path, canaries: Path) -> None:
        path = workdir / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(canaries / target)

    return change


# after these the run ends as if nothing had been
RESUMES: dict[str, Change] = {
    "nothing changed": lambda *_: None,
    "list of absolute paths": listed("{canaries}/canary", "{canaries}/ckpt-1"),
    "list of relative paths": listed("../../canaries/canary", "../../canaries/ckpt-1"),
    "list of wildcards": listed("{canaries}/*", "{canaries}/c", "../../canaries/can*", "../*"),
    "list of its own folder": listed("", ".", "..", "../history.csv"),
    "list of 100,000": listed(*(f"ckpt-{number}" for number in range(100_000))),
    "list of garbage": written("checkpoints/checkpoint", os.urandom(5000)),
    "list of nothing": written("checkpoints/checkpoint", b""),
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

# these end in an error, and history.csv stays
REFUSED: dict[str, Change] = {
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
    "both indexes are gone": removed("checkpoints/*.index"),
    "the folder of checkpoints is gone": removed("checkpoints"),
    "checkpoints is a link outside": linked("checkpoints", "folder"),
    "all data is gone": removed("checkpoints/*.data-*"),
    "all checkpoints are garbage": lambda workdir, _: [
        path.write_bytes(os.urandom(1000)) for path in (workdir / "checkpoints").glob("ckpt-*")
    ],
    "config.json is nested": written("config.json", b"[" * 100_000),
    "config.json is no JSON": written("config.json", b"\x00\xff\x1b[2J"),
    "config.json is endless": linked("config.json", "../../../../../../../../dev/zero"),
    "config.json has a number of 10,000 digits": lambda workdir, _: (workdir / "config.json").write_text(
        (workdir / "config.json").read_text().replace('"Recipe.steps": 9', '"Recipe.steps": ' + "9" * 10_000)
    ),
    "config.json is a folder": replaced_by_folder("config.json"),
}


def train(report: Report, config: Path, workdir: Path) -> Ended:
    words = (f"--gin_file={config}", f"--workdir={workdir}")
    return run("x3d_tf.train", *words, folder=config.parent, seconds=report.chosen.seconds, megabytes=2500)


def attempt(report: Report, folder: Path, whole: Path, cut: Path, change: Change, resumes: bool) -> str | None:
    """One changed copy, resumed."""
    folder.mkdir()
    canaries, workdir = outside(folder), copy(cut, folder / "runs" / "evil")
    change(workdir, canaries)
    before = contents(canaries)
    history = (workdir / "history.csv").read_bytes()
    ended = train(report, cut.parent / "tiny.gin", workdir)
    after = contents(canaries)
    # tensorboard and evaluation may lie on another disk: what is new there the run was told to write
    new = [name for name in after if name not in before and not (resumes and name.startswith("folder/"))]
    if harmed := sorted(name for name in before if after.get(name) != before[name]) + new:
        gone = [name for name in harmed if name not in after]
        return f"FILES OUTSIDE WERE HARMED: {harmed}, of which {gone} are gone and {new} are new"
    if not resumes:
        kept = (workdir / "history.csv").is_file() and (workdir / "history.csv").read_bytes() == history
        return refused(ended) or (None if kept else "history.csv is not what it was")
    if problem := succeeded(ended):
        return problem
    if "from the checkpoint of step" not in ended.out:
        return "trained from the start"
    if left := half_written(workdir):
        return f"{left} are left behind"
    return difference_of_weights(workdir / "model.keras", whole / "model.keras")


def evaluations(folder: Path, whole: Path) -> Iterator[tuple[str, Path]]:
    """Finished run folders that evaluation must refuse."""
    settings = json.loads((whole / "config.json").read_text())
    changes: dict[str, Any] = {
        "a wrong type": {**settings, "Recipe.steps": "x\x1b[2J"},
        "an unknown setting": {**settings, "Evil.setting": 1},
        "clips of a million frames": {**settings, "Expansion.gamma_t": 10**6},
        "records that are a device": {**settings, "DatasetSpec.records": "/dev/zero"},
        "no views": {**settings, "TrainConfig.test_views": 0},
        "a list": [],
    }
    for number, (name, content) in enumerate(changes.items()):
        workdir = copy(whole, folder / f"evaluated{number}")
        shutil.rmtree(workdir / "evaluation", ignore_errors=True)
        (workdir / "config.json").write_text(json.dumps(content))
        yield name, workdir


def main() -> None:
    """Runs the trials."""
    report = Report("hostile_runs", arguments(__doc__ or "", count=1000, seconds=240))
    with scratch() as folder:
        config, whole = folder / "tiny.gin", folder / "whole"
        config.write_text(recipe(make_records(folder / "records"), steps=STEPS, checkpoint=EVERY))
        print("training a tiny run ...", flush=True)
        if problem := succeeded(train(report, config, whole)):
            raise SystemExit(problem)
        cut = copy(whole, folder / "cut")
        for pattern in ("model.keras", f"checkpoints/ckpt-{STEPS}.*", "evaluation", "labels.txt", "input.json"):
            removed(pattern)(cut, cut)
        kinds = [(RESUMES, True), (REFUSED, False)]
        named = [(name, change, resumes) for changes, resumes in kinds for name, change in changes.items()]
        trials = [
            (name, partial(attempt, report, folder / str(number), whole, cut, change, resumes))
            for number, (name, change, resumes) in enumerate(named)
        ]
        for name, workdir in evaluations(folder, whole):
            words = ("x3d_tf.evaluate", f"--run={workdir}")
            limits: dict[str, Any] = {"folder": folder, "seconds": 60, "megabytes": 2500}
            trials.append(
                (f"evaluate with {name}", partial(lambda words, limits: refused(run(*words, **limits)), words, limits))
            )
        report.run(trials[: report.chosen.count])
    report.close()


if __name__ == "__main__":
    main()
