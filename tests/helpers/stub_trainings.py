"""Trainings of a search without TensorFlow, for tests and trials of its executors."""

import hashlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from x3d_tf.files import WriteError
from x3d_tf.modeling.expansion import Expansion
from x3d_tf.search.candidates import Candidate, Score
from x3d_tf.search.config import ExpandConfig

TINY = Expansion(gamma_tau=1.0, gamma_t=1, gamma_s=32 / 112, gamma_d=0.2)
SMALL_SEARCH = ExpandConfig(budget_gmacs=1.0, axes=("depth", "width"), max_steps=2)  # 2 x 2 candidates


def noise(candidate: Candidate) -> Score:
    """Returns a score that only depends on the candidate; one in eight fails."""
    identity = repr((candidate.network, candidate.seed, candidate.share))
    value = int(hashlib.sha256(identity.encode()).hexdigest()[:8], 16) / 2**32
    if value < 1 / 8:
        return Score(None, seconds=0.5, reason=f"no memory for {candidate.axis} \ud800 'é'\n")
    return Score(value, standard_error=0.01, seconds=1 / 3, training=value / 3)


@dataclass(frozen=True)
class Steps:
    """A training of a few steps with a checkpoint after each: a line, with the process id, in a file `NAME.steps`.

    While there is a file `hold` beside the work folder, no training goes beyond its first step.

    Attributes:
        folder: the work folder.
        steps: number of steps.
        seconds: duration of a step.
        failing: axes that do something else in the first step: a signal, "write" or "raise".
    """

    folder: Path
    steps: int = 4
    seconds: float = 0.05
    failing: tuple[tuple[str, str], ...] = ()

    def __call__(self, candidate: Candidate) -> Score:
        action = dict(self.failing).get(candidate.axis, "")
        print(f"training {candidate.axis}", flush=True)
        if action.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, action))
            time.sleep(60)
        if action == "write":
            raise WriteError("checkpoint cannot be written: No space left on device")
        if action == "raise":
            raise ValueError(f"no {candidate.axis}")
        while (done := self.progress(candidate)) < self.steps:
            while done and (self.folder.parent / "hold").exists():
                time.sleep(0.02)
            time.sleep(self.seconds)
            with self._file(candidate).open("a") as file:
                file.write(f"{os.getpid()}\n")
        return noise(candidate)

    def log(self, candidate: Candidate) -> Path:
        return self._file(candidate).with_suffix(".log")

    def progress(self, candidate: Candidate) -> int:
        path = self._file(candidate)
        return len(path.read_text().split()) if path.exists() else 0

    def _file(self, candidate: Candidate) -> Path:
        folder = self.folder / "candidates"
        folder.mkdir(parents=True, exist_ok=True)
        kind = "c" if candidate.network.contracts else ""
        return folder / f"step{candidate.step:02}{kind}_{candidate.axis}_seed{candidate.seed}.steps"
