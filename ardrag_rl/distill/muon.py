"""Muon: timm's, in float32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.optim import muon as timm_muon
from torch import Tensor


def muon(parameters: Iterable[Any], rate: float) -> torch.optim.Optimizer:
    """timm's Muon (AdamW for vectors): a lower loss than AdamW's after the same number of clips."""
    timm_muon.zeropower_via_newtonschulz = _orthogonalise
    return timm_muon.Muon(parameters, lr=rate, weight_decay=0.01, nesterov=True)


_TIMMS = timm_muon.zeropower_via_newtonschulz


def _orthogonalise(*args: Any, **kwargs: Any) -> Tensor:
    """timm's, in float32: bfloat16 takes a hundred times longer on a CPU without such instructions."""
    return _TIMMS(*args, **{**kwargs, "dtype": torch.float32})
