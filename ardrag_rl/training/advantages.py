"""Group-relative advantages per frame (paper Eq. 13)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Credit = Literal["frame", "return_to_go", "episode"]
Scale = Literal["group", "batch", "none"]

CREDITS = ("frame", "return_to_go", "episode")
SCALES = ("group", "batch", "none")
STD_FLOOR = 1e-4  # added to the standard deviation, as in Eq. 13 and TRL


def credit_signal(rewards: Tensor, credit: Credit = "frame") -> Tensor:
    """What frame m's action is judged by.

    Args:
        rewards: (B, F), on frame ends.
        credit: "frame", the frame's own reward (the paper); "return_to_go", the sum from this frame on;
            "episode", the sum over the whole video, for every frame.

    Returns:
        (B, F).
    """
    if credit == "frame":
        return rewards
    if credit == "return_to_go":
        return rewards.flip(1).cumsum(1).flip(1)
    if credit == "episode":
        return rewards.sum(1, keepdim=True).expand_as(rewards)
    raise ValueError(f"credit={credit!r}: choose one of {', '.join(CREDITS)}.")


def compute_advantages(
    rewards: Tensor, groups: Tensor, scale_rewards: Scale | bool = "group", credit: Credit = "frame"
) -> Tensor:
    """A[i,m] = (R[i,m] - mean_j R[j,m]) / (std_j R[j,m] + 1e-4), Eq. 13, over the videos j of i's group.

    Args:
        rewards: (B, F), on frame ends.
        groups: (B,) int64, equal within a group; groups may differ in size.
        scale_rewards: what divides, under TRL's names: "group" or True, the (Bessel-corrected) std of the group at
            this frame; "batch", one std over all videos and frames; "none" or False, nothing.
        credit: see `credit_signal`.

    Returns:
        (B, F) float32. A frame at which a whole group has one reward gets exactly 0.
    """
    scale = normalise_scale(scale_rewards)
    signal = credit_signal(rewards.float(), credit)  # (B, F)
    advantages = torch.zeros_like(signal)
    for g in groups.unique():
        rows = groups == g
        group = signal[rows]  # (G, F)
        centred = group - group.mean(0)
        if scale == "group":
            std = group.std(0) if len(group) > 1 else torch.zeros_like(centred[0])
            centred = centred / (std + STD_FLOOR)
        # a constant column minus its mean is rounding error, which a floor of 1e-4 would blow up
        advantages[rows] = centred.masked_fill(_constant(group), 0.0)
    if scale == "batch":
        advantages = advantages / ((signal.std() if signal.numel() > 1 else 0.0) + STD_FLOOR)
    return advantages


def zero_spread(rewards: Tensor, groups: Tensor) -> Tensor:
    """Fraction of groups that learn nothing, because all their videos have the same rewards; a scalar."""
    return torch.stack([_constant(rewards[groups == g]).all() for g in groups.unique()]).float().mean()


def normalise_scale(scale_rewards: Scale | bool) -> Scale:
    """TRL's values of `scale_rewards`, where True is "group" and False is "none"."""
    if isinstance(scale_rewards, bool):
        return "group" if scale_rewards else "none"
    if scale_rewards not in SCALES:
        raise ValueError(f"scale_rewards={scale_rewards!r}: choose one of {', '.join(SCALES)}, or True or False.")
    return scale_rewards


def _constant(group: Tensor) -> Tensor:
    """(F,) bool: the frames at which all of (G, F) are equal."""
    return group.amax(0) == group.amin(0)
