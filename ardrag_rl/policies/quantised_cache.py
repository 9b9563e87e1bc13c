"""QuantisedCache: entries of one byte a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ardrag_rl.policies.cache import Band, FrameEntry, LayerKV, SinkCache

KINDS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}  # and the largest number of each


@dataclass(frozen=True)
class Quantised:
    """A tensor (..., d) of one byte a number; every vector of d has a scale, so that its largest number fits.

    |restored - x| is at most 1/254 of the vector's largest for int8; for fp8 (e4m3), 1/16 of |x|, or 2^-10 / 448 of the
    vector's largest where that is more. Numbers that the format has, times the scale, are exact.

    Attributes:
        values: (..., d), int8 or float8.
        scale: (..., 1) float32.
        dtype: of the tensor.
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor, kind: str) -> Quantised:
        dtype, largest = KINDS[kind]
        top = x.float().abs().amax(-1, keepdim=True)
        scale = torch.where(top > 0, top / largest, 1.0)
        values = x.float() / scale
        return cls((values.round() if kind == "int8" else values).to(dtype), scale, x.dtype)

    def restored(self) -> Tensor:
        """(..., d) in the tensor's own type."""
        return (self.values.float() * self.scale).to(self.dtype)

    def select(self, rows: Tensor) -> Quantised:
        """The rows of the first dimension."""
        return replace(self, values=self.values.view(torch.uint8)[rows].view(self.values.dtype), scale=self.scale[rows])


@dataclass(frozen=True)
class QuantisedEntry:
    """A `FrameEntry` of one byte a number."""

    layers: tuple[tuple[Quantised, Quantised], ...]

    @classmethod
    def of(cls, entry: FrameEntry, kind: str) -> QuantisedEntry:
        return cls(tuple((Quantised.of(k, kind), Quantised.of(v, kind)) for k, v in entry.layers))

    def select(self, rows: Tensor) -> QuantisedEntry:
        """The entry of these videos of the batch."""
        return QuantisedEntry(tuple((k.select(rows), v.select(rows)) for k, v in self.layers))


@dataclass(frozen=True)
class QuantisedCache(SinkCache):
    """`RollingCache`, or `SinkCache`, in one byte a number and four for each vector of head_dim.

    LongLive keeps keys and values in few bits likewise (its format is NVFP4). A layer is restored when it is read, so
    only one is whole at a time. In one pass frames would see each other unrounded: inference only.

    Args:
        kind: "int8" or "fp8" (e4m3).
    """

    sink: int = 0
    kind: str = "int8"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: expected one of {', '.join(KINDS)}.")

    @property
    def band(self) -> Band | None:
        return None

    def append(self, entries: Sequence[FrameEntry]) -> Self:
        return super().append([QuantisedEntry.of(e, self.kind) for e in entries])  # type: ignore[misc]

    def view(self, layer: int) -> LayerKV | None:
        if not self.entries:
            return None
        keys, values = zip(*(e.layers[layer] for e in self.entries), strict=True)
        return torch.stack([k.restored() for k in keys], 1), torch.stack([v.restored() for v in values], 1)
