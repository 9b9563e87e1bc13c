"""compile_blocks: the transformer's blocks through torch.compile, where that pays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ardrag_rl.policies import transformer

_EAGER = transformer._run_block


def compile_blocks() -> None:
    """torch.compile, in this process, for passes with gradient that have no cache: a learner's.

    Rollouts stay as they are: a cache grows, and every length would be compiled anew.
    """
    compiled = torch.compile(_EAGER, dynamic=False)

    def run(block: Any, x: Tensor, modulation: Tensor, rotary: Any, layout: Any, past: Any, *rest: Any) -> Any:
        chosen = compiled if past is None and torch.is_grad_enabled() else _EAGER
        return chosen(block, x, modulation, rotary, layout, past, *rest)

    transformer._run_block = run  # type: ignore[assignment]


def eager_blocks() -> None:
    """As it was."""
    transformer._run_block = _EAGER
