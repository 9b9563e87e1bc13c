"""KV caches: what the clean frames so far leave behind for the frames after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

LayerKV = tuple[Tensor, Tensor]  # keys, values: (B, P, n, heads, head_dim) of P frames with n tokens each


@dataclass(frozen=True)
class FrameEntry:
    """What one clean frame leaves in every layer; never written to again, so gradients and forks stay apart.

    Attributes:
        layers: per layer (keys, values), each (B, n, heads, head_dim); keys carry their rotary position.
    """

    layers: tuple[LayerKV, ...]


class Cache(Protocol):
    """A caching strategy. `append` gives a new cache and leaves the old one as it was."""

    @property
    def num_frames(self) -> int:
        """Frames appended so far, those dropped included: the position of the next frame."""
        ...

    def append(self, entries: Sequence[FrameEntry]) -> Cache:
        """The cache after these frames, in order."""
        ...

    def view(self, layer: int) -> LayerKV | None:
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

    window: int
    entries: tuple[FrameEntry, ...] = ()
    num_frames: int = 0

    def append(self, entries: Sequence[FrameEntry]) -> RollingCache:
        kept = (*self.entries, *entries)[-self.window :]
        return RollingCache(self.window, kept, self.num_frames + len(entries))

    def view(self, layer: int) -> LayerKV | None:
        return self._layers[layer] if self.entries else None

    def select(self, rows: Tensor) -> RollingCache:
        entries = tuple(FrameEntry(tuple((k[rows], v[rows]) for k, v in e.layers)) for e in self.entries)
        return RollingCache(self.window, entries, self.num_frames)

    @cached_property
    def _layers(self) -> tuple[LayerKV, ...]:
        """Concatenated once, used by every step of the next frame."""
        per_layer = zip(*(e.layers for e in self.entries), strict=True)
        return tuple((torch.stack([k for k, _ in kv], 1), torch.stack([v for _, v in kv], 1)) for kv in per_layer)
