"""Scores of several training runs as one number: the interquartile mean and its bootstrap interval.

After "Deep RL at the edge of the statistical precipice" (Agarwal et al., 2021), with one difference. There every task
has its own runs, and runs are resampled task by task. Here one trained policy is judged on all tasks, so a run's scores
stand and fall together: whole runs are resampled within each variant (the strata), and tasks within the runs.
"""

from __future__ import annotations

import numpy as np

from ardrag_rl.training.report import Interval


def interquartile_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean of the middle half: a quarter of the values is cut at each end, rounded down."""
    ordered = np.sort(np.asarray(values, np.float64), axis)
    count = ordered.shape[axis]
    return ordered.take(np.arange(count // 4, count - count // 4), axis).mean(axis)


def bootstrap_runs(scores: np.ndarray, seed: int = 0, resamples: int = 2000, level: float = 0.95) -> Interval:
    """The interquartile mean over all runs and tasks, and the percentile bootstrap interval of it.

    With few runs the interval is coarse: of three runs there are ten different resamples.

    Args:
        scores: (runs, tasks); a task that some run could not score (NaN) is left out.
        seed: of the resampling; with equal seeds, variants meet the same resampled tasks.
        resamples: their number.
        level: of the interval.

    Returns:
        `n` is the number of values, runs times tasks.

    Raises:
        ValueError: not two dimensions, or no task is left.
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2:
        raise ValueError(f"scores have shape {scores.shape}: expected (runs, tasks).")
    scores = scores[:, np.isfinite(scores).all(0)]
    runs, tasks = scores.shape
    if not scores.size:
        raise ValueError("no task was scored by every run: nothing to aggregate.")
    # two streams, so that the tasks drawn do not depend on the number of runs
    of_tasks, of_runs = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    columns = of_tasks.integers(tasks, size=(resamples, 1, tasks))
    rows = of_runs.integers(runs, size=(resamples, runs, 1))
    means = interquartile_mean(scores[rows, columns].reshape(resamples, -1))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(interquartile_mean(scores.ravel())), float(low), float(high), scores.size)
