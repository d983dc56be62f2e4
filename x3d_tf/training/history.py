"""Training logs: the progress bar, history.csv, TensorBoard and the plot of the curves."""

import math
import time
from typing import Any

import numpy as np

from x3d_tf import plots
from x3d_tf.config import TrainConfig
from x3d_tf.errors import UserError
from x3d_tf.modeling.expansion import name_of
from x3d_tf.runs.event_files import EventFile
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.training.schedule import build_schedule
from x3d_tf.training.validation import Score


class History:
    """Collects the metrics of the training steps and writes the logs of a run.

    Args:
        run: the run folder. Rows of its history after step `first` are dropped: those steps will be repeated.
        config: the configuration of the run.
        steps_per_epoch: number of steps per epoch.
        first: number of steps already taken, 0 for a new run.
    """

    def __init__(self, run: RunFolder, config: TrainConfig, steps_per_epoch: int, first: int) -> None:
        self.run, self.config, self.steps_per_epoch = run, config, steps_per_epoch
        self.schedule = build_schedule(config.recipe)
        self.rows: list[dict[str, float]] = [row for row in run.read_history() if row["step"] <= first]
        run.write_history(self.rows)
        self.writer = EventFile(run.tensorboard)
        self.pending: list[dict[str, Any]] = []
        self.started = time.perf_counter()

    def add(self, metrics: dict[str, Any]) -> None:
        """Adds the metrics that a call of `TrainStep` returned, without waiting for their values."""
        self.pending.append(metrics)

    def end_row(self, step: int) -> str:
        """Writes a row for `step` with the averages since the last row, and returns a summary for the progress bar.

        Raises:
            UserError: a loss is not finite.
        """
        metrics = {name: np.concatenate([call[name].numpy() for call in self.pending]) for name in self.pending[0]}
        losses = metrics["loss"]
        for offset, loss in enumerate(losses, start=step - len(losses) + 1):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss must be finite, got {loss} at step {offset}. Train in a new --workdir with a lower "
                    f"Recipe.learning_rate (now {self.config.recipe.learning_rate}) or a higher "
                    f"Recipe.warmup_fraction; earlier checkpoints, if any, are in {self.run.checkpoints}"
                )
        elapsed, self.started = time.perf_counter() - self.started, time.perf_counter()
        row = {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "learning_rate": float(self.schedule(step - 1)),
            "loss": float(np.mean(losses)),
            "accuracy": float(np.mean(metrics["accuracy"])),
            "clips_per_second": len(losses) * self.config.recipe.batch / elapsed,
        }
        if "boxes_left_out" in metrics:
            row["boxes_left_out"] = int(np.sum(metrics["boxes_left_out"]))
        self.pending.clear()
        self.rows.append(row)
        self.run.append_history(row)
        shown = ("learning_rate", "loss", "accuracy", "clips_per_second")
        self.writer.add(step, {f"train/{name}": row[name] for name in shown})
        return f"{row['clips_per_second']:.1f} clips/s, loss {row['loss']:.3f}, accuracy {row['accuracy']:.0%}"

    def add_validation(self, step: int, score: Score) -> bool:
        """Adds a validation score to the row of `step`, the last one. Returns True if it is the best so far."""
        if not self.rows or self.rows[-1]["step"] != step:  # history.csv was truncated
            return score.beats(self.best()[0])
        row = self.rows.pop()
        best, _ = self.best()
        self.rows.append(row | {"validation_accuracy": score.accuracy, "validation_loss": score.loss})
        self.run.write_history(self.rows)
        self.writer.add(step, {"validation/accuracy": score.accuracy, "validation/loss": score.loss})
        return score.beats(best)

    def restart_clock(self) -> None:
        """Excludes the time since the last row, such as a validation, from the throughput of the next row."""
        self.started = time.perf_counter()

    def best(self) -> tuple[Score | None, int]:
        """Returns the best validation score so far and the number of validations since."""
        best, since = None, 0
        for row in self.rows:
            if "validation_accuracy" not in row:
                continue
            score, since = Score(row["validation_accuracy"], row["validation_loss"]), since + 1
            if score.beats(best):
                best, since = score, 0
        return best, since

    def boxes_left_out(self) -> int:
        """Returns the number of training boxes that their crops left out; 0 for classification."""
        return int(sum(row.get("boxes_left_out", 0) for row in self.rows))

    def save_plots(self) -> None:
        """Draws the learning curves and flushes the TensorBoard file."""
        self.writer.flush()
        plots.save_curves(self.rows, self.run.curves, name_of(self.config.expansion))
