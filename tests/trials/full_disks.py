"""Lets disks of five sizes fill up under training, building, prediction and export.

The disks are small tmpfs mounts, from a twentieth of what the command writes to nearly all of it, so root is needed;
without it the trial is skipped. Each command must end in one line that says so, and leave no half-written file under
its final name nor partial files. Then the disk is enlarged and the same command is given again: the result must equal
that of a large disk.

  python tests/trials/full_disks.py --count=5
  python tests/trials/full_disks.py --only=training      # or building, prediction, export
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from harness import (
    CLEANUPS,
    PAGE,
    Ended,
    Report,
    arguments,
    contents,
    difference_of_weights,
    half_written,
    make_records,
    make_videos,
    recipe,
    refused,
    run,
    save_model,
    scratch,
    succeeded,
)

CLASSES = 500  # of predictions, so that tables have many pages


@dataclass
class Operation:
    """A command that fills a disk.

    Attributes:
        words: the command line, given the folder on the disk.
        difference: where the folder is not as that of a large disk, given both; None where it is.
        half: what in a folder, after a failure, is not complete though it has its final name, given both.
        again: flags that the command needs to replace what it had finished.
    """

    words: Callable[[Path], tuple[str, ...]]
    difference: Callable[[Path, Path], str | None]
    half: Callable[[Path, Path], list[str]]
    again: tuple[str, ...] = ()


@contextmanager
def disk(folder: Path, size: int) -> Iterator[Callable[[int], Any]]:
    """A file system of so many bytes at a folder; gives the function that makes it larger."""
    folder.mkdir()
    size = max(size // PAGE, 2) * PAGE
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "trial", folder], check=True, capture_output=True)
    line = ["umount", "-l", str(folder)]
    CLEANUPS[id(line)] = partial(subprocess.run, line, check=False)
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    finally:
        CLEANUPS.pop(id(line))()


def may_mount(folder: Path) -> str | None:
    """Why no disks can be made here."""
    try:
        with disk(folder / "probe", 10**6):
            return None
    except (subprocess.CalledProcessError, OSError) as error:
        told = error.stderr if isinstance(error, subprocess.CalledProcessError) else b""
        return f"{error} {told.decode(errors='replace').strip()}"


def operations(folder: Path) -> dict[str, Operation]:
    """The commands; their inputs are made in `folder`."""
    config, videos = folder / "tiny.gin", folder / "videos"
    config.write_text(recipe(make_records(folder / "records"), steps=9, checkpoint=3))
    make_videos(videos, 6, splits=6)
    model = save_model(folder / "model.keras", CLASSES)
    splits = ",".join(f"split{number}" for number in range(6))
    return {
        "training": Operation(
            lambda out: ("x3d_tf.train", f"--gin_file={config}", f"--workdir={out}"),
            lambda out, whole: difference_of_weights(out / "model.keras", whole / "model.keras"),
            lambda out, whole: [],  # a checkpoint that was not complete would show when the run is resumed
        ),
        "building": Operation(
            lambda out: ("x3d_tf.build_records", f"--videos={videos}", f"--output={out}", f"--splits={splits}"),
            _difference_of_files,
            _other_files,
        ),
        "prediction": Operation(
            lambda out: (
                "x3d_tf.predict",
                f"--model={model}",
                *(f"--{kind}={out / name}" for kind, name in (("csv", "out.csv"), ("json", "out.json"))),
                f"--contact_sheet={out / 'out.png'}",
                "--overwrite",  # tables that are complete stay where the picture has no room
                str(videos),
            ),
            _difference_of_files,
            _other_files,
            ("--overwrite",),  # the tables are kept where only the picture did not fit
        ),
        "export": Operation(
            lambda out: ("export.saved_model", f"--model={model}", f"--output={out / 'mine'}"),
            lambda out, whole: None if contents(out).keys() == contents(whole).keys() else "files are missing",
            lambda out, whole: [*contents(out)],
        ),
    }


def _difference_of_files(out: Path, whole: Path) -> str | None:
    found, wanted = contents(out), contents(whole)
    differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    return f"{differing[:4]} differ" if differing else None


def _other_files(out: Path, whole: Path) -> list[str]:
    """Files with a final name whose content is not the final one; builds keep what they know in hidden ones."""
    found, wanted = contents(out), contents(whole)
    visible = [name for name in found if not name.startswith(".")]
    return [name for name in visible if name in wanted and found[name] != wanted[name] and name != "failures.csv"]


def attempt(report: Report, operation: Operation, mount: Path, whole: Path, share: float, need: int) -> str | None:
    """One disk of a share of what is needed."""

    def command(*more: str) -> Ended:
        words = operation.words(mount / "out")
        return run(*words, *more, folder=mount.parent, seconds=report.chosen.seconds, env={"TMPDIR": str(mount.parent)})

    with disk(mount, int(need * share)) as enlarge:
        first = command()
        if first.status == 0:
            report.note("disks that were large enough")
            return operation.difference(mount / "out", whole)
        if problem := refused(first):
            return f"{share:.0%} of the need: {problem}"
        if "space" not in first.last and "disk" not in first.last:
            return f"{share:.0%} of the need: the line does not say that the disk is full: {first.last[:300]}"
        if left := half_written(mount):
            return f"{share:.0%} of the need: {left} are left behind"
        if (mount / "out").exists() and (half := operation.half(mount / "out", whole)):
            return f"{share:.0%} of the need: {half} are half-written under their final names"
        enlarge(10 * need + 50_000_000)
        if problem := succeeded(command(*operation.again)):
            return f"{share:.0%} of the need, then enlarged: {problem}"
        if problem := operation.difference(mount / "out", whole):
            return f"{share:.0%} of the need, then enlarged: {problem}"
    return None


def main() -> None:
    """Runs the trials."""
    report = Report("full_disks", arguments(__doc__ or "", count=5, seconds=300))
    with scratch() as folder:
        if reason := may_mount(folder):
            print(f"skipped: disks of a size need a mount, which failed ({reason})")
            sys.exit(0)
        trials = []
        for name, operation in operations(folder).items():
            if report.chosen.only not in name:
                continue
            whole = folder / f"{name} whole" / "out"
            whole.parent.mkdir()
            print(f"{name} on a large disk ...", flush=True)
            ended = run(*operation.words(whole), folder=folder, seconds=report.chosen.seconds)
            if problem := succeeded(ended):
                report.add(f"{name} on a large disk", problem)
                continue
            need = sum(max(len(content), PAGE) for content in contents(whole).values())
            count = report.chosen.count
            for number in range(count):
                share = 0.05 + 0.9 * number / max(count - 1, 1)
                mount = folder / f"{name}{number}"
                trials.append((f"{name} {share:.0%}", partial(attempt, report, operation, mount, whole, share, need)))
        report.chosen.only = ""
        report.run(trials)
    report.close()


if __name__ == "__main__":
    main()
