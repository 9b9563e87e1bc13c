"""DeepSinkCache: a long sink, and between it and the last frames the tokens that these attend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ardrag_rl.policies.cache import Band, FrameEntry, LayerKV
from ardrag_rl.policies.relative_cache import RelativeCache
from ardrag_rl.policies.rotary import Turn, rotate


@dataclass(frozen=True)
class DeepSinkCache(RelativeCache):
    """Deep Forcing's deep sink with participative compression (Yi et al., 2025, Eq. 5-11, Algorithm 1).

    The cache grows to `window` frames. The next one makes it compress to `budget`: the first `sink` frames and the last
    `recent` stay whole; of the tokens between, those stay whose keys have the largest product with the sum of the
    recent frames' queries (Eq. 7), as many as fill `budget - sink - recent` frames. Sink, chosen tokens and recent
    frames are then read at consecutive positions (Eq. 6, 11), each token at its own place in the frame.

    No code was public when this was written. Where the paper is silent: the sum runs over heads too, so that all heads
    keep the same tokens, each layer chooses for itself, and queries are those of clean frames. Inference only.
    """

    sink: int = 10
    recent: int = 4
    budget: int = 16

    @classmethod
    def scaled(cls, window: int, **options: int) -> DeepSinkCache:
        """With the paper's 10, 4 and 16 of 21 frames scaled to the window, where the options do not say otherwise."""
        defaults = {"sink": window // 2, "recent": max(1, window // 5), "budget": -(-3 * window // 4)}
        return cls(window=window, **{**defaults, **options})  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        if self.sink < 0 or self.recent < 1 or not self.sink + self.recent <= self.budget <= self.window:
            raise ValueError(
                f"sink={self.sink}, recent={self.recent}, budget={self.budget}, window={self.window}: expected sink >= "
                "0, recent >= 1 and sink + recent <= budget <= window."
            )

    @property
    def band(self) -> Band | None:
        return None

    def append(self, entries: Sequence[FrameEntry]) -> Self:
        slots, recent = self.entries, self.recent
        for entry in entries:
            # a chosen token leaves its frame, so each is given its place there before
            space = entry.rotary.space()  # type: ignore[union-attr]
            layers = tuple((rotate(k[:, None], space)[:, 0], v) for k, v in entry.layers)
            queries = tuple(rotate(q[:, None], space)[:, 0] for q in entry.queries)
            slots = (*slots, FrameEntry(layers, queries, entry.rotary))
            if len(slots) > self.window:
                slots = self._compressed(slots)
            slots = tuple(replace(e, queries=()) for e in slots[:-recent]) + slots[-recent:]
        return replace(self, entries=slots, num_frames=self.num_frames + len(entries))

    def _turn(self) -> Turn:
        return self.entries[0].rotary.time(range(len(self.entries)))

    def _compressed(self, slots: tuple[FrameEntry, ...]) -> tuple[FrameEntry, ...]:
        first, last = slots[: self.sink], slots[-self.recent :]
        layers = [self._chosen(slots, i) for i in range(len(last[0].layers))]
        middle = tuple(
            replace(last[0], layers=tuple((k[:, i], v[:, i]) for k, v in layers), queries=())
            for i in range(self.budget - self.sink - self.recent)
        )
        return (*first, *middle, *last)

    def _chosen(self, slots: tuple[FrameEntry, ...], layer: int) -> LayerKV:
        """The tokens to keep, in their order, as (B, budget - sink - recent, n, heads, head_dim)."""
        keys, values = (
            torch.stack([e.layers[layer][i] for e in slots[self.sink : -self.recent]], 1) for i in (0, 1)
        )  # (B, P, n, H, d)
        queries = torch.stack([e.queries[layer] for e in slots[-self.recent :]], 1)
        rotary, at = slots[0].rotary, range(len(slots))
        assert rotary is not None
        seen = rotate(keys.float(), rotary.time(at[self.sink : -self.recent]))
        asked = rotate(queries.float(), rotary.time(at[-self.recent :])).sum((1, 2))  # (B, H, d)
        score = torch.einsum("bhd,bpnhd->bpn", asked, seen).flatten(1)
        count, tokens = self.budget - self.sink - self.recent, keys.shape[2]
        index = score.topk(count * tokens).indices.sort().values

        def pick(x: Tensor) -> Tensor:
            return torch.stack([row[i] for row, i in zip(x.flatten(1, 2), index, strict=True)]).unflatten(
                1, (count, tokens)
            )

        return pick(keys), pick(values)
