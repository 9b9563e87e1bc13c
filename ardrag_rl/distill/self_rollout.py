"""Self-Rollout (Algorithm 1): the student generates as at inference, and one step of each chunk carries gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ardrag_rl.flow import Kernel, predict_x0
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.policies.cache import Cache, FrameEntry
from ardrag_rl.policies.transformer import Context

History = Literal["self_rollout", "self_forcing", "teacher_forcing"]
HISTORIES = ("self_rollout", "self_forcing", "teacher_forcing")
RENOISE = Kernel("renoise")  # Psi of Algorithm 1


@dataclass(frozen=True)
class Conditions:
    """What B videos of F latent frames are generated from.

    Attributes:
        noise: (B, F, C, h, w), x[m,0] of all frames.
        trajectory: (B, F, C, h, w), the encoded control.
        reference: (B, F, C, h, w), the encoded image at frame 0, fixed noise after (Eq. 6).
        text: (B, L, D).
        image: (B, L', D') image tokens, for pipelines that have an image encoder.
    """

    noise: Tensor
    trajectory: Tensor
    reference: Tensor
    text: Tensor
    image: Tensor | None = None


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
    levels, chunk = policy.schedule.levels, policy.transformer.config["chunk_size"]
    starts = range(0, given.noise.shape[1], chunk)
    chosen = [steps] * len(starts) if isinstance(steps, int) else list(steps)
    _check(chosen, len(starts), policy.schedule.num_steps, history, data)
    context = policy.transformer.encode_context(given.text, given.image)
    cache = policy.transformer.new_cache()
    predictions, clean = [], []
    for a, s in zip(starts, chosen, strict=True):
        now = _Chunk(policy, given, context, cache, slice(a, a + chunk))

        def denoise(x: Tensor, v: Tensor, n: int) -> Tensor:
            return RENOISE.step(x, v, levels[n], levels[n + 1]).sample(generator)

        x = given.noise[:, now.frames]
        with torch.no_grad():
            for n in range(s):
                x = denoise(x, now.velocity(x, n), n)
        v = now.velocity(x, s)
        predictions.append(predict_x0(x, v, levels[s]))
        with torch.no_grad():
            if history == "teacher_forcing":
                assert data is not None
                x = data[:, now.frames]
            elif history == "self_forcing":
                x = predictions[-1].detach()
            else:
                x = denoise(x, v, s)
                for n in range(s + 1, len(levels) - 1):
                    x = denoise(x, now.velocity(x, n), n)
            cache = cache.append(now.entries(x))
        clean.append(x)
    return StudentVideo(torch.cat(predictions, 1), torch.cat(clean, 1), cache)


@dataclass(frozen=True)
class _Chunk:
    """The c frames of the videos that are denoised together, before their cache entries are written."""

    policy: VideoPolicy
    given: Conditions
    context: Context
    cache: Cache
    frames: slice

    def velocity(self, x: Tensor, n: int) -> Tensor:
        """Of x (B, c, C, h, w) at step n."""
        timestep = 1000 * self.policy.schedule.levels[n]
        v, _ = self.policy.transformer(self.context, None, self._inputs(x)[:, None], timestep, self.cache)
        return v[:, 0].float()

    def entries(self, x: Tensor) -> tuple[FrameEntry, ...]:
        """What the clean frames x (B, c, C, h, w) leave in the cache: one more pass, at t = 0."""
        return self.policy.transformer(self.context, self._inputs(x), cache=self.cache)[1]

    def _inputs(self, x: Tensor) -> Tensor:
        reference, trajectory = self.given.reference[:, self.frames], self.given.trajectory[:, self.frames]
        return self.policy.frame_inputs(x, reference, trajectory, self.frames.start)


def _check(steps: Sequence[int], chunks: int, num_steps: int, history: str, data: Tensor | None) -> None:
    if history not in HISTORIES:
        raise ValueError(f"history={history!r}: choose one of {', '.join(HISTORIES)}.")
    if history == "teacher_forcing" and data is None:
        raise ValueError("history='teacher_forcing' needs data=, the true frames.")
    if len(steps) != chunks or any(not 0 <= s < num_steps for s in steps):
        raise ValueError(f"steps={list(steps)}: expected one in 0..{num_steps - 1} for each of {chunks} chunks.")
