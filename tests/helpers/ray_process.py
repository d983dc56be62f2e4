"""A search with stub trainings on a Ray cluster: ray_process.py ADDRESS FOLDER STEPS SECONDS."""

from pathlib import Path

from stub_trainings import SMALL_SEARCH, TINY, Steps

from x3d_tf import commands, ray_cluster
from x3d_tf.search.loop import run_search
from x3d_tf.search.ray_executor import RayExecutor
from x3d_tf.search.shared import SharedTraining


def main(arguments: list[str]) -> None:
    address, folder, steps, seconds = arguments
    training = SharedTraining(Steps(Path(folder), int(steps), float(seconds)), "stub search")
    with ray_cluster.connected(address) as ray:
        executor = RayExecutor(ray, training, Path(folder), cpus=1)
        run_search(Path(folder), SMALL_SEARCH, executor, TINY, num_classes=4, shared=training)


if __name__ == "__main__":
    commands.run(main, positional=True)
