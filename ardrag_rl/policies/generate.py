"""Whole latent videos from a policy, without an environment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ardrag_rl.policies.chunks import Chunk, Conditions, chunk_slices
from ardrag_rl.policies.strategies import Strategy
from ardrag_rl.rollout import Plan

if TYPE_CHECKING:
    from ardrag_rl.policies.policy import VideoPolicy


def generate_latents(
    policy: VideoPolicy,
    plan: Plan,
    given: Conditions,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    cache: Strategy | None = None,
) -> Tensor:
    """Runs a plan over all frames: chunk by chunk, which with chunks of one frame is what an environment does.

    Args:
        policy: with a schedule of as many steps as the plan has.
        plan: a kernel for each step.
        given: of B videos of F frames.
        generator: of what stochastic kernels draw: one for the batch, or one for each video.
        cache: the caching strategy; None for the transformer's own.

    Returns:
        (B, F, N+1, C, h, w), x[m,n]; the last along N is clean.
    """
    return torch.cat(list(generate_chunks(policy, plan, given, generator, cache)), 1)


@torch.no_grad()
def generate_chunks(
    policy: VideoPolicy,
    plan: Plan,
    given: Conditions,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    cache: Strategy | None = None,
) -> Iterator[Tensor]:
    """As `generate_latents`, each chunk when it is made: (B, c, N+1, C, h, w)."""
    model, num_frames = policy.transformer, given.noise.shape[1]
    context, past = model.encode_context(given.text, given.image), model.new_cache(cache)
    for frames in chunk_slices(num_frames, model.config["chunk_size"]):
        chunk = Chunk(policy, given, context, past, frames)
        states = denoise(chunk, plan, generator)
        yield states
        if frames.stop < num_frames:
            past = past.append(chunk.entries(states[:, :, -1]))


@torch.no_grad()
def denoise(chunk: Chunk, plan: Plan, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
    """One chunk from its noise, (B, c, N+1, C, h, w)."""
    levels = chunk.policy.schedule.levels
    chain = [chunk.given.noise[:, chunk.frames]]
    for n, kernel in enumerate(plan.kernels):
        step = kernel.step(chain[-1], chunk.velocity(chain[-1], n), levels[n], levels[n + 1])
        chain.append(step.sample(generator))
    return torch.stack(chain, 2)
