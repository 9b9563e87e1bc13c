"""StaticCache: the rolling window in one buffer that is written in place, for inference."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ardrag_rl.policies.cache import FrameEntry, Room, SinkCache

SHAPES = 2  # that alternate without a new buffer


class _Buffer:
    """Where a static cache writes: (2, layers, B, slots, n, heads, head_dim), keys and values.

    Those of the last few shapes are kept, at the addresses that they had.
    """

    def __init__(self) -> None:
        self.data: Tensor | None = None
        self.writes = 0
        self._kept: dict[Hashable, Tensor] = {}

    def fit(self, entry: FrameEntry, slots: int) -> None:
        """Makes it what these entries ask for."""
        k = entry.layers[0][0]
        shape = (2, len(entry.layers), k.shape[0], slots, *k.shape[1:])
        kind = (shape, k.dtype, k.device)
        if kind not in self._kept:
            while len(self._kept) >= SHAPES:
                del self._kept[next(iter(self._kept))]
            with torch.inference_mode(False):  # or it could be written to in that mode only
                self._kept[kind] = torch.zeros(shape, dtype=k.dtype, device=k.device)
        self.data = self._kept[kind]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Buffer:
        return _Buffer()


@dataclass(frozen=True)
class StaticCache:
    """`RollingCache` (or, with a sink, `SinkCache`) without copies: what it shows lies where it was written.

    A chunk writes its keys in front of the history, and attention reads both as they lie; a new frame overwrites the
    oldest. So a step allocates nothing for the history and finds it at the same address, which CUDA graphs need
    (`transformers.StaticCache` is the idea; in video, Self-Forcing's buffers, which are moved once they are full).
    Inference only: an older cache is lost once a frame was appended, and using it raises. Caches that come from one
    empty `StaticCache` share its buffer, one video after another; each `make_cache("static", ...)` has its own.
    """

    unrotated: ClassVar[bool] = False
    band: ClassVar[None] = None

    window: int
    sink: int = 0
    num_frames: int = 0
    own: int = 0  # frames of the largest chunk, which is the first
    written: int = 0  # the buffer's writes when this cache was made
    buffer: _Buffer = field(default_factory=_Buffer, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.sink < 0:
            raise ValueError(f"sink={self.sink}: expected at least 0 frames.")

    @property
    def position(self) -> int:
        return self.num_frames

    @property
    def current(self) -> bool:
        return not self.num_frames or self.buffer.writes == self.written

    @property
    def key(self) -> Hashable:
        """The same for caches that lie at the same place."""
        if not self.num_frames:
            return None
        data = self._data()
        return data.data_ptr(), data.shape, self._filled

    @torch.no_grad()
    def append(self, entries: Sequence[FrameEntry]) -> StaticCache:
        """Overwrites the oldest frames. Entries of the last pass over this cache are in its room, and moved from there.

        Raises:
            RuntimeError: the cache was appended to before.
        """
        own = self.own
        if self.num_frames:
            self._data()
        else:
            own = len(entries)
            self.buffer.fit(entries[0], own + self.sink + self.window)
        data = self.buffer.data
        assert data is not None
        for i, entry in enumerate(entries):
            number = self.num_frames + i
            slot = number if number < self.sink else self.sink + (number - self.sink) % self.window
            if not entry.layers:
                data[:, :, :, own + slot] = data[:, :, :, own - len(entries) + i]
            for layer, (k, v) in enumerate(entry.layers):
                data[0, layer, :, own + slot] = k
                data[1, layer, :, own + slot] = v
        self.buffer.writes += 1
        return replace(self, num_frames=self.num_frames + len(entries), own=own, written=self.buffer.writes)

    def view(self, layer: int) -> Room | None:
        """Frames lie in the order of the buffer's slots.

        Raises:
            RuntimeError: the cache was appended to.
        """
        if not self.num_frames:
            return None
        keys, values = self._data()[:, layer, :, : self.own + self._filled]
        return Room(keys, values, self.own)

    def select(self, rows: Tensor) -> StaticCache:
        """In a buffer of its own."""
        if not self.num_frames:
            return replace(self, buffer=_Buffer())
        buffer = _Buffer()
        buffer.data, buffer.writes = self._data()[:, :, rows], self.written
        return replace(self, buffer=buffer)

    def immutable(self) -> SinkCache:
        """An empty cache that shows the same."""
        return SinkCache(self.window, sink=self.sink)

    @property
    def _filled(self) -> int:
        return min(self.num_frames, self.sink + self.window)

    def _data(self) -> Tensor:
        if not self.current or self.buffer.data is None:
            raise RuntimeError(
                f"this static cache of {self.num_frames} frames was appended to, or its buffer serves another video "
                "now: it cannot be forked or rewound. Go on with the newest, or take cache='rolling'."
            )
        return self.buffer.data
