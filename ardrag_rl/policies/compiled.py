"""The transformer's blocks through torch.compile, where that pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ardrag_rl.policies import block as blocks

SHAPES = 64  # chunks and sizes that several policies of a process may have
_EAGER = blocks.run_block


def compile_blocks() -> None:
    """torch.compile, in this process, for passes with gradient that have no cache: a learner's.

    Rollouts stay as they are: a cache grows, and every length would be compiled anew.
    """
    compiled = torch.compile(_EAGER, dynamic=False)

    def run(block: Any, x: Tensor, modulation: Tensor, rotary: Any, layout: Any, past: Any, *rest: Any) -> Any:
        chosen = compiled if past is None and torch.is_grad_enabled() else _EAGER
        return chosen(block, x, modulation, rotary, layout, past, *rest)

    blocks.run_block = run  # type: ignore[assignment]


def compiled_block() -> Callable[..., Any]:
    """A compiled block for a policy with a static cache; the number of frames in the cache is left open."""
    from torch._dynamo import config  # takes a second to import

    config.recompile_limit = max(config.recompile_limit, SHAPES)  # of a function in a process; beyond, it is eager
    return torch.compile(_EAGER)


def eager_blocks() -> None:
    """As it was."""
    blocks.run_block = _EAGER
