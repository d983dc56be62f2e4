"""Trainings that processes on several machines divide among themselves through files. Imports no TensorFlow."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from x3d_tf.errors import UserError
from x3d_tf.files import atomic_write, os_errors_as_write_error, read_limited
from x3d_tf.locks import locked
from x3d_tf.search.candidates import Candidate, Score
from x3d_tf.search.executor import Training, scored
from x3d_tf.search.trace import read_result, write_result
from x3d_tf.terminal import tell
from x3d_tf.text import whole

MOST_KILLS = 5  # processes that may be killed in a row, without a checkpoint between, before a candidate fails


@dataclass(frozen=True)
class SharedTraining:
    """A training that one process at a time does, wherever it runs; picklable.

    Beside the log file of a candidate are its files `.claim`, which the process that trains it locks, `.score.json`,
    its result, and while it trains `.starts`, the number of processes that began since its last checkpoint. The lock of
    a process that is killed is released, and the next one resumes from the checkpoint.

    Attributes:
        training: the training.
        search: hash of the settings of the search, see `digest_of`.
    """

    training: Training
    search: str

    def __call__(self, candidate: Candidate) -> Score:
        """Returns the score of a candidate, also if another process has trained it.

        An exception of the training is a failure of the candidate, and so are `MOST_KILLS` killed processes.

        Raises:
            Locked: another process trains the candidate.
            UserError: the file system does not support locks.
            WriteError: a file cannot be written.
        """
        claim = self._file(candidate, ".claim")
        with locked(claim, f"another process trains {claim.stem}", "wait for it", required=True):
            return self._read(candidate) or self._trained(candidate)

    def log(self, candidate: Candidate) -> Path:
        """Returns the file for the output of the training."""
        return self.training.log(candidate)

    def progress(self, candidate: Candidate) -> int:
        """Returns a number that grows with each checkpoint of the training."""
        return self.training.progress(candidate)

    def result(self, candidate: Candidate) -> Score | None:
        """Returns the score of a candidate that a process has written; None without one.

        A damaged file is deleted with a warning, so that the candidate is trained again.
        """
        path = self._file(candidate, ".score.json")
        try:
            return read_result(path, self.search, candidate)
        except FileNotFoundError:
            return None
        except (UserError, OSError) as error:
            tell(f"warning: {path} is damaged: {error}; it is deleted, and its candidate trained again")
            with os_errors_as_write_error(path):
                path.unlink(missing_ok=True)
            return None

    def forget_failures(self, candidates: Iterable[Candidate]) -> None:
        """Deletes the results of candidates that failed, so that they are trained again."""
        for candidate in candidates:
            score = self._read(candidate)
            if score and score.reason:
                self._file(candidate, ".score.json").unlink(missing_ok=True)

    def _trained(self, candidate: Candidate) -> Score:
        starts = self._file(candidate, ".starts")
        progress = self.training.progress(candidate)
        kills = _count(starts, progress)
        try:
            if kills < MOST_KILLS:
                atomic_write(starts, f"{kills + 1} at {progress}\n".encode())
                score = scored(self.training, candidate)
            else:
                text = f"{kills} processes were killed in a row while they trained it (out of memory?)"
                score = Score(None, reason=text)
            write_result(self._file(candidate, ".score.json"), self.search, candidate, score)
        finally:  # not if this process is killed
            starts.unlink(missing_ok=True)
        return score

    def _read(self, candidate: Candidate) -> Score | None:
        try:
            return read_result(self._file(candidate, ".score.json"), self.search, candidate)
        except (UserError, OSError):
            return None

    def _file(self, candidate: Candidate, suffix: str) -> Path:
        log = self.training.log(candidate)
        return log.with_name(log.stem + suffix)


def _count(path: Path, progress: int) -> int:
    """Returns the number of processes in a file that began at a checkpoint; 0 if the file is damaged or missing."""
    try:
        count, _, step = read_limited(path, 100).decode("ascii", "replace").strip().partition(" at ")
    except (UserError, OSError):
        return 0
    return (whole(count) or 0) if whole(step) == progress else 0
