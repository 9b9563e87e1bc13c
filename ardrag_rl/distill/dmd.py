"""Distribution matching distillation: the student's gradient from two scores (Yin et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor


def dmd_gradient(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """(x0_fake - x0_real) / mean |x0 - x0_real|, as in Self-Forcing: against it x0 moves towards the data.

    In x0 space the difference of the two scores at one noised version of x0 is that of what they denoise it to. The
    mean is over a video, so that noise levels at which the teacher is far off do not dominate.

    Args:
        x0: (B, F, C, h, w), the student's prediction.
        real: what the frozen teacher makes of its noised version, (B, F, C, h, w).
        fake: what the critic, which follows the student's distribution, makes of the same.
    """
    x0, real, fake = (x.detach().float() for x in (x0, real, fake))
    scale = (x0 - real).abs().mean(tuple(range(1, x0.ndim)), keepdim=True)
    return torch.nan_to_num((fake - real) / scale)  # 0 / 0: the teacher changes nothing


def dmd_loss(x0: Tensor, gradient: Tensor) -> Tensor:
    """1/2 mse(x0, sg(x0 - gradient)): a scalar whose gradient for x0 is `gradient` over the number of values."""
    return 0.5 * (x0.float() - (x0.float() - gradient).detach()).square().mean()
