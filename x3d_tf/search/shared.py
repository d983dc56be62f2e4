"""Trainings that processes on several machines divide among themselves through files. Imports no TensorFlow."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from x3d_tf.errors import UserError
from x3d_tf.files import atomic_write, os_errors_as_write_error, read_limited
from x3d_tf.locks import Locked, locked
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
    its result, and until then `.kills`, the number of processes that were killed since its last checkpoint. The lock of
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
            WriteError: a file cannot be read or written. This is no failure of the candidate.
        """
        with self._claimed(candidate), os_errors_as_write_error(self._result(candidate)):
            return self._intact(candidate) or self._trained(candidate)

    def log(self, candidate: Candidate) -> Path:
        """Returns the file for the output of the training."""
        return self.training.log(candidate)

    def progress(self, candidate: Candidate) -> int:
        """Returns a number that grows with each checkpoint of the training."""
        return self.training.progress(candidate)

    def claim(self, candidate: Candidate) -> Path:
        """Returns the file that the process that trains a candidate locks."""
        return self._file(candidate, ".claim")

    def result(self, candidate: Candidate) -> Score | None:
        """Returns the score of a candidate that a process has written; None without one, or if it cannot be read now.

        A damaged file is deleted with a warning, so that the candidate is trained again.
        """
        with suppress(OSError):
            try:
                return self._read(candidate)
            except UserError:
                with suppress(Locked), self._claimed(candidate):  # another process may replace it meanwhile
                    return self._intact(candidate)
        return None

    def forget_failures(self, candidates: Iterable[Candidate]) -> None:
        """Deletes the results of candidates that failed, so that they are trained again."""
        for candidate in candidates:
            score = self.result(candidate)
            if score and score.reason:
                _delete(self._result(candidate))

    def count_kill(self, candidate: Candidate) -> None:
        """Counts a process that was killed while it trained a candidate; called by a process that saw it.

        Where the whole machine or the search was killed nobody counts, because the training is not the cause.
        """
        kills, progress = self._file(candidate, ".kills"), self.progress(candidate)
        atomic_write(kills, f"{_count(kills, progress) + 1} at {progress}\n".encode())
        if self.result(candidate):  # another process has finished it meanwhile
            _delete(kills)

    def _trained(self, candidate: Candidate) -> Score:
        path = self._file(candidate, ".kills")
        kills = _count(path, self.progress(candidate))
        if kills < MOST_KILLS:
            score = scored(self.training, candidate)
        else:
            text = f"{kills} processes were killed in a row while they trained it (out of memory?)"
            score = Score(None, reason=text)
        write_result(self._result(candidate), self.search, candidate, score)
        with suppress(OSError):  # the score is written
            path.unlink(missing_ok=True)
        return score

    def _intact(self, candidate: Candidate) -> Score | None:
        """Returns the score in the file of a candidate, which this process has claimed; deletes a damaged file."""
        try:
            return self._read(candidate)
        except UserError as error:
            path = self._result(candidate)
            tell(f"warning: {path} is damaged: {error}; it is deleted, and its candidate trained again")
            _delete(path)
            return None

    def _read(self, candidate: Candidate) -> Score | None:
        """Returns the score in the file of a candidate; None without a file.

        Raises:
            UserError: the file is damaged.
            OSError: the file cannot be read.
        """
        try:
            return read_result(self._result(candidate), self.search, candidate)
        except FileNotFoundError:
            return None

    def _claimed(self, candidate: Candidate) -> AbstractContextManager[None]:
        claim = self.claim(candidate)
        return locked(claim, f"another process trains {claim.stem}", "wait for it", required=True)

    def _result(self, candidate: Candidate) -> Path:
        return self._file(candidate, ".score.json")

    def _file(self, candidate: Candidate, suffix: str) -> Path:
        log = self.training.log(candidate)
        return log.with_name(log.stem + suffix)


def _delete(path: Path) -> None:
    with os_errors_as_write_error(path):
        path.unlink(missing_ok=True)


def _count(path: Path, progress: int) -> int:
    """Returns the number of processes in a file that were killed at a checkpoint; 0 if it is damaged or missing."""
    try:
        count, _, step = read_limited(path, 100).decode("ascii", "replace").strip().partition(" at ")
    except (UserError, OSError):
        return 0
    return (whole(count) or 0) if whole(step) == progress else 0
