"""Chunk: the frames of a video that are denoised together, against the cache of those before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ardrag_rl.policies.cache import Cache, FrameEntry
from ardrag_rl.policies.transformer import Context

if TYPE_CHECKING:
    from ardrag_rl.policies.policy import VideoPolicy


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
class Chunk:
    """c frames of B videos before their cache entries are written; one frame in an environment.

    Attributes:
        policy: denoises.
        given: of the whole videos.
        context: of the prompt.
        cache: of the frames before.
        frames: which ones.
    """

    policy: VideoPolicy
    given: Conditions
    context: Context
    cache: Cache
    frames: slice

    def velocity(self, x: Tensor, n: int) -> Tensor:
        """Of x (B, c, C, h, w) at step n, float32."""
        timestep = 1000 * self.policy.schedule.levels[n]
        v, _ = self.policy.transformer(self.context, None, self._inputs(x)[:, None], timestep, self.cache)
        return v[:, 0].float()

    def entries(self, x: Tensor) -> tuple[FrameEntry, ...]:
        """What the clean frames x (B, c, C, h, w) leave in the cache: one more pass, at t = 0."""
        return self.policy.transformer(self.context, self._inputs(x), cache=self.cache)[1]

    def _inputs(self, x: Tensor) -> Tensor:
        reference, trajectory = self.given.reference[:, self.frames], self.given.trajectory[:, self.frames]
        return self.policy.frame_inputs(x, reference, trajectory, self.frames.start)


def chunk_slices(num_frames: int, chunk_size: int) -> Iterator[slice]:
    """The frames of each chunk of a video; the last may be shorter."""
    return (slice(a, min(a + chunk_size, num_frames)) for a in range(0, num_frames, chunk_size))
