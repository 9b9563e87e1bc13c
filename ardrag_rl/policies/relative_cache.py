"""Caches whose keys get their position when they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from ardrag_rl.policies.cache import Band, FrameEntry, LayerKV, SinkCache
from ardrag_rl.policies.rotary import Turn, rotate


@dataclass(frozen=True)
class RelativeCache(SinkCache):
    """Keys are kept unrotated and rotated on read, at their place in the cache: 0 for the first frame that is there.

    So StreamingLLM counts; in video Infinity-RoPE and Reward Forcing do. Positions never exceed the cache, so a video
    may be longer than the model's rotary table. Without a sink all distances stay what they were: it equals
    `RollingCache` and is exact in one pass. With one, the sink stays next to the window however long ago it was, which
    no mask expresses: inference only.
    """

    unrotated: ClassVar[bool] = True

    sink: int = 0

    @property
    def position(self) -> int:
        return len(self.entries)

    @property
    def band(self) -> Band | None:
        return None if self.sink else Band(self.window)

    def append(self, entries: Sequence[FrameEntry]) -> Self:
        return super().append([replace(e, queries=()) for e in entries])

    def _turn(self) -> Turn:
        """What the frames of the cache are rotated by."""
        return self.entries[0].rotary.at(range(len(self.entries)))

    @cached_property
    def _layers(self) -> tuple[LayerKV, ...]:
        turn, layers = self._turn(), []
        for kv in zip(*(e.layers for e in self.entries), strict=True):
            keys, values = (torch.stack([x.type_as(xs[-1]) for x in xs], 1) for xs in zip(*kv, strict=True))
            layers.append((rotate(keys, turn), values))
        return tuple(layers)


@dataclass(frozen=True)
class EmaSinkCache(RelativeCache):
    """Reward Forcing's EMA sink: a frame that leaves the window is folded into the sink, not forgotten.

    The sink begins as the first `sink` frames; frame m, when it leaves, goes into slot m mod `sink`, as
    `decay * slot + (1 - decay) * frame`, keys (unrotated) and values alike. With chunks of `sink` frames that is the
    public code's update, whose decay is 0.999 and sink 3. Inference only.
    """

    sink: int = 1
    decay: float = 0.999

    def __post_init__(self) -> None:
        if self.sink < 1:
            raise ValueError(f"sink={self.sink}: an EMA sink needs at least 1 frame.")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay={self.decay}: expected a number in [0, 1].")

    @property
    def band(self) -> Band | None:
        return None

    def _kept(self, entries: tuple[FrameEntry, ...]) -> tuple[FrameEntry, ...]:
        slots, frames = list(entries[: self.sink]), entries[self.sink :]
        leaving = frames[: max(0, len(frames) - self.window)]
        number = self.num_frames - len(self.entries) + self.sink  # of the first of them
        for slot, frame in enumerate(leaving, number):
            slots[slot % self.sink] = self._folded(slots[slot % self.sink], frame)
        return (*slots, *frames[len(leaving) :])

    def _folded(self, slot: FrameEntry, frame: FrameEntry) -> FrameEntry:
        """In float32, and it stays so: what a step adds is less than bfloat16 can tell."""

        def fold(a: Tensor, b: Tensor) -> Tensor:
            return self.decay * a.float() + (1 - self.decay) * b.float()

        both = zip(slot.layers, frame.layers, strict=True)
        return replace(slot, layers=tuple((fold(k, k2), fold(v, v2)) for (k, v), (k2, v2) in both))
