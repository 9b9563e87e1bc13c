"""Recorder: what an update is worth and what it took, kept until the Trainer logs it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import fields

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ardrag_rl.rewards import Aesthetic, WeightedReward
from ardrag_rl.rollout import Rollout
from ardrag_rl.training.advantages import zero_spread
from ardrag_rl.training.stats import LossStats
from ardrag_rl.training.workers import UnitResult


class Recorder:
    """Numbers by name, of which a log shows the means.

    Args:
        rewards: of the run.
    """

    def __init__(self, rewards: tuple[WeightedReward, ...]) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)
        # Eq. 15's score before it is mapped to 1-5, which other work reports
        self._raw = {t.name: t.reward.raw for t in rewards if isinstance(t.reward, Aesthetic)}

    def note(self, name: str, value: float | Tensor) -> None:
        """One more number of this name."""
        self._values[name].append(float(value))

    def total(self, name: str) -> float:
        """Of the numbers since the last log."""
        return sum(self._values[name])

    def generation(self, result: UnitResult, advantages: Tensor) -> None:
        """What a generation is worth."""
        rollout = result.rollout
        assert rollout is not None
        for name, values in rollout.reward_terms.items():
            counted = values[result.counted[name]]
            if len(counted):
                self.note(f"rewards/{name}/mean", counted.mean())
                self.note(f"rewards/{name}/std", counted.std(correction=0))
                if name in self._raw:
                    self.note(f"rewards/{name}/raw", self._raw[name](counted.mean()))
        # beside every reward, against those that still videos earn
        self.note("dynamic_degree", result.dynamic_degree.mean())
        self.note("reward", rollout.rewards.mean())
        self.note("reward_std", torch.stack([group.std(0) for group in _by_group(rollout)]).mean())
        self.note("frac_reward_zero_std", zero_spread(rollout.rewards, rollout.groups))
        self.note("advantage_abs", advantages.abs().mean())
        self.note("stochastic_step", rollout.plan.scored[0])
        self.note("seconds/policy", result.timings.policy)
        self.note("seconds/env", result.timings.env)
        self.note("videos_per_second", len(rollout) / max(result.timings.policy + result.timings.env, 1e-9))

    def loss(self, stats: LossStats, before_update: bool) -> None:
        """A micro-batch's; where it is the first since the policy acted, how far the replay is from the record."""
        if before_update:
            self.note("before_update/ratio", stats.ratio_mean)
            self.note("before_update/drift_mean", stats.drift_mean)
            self.note("before_update/drift_max", stats.drift_max)
        for field in fields(stats):
            value = getattr(stats, field.name)
            if value is not None and not field.name.startswith("drift"):
                self.note(field.name, value)

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Over all processes, since the last call; one that has no number of a name does not count for it."""
        own = {name: float(np.mean(values)) for name, values in self._values.items() if values}
        self._values.clear()
        every = gather_object([own]) if accelerator.num_processes > 1 else [own]
        names = sorted({name for means in every for name in means})
        return {name: float(np.mean([means[name] for means in every if name in means])) for name in names}


def _by_group(rollout: Rollout) -> list[Tensor]:
    return [rollout.rewards[rollout.groups == g] for g in rollout.groups.unique()]
