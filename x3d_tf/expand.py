"""Expands a small network step by step to a budget: the paper's search for X3D.

Each step trains the network, expanded to twice its cost along each of six axes, and continues from the best one:
  python -m x3d_tf.expand --gin_file=gin/expand.gin --gin_bindings='ExpandConfig.budget_gmacs=0.6' --workdir=runs/expand

The start network is Expansion.* of the configuration, and its data set and recipe train every candidate. The candidates
are compared on the validation split. Run the same command again to continue an interrupted search.

Train the candidates on the nodes of a Ray cluster, four CPU cores and one GPU for each:
  python -m x3d_tf.expand --gin_file=expand.gin --workdir=/shared/expand --ray=HOST:PORT --cpus=4 --gpus=1

Train them in the tasks of a SLURM array, or other processes over a shared folder, which all run the same command:
  srun python -m x3d_tf.expand --gin_file=expand.gin --workdir=/shared/expand --array --cpus=$SLURM_CPUS_PER_TASK

Print the candidates of the first step and the expected duration, and train nothing:
  python -m x3d_tf.expand --gin_file=gin/expand.gin --gin_bindings='ExpandConfig.budget_gmacs=0.6' --dry_run

Print the steps that the paper published, with their costs:
  python -m x3d_tf.expand --replay=paper

Draw the pictures of a search again from its trace and its reports, with the paper's points beside them:
  python -m x3d_tf.expand --plot=runs/expand --paper

Compare the cost of inference of several networks, with 1 to 10 clips per video; each was evaluated with --sweep:
  python -m x3d_tf.expand --plot=runs

The work folder gets trace.jsonl (all scores), candidates/ (a run folder for each training), family/ (a gin file for
each step), staircase.png, and at the end found.gin, found/ (the run folder of the found network) and report.md.
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from absl import flags

from x3d_tf import commands, gin_config, ray_cluster
from x3d_tf.config import TrainConfig
from x3d_tf.errors import UserError
from x3d_tf.evaluation.inference_cost import INFERENCE_COST_NAME, save_inference_cost
from x3d_tf.evaluation.metrics import TOP1
from x3d_tf.evaluation.paper_points import FIGURE_2_POINTS
from x3d_tf.files import WriteError
from x3d_tf.modeling.expansion import name_of
from x3d_tf.search.array_executor import ArrayExecutor, Follower, take_part
from x3d_tf.search.candidates import Candidate, Score
from x3d_tf.search.config import ExpandConfig
from x3d_tf.search.executor import Executor, ProcessExecutor, Remote
from x3d_tf.search.loop import identity_of, run_search, search_of
from x3d_tf.search.outputs import STAIRCASE_NAME, SearchFolder
from x3d_tf.search.planning import plan_lines
from x3d_tf.search.ray_executor import RayExecutor, default_gpus
from x3d_tf.search.replay import path_table
from x3d_tf.search.reports import candidate_table, family_table, save_staircase, step_table
from x3d_tf.search.search import Latency, Search
from x3d_tf.search.shared import SharedTraining
from x3d_tf.search.trace import TRACE_NAME, digest_of, read_trace, require_search_folder
from x3d_tf.search.training import CandidateTraining, SearchSetup, check_settings, open_setup
from x3d_tf.startup import starting_tensorflow
from x3d_tf.text import counted

FLAGS = flags.FLAGS

_Executor = ProcessExecutor | RayExecutor | ArrayExecutor
_CLUSTER_CPUS = 4  # of a candidate on several machines: a constant, because rounding depends on it


def define_flags() -> None:
    """Defines the flags of this command."""
    gin_config.define_flags(required=False)
    flags.DEFINE_string("workdir", None, "Work folder. Defaults to runs/<name of the first gin file>.")
    flags.DEFINE_integer(
        "parallel",
        1,
        "Number of processes that train candidates, among which CPU cores and GPUs are divided. Other numbers of cores "
        "round differently, so keep it when you continue a search. Defaults to 1.",
        lower_bound=1,
    )
    flags.DEFINE_string(
        "ray",
        None,
        "Address of the head node of a Ray cluster, HOST:PORT, whose nodes train the candidates. All of them must see "
        "the work folder and the records under the same paths. Defaults to this machine only.",
    )
    flags.DEFINE_bool(
        "array",
        False,
        "Share the search with all processes that run this command with the same work folder, such as the tasks of a "
        "SLURM array. They may start and end at any time.",
    )
    flags.DEFINE_integer(
        "cpus",
        None,
        "Number of CPU cores of a candidate: of TensorFlow's threads, on which rounding depends, and with --ray of the "
        "cores to reserve. A search continues with the same number only. Defaults to 4 with --ray and --array, "
        "otherwise to the cores of this machine.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "gpus",
        None,
        "Number of GPUs of a candidate with --ray. Defaults to 1 if the cluster has GPUs, otherwise to 0.",
        lower_bound=0,
    )
    flags.DEFINE_bool("dry_run", False, "Print the first candidates and an estimate of the duration; train nothing.")
    flags.DEFINE_enum("replay", None, ["paper"], "Print the published expansion path and its costs.")
    flags.DEFINE_string(
        "plot",
        None,
        f"Folder to draw pictures of, without training: {STAIRCASE_NAME} from the trace of a search, and "
        f"{INFERENCE_COST_NAME} from the reports of evaluations with --sweep in its run folders.",
    )
    flags.DEFINE_bool("paper", False, "Add the points that the paper prints, for Kinetics-400, to the pictures.")


def main() -> None:
    """Runs the search that the flags configure, or prints or draws what they select."""
    modes = [f"--{name}" for name in ("gin_file", "replay", "plot") if FLAGS[name].value]
    if len(modes) != 1:
        raise UserError(f"one of --gin_file, --replay and --plot is required, got {' and '.join(modes) or 'none'}")
    if FLAGS.paper and not FLAGS.plot:
        raise UserError("--paper requires --plot, the folder to draw pictures of")
    _check_processes()
    if FLAGS.replay:
        print("\n".join(path_table()))
    elif FLAGS.plot:
        _plot(Path(FLAGS.plot), paper=FLAGS.paper)
    else:
        config, expand = gin_config.parse_expand(FLAGS.gin_file, FLAGS.gin_bindings or [])
        folder = Path(FLAGS.workdir or f"runs/{Path(FLAGS.gin_file[0]).stem}")
        require_search_folder(folder)
        check_settings(config)
        _create_records(config)
        setup = open_setup(config)
        if FLAGS.dry_run:
            _print_plan(setup, expand, folder)
        else:
            _search(setup, expand, folder)


def _check_processes() -> None:
    """Raises `UserError` if the flags for the processes of a search exclude each other, or no address is given."""
    chosen = {"--parallel": FLAGS.parallel > 1, "--array": FLAGS.array, "--ray": FLAGS.ray is not None}
    given = [name for name, value in chosen.items() if value]
    if len(given) > 1:
        raise UserError(f"at most one of {', '.join(chosen)} may be given, got {' and '.join(given)}")
    if FLAGS.dry_run and (FLAGS.array or FLAGS.ray is not None):
        raise UserError(f"--dry_run measures this machine and cannot be combined with {given[0]}")
    if FLAGS.gpus is not None and FLAGS.ray is None:
        raise UserError("--gpus requires --ray; otherwise CUDA_VISIBLE_DEVICES selects GPUs")
    if FLAGS.ray is not None:
        ray_cluster.check_address(FLAGS.ray)


def _plot(folder: Path, *, paper: bool) -> None:
    """Draws the pictures of what a folder holds, and prints which ones."""
    needed = {
        STAIRCASE_NAME: f"{TRACE_NAME} of a search with a finished step",
        INFERENCE_COST_NAME: "run folders with reports of python -m x3d_tf.evaluate --sweep",
    }
    drawn = {
        STAIRCASE_NAME: _plot_staircase(folder, folder / STAIRCASE_NAME, paper=paper),
        INFERENCE_COST_NAME: save_inference_cost(folder, folder / INFERENCE_COST_NAME, paper=paper),
    }
    if not any(drawn.values()):
        raise UserError(f"{folder} must hold {', or '.join(needed.values())}")
    for name, lines in drawn.items():
        missing = f"not drawn: {name}, for which {folder} would need {needed[name]}"
        print("\n  ".join([f"written: {folder / name}", *lines]) if lines else missing)


def _plot_staircase(folder: Path, path: Path, *, paper: bool) -> list[str]:
    """Draws the picture of a search from its trace, and returns the lines that describe it; none without a search."""
    if not (folder / TRACE_NAME).exists():
        return []
    settings, trace = read_trace(folder)
    search = search_of(settings, trace)
    if not search.steps:
        return []
    metric = str(settings.get("metric", "score"))[:100]
    save_staircase(search, path, metric, FIGURE_2_POINTS if paper and metric == TOP1.label else ())
    lines = [f"{metric} of {counted(len(search.winners()), 'step')}"]
    return lines + [f"the paper has no points for {metric}"] * (paper and metric != TOP1.label)


def _create_records(config: TrainConfig) -> None:
    """Creates the records of a synthetic data set, without the GPUs, which the processes of the search need."""
    if config.dataset.synthetic is not None and not Path(config.dataset.records).exists():
        with starting_tensorflow(devices=False):
            import tensorflow  # noqa: F401  takes seconds
        config.dataset.synthetic.open(Path(config.dataset.records))


def _training(setup: SearchSetup, folder: Path, worker: int = 0, processes: int = 1) -> CandidateTraining:
    cores = FLAGS.cpus or (_CLUSTER_CPUS if FLAGS.array or FLAGS.ray else None)
    config = setup.training
    if FLAGS.ray:  # the processes of the nodes have other working folders
        records = str(Path(config.dataset.records).absolute())
        config, folder = replace(config, dataset=replace(config.dataset, records=records)), folder.absolute()
    return CandidateTraining(config, setup.num_classes, setup.metric, folder, (worker, processes), cores)


def _print_plan(setup: SearchSetup, expand: ExpandConfig, folder: Path) -> None:
    measuring = Remote(_training(setup, folder))
    try:
        latency = functools.partial(measuring.call, "latency") if expand.cost == "latency" else None
        start, options = setup.config.expansion, setup.config.model
        search = Search(expand, start, options=options, num_classes=setup.num_classes, latency=latency)
        for line in plan_lines(search, setup, functools.partial(measuring.call, "speed"), FLAGS.parallel):
            print(line, flush=True)
    finally:
        measuring.stop()


def _search(setup: SearchSetup, expand: ExpandConfig, folder: Path) -> None:
    run = Run(setup, expand, folder)
    try:
        with _executor(run) as executor:
            if isinstance(executor, ArrayExecutor):
                ended = run.together(executor)
            else:
                ended = run.coordinate(executor, run.shared_training() if isinstance(executor, RayExecutor) else None)
    except KeyboardInterrupt:
        print(f"\nstopped; run the same command again to continue the search in {folder}", file=sys.stderr)
        raise
    except WriteError as error:
        raise WriteError(f"{error}. Run the same command again to continue the search in {folder}") from error
    finally:
        run.measuring.stop()
    print(ended)


@contextmanager
def _executor(run: "Run") -> Iterator[_Executor]:
    """Starts the executor that the flags select, within the block."""
    if FLAGS.ray:
        folder, records = run.folder.absolute(), Path(run.setup.training.dataset.records).absolute()
        with ray_cluster.connected(FLAGS.ray) as ray:
            cpus = FLAGS.cpus or _CLUSTER_CPUS
            gpus = default_gpus(ray) if FLAGS.gpus is None else FLAGS.gpus
            run.settings |= {"gpus": gpus} if gpus else {}  # rounding depends on them too
            yield RayExecutor(ray, run.shared_training(), folder, [records], cpus=cpus, gpus=gpus)
    elif FLAGS.array:
        with ArrayExecutor(run.shared_training()) as executor:
            yield executor
    else:
        count = FLAGS.parallel
        trainings = [_training(run.setup, run.folder, number, count) for number in range(count)]
        with ProcessExecutor(trainings) as processes:
            yield processes


class Run:
    """A search that the flags configure.

    Args:
        setup: settings of the trainings.
        expand: settings of the search.
        folder: the work folder.

    Attributes:
        measuring: process that measures latencies.
    """

    def __init__(self, setup: SearchSetup, expand: ExpandConfig, folder: Path) -> None:
        self.setup, self.expand, self.folder = setup, expand, folder
        self.files = SearchFolder(folder, setup)
        training = _training(setup, folder)
        self.measuring = Remote(training)
        # The number of threads is part of a search that may run on machines of several kinds.
        self.settings = setup.identity | ({"cpus": training.cores} if training.cores else {})

    def shared_training(self) -> SharedTraining:
        """Returns the training of candidates by processes on several machines."""
        return SharedTraining(_training(self.setup, self.folder), digest_of(self._identity()))

    def coordinate(self, executor: _Executor, shared: SharedTraining | None, followed: int | None = None) -> str:
        """Runs the search, and returns what to print at its end."""
        ended: list[str] = []
        printing = Printing(executor, self.files, self.setup.metric.label)

        def end(search: Search) -> None:
            if not printing.scored and self.files.report.is_file():
                ended.append(f"{self.folder} is already finished ({self.files.report} exists)")
            else:
                ended.append(self._end(search))

        run_search(
            self.folder,
            self.expand,
            printing,
            self.setup.config.expansion,
            options=self.setup.config.model,
            num_classes=self.setup.num_classes,
            latency=functools.partial(self.measuring.call, "latency"),
            settings=self.settings,
            on_score=printing.end_step,
            on_scored=executor.end,
            on_end=end,
            shared=shared,
            followed=followed,
        )
        return ended[0]

    def together(self, executor: ArrayExecutor) -> str:
        """Runs the search together with other processes, and returns what to print at its end."""
        shared = self.shared_training()
        return take_part(
            lambda followed: self.coordinate(executor, shared, followed),
            lambda: Follower(self.folder, self._identity(), self._new_search, executor),
        )

    def _identity(self) -> dict[str, Any]:
        start, options = self.setup.config.expansion, self.setup.config.model
        return identity_of(self.expand, start, options, self.setup.num_classes, self.settings)

    def _new_search(self, latency: Latency) -> Search:
        start, options = self.setup.config.expansion, self.setup.config.model
        return Search(self.expand, start, options=options, num_classes=self.setup.num_classes, latency=latency)

    def _end(self, search: Search) -> str:
        files, found = self.files, name_of(self.files.write_end(search).network.expansion)
        return (
            "\n".join(family_table(search)) + "\n"
            f"found:      {found}: {files.found_gin} and its run folder {files.found.root}\n"
            f"family:     {files.family}: a gin file for each step\n"
            f"report:     {files.report} and {files.staircase}\n"
            f"candidates: {files.candidates}: histories, and model.keras of the chosen networks; no checkpoints"
        )


class Printing:
    """An executor that prints the candidates of a round and their scores.

    Args:
        executor: scores the candidates.
        files: the work folder, whose files are written after each step.
        metric: name of the score.

    Attributes:
        scored: number of candidates scored.
    """

    def __init__(self, executor: Executor, files: SearchFolder, metric: str) -> None:
        self._executor, self._files, self._metric = executor, files, metric
        self.scored = 0

    def scores(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Score]]:
        """Yields each candidate with its score."""
        first = candidates[0]
        kind = "contraction of step" if first.network.contracts else "step"
        share = f", {first.share:.0%} of the schedule" if first.share < 1 else ""
        print(f"{kind} {first.step}: {counted(len(candidates), 'training')} (logs: {self._files.candidates}){share}")
        print("\n".join(candidate_table(candidates)), flush=True)
        for number, (candidate, score) in enumerate(self._executor.scores(candidates), start=1):
            self.scored += 1
            seed = f" seed {candidate.seed}" if candidate.seed else ""
            network = f"{candidate.axis}{seed}, {candidate.network.cost.macs / 1e9:.4f} GMACs"
            place = f"{kind} {candidate.step}, {number} of {len(candidates)}"
            print(f"{place}: {network}: {self._text(score)}, {score.seconds:.0f} s", flush=True)
            yield candidate, score

    def _text(self, score: Score) -> str:
        if score.value is None:
            return f"failed: {score.reason}"
        return f"{self._metric} {score.value:.4f} ± {score.standard_error:.4f}"

    def end_step(self, search: Search, candidate: Candidate, score: Score) -> None:
        """Prints the table of a step and writes its files if the score was its last one."""
        if search.steps and any(result.network == candidate.network for result in search.steps[-1].results):
            print("\n".join(step_table(search.steps[-1])), flush=True)
            self._files.write_steps(search)


if __name__ == "__main__":
    define_flags()
    commands.run(main)
