"""Compares multigrid training with the plain schedule: steps, time and accuracy for the same clips.

  python benchmarks/multigrid.py --workdir=runs/multigrid              # 20 minutes on two cores
  python benchmarks/multigrid.py --workdir=runs/multigrid --seeds=5

Trains the network of X3D-S on clips of 8 x 96² of the synthetic data set moving_shapes, in turns with both schedules.
Each training is a process of its own, without validation. Its time is that of the training steps, with the time that
compilation takes. Top-1 is that of the 100 test videos, one clip each. Run the same command again to continue after an
interruption.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command import positive, run

from x3d_tf import gin_config
from x3d_tf.data.datasets.spec import open_dataset
from x3d_tf.errors import require
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.training.multigrid import phases_of

SCHEDULES = ("none", "long")  # values of Recipe.multigrid
SETTINGS: Mapping[str, Any] = {
    "Expansion.gamma_tau": 5.0,
    "Expansion.gamma_t": 8,
    "Expansion.gamma_s": 96 / 112,
    "Recipe.schedule": "steps",
    "Recipe.decay_fractions": (0.393, 0.644, 0.82),  # those of PySlowFast for SlowFast with multigrid training
    "TrainConfig.test_views": 1,
}


@dataclass(frozen=True)
class Training:
    """A finished training.

    Attributes:
        schedule: value of Recipe.multigrid.
        seed: its seed.
        steps: number of steps.
        shapes: number of input shapes.
        seconds: time of the training steps, with compilation.
        top1: share of the test videos whose class is predicted.
    """

    schedule: str
    seed: int
    steps: int
    shapes: int
    seconds: float
    top1: float


def main() -> None:
    """Trains and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the records and the trainings")
    parser.add_argument("--seeds", type=positive, default=2, help="trainings with each schedule. Defaults to 2")
    parser.add_argument("--steps", type=positive, default=640, help="plain steps of 8 clips. Defaults to 640")
    settings = parser.parse_args()
    records = settings.workdir / "records"
    trainings = []
    for seed in range(settings.seeds):
        for schedule in SCHEDULES:
            varied = {
                "DatasetSpec.records": str(records),
                "Recipe.steps": settings.steps,
                "Recipe.multigrid": schedule,
                "TrainConfig.seed": seed,
            }
            bindings = [f"{name}={value!r}" for name, value in {**SETTINGS, **varied}.items()]
            trainings.append(train(bindings, settings.workdir / f"{schedule}_{seed}"))
    print("\n".join(table(trainings)))


def train(bindings: Sequence[str], folder: Path) -> Training:
    """Trains in another process, unless an earlier one finished, and returns the figures of the run folder."""
    config = gin_config.parse(["gin/x3d_s.gin"], bindings).config
    open_dataset(config.dataset)  # generates the videos, which is not measured
    run_folder = RunFolder(folder)
    if not [*run_folder.evaluations.glob("*/results.json")]:
        command = [sys.executable, "-m", "x3d_tf.train", "--gin_file=gin/x3d_s.gin", f"--workdir={folder}"]
        subprocess.run([*command, *(f"--gin_bindings={binding}" for binding in bindings)], check=True)
    require(run_folder.read_config() == config, "--workdir", "have no trainings with other settings", folder)
    (results,) = run_folder.evaluations.glob("*/results.json")
    phases = phases_of(config)
    rows = run_folder.read_history(["top1"], [])
    seen = [0, *(phases.plain_steps(row["step"]) * config.recipe.batch for row in rows)]
    seconds = sum(
        (after - before) / row["clips_per_second"] for row, (before, after) in zip(rows, itertools.pairwise(seen))
    )
    return Training(
        config.recipe.multigrid,
        config.seed,
        phases.steps,
        len(phases.clips),
        seconds,
        json.loads(results.read_text())["top1"],
    )


def table(trainings: Sequence[Training]) -> list[str]:
    """Returns the lines of a table with one row for each training, and the ratio of the times."""
    lines = ["| multigrid | seed | steps | input shapes | seconds | top-1 |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row.schedule} | {row.seed} | {row.steps} | {row.shapes} | {row.seconds:.0f} | {row.top1:.1%} |"
        for row in trainings
    ]
    plain, long = ([row for row in trainings if row.schedule == name] for name in SCHEDULES)
    ratios = [before.seconds / after.seconds for before, after in zip(plain, long, strict=True)]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return [*lines, "", f"multigrid training is {statistics.median(ratios):.2f} times as fast ({spread})"]


if __name__ == "__main__":
    run(main)
