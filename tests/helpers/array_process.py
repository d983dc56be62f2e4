"""A process of an array that searches with stub trainings: array_process.py FOLDER [SECONDS] [AXIS=ACTION ...]."""

import os
import signal
from pathlib import Path

from stub_trainings import SMALL_SEARCH, TINY, Steps

from x3d_tf import commands
from x3d_tf.modeling.architecture import ModelOptions
from x3d_tf.search import array_executor
from x3d_tf.search.array_executor import ArrayExecutor, Follower, take_part
from x3d_tf.search.loop import identity_of, run_search
from x3d_tf.search.search import Latency, Search
from x3d_tf.search.shared import SharedTraining
from x3d_tf.search.trace import digest_of


def main(arguments: list[str]) -> None:
    folder, seconds, *failing = arguments
    actions = tuple((axis, action) for axis, _, action in (text.partition("=") for text in failing))
    training = Steps(Path(folder), steps=int(dict(actions).get("steps", 5)), seconds=float(seconds), failing=actions)
    identity = identity_of(SMALL_SEARCH, TINY, ModelOptions(), 4)
    array_executor.POLL = 0.2

    def new_search(latency: Latency) -> Search:
        return Search(SMALL_SEARCH, TINY, num_classes=4, latency=latency)

    def end(_: Search) -> None:
        report, fails = Path(folder, "report.md"), Path(folder, "fails")
        if "end=SIGKILL" in failing and not fails.exists():
            fails.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        print("already finished" if report.exists() else "finished")
        report.touch()

    shared = SharedTraining(training, digest_of(identity))
    with ArrayExecutor(shared) as executor:

        def coordinate(followed: int | None) -> Search:
            options = {"shared": shared, "followed": followed, "on_scored": executor.end, "on_end": end}
            return run_search(Path(folder), SMALL_SEARCH, executor, TINY, num_classes=4, **options)

        take_part(coordinate, lambda: Follower(Path(folder), identity, new_search, executor))


if __name__ == "__main__":
    commands.run(main, positional=True)
