"""Learning-rate schedules with linear warm-up: half-cosine, step decay and decay on plateaus (paper, appendix A)."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from x3d_tf.config import Recipe, TrainConfig
from x3d_tf.training.multigrid import Phases, phases_of


@keras.saving.register_keras_serializable("x3d_tf")
class CosineWithWarmup(keras.optimizers.schedules.LearningRateSchedule):
    """Half-cosine decay, rate(n) = 0.5 peak (cos(π n / steps) + 1), after a linear warm-up.

    Args:
        peak: value of the cosine at step 0, η.
        steps: the step at which the rate reaches zero.
        warmup_steps: number of warm-up steps. The warm-up ends at the cosine's value at that step, not at the peak.
        warmup_start: initial learning rate, as a fraction of the peak.
    """

    def __init__(self, peak: float, steps: int, warmup_steps: int = 0, warmup_start: float = 0.1) -> None:
        self.peak, self.steps, self.warmup_steps, self.warmup_start = peak, steps, warmup_steps, warmup_start

    def __call__(self, step: Any) -> Any:
        step = ops.cast(step, keras.config.floatx())
        rate = 0.5 * self.peak * (ops.cos(math.pi * step / self.steps) + 1)
        last = 0.5 * self.peak * (math.cos(math.pi * self.warmup_steps / self.steps) + 1)
        return _with_warmup(step, rate, self.warmup_steps, self.peak * self.warmup_start, last)

    def get_config(self) -> dict[str, Any]:
        return dict(vars(self))


@keras.saving.register_keras_serializable("x3d_tf")
class StepsWithWarmup(keras.optimizers.schedules.LearningRateSchedule):
    """Step decay, which divides the rate by 10 at each decay step, after a linear warm-up to the peak.

    Args:
        peak: the rate before the first decay step, η.
        decay_steps: the decay steps, ascending and after the warm-up.
        warmup_steps: number of warm-up steps.
        warmup_start: initial learning rate, as a fraction of the peak.
    """

    def __init__(
        self, peak: float, decay_steps: Sequence[int], warmup_steps: int = 0, warmup_start: float = 0.1
    ) -> None:
        self.peak, self.decay_steps = peak, list(decay_steps)
        self.warmup_steps, self.warmup_start = warmup_steps, warmup_start

    def __call__(self, step: Any) -> Any:
        step = ops.cast(step, keras.config.floatx())
        rate = ops.convert_to_tensor(self.peak, keras.config.floatx())
        for number, start in enumerate(self.decay_steps, 1):
            rate = ops.where(step >= start, self.peak * 10.0**-number, rate)
        return _with_warmup(step, rate, self.warmup_steps, self.peak * self.warmup_start, self.peak)

    def get_config(self) -> dict[str, Any]:
        return dict(vars(self))


@keras.saving.register_keras_serializable("x3d_tf")
class PlateauWithWarmup(keras.optimizers.schedules.LearningRateSchedule):
    """Step decay that divides the rate by 10 when validations stop improving, after a linear warm-up to the peak.

    Create it in the strategy's scope.

    Args:
        peak: the rate before the first division, η.
        validations: number of successive validations without improvement before a division.
        warmup_steps: number of warm-up steps. Validations during the warm-up do not count.
        warmup_start: initial learning rate, as a fraction of the peak.

    Attributes:
        variables: the state to save: the rate after the warm-up, and the validations without improvement since it
            changed.
    """

    def __init__(self, peak: float, validations: int, warmup_steps: int = 0, warmup_start: float = 0.1) -> None:
        self.peak, self.validations = peak, validations
        self.warmup_steps, self.warmup_start = warmup_steps, warmup_start
        self._rate = tf.Variable(peak, trainable=False, dtype=keras.config.floatx())
        self._since = tf.Variable(0, trainable=False, dtype=tf.int64)
        self.variables = [self._rate, self._since]

    def __call__(self, step: Any) -> Any:
        step = ops.cast(step, keras.config.floatx())
        rate = self._rate.read_value()
        return _with_warmup(step, rate, self.warmup_steps, self.peak * self.warmup_start, self.peak)

    def count(self, step: int, *, improved: bool) -> bool:
        """Counts the validation after `step` steps. Returns True if it divides the rate of the following steps."""
        since = 0 if improved or step < self.warmup_steps else int(self._since.numpy()) + 1
        divides = since >= self.validations
        if divides:
            self._rate.assign(self._rate.numpy() / 10)
        self._since.assign(0 if divides else since)
        return divides

    def get_config(self) -> dict[str, Any]:
        names = ("peak", "validations", "warmup_steps", "warmup_start")
        return {name: getattr(self, name) for name in names}


def _with_warmup(step: Any, rate: Any, steps: int, first: float, last: float) -> Any:
    """Returns `rate` after the warm-up, and a linear rise from `first` to `last` during it."""
    return ops.where(step < steps, first + (last - first) * step / steps, rate) if steps else rate


class MultigridSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule in proportion to the batch of each phase, as a function of the clips seen instead of the steps.

    It cannot be saved with an optimizer: it follows from the configuration.

    Args:
        plain: the schedule of the plain batch.
        phases: the phases of the run.
    """

    def __init__(self, plain: CosineWithWarmup | StepsWithWarmup | PlateauWithWarmup, phases: Phases) -> None:
        self.plain, self.phases = plain, phases

    def __call__(self, step: Any) -> Any:
        step = ops.cast(step, keras.config.floatx())
        plain_step, factor = step, ops.ones_like(step)
        for phase in self.phases.phases:
            begun = step >= phase.first
            plain_step = ops.where(begun, phase.plain + (step - phase.first) * phase.factor, plain_step)
            factor = ops.where(begun, float(phase.factor), factor)
        return factor * self.plain(plain_step)


Schedule = CosineWithWarmup | StepsWithWarmup | PlateauWithWarmup | MultigridSchedule


def schedule_of(config: TrainConfig) -> Schedule:
    """Returns the learning-rate schedule of a run. Call it in the strategy's scope."""
    plain = build_schedule(config.recipe)
    if config.recipe.multigrid == "none":
        return plain
    return MultigridSchedule(plain, phases_of(config))


def build_schedule(recipe: Recipe) -> CosineWithWarmup | StepsWithWarmup | PlateauWithWarmup:
    """Builds the schedule of a recipe for batches of `Recipe.batch` clips. Call it in the strategy's scope."""
    peak, warmup = recipe.scaled_learning_rate, (recipe.scaled_warmup_steps, recipe.warmup_start)
    if recipe.schedule == "steps":
        return StepsWithWarmup(peak, recipe.scaled_decay_steps, *warmup)
    if recipe.schedule == "plateau":
        return PlateauWithWarmup(peak, recipe.plateau_validations, *warmup)
    return CosineWithWarmup(peak, recipe.scaled_steps, *warmup)
