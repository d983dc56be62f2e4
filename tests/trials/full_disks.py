"""Fills up disks of five sizes during training, record building, prediction and export.

The disks are tmpfs mounts of 5 % to 95 % of the space that the command needs. Mounting requires root; without it the
trial is skipped. Each command must fail with a one-line error about the disk, and leave no partial file and no
incomplete file under its final name. Then the disk is enlarged and the same command runs again: the result must equal
that on a large disk.

  python tests/trials/full_disks.py --count=5
  python tests/trials/full_disks.py --only=training      # or building, prediction or export
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

CLASSES = 500  # many, so that prediction tables take many pages of memory


@dataclass
class Operation:
    """A command that fills a disk.

    Attributes:
        words: function that returns the command line for a folder on the disk.
        difference: function that compares the folder with that on a large disk; returns a message, or None if equal.
        half: function that returns the incomplete files with final names in the folder, after a failure.
        again: flags for the second attempt, to replace finished files.
    """

    words: Callable[[Path], tuple[str, ...]]
    difference: Callable[[Path, Path], str | None]
    half: Callable[[Path, Path], list[str]]
    again: tuple[str, ...] = ()


@contextmanager
def disk(folder: Path, size: int) -> Iterator[Callable[[int], Any]]:
    """Mounts a file system of `size` bytes at a folder; yields a function that enlarges it."""
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
    """Returns the reason why file systems cannot be mounted, or None."""
    try:
        with disk(folder / "probe", 10**6):
            return None
    except (subprocess.CalledProcessError, OSError) as error:
        stderr = error.stderr if isinstance(error, subprocess.CalledProcessError) else b""
        return f"{error} {stderr.decode(errors='replace').strip()}"


def operations(folder: Path) -> dict[str, Operation]:
    """Creates the inputs of the commands in `folder` and returns the commands by name."""
    config, videos = folder / "tiny.gin", folder / "videos"
    config.write_text(recipe(make_records(folder / "records"), steps=9, checkpoint=3))
    make_videos(videos, 6, splits=6)
    model = save_model(folder / "model.keras", CLASSES)
    splits = ",".join(f"split{number}" for number in range(6))
    return {
        "training": Operation(
            lambda out: ("x3d_tf.train", f"--gin_file={config}", f"--workdir={out}"),
            lambda out, reference: difference_of_weights(out / "model.keras", reference / "model.keras"),
            lambda out, reference: [],  # resuming the run would reveal an incomplete checkpoint
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
                "--overwrite",  # complete tables are kept if only the contact sheet fails
                str(videos),
            ),
            _difference_of_files,
            _other_files,
            ("--overwrite",),  # replaces tables that were complete
        ),
        "export": Operation(
            lambda out: ("export.saved_model", f"--model={model}", f"--output={out / 'mine'}"),
            lambda out, reference: None if contents(out).keys() == contents(reference).keys() else "files are missing",
            lambda out, reference: [*contents(out)],
        ),
    }


def _difference_of_files(out: Path, reference: Path) -> str | None:
    actual, expected = contents(out), contents(reference)
    differing = sorted(name for name in actual.keys() | expected.keys() if actual.get(name) != expected.get(name))
    return f"{differing[:4]} differ" if differing else None


def _other_files(out: Path, reference: Path) -> list[str]:
    """Returns files whose name is final but whose content is not; builds keep their state in hidden files."""
    actual, expected = contents(out), contents(reference)
    visible = [name for name in actual if not name.startswith(".")]
    return [name for name in visible if name in expected and actual[name] != expected[name] and name != "failures.csv"]


def attempt(report: Report, operation: Operation, mount: Path, reference: Path, share: float, need: int) -> str | None:
    """Runs one trial on a disk with a fraction of the space that the command needs."""

    def command(*more: str) -> Ended:
        words = operation.words(mount / "out")
        return run(*words, *more, folder=mount.parent, seconds=report.chosen.seconds, env={"TMPDIR": str(mount.parent)})

    with disk(mount, int(need * share)) as enlarge:
        first = command()
        if first.status == 0:
            report.note("disks that were large enough")
            return operation.difference(mount / "out", reference)
        if problem := refused(first):
            return f"{share:.0%} of the need: {problem}"
        if "space" not in first.last and "disk" not in first.last:
            return f"{share:.0%} of the need: the error does not report a full disk: {first.last[:300]}"
        if left := half_written(mount):
            return f"{share:.0%} of the need: {left} were left behind"
        if (mount / "out").exists() and (half := operation.half(mount / "out", reference)):
            return f"{share:.0%} of the need: {half} are incomplete under their final names"
        enlarge(10 * need + 50_000_000)
        if problem := succeeded(command(*operation.again)):
            return f"{share:.0%} of the need, then enlarged: {problem}"
        if problem := operation.difference(mount / "out", reference):
            return f"{share:.0%} of the need, then enlarged: {problem}"
    return None


def main() -> None:
    """Runs the trials."""
    report = Report("full_disks", arguments(__doc__ or "", count=5, seconds=300))
    with scratch() as folder:
        if reason := may_mount(folder):
            print(f"skipped: mounting a tmpfs failed ({reason})")
            sys.exit(0)
        trials = []
        for name, operation in operations(folder).items():
            if report.chosen.only not in name:
                continue
            reference = folder / f"{name} reference" / "out"
            reference.parent.mkdir()
            print(f"{name} on a large disk ...", flush=True)
            ended = run(*operation.words(reference), folder=folder, seconds=report.chosen.seconds)
            if problem := succeeded(ended):
                report.add(f"{name} on a large disk", problem)
                continue
            need = sum(max(len(content), PAGE) for content in contents(reference).values())
            count = report.chosen.count
            for number in range(count):
                share = 0.05 + 0.9 * number / max(count - 1, 1)
                mount = folder / f"{name}{number}"
                trials.append(
                    (f"{name} {share:.0%}", partial(attempt, report, operation, mount, reference, share, need))
                )
        report.chosen.only = ""
        report.run(trials)
    report.close()


if __name__ == "__main__":
    main()
