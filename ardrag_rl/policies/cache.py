"""KV caches: what the clean frames so far leave behind for the frames after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from ardrag_rl.policies.rotary import Rotary

LayerKV = tuple[Tensor, Tensor]  # keys, values: (B, P, n, heads, head_dim) of P frames with n tokens each


class Room(NamedTuple):
    """Keys and values of the history, in a buffer that has room in front of them for those of the chunk to come.

    Attributes:
        keys, values: (B, own + P, n, heads, head_dim).
        own: frames of the largest chunk.
    """

    keys: Tensor
    values: Tensor
    own: int

    def with_chunk(self, keys: Tensor, values: Tensor) -> LayerKV:
        """What a chunk attends to, its own c frames written in: (B, c + P, n, heads, head_dim) each, not copied."""
        first = self.own - keys.shape[1]
        self.keys[:, first : self.own] = keys
        self.values[:, first : self.own] = values
        return self.keys[:, first:], self.values[:, first:]


@dataclass(frozen=True)
class FrameEntry:
    """What one clean frame leaves in every layer; never written to again, so gradients and forks stay apart.

    Attributes:
        layers: per layer (keys, values), each (B, n, heads, head_dim); keys carry their rotary position, or none where
            the cache asks for `unrotated` entries. Empty where the cache gave `Room`, and has them already.
        queries: per layer (B, n, heads, head_dim), without a position, in unrotated entries.
        rotary: what gives an unrotated entry its position.
    """

    layers: tuple[LayerKV, ...]
    queries: tuple[Tensor, ...] = ()
    rotary: Rotary | None = None

    def select(self, rows: Tensor) -> FrameEntry:
        """The entry of these videos of the batch."""
        layers = tuple((k[rows], v[rows]) for k, v in self.layers)
        return FrameEntry(layers, tuple(q[rows] for q in self.queries), self.rotary)


@dataclass(frozen=True)
class Band:
    """What a frame sees where many run in one pass: the first `sink` frames and the last `window` before its chunk."""

    window: int
    sink: int = 0


class Cache(Protocol):
    """A caching strategy. `append` gives a new cache and leaves the old one as it was; or, in place, useless.

    A strategy with a `band` is exact in one pass over many frames, so a replay equals the rollout and it can be trained
    with. Where `band` is None, what a frame sees depends on what the cache made of the frames before it: they have to
    come one chunk at a time, and the transformer refuses anything else.
    """

    @property
    def num_frames(self) -> int:
        """Frames appended so far, those dropped included: the number of the next frame."""
        ...

    @property
    def position(self) -> int:
        """The temporal rotary position of the next frame."""
        ...

    @property
    def band(self) -> Band | None:
        """What one pass over many frames has to mask; None where no mask gives the same."""
        ...

    @property
    def unrotated(self) -> bool:
        """Whether entries are to come without a position, and with their queries."""
        ...

    @property
    def current(self) -> bool:
        """Whether this cache can be used; one that writes in place cannot, once it was appended to."""
        ...

    def append(self, entries: Sequence[FrameEntry]) -> Cache:
        """The cache after these frames, in order."""
        ...

    def view(self, layer: int) -> LayerKV | Room | None:
        """What the next frame attends to in a layer, oldest first; None while there is nothing."""
        ...

    def select(self, rows: Tensor) -> Cache:
        """The cache of these videos of the batch."""
        ...


@dataclass(frozen=True)
class RollingCache:
    """Keeps the last `window` frames and drops the oldest (Self-Forcing's rolling window).

    An entry was itself computed from the frames before it, so a window of W frames still carries what happened
    longer ago: a rebuild has to run all earlier frames under the banded mask.
    """

    unrotated: ClassVar[bool] = False
    current: ClassVar[bool] = True

    window: int
    entries: tuple[Any, ...] = ()  # FrameEntry, or what a strategy makes of it
    num_frames: int = 0

    @property
    def position(self) -> int:
        return self.num_frames

    @property
    def band(self) -> Band | None:
        return Band(self.window)

    def append(self, entries: Sequence[FrameEntry]) -> Self:
        kept = self._kept((*self.entries, *entries))
        return replace(self, entries=kept, num_frames=self.num_frames + len(entries))

    def view(self, layer: int) -> LayerKV | None:
        return self._layers[layer] if self.entries else None

    def select(self, rows: Tensor) -> Self:
        return replace(self, entries=tuple(e.select(rows) for e in self.entries))

    def _kept(self, entries: tuple[Any, ...]) -> tuple[Any, ...]:
        return entries[-self.window :]

    @cached_property
    def _layers(self) -> tuple[LayerKV, ...]:
        """Concatenated once, used by every step of the next frame."""
        per_layer = zip(*(e.layers for e in self.entries), strict=True)
        return tuple((torch.stack([k for k, _ in kv], 1), torch.stack([v for _, v in kv], 1)) for kv in per_layer)


@dataclass(frozen=True)
class SinkCache(RollingCache):
    """An attention sink: keeps the first `sink` frames beside the last `window` (StreamingLLM; in video LongLive).

    All keep the positions they had, as LongLive was trained. Exact in one pass.
    """

    sink: int = 1

    def __post_init__(self) -> None:
        if self.sink < 0:
            raise ValueError(f"sink={self.sink}: expected at least 0 frames.")

    @property
    def band(self) -> Band | None:
        return Band(self.window, self.sink)

    def _kept(self, entries: tuple[Any, ...]) -> tuple[Any, ...]:
        return entries[: self.sink] + entries[max(self.sink, len(entries) - self.window) :]
