"""Training logs: the progress bar, history.csv, TensorBoard and the plot of the curves."""

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from x3d_tf import plots
from x3d_tf.config import TrainConfig
from x3d_tf.errors import UserError, require
from x3d_tf.modeling.expansion import name_of
from x3d_tf.runs.event_files import EventFile
from x3d_tf.runs.run_folder import HISTORY_FIELDS, RunFolder
from x3d_tf.tasks.base import Validation
from x3d_tf.training.multigrid import Phases
from x3d_tf.training.schedule import Schedule
from x3d_tf.types import Metric

_VALIDATION = "validation_"  # prefix of the columns with the metrics of validations


class History:
    """Collects the metrics of the training steps and writes the logs of a run.

    Args:
        run: the run folder. Rows of its history after step `first` are dropped: those steps will be repeated.
        config: the configuration of the run.
        schedule: the learning-rate schedule of the optimizer.
        phases: the phases of the run.
        steps_per_epoch: number of steps of the plain schedule per epoch.
        first: number of steps already taken, 0 for a new run.
        metrics: the metrics of a training step besides the loss.
        validation: the validation of the run, if any.
    """

    def __init__(
        self,
        run: RunFolder,
        config: TrainConfig,
        schedule: Schedule,
        phases: Phases,
        steps_per_epoch: int,
        first: int,
        metrics: Sequence[Metric],
        validation: Validation | None = None,
    ) -> None:
        self.run, self.config, self.schedule = run, config, schedule
        self.phases, self.steps_per_epoch = phases, steps_per_epoch
        self.metrics, self.validation = metrics, validation
        trained = [metric.name for metric in metrics]
        validated = [_VALIDATION + metric.name for metric in validation.metrics] if validation else []
        self.columns = (*HISTORY_FIELDS, *trained, *validated)
        self.rows = [row for row in run.read_history(trained, validated) if row["step"] <= first]
        run.write_history(self.columns, self.rows)
        self.writer = EventFile(run.tensorboard)
        self.pending: list[dict[str, Any]] = []
        self.started = time.perf_counter()

    def add(self, metrics: dict[str, Any]) -> None:
        """Adds the metrics that a call of `TrainStep` returned, without waiting for their values."""
        self.pending.append(metrics)

    def end_row(self, step: int) -> str:
        """Writes a row for `step` with the metrics since the last row, and returns a summary for the progress bar.

        Raises:
            UserError: a loss or another metric is not finite.
        """
        values = {name: np.concatenate([call[name].numpy() for call in self.pending]) for name in self.pending[0]}
        losses = values["loss"]
        for offset, loss in enumerate(losses, start=step - len(losses) + 1):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss must be finite, got {loss} at step {offset}. Train in a new --workdir with a lower "
                    f"Recipe.learning_rate (now {self.config.recipe.learning_rate}) or a higher "
                    f"Recipe.warmup_fraction; earlier checkpoints, if any, are in {self.run.checkpoints}"
                )
        for metric in self.metrics:
            for offset, value in enumerate(values[metric.name], start=step - len(losses) + 1):
                require(math.isfinite(value), f"{metric.name} at step {offset}", "be finite", float(value))
        seen, before = (self.phases.plain_steps(number) for number in (step, step - len(losses)))
        elapsed, self.started = time.perf_counter() - self.started, time.perf_counter()
        row = {
            "step": step,
            "epoch": seen / self.steps_per_epoch,
            "learning_rate": float(self.schedule(step - 1)),
            "loss": float(np.mean(losses)),
            "clips_per_second": (seen - before) * self.config.recipe.batch / elapsed,
        }
        for metric in self.metrics:
            measured = values[metric.name]
            row[metric.name] = int(np.sum(measured)) if metric.kind == "count" else float(np.mean(measured))
        self.pending.clear()
        self.rows.append(row)
        self.run.append_history(self.columns, row)
        self.writer.add(step, {f"train/{name}": row[name] for name in row if name not in ("step", "epoch")})
        shares = [f", {metric.name} {row[metric.name]:.0%}" for metric in self.metrics if metric.kind == "share"]
        return f"{row['clips_per_second']:.1f} clips/s, loss {row['loss']:.3f}{''.join(shares)}"

    def add_validation(self, step: int, scores: dict[str, float]) -> bool:
        """Adds the metrics of a validation to the last row, that of `step`. Returns True if they are the best so far.

        Raises:
            UserError: a metric is not finite.
        """
        for name, value in scores.items():
            if not math.isfinite(value):
                raise UserError(f"{_VALIDATION}{name} must be finite, got {value} at step {step}")
        best, _ = self.best(before=step)
        if self.rows and self.rows[-1]["step"] == step:  # otherwise history.csv was truncated
            self.rows[-1] |= {_VALIDATION + name: value for name, value in scores.items()}
            self.run.write_history(self.columns, self.rows)
            self.writer.add(step, {f"validation/{name}": value for name, value in scores.items()})
        return best is None or self._rank(scores) > self._rank(best)

    def restart_clock(self) -> None:
        """Excludes the time since the last row, such as a validation, from the throughput of the next row."""
        self.started = time.perf_counter()

    def best(self, before: float = math.inf) -> tuple[dict[str, float] | None, int]:
        """Returns the best validation before a step, and the number of validations since."""
        best, since = None, 0
        names = [metric.name for metric in self.validation.metrics] if self.validation else []
        for row in self.rows:
            scores = {name: row[_VALIDATION + name] for name in names if _VALIDATION + name in row}
            if row["step"] >= before or not names or len(scores) < len(names):
                continue
            since += 1
            if best is None or self._rank(scores) > self._rank(best):
                best, since = scores, 0
        return best, since

    def _rank(self, scores: dict[str, float]) -> tuple[float, ...]:
        assert self.validation is not None
        return self.validation.rank(scores)

    def totals(self) -> list[str]:
        """Returns a line for each metric that counts something, unless the count is 0."""
        counts = [metric for metric in self.metrics if metric.kind == "count"]
        totals = [(metric, sum(row[metric.name] for row in self.rows)) for metric in counts]
        return [f"{metric.name}: {total:.0f} ({metric.note})" for metric, total in totals if total]

    def save_plots(self) -> None:
        """Draws the learning curves and flushes the TensorBoard file."""
        self.writer.flush()
        validated = self.validation.metrics if self.validation else ()
        title = name_of(self.config.expansion, self.config.model.family)
        plots.save_curves(self.rows, self.run.curves, title, training=self.metrics, validation=validated)
