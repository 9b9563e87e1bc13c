"""How far the learner's policy is from the one that took the actions, and from the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ardrag_rl.flow import GaussianStep
from ardrag_rl.rollout import Rollout
from ardrag_rl.training.algorithms import advantages_of, epsilon_high, log_prob

if TYPE_CHECKING:
    from ardrag_rl.training.config import GRPOConfig


@dataclass(frozen=True)
class LossStats:
    """How far the policy is from the one that took the actions; every field a scalar over a micro-batch.

    Attributes:
        ratio_mean, ratio_min, ratio_max: of p / p_recorded.
        clip_low, clip_high: fraction of transitions that Eq. 14 clips below and above, where it does.
        approx_kl: KL(recorded || policy) by Schulman's estimator r - 1 - log r.
        kl: KL(policy || reference), closed form; None without a reference.
        drift_mean, drift_max: |log p - recorded|; before an update, the error of the replay.
    """

    ratio_mean: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    clip_low: Tensor
    clip_high: Tensor
    approx_kl: Tensor
    kl: Tensor | None
    drift_mean: Tensor
    drift_max: Tensor


@torch.no_grad()
def loss_stats(steps: GaussianStep, rollout: Rollout, args: GRPOConfig) -> LossStats:
    """The same statistics for every algorithm."""
    reference = rollout.ref_steps
    log_ratio = log_prob(steps, rollout, args) - rollout.log_probs  # (B, F, S)
    ratio, drift, a = log_ratio.exp(), log_ratio.abs(), advantages_of(rollout)
    return LossStats(
        ratio_mean=ratio.mean(),
        ratio_min=ratio.min(),
        ratio_max=ratio.max(),
        clip_low=((ratio < 1 - args.epsilon) & (a < 0)).float().mean(),
        clip_high=((ratio > 1 + epsilon_high(args)) & (a > 0)).float().mean(),
        approx_kl=(ratio - 1 - log_ratio).mean(),
        kl=None if reference is None else steps.kl(reference, args.log_prob_reduction).mean(),
        drift_mean=drift.mean(),
        drift_max=drift.max(),
    )
