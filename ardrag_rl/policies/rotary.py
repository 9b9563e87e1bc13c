"""Rotary: 3-D rotary positions of tokens, in time and in the frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Turn = tuple[Tensor, Tensor]  # cos and sin, broadcast over (..., heads, head_dim / 2)


@dataclass(frozen=True)
class Rotary:
    """The rotary positions of frames of height x width tokens.

    Attributes:
        cos, sin: (L, head_dim / 2), by position.
        split: how head_dim / 2 is divided among time, height and width.
        height, width: of a frame, in tokens.
    """

    cos: Tensor
    sin: Tensor
    split: tuple[int, int, int]
    height: int
    width: int

    @classmethod
    def of(cls, rope: Any, height: int, width: int) -> Rotary:
        """That of diffusers' `WanRotaryPosEmbed`."""
        split = (rope.t_dim // 2, rope.h_dim // 2, rope.w_dim // 2)
        return cls(rope.freqs_cos[:, ::2], rope.freqs_sin[:, ::2], split, height, width)

    def at(self, position: Sequence[int]) -> Turn:
        """Of P frames at these temporal positions: (P, n, 1, head_dim / 2) each.

        Raises:
            ValueError: a position is beyond the model's.
        """
        return self._grid(position, self.height, self.width)

    def time(self, position: Sequence[int]) -> Turn:
        """The temporal part of `at` alone, (P, 1, 1, head_dim / 2)."""
        return self._grid(position, 1, 1)  # position 0 turns nothing

    def space(self) -> Turn:
        """The spatial part of `at` alone, (1, n, 1, head_dim / 2)."""
        return self._grid([0], self.height, self.width)

    def _grid(self, position: Sequence[int], height: int, width: int) -> Turn:
        if (last := max(position, default=0)) >= len(self.cos):
            raise ValueError(f"frame {last} is beyond rope_max_seq_len={len(self.cos)}.")

        def grid(freqs: Tensor) -> Tensor:
            t, y, x = freqs.split(self.split, 1)
            shape = (len(position), height, width, -1)
            times = torch.stack([t[p] for p in position])  # no index tensor, which a GPU would have to wait for
            axes = (times[:, None, None], y[:height][None, :, None], x[:width][None, None])
            return torch.cat([a.expand(shape) for a in axes], -1).flatten(1, 2)[:, :, None]

        return grid(self.cos), grid(self.sin)


def rotate(x: Tensor, turn: Turn) -> Tensor:
    """Rotary position on neighbouring pairs, x (..., heads, head_dim)."""
    cos, sin = turn
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x)
