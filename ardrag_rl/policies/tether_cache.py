"""TetherCache: a sink, a memory of frames worth recalling, and the last frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from ardrag_rl.policies.cache import Band, FrameEntry, LayerKV
from ardrag_rl.policies.relative_cache import RelativeCache


@dataclass(frozen=True)
class TetherCache(RelativeCache):
    """TetherCache's gated recall with trusted alignment (Meng et al., 2026), as its public code has it.

    `window` frames in all: the first `sink`, a memory, the last `recent`. A frame that leaves the recent ones competes
    with those in the memory, in each layer: the score of a frame is its attention mass, the softmax over the
    competitors of the mean product of the newest frame's queries with its keys, plus `diversity` times how far it is in
    time from competitors of much mass. The lowest one goes (GRAB). A frame that comes in is first moved by `alignment`
    towards the mean and standard deviation, per head and channel, of sink and memory (TAME). Positions are places in
    the cache.

    Videos of a batch choose for themselves; the public code is for one. Inference only.

    Args:
        diversity: alpha.
        alignment: tau, in [0, 1].
        frames: per layer (B, memory), the numbers of the frames in the memory; empty until the cache is full.
    """

    sink: int = 3
    recent: int = 4
    diversity: float = 0.35
    alignment: float = 0.35
    frames: tuple[Tensor, ...] = ()

    @classmethod
    def scaled(cls, window: int, **options: Any) -> TetherCache:
        """With the public code's 3 and 4 of 21 frames scaled to the window, where the options do not say otherwise."""
        return cls(window=window, **{"sink": window // 7, "recent": max(1, window // 5), **options})

    def __post_init__(self) -> None:
        if self.sink < 0 or self.recent < 1 or self.memory < 0:
            raise ValueError(
                f"sink={self.sink}, recent={self.recent}, window={self.window}: expected sink >= 0, recent >= 1 and "
                "sink + recent <= window."
            )
        if self.diversity < 0 or not 0 <= self.alignment <= 1:
            raise ValueError(
                f"diversity={self.diversity}, alignment={self.alignment}: expected diversity >= 0 and alignment in "
                "[0, 1]."
            )

    @property
    def memory(self) -> int:
        """Frames of the memory."""
        return self.window - self.sink - self.recent

    @property
    def band(self) -> Band | None:
        return None

    def append(self, entries: Sequence[FrameEntry]) -> Self:
        cache = self
        for entry in entries:
            if len(cache.entries) == cache.window:
                cache = cache._recalled(entry.queries)
            kept = (*cache.entries, replace(entry, queries=()))
            cache = replace(cache, entries=kept, num_frames=cache.num_frames + 1)
        return cache

    def select(self, rows: Tensor) -> Self:
        return replace(super().select(rows), frames=tuple(f[rows] for f in self.frames))

    def _recalled(self, queries: Sequence[Tensor]) -> Self:
        """The cache without the frame that is least worth keeping of the memory and the oldest recent one."""
        end = self.sink + self.memory
        if not self.memory:
            return replace(self, entries=self.entries[:end] + self.entries[end + 1 :])
        first = torch.arange(self.sink, end).expand(len(queries[0]), -1)
        frames = [x.to(queries[0].device) for x in self.frames or (first,) * len(queries)]
        layers: list[LayerKV] = []
        for i, query in enumerate(queries):
            keys, values = (torch.stack([e.layers[i][j] for e in self.entries[: end + 1]], 1) for j in (0, 1))
            number = torch.full_like(frames[i][:, :1], self.num_frames - self.recent)
            frames[i] = torch.cat([frames[i], number], 1)
            score = recall_score(query, keys[:, self.sink :], frames[i], self.diversity)
            index = score.topk(self.memory).indices.sort().values  # (B, memory)
            row = torch.arange(len(index), device=index.device)[:, None]
            frames[i] = frames[i][row, index]
            keys, values = (aligned(x, self.alignment)[:, self.sink :][row, index] for x in (keys, values))
            layers.append((keys, values))
        memory = tuple(
            replace(self.entries[0], layers=tuple((k[:, m], v[:, m]) for k, v in layers)) for m in range(self.memory)
        )
        kept = self.entries[: self.sink] + memory + self.entries[end + 1 :]
        return replace(self, entries=kept, frames=tuple(frames))


def recall_score(queries: Tensor, keys: Tensor, frames: Tensor, diversity: float) -> Tensor:
    """What P frames are worth to one (GRAB), (B, P).

    Args:
        queries: (B, n, heads, head_dim) of the newest frame, unrotated.
        keys: (B, P, n, heads, head_dim), unrotated.
        frames: (B, P), their numbers.
        diversity: alpha.
    """
    query, key = queries.float().mean(1), keys.float().mean(2)  # the mean product is the product of the means
    product = torch.einsum("bhd,bphd->bp", query, key) / (query.shape[1] * query.shape[2] ** 0.5)
    mass = product.softmax(-1)
    number = frames.float()
    scale = (0.5 * (number.amax(1) - number.amin(1) + 1)).clamp(min=1)
    near = torch.exp(-(number[:, :, None] - number[:, None]).abs() / scale[:, None, None])  # (B, P, P)
    near = near - torch.diag_embed(near.diagonal(dim1=1, dim2=2))  # not to itself
    return mass + diversity * (1 - (near * mass[:, None]).amax(-1)).clamp(min=0)


def aligned(x: Tensor, alignment: float) -> Tensor:
    """Frames (B, P, n, heads, head_dim), the last one moved towards the statistics of those before it (TAME)."""
    trusted, last = x[:, :-1].float().flatten(1, 2), x[:, -1].float()
    (mean, std), (own_mean, own_std) = (
        (a.mean(1, keepdim=True), a.std(1, keepdim=True, correction=0).clamp(min=1e-6)) for a in (trusted, last)
    )
    moved = torch.lerp(last, std * (last - own_mean) / own_std + mean, alignment)
    return torch.cat([x[:, :-1], moved.type_as(x)[:, None]], 1)
