"""Runs the commands of docs/kinetics.md, charades.md and small-sets.md on synthetic videos in the official formats.

The commands run as they are printed, in a folder in which the videos and lists have the names of the pages. Added to
those that train are clip size, batch, steps and frequency of checkpoints, and for Charades the factors of X3D-XS. The
network for Kinetics is X3D-XS with the paper's recipe. Charades and the small sets start from it. Scores must exceed
those of a network that does not see the order of frames, and for Charades twice the share of positives.

  python tests/trials/published_data.py                # everything; takes an hour on two cores
  python tests/trials/published_data.py --size=0.02    # a few videos and steps, to try the script: no score is checked

Run the same command again to continue after an interruption.
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

# Edits of the commands that train, by run folder. Recipe.steps counts steps of the batch of the recipe.
CLIP = {"Expansion.gamma_tau": 5.0, "Expansion.gamma_t": 8, "Expansion.gamma_s": 0.5}  # 8 frames of 56 pixels
SHORT = {**CLIP, "Recipe.batch": 16, "Recipe.steps": 1, "Recipe.precise_bn_batches": 4, "TrainConfig.test_views": 1}
TWICE_THE_STRIDE = {**CLIP, "Expansion.gamma_tau": 10.0}
XS = {"Expansion.gamma_w": 1.0, "Expansion.gamma_b": 2.25, "Expansion.gamma_d": 2.2}
EDITS: dict[str, dict[str, Any]] = {
    "x3d_xs_kinetics400": {**CLIP, "Recipe.batch": 32, "Recipe.steps": 11},  # of 2048 clips: 704 of 32
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
FEW = {"Recipe.steps": 1}  # with --size below 1

XS_RECIPE = "gin/kinetics400/x3d_xs.gin"  # its header has the first command, docs/kinetics.md the flags of the second
XS_COMMANDS = (
    f"python -m x3d_tf.train --gin_file={XS_RECIPE} --workdir=runs/x3d_xs_kinetics400",
    "python -m x3d_tf.evaluate --run=runs/x3d_xs_kinetics400 --crops=3 --head_pool=fixed_probabilities",
)
VIEWS = "10-LeftCenterRight"
FRAMES = 90  # of a clip of Kinetics
# A network that does not see the order of frames confuses up and down, and their diagonals: it reaches 0.75 and 0.6.
KINETICS_TOP1, UCF101_TOP1, CHARADES_RATIO = 0.85, 0.75, 2.0


class Pages:
    """The trials, one for each page, in a folder with synthetic data."""

    def __init__(self, report: Report) -> None:
        self.report, self.size = report, report.chosen.size
        self.root = Path(report.chosen.workdir) / f"size_{self.size:g}"
        (self.root / "runs").mkdir(parents=True, exist_ok=True)
        if not (self.root / "gin").exists():
            (self.root / "gin").symlink_to(ROOT / "gin")
        self.finished = self.root / "finished.txt"  # commands of earlier runs

    def kinetics(self) -> str | None:
        """The page, with X3D-XS first."""
        counts = {"train": self.scaled(2100, 60), "validate": self.scaled(200, 40)}
        listed, missing, damaged = self.written("kinetics", partial(write_kinetics, self.root, counts))
        build, *others = commands("kinetics.md")
        if XS_COMMANDS[0] not in (ROOT / XS_RECIPE).read_text():
            return f"the header of {XS_RECIPE} has another command"
        if problem := self.run([build]) or self.built(missing, damaged) or self.run([*XS_COMMANDS, *others]):
            return problem
        self.report.notes["Kinetics: videos in the lists"] = f"{listed}, of which missing {missing}, damaged {damaged}"
        return self.scored("Kinetics", "runs/x3d_xs_kinetics400", "top1", 1 / len(KINETICS), KINETICS_TOP1)

    def built(self, missing: int, damaged: int) -> str | None:
        """Compares failures.csv with the videos, and checks that segments of complete videos were cut out."""
        from x3d_tf.data.records.manifest import Manifest

        folder = self.root / "data" / "kinetics400"
        with (folder / "failures.csv").open(newline="") as file:
            reasons = [row[1] for row in list(csv.reader(file))[1:]]
        found = sum("does not exist" in reason for reason in reasons)
        if (found, len(reasons) - found) != (missing, damaged):
            return f"failures.csv has {found} missing and {len(reasons) - found} damaged videos"
        records = [record for split in Manifest.load(folder).splits.values() for record in split.records]
        lengths = {record.frames for record in records}
        return None if lengths == {FRAMES} else f"the records have {sorted(lengths)} frames"

    def charades(self) -> str | None:
        """The page, from the network for Kinetics."""
        counts = {"train": self.scaled(320, 40), "test": self.scaled(100, 16)}
        share = self.written("charades", partial(write_charades, self.root, counts))
        self.link("x3d_xl_kinetics400", "x3d_xl_kinetics600")
        problem = self.run(commands("charades.md"))
        return problem or self.scored("Charades", "runs/charades_k400", "map", share, CHARADES_RATIO * share)

    def small_sets(self) -> str | None:
        """The page, with all three splits of UCF101."""
        self.written("ucf101", partial(write_ucf101, self.root, self.scaled(2, 1)))
        self.written("hmdb51", partial(write_hmdb51, self.root, self.scaled(14, 7)))
        counts = {"train": self.scaled(40, 24), "validation": self.scaled(12, 8)}
        self.written("something", partial(write_something, self.root, counts))
        self.link("x3d_s_kinetics400")
        build, train, *others = commands("small-sets.md")
        (evaluate,) = (line for line in others if "--crops=3" in line)
        lines = [build, train, evaluate]
        for split in (2, 3):
            records = f"--gin_bindings='DatasetSpec.records=\"data/ucf101_{split}\"'"  # as the page says
            lines.append(build.replace("list01", f"list0{split}").replace("ucf101_1", f"ucf101_{split}"))
            lines.append(f"{train.replace('ucf101_1', f'ucf101_{split}')} {records}")
            lines.append(evaluate.replace("ucf101_1", f"ucf101_{split}"))
        if problem := self.run([*lines, *(line for line in others if line != evaluate)]):
            return problem
        mean = statistics.mean(self.results(f"runs/ucf101_{split}")["top1"] for split in (1, 2, 3))
        with (self.root / "reports" / "ucf101" / "comparison.csv").open(newline="") as file:
            means = [row for row in csv.DictReader(file) if row["report"] == "mean"]
        found = [row["top-1"] for row in means if row["views"] == VIEWS]
        if len(means) != 2 or found != [f"{100 * mean:.1f}"]:  # one for the report of the training, with 10 views
            return f"the table must have two means, that of 30 views {100 * mean:.1f}, got {means}"
        name = "UCF101, mean of three splits, 30 views: top1"
        return self.checked(name, mean, 1 / len(CHARADES), UCF101_TOP1)

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
        """Makes the run of X3D-XS the one of which a page speaks; X3D-S has weights of the same shapes."""
        for name in names:
            link = self.root / "runs" / name
            if not link.is_symlink():
                link.symlink_to("x3d_xs_kinetics400")

    def run(self, lines: Sequence[str]) -> str | None:
        """Runs the commands that have not finished in an earlier run; returns the problem of the first that fails."""
        done = self.finished.read_text().splitlines() if self.finished.exists() else []
        for line in lines:
            if line in done:
                continue
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
            with self.finished.open("a") as file:
                file.write(f"{line}\n")
        return None

    def results(self, folder: str) -> dict[str, Any]:
        """Returns the results of the report of a run, of the one with three crops if there are two."""
        files = (self.root / folder / "evaluation").glob("*/results.json")
        reports: list[dict[str, Any]] = [json.loads(file.read_text()) for file in files]
        return max(reports, key=lambda report: VIEWS in report["views"])

    def scored(self, name: str, folder: str, metric: str, chance: float, required: float) -> str | None:
        """Checks a score of a report with 30 views."""
        results = self.results(folder)
        if VIEWS not in results["views"]:
            return f"{folder} has no report with {VIEWS}"
        return self.checked(f"{name}, {results['views']}: {metric}", results[metric], chance, required)

    def checked(self, name: str, score: float, chance: float, required: float) -> str | None:
        """Notes a score beside that of chance; returns a problem if it is below the required one."""
        text = self.report.notes[name] = f"{100 * score:.1f} % (chance {100 * chance:.1f} %)"
        failed = self.size == 1 and score < required
        return f"{name} is {text}, below {100 * required:.1f} %" if failed else None


def main() -> None:
    """Runs the trials."""
    folder = str(ROOT / "build" / "published_data")
    report = Report("published_data", arguments(__doc__ or "", count=1, seconds=3600.0, size=1.0, workdir=folder))
    pages = Pages(report)
    for name in ("kinetics", "charades", "small_sets"):  # the others start from the network of the first
        if report.chosen.only in name:
            try:
                problem = getattr(pages, name)()
            except Exception as error:
                problem = f"the trial itself ended with {error!r}"
            report.add(name, problem)
    report.close()


if __name__ == "__main__":
    main()
