"""compile_blocks: the transformer's blocks through torch.compile, where that pays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ardrag_rl.policies import block as blocks
from ardrag_rl.policies.cache import Room

_EAGER = blocks.run_block


def compile_blocks(static: bool = False) -> None:
    """torch.compile, in this process, for passes with gradient that have no cache: a learner's.

    Rollouts stay as they are: a cache grows, and every length would be compiled anew.

    Args:
        static: instead, for passes over a static cache, without gradient; their number of frames is left open.
    """
    compiled = torch.compile(_EAGER, dynamic=None if static else False)

    def run(block: Any, x: Tensor, modulation: Tensor, rotary: Any, layout: Any, past: Any, *rest: Any) -> Any:
        fits = isinstance(past, Room) if static else past is None
        chosen = compiled if fits and torch.is_grad_enabled() != static else _EAGER
        return chosen(block, x, modulation, rotary, layout, past, *rest)

    blocks.run_block = run  # type: ignore[assignment]


def eager_blocks() -> None:
    """As it was."""
    blocks.run_block = _EAGER
