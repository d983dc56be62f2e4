"""The learning rate over a run: half a cosine, warmed up linearly (paper, appendix A.3)."""

import math
from typing import Any

import keras
from keras import ops

from x3d_tf.runs.recipe import Recipe


@keras.saving.register_keras_serializable("x3d_tf")
class CosineWithWarmup(keras.optimizers.schedules.LearningRateSchedule):
    """rate(n) = 0.5 peak (cos(π n / steps) + 1), after a linear rise to the cosine's own value.

    Args:
        peak: the cosine's value at step 0, η.
        steps: where it reaches zero.
        warmup_steps: steps of the rise; it ends at the cosine's value there, not at the peak.
        warmup_start: where the rise begins, in units of the peak.
    """

    def __init__(self, peak: float, steps: int, warmup_steps: int = 0, warmup_start: float = 0.1) -> None:
        self.peak, self.steps, self.warmup_steps, self.warmup_start = peak, steps, warmup_steps, warmup_start

    def __call__(self, step: Any) -> Any:
        step = ops.cast(step, keras.config.floatx())
        rate = 0.5 * self.peak * (ops.cos(math.pi * step / self.steps) + 1)
        if not self.warmup_steps:
            return rate
        first = self.peak * self.warmup_start
        last = 0.5 * self.peak * (math.cos(math.pi * self.warmup_steps / self.steps) + 1)
        return ops.where(step < self.warmup_steps, first + (last - first) * step / self.warmup_steps, rate)

    def get_config(self) -> dict[str, Any]:
        return dict(vars(self))


def schedule_of(recipe: Recipe) -> CosineWithWarmup:
    """The schedule of a recipe at its batch."""
    return CosineWithWarmup(
        recipe.scaled_learning_rate, recipe.scaled_steps, recipe.scaled_warmup_steps, recipe.warmup_start
    )
