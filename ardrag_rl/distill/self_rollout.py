"""Self-Rollout (Algorithm 1): the student generates as at inference, and one step of each chunk carries gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ardrag_rl.flow import Kernel, predict_x0
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.policies.cache import Cache
from ardrag_rl.policies.chunks import Chunk, Conditions, chunk_slices

History = Literal["self_rollout", "self_forcing", "teacher_forcing"]
HISTORIES = ("self_rollout", "self_forcing", "teacher_forcing")
RENOISE = Kernel("renoise")  # Psi of Algorithm 1


@dataclass(frozen=True)
class StudentVideo:
    """What a Self-Rollout leaves behind.

    Attributes:
        predictions: (B, F, C, h, w), x0_hat of each frame at its step s, with gradient; what DMD and the critic judge.
        clean: (B, F, C, h, w), what entered the cache, without gradient.
        cache: after the last frame.
    """

    predictions: Tensor
    clean: Tensor
    cache: Cache


def self_rollout(
    policy: VideoPolicy,
    given: Conditions,
    steps: int | Sequence[int],
    history: History = "self_rollout",
    data: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> StudentVideo:
    """Algorithm 1, corrected. Frame by frame (chunk by chunk, where the student has larger ones): denoise from pure
    noise to step s without gradient, renoising with fresh noise; predict x0_hat there with gradient; then see that the
    cache holds what it will hold at inference.

    What enters the cache is all that the three histories differ in:
    - "self_rollout": the frame, denoised on from a detached x0_hat through the steps after s, as at inference;
    - "self_forcing": x0_hat of step s itself (Self-Forcing, the paper's baseline); the same where s = N-1;
    - "teacher_forcing": the true frame.

    No gradient crosses chunks: cache entries are written without.

    Args:
        policy: the student.
        given: of B videos of F frames.
        steps: s in 0..N-1, one for the video (Algorithm 1) or one for each chunk (the paper's text).
        history: see above.
        data: (B, F, C, h, w), the true frames; "teacher_forcing" needs them.
        generator: of the renoising, drawn as at inference: one for the batch, or one for each video.

    Raises:
        ValueError: an unknown history, a step outside 0..N-1, a wrong number of them, or no data.
    """
    levels = policy.schedule.levels
    slices = list(chunk_slices(given.noise.shape[1], policy.transformer.config["chunk_size"]))
    chosen = [steps] * len(slices) if isinstance(steps, int) else list(steps)
    _check(chosen, len(slices), policy.schedule.num_steps, history, data)
    context = policy.transformer.encode_context(given.text, given.image)
    cache = policy.transformer.new_cache()
    predictions, clean = [], []
    for frames, s in zip(slices, chosen, strict=True):
        chunk = Chunk(policy, given, context, cache, frames)

        def denoise(x: Tensor, v: Tensor, n: int) -> Tensor:
            return RENOISE.step(x, v, levels[n], levels[n + 1]).sample(generator)

        x = given.noise[:, frames]
        with torch.no_grad():
            for n in range(s):
                x = denoise(x, chunk.velocity(x, n), n)
        v = chunk.velocity(x, s)
        predictions.append(predict_x0(x, v, levels[s]))
        with torch.no_grad():
            if history == "teacher_forcing":
                assert data is not None
                x = data[:, frames]
            elif history == "self_forcing":
                x = predictions[-1].detach()
            else:
                x = denoise(x, v, s)
                for n in range(s + 1, len(levels) - 1):
                    x = denoise(x, chunk.velocity(x, n), n)
            cache = cache.append(chunk.entries(x))
        clean.append(x)
    return StudentVideo(torch.cat(predictions, 1), torch.cat(clean, 1), cache)


def _check(steps: Sequence[int], chunks: int, num_steps: int, history: str, data: Tensor | None) -> None:
    if history not in HISTORIES:
        raise ValueError(f"history={history!r}: choose one of {', '.join(HISTORIES)}.")
    if history == "teacher_forcing" and data is None:
        raise ValueError("history='teacher_forcing' needs data=, the true frames.")
    if len(steps) != chunks or any(not 0 <= s < num_steps for s in steps):
        raise ValueError(f"steps={list(steps)}: expected one in 0..{num_steps - 1} for each of {chunks} chunks.")
