"""Bootstrap intervals of any number that a set of videos has, over training runs and tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ardrag_rl.training.report import Interval

Statistic = Callable[[np.ndarray], float]  # of the tasks at these indices (n,)


def bootstrap_interval(
    runs: Sequence[Statistic], num_tasks: int, seed: int = 0, resamples: int = 200, level: float = 0.95
) -> Interval:
    """The mean over runs of a statistic of their tasks, and its interval over both.

    Every resample draws runs and tasks, with replacement. That repeats tasks, which shifts a Frechet distance
    whatever the videos are. So the resamples give the width only: they are moved to have their mean at the number
    itself.

    Args:
        runs: for each run, say of another seed, its number as a function of task indices. A distance to the true videos
            should take these of the same tasks: what the tasks show then cancels.
        num_tasks: n; the number itself is of all of them, once each.
        seed: of the resampling.
        resamples: their number.
        level: of the interval.

    Returns:
        the mean of the runs' statistics, the bounds, and the number of videos in all runs together.

    Raises:
        ValueError: no runs or no tasks.
    """
    if not runs or num_tasks < 1:
        raise ValueError(f"{len(runs)} runs of {num_tasks} tasks: expected at least one of each.")
    point = float(np.mean([run(np.arange(num_tasks)) for run in runs]))
    rng = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    for i in range(resamples):
        tasks = rng.integers(num_tasks, size=num_tasks)  # of all runs: they have the same
        drawn[i] = np.mean([runs[k](tasks) for k in rng.integers(len(runs), size=len(runs))])
    low, high = np.nanquantile(drawn - np.nanmean(drawn), [(1 - level) / 2, (1 + level) / 2]) + point
    return Interval(point, float(low), float(high), len(runs) * num_tasks)
