"""Learning-rate schedules with linear warm-up: half-cosine and step decay (paper, appendices A.3 and A.1)."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from x3d_tf.config import Recipe


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


def _with_warmup(step: Any, rate: Any, steps: int, first: float, last: float) -> Any:
    """Returns `rate` after the warm-up, and a linear rise from `first` to `last` during it."""
    return ops.where(step < steps, first + (last - first) * step / steps, rate) if steps else rate


def build_schedule(recipe: Recipe) -> CosineWithWarmup | StepsWithWarmup:
    """Builds the learning-rate schedule of a recipe, scaled to its batch size."""
    peak, warmup = recipe.scaled_learning_rate, (recipe.scaled_warmup_steps, recipe.warmup_start)
    if recipe.schedule == "steps":
        return StepsWithWarmup(peak, recipe.scaled_decay_steps, *warmup)
    return CosineWithWarmup(peak, recipe.scaled_steps, *warmup)
