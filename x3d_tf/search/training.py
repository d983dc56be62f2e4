"""Training and validation of the candidates of a search by the ordinary training code.

The module imports TensorFlow only inside functions that run in worker processes.
"""

import gc
import hashlib
import itertools
import math
import shutil
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

from x3d_tf.config import TrainConfig
from x3d_tf.data.datasets.spec import open_for_training, validation_split
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.errors import UserError, require
from x3d_tf.evaluation.eval_config import EvalConfig
from x3d_tf.evaluation.reports import RESULTS_NAME, read_report
from x3d_tf.files import os_errors_as_write_error
from x3d_tf.modeling.architecture import ModelOptions
from x3d_tf.modeling.expansion import Expansion
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.search.axes import require_x3d
from x3d_tf.search.candidates import PHASES, Candidate, Phase, Score
from x3d_tf.startup import starting_tensorflow
from x3d_tf.tasks.base import Task, find, task_of_model, task_of_records
from x3d_tf.training.checks import check_batch, check_records
from x3d_tf.types import Metric

_LATENCY_RUNS = 11  # of which the median is taken
_SPEED_STEPS = 3  # training steps that an estimate measures


@dataclass(frozen=True)
class SearchSetup:
    """Settings of the trainings of a search, checked against the records.

    Attributes:
        config: the configuration of the start network, with the default splits of the records.
        training: the same for the trainings of the search, whose final evaluation is on the validation split.
        records: the manifest of the records, with the split held out for validation.
        task: the task of the trainings.
        split: name of the validation split.
    """

    config: TrainConfig
    training: TrainConfig
    records: Manifest
    task: Task
    split: str

    @property
    def num_classes(self) -> int:
        """Number of outputs of the networks."""
        return len(self.task.classes(self.records))

    @property
    def metric(self) -> Metric:
        """The metric that is the score: the main one of the task's evaluation."""
        return self.task.metrics(self.num_classes)[0]

    @property
    def identity(self) -> dict[str, object]:
        """The settings that determine the scores, by name, without those of the start network."""
        paths = ("DatasetSpec.records", "TrainConfig.init")
        settings = {name: value for name, value in self.training.settings().items() if name not in paths}
        return {**settings, "records": self.records.fingerprint(), "metric": self.metric.label}


def check_settings(config: TrainConfig) -> None:
    """Checks a configuration before its records are opened or created.

    Raises:
        UserError: a setting does not suit a search, or no task has the name.
    """
    default = ModelOptions()
    rule = "be None for a search, whose networks differ in width and depth"
    require(config.init is None, "TrainConfig.init", rule, config.init)
    multigrid, rule = config.recipe.multigrid, 'be "none" for a search, whose networks differ in frames and crops'
    require(multigrid == "none", "Recipe.multigrid", rule, multigrid)
    require_x3d(config.model)
    for name in ("bn_group", "drop_connect"):
        value = getattr(config.model, name)
        rule = f"be {getattr(default, name)}, the default: the regularisation of each step of a search replaces it"
        require(value == getattr(default, name), f"ModelOptions.{name}", rule, value)
    if config.task is not None:
        find(config.task)


def open_setup(config: TrainConfig) -> SearchSetup:
    """Opens the records of a search, after creating those of a synthetic data set, and checks the settings with them.

    Args:
        config: the configuration of the start network, which `check_settings` has accepted.

    Raises:
        UserError: there is no validation split, or a setting does not suit the records or a phase. Names the setting,
            the rule and the value received.
    """
    records, dataset = open_for_training(config.dataset)
    split = validation_split(dataset)
    if split is None:
        raise UserError(
            f"a search chooses networks on a validation split, and {records.folder} has neither of the splits val and "
            f"validation; set DatasetSpec.validation_split, or hold out training videos with "
            f"DatasetSpec.validation_fraction"
        )
    rule = f"not be {config.dataset.eval_split!r}, DatasetSpec.eval_split: that split must not choose the networks"
    require(split != config.dataset.eval_split, "DatasetSpec.validation_split", rule)
    task = task_of_records(config, records)
    config = replace(config, dataset=dataset)
    training = replace(config, dataset=replace(dataset, eval_split=split))
    setup = SearchSetup(config, training, records, task, split)
    rule = f"be a share in [0, 1] for a search, so that it has a standard error (task {task.name})"
    require(setup.metric.kind == "share", f"the main metric {setup.metric.name}", rule, setup.metric.kind)
    for phase in dict.fromkeys(PHASES):
        check_records(regularised(training, phase), records, task)
        check_batch(regularised(training, phase), 1)
    return setup


def regularised(config: TrainConfig, phase: Phase) -> TrainConfig:
    """Returns a configuration with the regularisation of a phase. The number of clips stays the same.

    The recipe scales the learning rate and the number of steps linearly with the batch size; see `Recipe`.
    """
    model = replace(config.model, bn_group=phase.bn_group, drop_connect=phase.drop_connect)
    recipe = replace(config.recipe, batch=config.recipe.batch * phase.batch_factor)
    return replace(config, model=model, recipe=recipe)


def candidate_config(config: TrainConfig, candidate: Candidate) -> TrainConfig:
    """Returns the configuration of the training of a candidate."""
    config = regularised(config, candidate.phase)
    recipe = replace(config.recipe, steps=max(1, round(config.recipe.steps * candidate.share)))
    return replace(config, expansion=candidate.expansion, recipe=recipe, seed=config.seed + candidate.seed)


def candidate_run(folder: Path, config: TrainConfig, candidate: Candidate) -> RunFolder:
    """Returns the run folder of a candidate below the work folder of a search.

    Args:
        folder: the work folder.
        config: `SearchSetup.training`.
        candidate: the candidate.
    """
    identity = repr((candidate_config(config, candidate).fingerprint(), candidate.network.parent))
    number = hashlib.sha256(identity.encode()).hexdigest()[:8]
    step = f"step{candidate.step:02}{'c' if candidate.network.contracts else ''}"
    return RunFolder(folder / "candidates" / f"{step}_{candidate.axis}_seed{candidate.seed}_{number}")


@dataclass(frozen=True)
class CandidateTraining:
    """Trains and validates candidates in the process that calls it; picklable.

    Attributes:
        config: `SearchSetup.training`.
        num_classes: number of outputs of the networks.
        metric: the metric of the evaluation that is the score.
        folder: the work folder of the search.
        worker: number of this process, from 0, and number of processes, among which CPU cores and GPUs are divided.
        cores: number of threads of TensorFlow, on which rounding depends. Defaults to the share of this process.
    """

    config: TrainConfig
    num_classes: int
    metric: Metric
    folder: Path
    worker: tuple[int, int] = (0, 1)
    cores: int | None = None

    def __call__(self, candidate: Candidate) -> Score:
        """Returns the score of a candidate. An interrupted training resumes from its last checkpoint.

        Raises:
            UserError: the training failed, for example because the loss is not finite.
            WriteError: a file cannot be written.
        """
        started = time.monotonic()
        self._start_tensorflow()
        import keras

        from x3d_tf.training.loop import train

        run, config = candidate_run(self.folder, self.config, candidate), candidate_config(self.config, candidate)
        if run.config.is_file() and not (run.model.is_file() or run.has_checkpoint):
            shutil.rmtree(run.root)  # without weights: an earlier search finished the step, and its trace was damaged
        try:
            # The final evaluation is on the validation split too: another one, in training, would only take time.
            train(config, run.root, validates=config.recipe.needs_validation)
            value, error = measured(run, task_of_model(run.root), self.metric)
        finally:
            keras.backend.clear_session()
            gc.collect()
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        return Score(value, error, time.monotonic() - started, training_score(run, self.metric))

    def log(self, candidate: Candidate) -> Path:
        """Returns the file for the output of the training of a candidate, beside its run folder."""
        root = candidate_run(self.folder, self.config, candidate).root
        with os_errors_as_write_error(root.parent):
            root.parent.mkdir(parents=True, exist_ok=True)
        return root.with_name(f"{root.name}.log")

    def progress(self, candidate: Candidate) -> int:
        """Returns the step of the last checkpoint of a candidate; 0 if there is none."""
        return candidate_run(self.folder, self.config, candidate).last_step

    def latency(self, expansion: Expansion) -> float:
        """Returns the median time in milliseconds of the folded inference form for one clip, after warm-up."""
        self._start_tensorflow()
        import keras
        import tensorflow as tf

        from x3d_tf.modeling.folded import fold
        from x3d_tf.modeling.x3d import X3D

        app = fold(X3D(expansion, self.num_classes, self.config.model), batch=1)
        predict = tf.function(lambda clip: app(clip, training=False))
        clip = tf.random.stateless_uniform(app.input_shape, (0, 0), maxval=256, dtype=tf.int32)
        clip, times = tf.cast(clip, tf.float32), []
        for _ in range(2 + _LATENCY_RUNS):
            started = time.perf_counter()
            predict(clip).numpy()
            times.append(1000 * (time.perf_counter() - started))
        keras.backend.clear_session()
        return statistics.median(times[2:])

    def speed(self, candidate: Candidate) -> tuple[float, float]:
        """Measures a few training steps of a candidate.

        Returns:
            Seconds per step, and seconds until the first step has been taken.
        """
        started = time.perf_counter()
        self._start_tensorflow()
        import keras
        import tensorflow as tf

        from x3d_tf.training.loop import Trainer
        from x3d_tf.training.workers import Workers

        config = candidate_config(self.config, candidate)
        records, _ = open_for_training(config.dataset)
        trainer = Trainer(config, records, Workers(tf.distribute.MirroredStrategy()), task_of_records(config, records))
        batches = iter(trainer.batches())
        times = [started]
        for _ in range(1 + _SPEED_STEPS):
            trainer.step(batches, 1)["loss"].numpy()
            times.append(time.perf_counter())
        keras.backend.clear_session()
        return statistics.median(b - a for a, b in itertools.pairwise(times[1:])), times[1] - times[0]

    def _start_tensorflow(self) -> None:
        """Imports TensorFlow and divides the CPU cores or the GPUs among the processes of the search."""
        with starting_tensorflow():
            import x3d_tf.training.loop  # noqa: F401  takes seconds
            from x3d_tf.parallel import divide_devices, num_batch_slices, use_single_threaded_ops

            divide_devices(*self.worker, self.cores)
            # The same threads for all phases: scores must not depend on the candidate at which a search continues.
            configs = [regularised(self.config, phase) for phase in PHASES]
            clips = [config.recipe.batch // config.execution.accumulation for config in configs]
            slices = (num_batch_slices(*pair) for pair in zip(clips, (config.model.bn_group for config in configs)))
            use_single_threaded_ops(min(slices))


def measured(run: RunFolder, task: Task, metric: Metric, split: str | None = None) -> tuple[float, float]:
    """Returns a share that a run reaches on a split, and its standard error from the number of samples.

    An existing report is read. Otherwise the run is evaluated, which starts TensorFlow.

    Args:
        run: the run, with `model.keras`.
        task: the task of the run.
        metric: a metric of the task.
        split: name of the split. Defaults to that of the run's final evaluation.

    Raises:
        UserError: the report is damaged, or the evaluation failed.
    """
    folder = task.report_folder(run, EvalConfig(split=split))
    if (folder / RESULTS_NAME).is_file():
        report = read_report(folder)
    else:
        from x3d_tf.evaluation.running import evaluate_run

        report = evaluate_run(run, task, split=split)
    value = float(report.results[metric.name])
    return value, math.sqrt(value * (1 - value) / report.results["samples"])


def training_score(run: RunFolder, metric: Metric) -> float | None:
    """Returns the mean of a metric over the last tenth of the steps; None if training does not measure it."""
    rows = [row for row in run.read_history() if metric.name in row]
    last = rows[-max(1, len(rows) // 10) :]
    return statistics.fmean(row[metric.name] for row in last) if last else None
