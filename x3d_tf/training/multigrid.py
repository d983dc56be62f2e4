"""The long cycle of multigrid training: small clips in large batches first. Imports no TensorFlow.

Wu et al., "A Multigrid Method for Efficiently Training Video Models", CVPR 2020. A stage, the steps with one learning
rate, runs once through `CYCLE`, with equal numbers of steps for each shape. The last stage has the network's own clips
only.

A step with k times the batch takes the clips of k steps of the plain schedule, in the same order, and k times their
learning rate. A run therefore sees the same clips as a plain run, in fewer steps.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from x3d_tf.config import Recipe, TrainConfig
from x3d_tf.modeling.expansion import BASE_CROP, Expansion
from x3d_tf.tasks.base import Loss
from x3d_tf.types import ClipSpec, Metric

# Factors of the batch, the frames and the side of the crop.
CYCLE = ((8, 1 / 4, 0.5**0.5), (4, 1 / 2, 0.5**0.5), (2, 1 / 2, 1.0), (1, 1.0, 1.0))


@dataclass(frozen=True)
class Phase:
    """Successive steps with clips of one shape.

    Attributes:
        expansion: the expansion of the network, with the frames and the crop of the phase.
        factor: batch and learning rate, relative to those of the plain schedule.
        first: number of steps before the phase.
        plain: number of steps of the plain schedule that see the clips before the phase.
        steps: number of steps of the phase.
    """

    expansion: Expansion
    factor: int
    first: int
    plain: int
    steps: int

    @property
    def end(self) -> int:
        """Number of steps up to the end of the phase."""
        return self.first + self.steps


@dataclass(frozen=True)
class Phases:
    """The phases of a run, at least one, in order."""

    phases: tuple[Phase, ...]

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        return self.phases[-1].end

    @property
    def clips(self) -> dict[int, ClipSpec]:
        """The clip of each factor, in the order of training."""
        return {phase.factor: phase.expansion.clip for phase in self.phases}

    def at(self, step: int) -> Phase:
        """Returns the phase of the step that follows `step` steps; after the last step, the last phase."""
        return next((phase for phase in self.phases if step < phase.end), self.phases[-1])

    def plain_steps(self, step: int) -> int:
        """Returns the number of steps of the plain schedule that see as many clips as the first `step` steps."""
        phase = self.at(step)
        return phase.plain + (step - phase.first) * phase.factor


def phases_of(config: TrainConfig) -> Phases:
    """Returns the phases of a run; a run without multigrid training has one."""
    recipe, expansion = config.recipe, config.expansion
    if recipe.multigrid == "none":
        return Phases((Phase(expansion, 1, 0, 0, recipe.scaled_steps),))
    phases: list[Phase] = []
    for factor, steps in _lengths(recipe):
        first, plain = (phases[-1].end, phases[-1].plain + phases[-1].steps * phases[-1].factor) if phases else (0, 0)
        phases.append(Phase(_expansions(expansion)[factor], factor, first, plain, steps))
    return Phases(tuple(phases))


def _lengths(recipe: Recipe) -> list[tuple[int, int]]:
    """Returns the factor and the number of steps of each phase that has any."""
    ends = (0, *recipe.scaled_decay_steps, recipe.scaled_steps)
    *stages, last = (end - start for start, end in itertools.pairwise(ends))
    lengths = []
    for clips in stages:  # in batches of the plain schedule
        steps, rest = divmod(clips, sum(factor for factor, _, _ in CYCLE))
        lengths += [(factor, steps + rest if factor == 1 else steps) for factor, _, _ in CYCLE]
    return [(factor, steps) for factor, steps in (*lengths, (1, last)) if steps]


def _expansions(expansion: Expansion) -> dict[int, Expansion]:
    """Returns the expansion with the frames and the crop of each factor, rounded down."""
    clip, expansions = expansion.clip, {1: expansion}
    for factor, frames, side in CYCLE[:-1]:
        gamma_s = expansion.gamma_s if side == 1 else math.floor(clip.size * side) / BASE_CROP
        expansions[factor] = replace(expansion, gamma_t=math.floor(clip.frames * frames), gamma_s=gamma_s)
    return expansions


class LossByBatch:
    """A loss for batches of several sizes.

    Args:
        losses: the loss of each number of clips per device and micro-batch, with the same metrics.
    """

    def __init__(self, losses: Mapping[int, Loss]) -> None:
        self._losses = losses

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics besides the loss."""
        return next(iter(self._losses.values())).metrics

    def __call__(self, logits: Any, targets: Any, inputs: Any) -> dict[str, Any]:
        """Computes the loss; see `tasks.base.Loss`. The number of clips must be static."""
        return self._losses[logits.shape[0]](logits, targets, inputs)
