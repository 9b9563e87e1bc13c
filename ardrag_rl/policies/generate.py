"""Whole latent videos from a policy, without an environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ardrag_rl.policies.chunks import Chunk, Conditions, chunk_slices
from ardrag_rl.rollout import Plan

if TYPE_CHECKING:
    from ardrag_rl.policies.policy import VideoPolicy


@torch.no_grad()
def generate_latents(
    policy: VideoPolicy,
    plan: Plan,
    given: Conditions,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Runs a plan over all frames: chunk by chunk, which with chunks of one frame is what an environment does.

    Args:
        policy: with a schedule of as many steps as the plan has.
        plan: a kernel for each step.
        given: of B videos of F frames.
        generator: of what stochastic kernels draw: one for the batch, or one for each video.

    Returns:
        (B, F, N+1, C, h, w), x[m,n]; the last along N is clean.
    """
    model, levels, num_frames = policy.transformer, policy.schedule.levels, given.noise.shape[1]
    context, cache = model.encode_context(given.text, given.image), model.new_cache()
    states = []
    for frames in chunk_slices(num_frames, model.config["chunk_size"]):
        chunk = Chunk(policy, given, context, cache, frames)
        chain = [given.noise[:, frames]]
        for n, kernel in enumerate(plan.kernels):
            step = kernel.step(chain[-1], chunk.velocity(chain[-1], n), levels[n], levels[n + 1])
            chain.append(step.sample(generator))
        if frames.stop < num_frames:
            cache = cache.append(chunk.entries(chain[-1]))
        states.append(torch.stack(chain, 2))
    return torch.cat(states, 1)
