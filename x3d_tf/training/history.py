"""What a run tells of itself: progress bar, history.csv, TensorBoard, curves."""

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
from x3d_tf.training.schedule import schedule_of
from x3d_tf.training.validation import Score


class History:
    """Collects what the steps return and writes it where people look.

    Args:
        run: where to write; rows after step `first` are of a lost part of the run and are left out.
        config: of the run.
        steps_per_epoch: to tell the epoch.
        first: steps already done.
    """

    def __init__(self, run: RunFolder, config: TrainConfig, steps_per_epoch: int, first: int) -> None:
        self.run, self.config, self.steps_per_epoch = run, config, steps_per_epoch
        self.schedule = schedule_of(config.recipe)
        self.rows: list[dict[str, float]] = [row for row in run.read_history() if row["step"] <= first]
        run.write_history(self.rows)
        self.writer = EventFile(run.tensorboard)
        self.pending: list[dict[str, Any]] = []
        self.started = time.perf_counter()

    def add(self, measured: dict[str, Any]) -> None:
        """Takes what `TrainStep` says of some steps, without waiting for it."""
        self.pending.append(measured)

    def end_row(self, step: int) -> str:
        """Averages what was added since the last row, up to `step`, and returns it in a few words.

        Raises:
            UserError: a loss is not a number.
        """
        measured = {name: np.concatenate([part[name].numpy() for part in self.pending]) for name in self.pending[0]}
        losses = measured["loss"]
        for offset, loss in enumerate(losses, start=step - len(losses) + 1):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at step {offset}: lower Recipe.learning_rate (it is "
                    f"{self.config.recipe.learning_rate}) or raise Recipe.warmup_fraction, with a --workdir of its "
                    f"own; checkpoints from before, if any, are in {self.run.checkpoints}"
                )
        elapsed, self.started = time.perf_counter() - self.started, time.perf_counter()
        row = {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "learning_rate": float(self.schedule(step - 1)),
            "loss": float(np.mean(losses)),
            "accuracy": float(np.mean(measured["accuracy"])),
            "clips_per_second": len(losses) * self.config.recipe.batch / elapsed,
        }
        if "boxes_left_out" in measured:
            row["boxes_left_out"] = int(np.sum(measured["boxes_left_out"]))
        self.pending.clear()
        self.rows.append(row)
        self.run.append_history(row)
        shown = ("learning_rate", "loss", "accuracy", "clips_per_second")
        self.writer.add(step, {f"train/{name}": row[name] for name in shown})
        return f"{row['clips_per_second']:.1f} clips/s, loss {row['loss']:.3f}, accuracy {row['accuracy']:.0%}"

    def score_step(self, step: int, score: Score) -> bool:
        """Adds a validation to the row of a step, the last, and says whether it is the best so far."""
        if not self.rows or self.rows[-1]["step"] != step:  # somebody has cut the file
            return score.beats(self.best()[0])
        row = self.rows.pop()
        best, _ = self.best()
        self.rows.append(row | {"validation_accuracy": score.accuracy, "validation_loss": score.loss})
        self.run.write_history(self.rows)
        self.writer.add(step, {"validation/accuracy": score.accuracy, "validation/loss": score.loss})
        return score.beats(best)

    def restart_clock(self) -> None:
        """Leaves the time since the last row out of the next row's speed: it was not spent on training."""
        self.started = time.perf_counter()

    def best(self) -> tuple[Score | None, int]:
        """The best validation so far, and how many came after it."""
        best, since = None, 0
        for row in self.rows:
            if "validation_accuracy" not in row:
                continue
            score, since = Score(row["validation_accuracy"], row["validation_loss"]), since + 1
            if score.beats(best):
                best, since = score, 0
        return best, since

    def boxes_left_out(self) -> int:
        """Of all rows; 0 of networks that see no boxes."""
        return int(sum(row.get("boxes_left_out", 0) for row in self.rows))

    def save_plots(self) -> None:
        """Draws the curves so far."""
        self.writer.flush()
        plots.save_curves(self.rows, self.run.curves, name_of(self.config.expansion))
