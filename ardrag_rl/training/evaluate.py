"""evaluate: a policy on held-out tasks, every step deterministic (or as planned), one record of per-task numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ardrag_rl.control import Control
from ardrag_rl.envs import ARDragVectorEnv
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.rewards import DynamicDegree, Motion, motion_distance
from ardrag_rl.rollout import Plan
from ardrag_rl.training.collect import collect, counted_frames


@dataclass(frozen=True)
class Evaluation:
    """What a policy does on n tasks.

    Attributes:
        task_ids: n names.
        terms: reward name -> (n,) float64, unweighted, the mean over the counted frames of each video; NaN where a
            task has none. And "motion_error", the mean distance of dragged and tracked points in pixels,
            and "dynamic_degree".
        videos: (k, T, 3, H, W) in [0, 1], of the first k tasks.
        controls: of these k.
    """

    task_ids: tuple[str, ...]
    terms: dict[str, np.ndarray]
    videos: Tensor
    controls: tuple[Control, ...]

    def mean(self, name: str) -> float:
        """Over the tasks that have a counted frame."""
        return float(np.nanmean(self.terms[name]))


def evaluate(
    envs: ARDragVectorEnv,
    policy: VideoPolicy,
    tasks: Sequence[int],
    plan: Plan | None = None,
    seed: int = 0,
    num_videos: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Generates one video for each task and scores it with the environments' rewards, weight 0 included.

    A task's noise depends on (seed, task index) only, so that two policies meet the same.

    Args:
        envs: a batch of `num_envs` tasks at a time.
        tasks: indices into the environments' source.
        plan: None is every step `ode`.
        seed: of the noise.
        num_videos: k, videos to keep.
        progress: called with the number of tasks done so far.
    """
    plan = plan or Plan.all("ode", policy.schedule.num_steps)
    size = envs.num_envs
    tracker = next((term.reward.tracker for term in envs.rewards if isinstance(term.reward, Motion)), None)
    ids: list[str] = []
    scores: dict[str, list[Tensor]] = {}
    videos: list[Tensor] = []
    controls: list[Control] = []
    for first in range(0, len(tasks), size):
        batch = list(tasks[first : first + size])
        full = batch + [batch[-1]] * (size - len(batch))  # the last batch is filled up; the surplus is dropped
        rollout = collect(envs, policy, plan, (seed, _EVALUATION), full, group_ids=full)
        counted = counted_frames(envs)
        for name, values in rollout.reward_terms.items():
            mask = counted[name][: len(batch)]
            total = (values[: len(batch)].double() * mask).sum(1)
            scores.setdefault(name, []).append(total / mask.sum(1))  # 0 / 0 is NaN: nothing to score
        ids += rollout.task_ids[: len(batch)]
        shown = [task.control for task in envs.tasks[: len(batch)]]
        pixels = envs.codec.decode(rollout.clean[: len(batch)]).cpu()
        error = motion_distance(pixels, shown, tracker, pixels=True)  # (B, T), NaN where not counted
        scores.setdefault("motion_error", []).append(error.double().nanmean(1))
        if "dynamic_degree" not in rollout.reward_terms:
            scores.setdefault("dynamic_degree", []).append(DynamicDegree()(pixels, shown).double().mean(1))
        wanted = max(0, min(num_videos - first, len(batch)))
        videos.append(pixels[:wanted])
        controls += shown[:wanted]
        if progress is not None:
            progress(first + len(batch))
    return Evaluation(
        task_ids=tuple(ids),
        terms={name: torch.cat(parts).numpy() for name, parts in scores.items()},
        videos=torch.cat(videos),
        controls=tuple(controls),
    )


_EVALUATION = 2**32 - 1  # a key that no update has
