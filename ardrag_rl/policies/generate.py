"""Whole latent videos from a policy, without an environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ardrag_rl.rollout import Plan

if TYPE_CHECKING:
    from ardrag_rl.policies.policy import VideoPolicy


@torch.no_grad()
def generate_latents(
    policy: VideoPolicy,
    plan: Plan,
    noise: Tensor,
    trajectory: Tensor,
    reference: Tensor,
    text: Tensor,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Runs a plan over all frames with a session, exactly as an environment would be acted in.

    Args:
        noise: (B, F, C, h, w), x[m,0] of all frames.
        trajectory, reference: (B, F, C, h, w).
        text: (B, L, D).

    Returns:
        (B, F, N+1, C, h, w), x[m,n]; the last along N is clean.
    """
    batch, frames = noise.shape[:2]
    session = policy.session(batch)
    latents = noise.clone()
    states = []
    for m in range(frames):
        chain = [latents[:, m].clone()]
        for n, kernel in enumerate(plan.kernels):
            obs = {
                "latents": latents,
                "trajectory": trajectory,
                "reference": reference,
                "text": text,
                "frame": torch.full((batch, 1), m),
                "step": torch.full((batch, 1), n),
            }
            chain.append(session.transition(obs, kernel).sample(generator))
            latents[:, m] = chain[-1]
        states.append(torch.stack(chain, 1))
    return torch.stack(states, 1)
