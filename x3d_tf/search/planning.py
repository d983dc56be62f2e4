"""The plan of a search: its first candidates, and an estimate of its duration. Imports no TensorFlow."""

import statistics
from collections.abc import Callable, Iterator

from x3d_tf.search.candidates import PHASES, Candidate
from x3d_tf.search.config import UNITS
from x3d_tf.search.reports import candidate_table
from x3d_tf.search.search import Plan, Search, estimate
from x3d_tf.search.training import SearchSetup, candidate_config, regularised
from x3d_tf.text import counted

PAPER_GMACS = (0.04, 0.08, 0.15, 0.30, 0.60)  # of the candidates of steps 1 to 5 (paper, section 4.1)
PAPER_AXES = 6

_MEASURED = 2  # candidates whose steps are measured
_FORWARD = 1 / 3  # time of a clip in evaluation, relative to training: the backward pass takes twice the forward pass

Speed = Callable[[Candidate], tuple[float, float]]


def plan_lines(search: Search, setup: SearchSetup, speed: Speed, processes: int = 1) -> Iterator[str]:
    """Yields the lines of the plan of a search; measures the speed after the first ones.

    Args:
        search: a search without scores, which is used up.
        setup: the settings of the trainings.
        speed: returns seconds per training step, and seconds until the first step has been taken.
        processes: number of processes that train candidates.
    """
    plan = estimate(search)
    yield f"step 1: {counted(len(plan.first), 'training')}"
    yield from candidate_table(plan.first)
    yield ""
    yield (
        f"to {search.config.budgets[-1]:g} {UNITS[search.config.cost][0]}: {counted(plan.steps, 'step')}, "
        f"{counted(plan.trainings, 'training')}, whose clips have {plan.gmacs:.2f} GMACs in sum"
    )
    yield (
        f"the paper: {len(PAPER_GMACS) * PAPER_AXES} trainings to 0.6 GMACs, {PAPER_AXES} x "
        f"({' + '.join(f'{macs:.2f}' for macs in PAPER_GMACS)}) = {PAPER_AXES * sum(PAPER_GMACS):.2f} GMACs in sum"
    )
    clips, evaluated = clips_per_training(setup)
    yield f"each training: {clips} clips of the split {setup.config.dataset.train_split}, {evaluated} of {setup.split}"
    yield f"measuring {counted(min(_MEASURED, len(plan.first)), 'candidate')}"
    hours = hours_expected(plan, setup, speed) / processes
    shared = f", {processes} at a time" if processes > 1 else ""
    expected = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
    yield (
        f"expected: {expected}{shared}. This is an estimate from a few training steps on this machine; it "
        "assumes that the time is proportional to the multiply-adds"
    )


def clips_per_training(setup: SearchSetup) -> tuple[int, int]:
    """Returns the numbers of training clips and of validation clips of a training with the complete schedule."""
    config = regularised(setup.training, PHASES[0])
    steps, videos = config.recipe.scaled_steps, len(setup.records.splits[setup.split].records)
    validations = -(-steps // config.checkpoint_steps) if config.recipe.needs_validation else 0
    return steps * config.recipe.batch, videos * (config.test_views + validations)


def hours_expected(plan: Plan, setup: SearchSetup, speed: Speed) -> float:
    """Returns the expected duration of a search in hours, in one process."""
    rates, starts = [], []
    for candidate in plan.first[:_MEASURED]:
        seconds, start = speed(candidate)
        batch = candidate_config(setup.training, candidate).recipe.batch
        rates.append(batch * candidate.network.cost.macs / 1e9 / seconds)
        starts.append(start)
    clips, evaluated = clips_per_training(setup)
    trained = plan.gmacs * (clips + _FORWARD * evaluated) / statistics.fmean(rates)
    return (trained + plan.trainings * min(starts)) / 3600
