"""Runs the commands of docs/kinetics.md, charades.md and small-sets.md on synthetic videos in the official formats.

The commands run as they are printed, in a folder in which the videos and lists have the names of the pages. Added to
those that train are clip size, batch, steps and frequency of checkpoints, and for Charades the factors of X3D-XS. The
network for Kinetics is X3D-XS with the paper's recipe. Charades and the small sets start from it.

  python tests/trials/published_data.py                # everything; takes an hour on two cores
  python tests/trials/published_data.py --size=0.02    # a few videos and steps, to try the script: no score is checked

A score must be twice that of a network that sees nothing. Run the same command again to continue after an interruption.
"""

import csv
import json
import shlex
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness import ROOT, Report, arguments, run, succeeded
from official_files import (
    CHARADES,
    KINETICS,
    write_charades,
    write_hmdb51,
    write_kinetics,
    write_something,
    write_ucf101,
)
from pages import commands

# Edits of the commands that train, by run folder.
CLIP = {"Expansion.gamma_tau": 5.0, "Expansion.gamma_t": 8, "Expansion.gamma_s": 0.5}  # 8 frames of 56 pixels
SHORT = {**CLIP, "Recipe.batch": 16, "Recipe.steps": 4, "Recipe.precise_bn_batches": 4, "TrainConfig.test_views": 1}
TWICE_THE_STRIDE = {**CLIP, "Expansion.gamma_tau": 10.0}
XS = {"Expansion.gamma_w": 1.0, "Expansion.gamma_b": 2.25, "Expansion.gamma_d": 2.2}
EDITS: dict[str, dict[str, Any]] = {
    "x3d_xs_kinetics400": {**CLIP, "Recipe.batch": 32, "Recipe.steps": 700},
    "x3d_m_kinetics400": SHORT,
    "x3d_m_pyslowfast": SHORT,
    "b0": SHORT,
    "charades_k400": {**TWICE_THE_STRIDE, **XS, "Recipe.steps": 500},
    "charades_k600": {**TWICE_THE_STRIDE, **XS, "Recipe.steps": 50},
    "charades_plateau": {**TWICE_THE_STRIDE, **XS, "Recipe.steps": 50, "TrainConfig.checkpoint_steps": 10},
    "hmdb51_1": {**CLIP, "Recipe.steps": 20},
    "something": {**CLIP, "Recipe.steps": 20},
    **{f"ucf101_{split}": {**CLIP, "Recipe.steps": 300} for split in (1, 2, 3)},
}
FEW = {"Recipe.steps": 4, "TrainConfig.test_views": 2}  # with --size below 1

XS_COMMANDS = (  # of the header of gin/kinetics400/x3d_xs.gin, and of a sentence of docs/kinetics.md
    "python -m x3d_tf.train --gin_file=gin/kinetics400/x3d_xs.gin --workdir=runs/x3d_xs_kinetics400",
    "python -m x3d_tf.evaluate --run=runs/x3d_xs_kinetics400 --crops=3 --head_pool=fixed_probabilities",
)
VIEWS = "10-LeftCenterRight"
REQUIRED = 2.0  # ratio of a score to that of a network that sees nothing


class Pages:
    """The trials, one for each page, in a folder with synthetic data."""

    def __init__(self, root: Path, report: Report) -> None:
        self.root, self.report, self.size = root, report, report.chosen.size
        root.mkdir(parents=True, exist_ok=True)
        if not (root / "gin").exists():
            (root / "gin").symlink_to(ROOT / "gin")

    def kinetics(self) -> str | None:
        """The page, with X3D-XS first."""
        counts = {"train": self.scaled(2100, 40), "validate": self.scaled(200, 20)}
        listed, missing, damaged = self.written("kinetics", partial(write_kinetics, self.root, counts))
        build, *others = commands("kinetics.md")
        if problem := self.run([build]):
            return problem
        with (self.root / "data" / "kinetics400" / "failures.csv").open(newline="") as file:
            reasons = [row[1] for row in list(csv.reader(file))[1:]]
        absent = sum("does not exist" in reason for reason in reasons)
        if (absent, len(reasons) - absent) != (missing, damaged):
            return f"failures.csv has {absent} missing and {len(reasons) - absent} damaged videos"
        self.report.notes["Kinetics: videos in the lists"] = f"{listed}, of which missing {missing}, damaged {damaged}"
        if problem := self.run([*XS_COMMANDS, *others]):
            return problem
        return self.scored("Kinetics", "runs/x3d_xs_kinetics400", "top1", 1 / len(KINETICS))

    def charades(self) -> str | None:
        """The page, from the network for Kinetics."""
        counts = {"train": self.scaled(320, 16), "test": self.scaled(100, 16)}
        share = self.written("charades", partial(write_charades, self.root, counts))
        self.link("x3d_xl_kinetics400", "x3d_xl_kinetics600")
        return self.run(commands("charades.md")) or self.scored("Charades", "runs/charades_k400", "map", share)

    def small_sets(self) -> str | None:
        """The page, with all three splits of UCF101."""
        clips = self.scaled(2, 1)
        self.written("ucf101", partial(write_ucf101, self.root, clips))
        self.written("hmdb51", partial(write_hmdb51, self.root, self.scaled(14, 7)))
        counts = {"train": self.scaled(40, 8), "validation": self.scaled(12, 8)}
        self.written("something", partial(write_something, self.root, counts))
        self.link("x3d_s_kinetics400")
        build, train, *others = commands("small-sets.md")
        records = "--gin_bindings='DatasetSpec.records=\"data/ucf101_{}\"'"  # as the page says
        splits = [[build, train]]
        for split in (2, 3):
            again = train.replace("ucf101_1", f"ucf101_{split}") + " " + records.format(split)
            splits.append([build.replace("list01", f"list0{split}").replace("ucf101_1", f"ucf101_{split}"), again])
        if problem := self.run([command for pair in splits for command in pair] + others):
            return problem
        scores = [self.results(f"runs/ucf101_{split}")["top1"] for split in (1, 2, 3)]
        table = (self.root / "reports" / "ucf101" / "comparison.md").read_text()
        mean = f"{100 * statistics.mean(scores):.1f}"
        if mean not in table.partition("| mean")[2]:
            return f"the table has no row with the mean, {mean}"
        return self.checked("UCF101, mean of three splits: top1", statistics.mean(scores), 1 / len(CHARADES))

    def scaled(self, full: int, least: int) -> int:
        """Returns a number of videos for --size."""
        return max(round(full * self.size), least)

    def written(self, name: str, write: Callable[[], Any]) -> Any:
        """Writes the videos and lists of a data set unless an earlier run did; returns what `write` returned."""
        facts = self.root / f"{name}.json"
        if not facts.exists():
            print(f"       writing the videos of {name}", flush=True)
            facts.write_text(json.dumps(write()))
        return json.loads(facts.read_text())

    def link(self, *names: str) -> None:
        """Makes the run of X3D-XS the one of which a page speaks; the small networks have weights of equal shapes."""
        for name in names:
            if not (self.root / "runs" / name).exists():
                (self.root / "runs" / name).symlink_to("x3d_xs_kinetics400")

    def run(self, lines: Sequence[str]) -> str | None:
        """Runs commands one after the other; returns the problem of the first that fails, or None."""
        for line in lines:
            words = shlex.split(line)[2:]
            if words[0] == "x3d_tf.train":
                workdir = next(word for word in words if word.startswith("--workdir="))
                settings = EDITS[Path(workdir).name] | (FEW if self.size < 1 else {})
                words += [f"--gin_bindings={name}={value}" for name, value in settings.items()]
            ended = run(*words, folder=self.root, seconds=self.report.chosen.seconds, megabytes=12_000)
            print(f"       {ended.seconds:5.0f} s  {line}", flush=True)
            if words[0] == "x3d_tf.evaluate":
                print(ended.out, flush=True)
            if problem := succeeded(ended):
                return f"{line}: {problem}"
        return None

    def results(self, folder: str) -> dict[str, Any]:
        """Returns the results of the report of a run with the most views."""
        files = (self.root / folder / "evaluation").glob("*/results.json")
        reports: list[dict[str, Any]] = [json.loads(file.read_text()) for file in files]
        return max(reports, key=lambda report: VIEWS in report["views"])

    def scored(self, name: str, folder: str, metric: str, blind: float) -> str | None:
        """Checks a score of a report with 30 views; `blind` is that of a network that sees nothing."""
        results = self.results(folder)
        if VIEWS not in results["views"]:
            return f"{folder} has no report with {VIEWS}"
        return self.checked(f"{name}, {results['views']}: {metric}", results[metric], blind)

    def checked(self, name: str, score: float, blind: float) -> str | None:
        """Notes a score beside that of a network that sees nothing; returns a problem if it is not far above it."""
        text = self.report.notes[name] = f"{100 * score:.1f} % (a network that sees nothing: {100 * blind:.1f} %)"
        return None if self.size < 1 or score >= REQUIRED * blind else f"{name} {text}"


def main() -> None:
    """Runs the trials."""
    folder = str(ROOT / "build" / "published_data")
    report = Report("published_data", arguments(__doc__ or "", count=1, seconds=3600.0, size=1.0, workdir=folder))
    pages = Pages(Path(report.chosen.workdir), report)
    for name in ("kinetics", "charades", "small_sets"):  # each needs the network of the first
        if report.chosen.only in name:
            report.add(name, getattr(pages, name)())
    report.close()


if __name__ == "__main__":
    main()
