"""Bootstrap intervals of any number that a set of videos has, over training runs and videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ardrag_rl.training.report import Interval


def bootstrap_interval(
    runs: Sequence[np.ndarray],
    statistic: Callable[[np.ndarray], float],
    seed: int = 0,
    resamples: int = 200,
    level: float = 0.95,
) -> Interval:
    """The mean over runs of a statistic of their videos, and its interval over both.

    Every resample draws runs, and videos within each, with replacement. That repeats videos, which widens a Frechet
    distance whatever the videos are. So the resamples give the width only: they are moved to have their mean at the
    number itself.

    Args:
        runs: for each run, say of another seed, an array (n, ...) with an entry for each video.
        statistic: of such an array.
        seed: of the resampling.
        resamples: their number.
        level: of the interval.

    Returns:
        the mean of the runs' statistics, the bounds, and the number of videos in all runs together.

    Raises:
        ValueError: no runs, or a run without videos.
    """
    if not runs or any(len(run) == 0 for run in runs):
        raise ValueError(f"runs of {[len(run) for run in runs]} videos: expected at least one run with one video.")
    point = float(np.mean([statistic(run) for run in runs]))
    rng = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    for i in range(resamples):
        chosen = [runs[k] for k in rng.integers(len(runs), size=len(runs))]
        drawn[i] = np.mean([statistic(run[rng.integers(len(run), size=len(run))]) for run in chosen])
    low, high = np.quantile(drawn - drawn.mean(), [(1 - level) / 2, (1 + level) / 2]) + point
    return Interval(point, float(low), float(high), sum(len(run) for run in runs))
