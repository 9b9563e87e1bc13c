"""The report of a run: before and after on held-out tasks with intervals, reward curves (Fig. 6), videos (Fig. 5)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ardrag_rl.training.evaluate import Evaluation

LOWER_IS_BETTER = ("motion_error",)


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its bootstrap interval, over n values."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """One reward term before and after training on the same tasks and noise; `difference` is paired."""

    before: Interval
    after: Interval
    difference: Interval


def bootstrap(values: np.ndarray, seed: int = 0, resamples: int = 10_000, level: float = 0.95) -> Interval:
    """The percentile bootstrap interval of a mean.

    Args:
        values: (n,); NaN (a task with nothing to score) is left out.
        seed: of the resampling.
        resamples: their number.
        level: of the interval.

    Raises:
        ValueError: no value is left.
    """
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    n = len(values)
    if n == 0:
        raise ValueError("bootstrap of no values: every task lacks a counted frame.")
    rng = np.random.default_rng(seed)
    # how often each value is drawn: the same distribution as drawing indices, and one matrix product
    means = rng.multinomial(n, np.full(n, 1 / n), size=resamples) @ values / n
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high), n)


def compare(before: Evaluation, after: Evaluation, seed: int = 0) -> dict[str, Comparison]:
    """Term -> comparison, task by task; a term that no task has anything to score for is left out.

    Raises:
        ValueError: the evaluations are not of the same tasks.
    """
    if before.task_ids != after.task_ids:
        raise ValueError("before and after are evaluations of different tasks and cannot be paired.")
    return {
        name: Comparison(
            bootstrap(values, seed), bootstrap(after.terms[name], seed), bootstrap(after.terms[name] - values, seed)
        )
        for name, values in before.terms.items()
        if np.isfinite(values).any()
    }


def write_report(
    folder: Path,
    before: Evaluation,
    after: Evaluation,
    others: Mapping[str, Evaluation],
    history: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
) -> dict[str, Comparison]:
    """Writes report.json, curves.png and before_after.gif.

    Args:
        folder: of the run.
        before, after: all-`ode` evaluations of the same tasks.
        others: further evaluations by name, say all-`renoise`, reported as they are.
        history: the trainer's `state.log_history`.
        facts: what else the report should say: settings, seconds.

    Returns:
        The comparisons.
    """
    comparisons = compare(before, after)
    report = {
        "tasks": len(before.task_ids),
        "terms": {name: asdict(c) for name, c in comparisons.items()},
        "others": {
            label: {name: asdict(bootstrap(e.terms[name])) for name in comparisons} for label, e in others.items()
        },
        "facts": dict(facts),
        "task_ids": list(before.task_ids),
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "report.partial"
    partial.write_text(json.dumps(report, indent=2, default=str) + "\n")
    partial.replace(folder / "report.json")
    draw_curves(folder / "curves.png", history)
    if len(before.videos) and len(after.videos):
        draw_videos(folder / "before_after.gif", [before, after])
    return comparisons


def format_table(comparisons: Mapping[str, Comparison]) -> str:
    """The comparisons as lines of text."""
    lines = [f"{'held-out':18s} {'before':>8s} {'after':>8s}   difference [95 % interval]"]
    for name, c in comparisons.items():
        d = c.difference
        note = "  (lower is better)" if name in LOWER_IS_BETTER else ""
        lines.append(
            f"{name:18s} {c.before.mean:8.3f} {c.after.mean:8.3f}   {d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]{note}"
        )
    return "\n".join(lines)


def draw_curves(path: Path, history: Sequence[Mapping[str, Any]], window: int = 9) -> None:
    """Each reward term against updates, raw and as a running mean (the paper's Fig. 6)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [entry for entry in history if "reward" in entry]
    names = sorted({k for row in rows for k in row if k.startswith("rewards/") and k.endswith("/mean")})
    if not names:
        return
    figure = Figure(figsize=(4.2 * len(names), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for i, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), i + 1)
        x = np.array([row["step"] for row in rows if name in row])
        y = np.array([row[name] for row in rows if name in row], np.float64)
        axes.plot(x, y, color="tab:blue", alpha=0.3, linewidth=1)
        axes.plot(x, smooth(y, window), color="tab:blue", linewidth=2)
        axes.set(title=name.split("/")[1], xlabel="update")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """The centred running mean, over fewer values at the ends; (n,) -> (n,)."""
    kernel = np.ones(min(window, len(y)))
    return np.convolve(y, kernel, "same") / np.convolve(np.ones(len(y)), kernel, "same")


def draw_videos(path: Path, rows: Sequence[Evaluation], fps: int = 8) -> None:
    """A GIF, a column for each kept task and a row for each evaluation, the drag path on all (Fig. 5)."""
    from ardrag_rl.envs import draw_drag
    from ardrag_rl.media import write_gif

    def row(e: Evaluation, t: int) -> np.ndarray:
        return np.concatenate([draw_drag(v[t], c, t, size=128) for v, c in zip(e.videos, e.controls, strict=True)], 1)

    frames = range(rows[0].videos.shape[1])
    write_gif(path, np.stack([np.concatenate([row(e, t) for e in rows], 0) for t in frames]), fps)
