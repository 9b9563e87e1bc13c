"""SideStream: calls that a GPU makes beside what it is doing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


class SideStream:
    """Runs calls in order on a CUDA stream of its own; on another device at once.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """function(x), once what was asked for before is done; its result is there after `join`."""
        if self._stream is None or not x.is_cuda:
            return function(x)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        x.record_stream(self._stream)  # or the allocator gives its memory away while it is still read
        with torch.cuda.stream(self._stream):
            return function(x)

    def join(self) -> None:
        """What comes next on the caller's stream waits for all calls."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


@cache
def side_stream(device: torch.device) -> SideStream:
    """The one of a device: what was freed on a stream is memory for that stream alone."""
    return SideStream(device)
