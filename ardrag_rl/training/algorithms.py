"""The losses that `loss_type` chooses from: Eq. 14 (GRPO), REINFORCE and RLOO, on per-frame advantages.

An algorithm is `fn(steps, rollout, args) -> loss`: the policy's Gaussians over the scored transitions, mean
(B, F, S, C, h, w), the rollout they were taken in (with `advantages`, and `ref_steps` where `args.beta` > 0), and the
configuration. Deterministic transitions have no density and are no part of it. To add one:

    @ardrag_rl.register_algorithm("mine")
    def mine(steps, rollout, args): ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ardrag_rl.flow import GaussianStep
from ardrag_rl.rollout import Rollout

if TYPE_CHECKING:
    from ardrag_rl.training.config import GRPOConfig

Algorithm = Callable[[GaussianStep, Rollout, "GRPOConfig"], Tensor]

_ALGORITHMS: dict[str, Algorithm] = {}


def register_algorithm(name: str) -> Callable[[Algorithm], Algorithm]:
    """Makes a loss selectable as `loss_type=name`; a name that is taken is replaced."""

    def register(fn: Algorithm) -> Algorithm:
        _ALGORITHMS[name] = fn
        return fn

    return register


def algorithm_names() -> tuple[str, ...]:
    """The known values of `loss_type`."""
    return tuple(sorted(_ALGORITHMS))


def get_algorithm(name: str) -> Algorithm:
    """The loss of this name, or a ValueError that says which exist."""
    if name not in _ALGORITHMS:
        raise ValueError(
            f"loss_type={name!r} is unknown; choose one of {', '.join(algorithm_names())}, or register it with "
            "@ardrag_rl.register_algorithm."
        )
    return _ALGORITHMS[name]


@register_algorithm("grpo")
def grpo(steps: GaussianStep, rollout: Rollout, args: GRPOConfig) -> Tensor:
    """-E[min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)] + beta KL(policy || reference), Eq. 14.

    r = p(a|s) / p_recorded(a|s), the mean over all scored transitions.
    """
    ratio = (log_prob(steps, rollout, args) - rollout.log_probs).exp()  # (B, F, S)
    clipped = ratio.clamp(1 - args.epsilon, 1 + epsilon_high(args))
    a = advantages_of(rollout)
    return -torch.min(ratio * a, clipped * a).mean() + _penalty(steps, rollout, args)


@register_algorithm("reinforce")
def reinforce(steps: GaussianStep, rollout: Rollout, args: GRPOConfig) -> Tensor:
    """-E[log p(a|s) A] + beta KL: the policy gradient itself, neither ratio nor clip."""
    return -(log_prob(steps, rollout, args) * advantages_of(rollout)).mean() + _penalty(steps, rollout, args)


@register_algorithm("rloo")
def rloo(steps: GaussianStep, rollout: Rollout, args: GRPOConfig) -> Tensor:
    """REINFORCE with the leave-one-out baseline: R_i - mean of the other G-1 = G/(G-1) (R_i - mean of all G).

    Unbiased with `scale_rewards="none"`.
    """
    assert args.num_generations is not None
    factor = args.num_generations / (args.num_generations - 1)
    loss = -(log_prob(steps, rollout, args) * factor * advantages_of(rollout)).mean()
    return loss + _penalty(steps, rollout, args)


def log_prob(steps: GaussianStep, rollout: Rollout, args: GRPOConfig) -> Tensor:
    """(B, F, S): log p of the recorded actions under `steps`, reduced as the recorded ones were."""
    return steps.log_prob(rollout.actions, args.log_prob_reduction)


def epsilon_high(args: GRPOConfig) -> float:
    """The upper clip range; TRL's default is the lower one."""
    return args.epsilon if args.epsilon_high is None else args.epsilon_high


def advantages_of(rollout: Rollout) -> Tensor:
    """(B, F, 1), against (B, F, S)."""
    if rollout.advantages is None:
        raise ValueError("the rollout has no advantages: fill them in with compute_advantages first.")
    return rollout.advantages[..., None]


def _penalty(steps: GaussianStep, rollout: Rollout, args: GRPOConfig) -> Tensor:
    """beta KL(policy || reference) in its closed form (mu_p - mu_q)^2 / (2 s^2), Eq. 14."""
    if args.beta == 0:
        return steps.mean.new_zeros(())
    if rollout.ref_steps is None:
        raise ValueError(f"beta={args.beta} needs the reference policy's steps; set rollout.ref_steps, or beta=0.")
    return args.beta * steps.kl(rollout.ref_steps, args.log_prob_reduction).mean()
