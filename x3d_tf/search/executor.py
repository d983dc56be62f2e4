"""Scoring of the candidates of a search: one after another, or by another executor. Imports no TensorFlow."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from x3d_tf.errors import first_line
from x3d_tf.files import WriteError
from x3d_tf.search.candidates import Candidate, Score


class Executor(Protocol):
    """Scores the candidates of a round."""

    def scores(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Score]]:
        """Yields each candidate with its score as soon as it is known, in any order."""


class SerialExecutor:
    """Scores candidates one after another in this process.

    Args:
        score: trains and validates a candidate. An exception is a failure of the candidate, except `WriteError`: the
            others would also fail on a full disk.
    """

    def __init__(self, score: Callable[[Candidate], Score]) -> None:
        self._score = score

    def scores(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Score]]:
        """Yields each candidate with its score, in the given order."""
        for candidate in candidates:
            started = time.monotonic()
            try:
                score = self._score(candidate)
            except WriteError:
                raise
            except Exception as error:  # training can raise anything, such as errors of the device's memory
                reason = f"{type(error).__name__}: {first_line(error)}"
                score = Score(None, seconds=time.monotonic() - started, reason=reason)
            yield candidate, score
