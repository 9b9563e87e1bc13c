"""Critic: the fake score of DMD, and a discriminator on its features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ardrag_rl.flow import interpolate, predict_x0
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.policies.chunks import Conditions


def denoise(policy: VideoPolicy, x: Tensor, t: Tensor, given: Conditions) -> Tensor:
    """What a bidirectional model makes of noisy videos: x0_hat, float32.

    Args:
        policy: with chunks as long as the videos.
        x: (B, F, C, h, w), at noise level t of its video.
        t: (B,) in (0, 1].
        given: without its noise, which is in x.

    Returns:
        (B, F, C, h, w).
    """
    inputs = policy.frame_inputs(x, given.reference, given.trajectory)[:, None]
    context = policy.transformer.encode_context(given.text, given.image)
    v, _ = policy.transformer(context, None, inputs, 1000 * t[:, None, None])
    return predict_x0(x.float(), v[:, 0].float(), t[:, None, None, None, None])


def guided(policy: VideoPolicy, x: Tensor, t: Tensor, given: Conditions, negative: Tensor, scale: float) -> Tensor:
    """`denoise` with classifier-free guidance, x0_u + scale (x0_c - x0_u), diffusers' convention: 1 is none.

    Args:
        negative: (B, L, D), the prompt of x0_u, which sees no drag path.
        scale: 1 costs one pass, others two.
    """
    told = denoise(policy, x, t, given)
    if scale == 1:
        return told
    nothing = Conditions(given.noise, torch.zeros_like(given.trajectory), given.reference, negative, given.image)
    untold = denoise(policy, x, t, nothing)
    return untold + scale * (told - untold)


@dataclass(frozen=True)
class Judgement:
    """What a critic says of noisy videos.

    Attributes:
        x0_hat: (B, F, C, h, w).
        logits: (B, F, n), above 0 where a token looks like data.
    """

    x0_hat: Tensor
    logits: Tensor


class Critic(nn.Module):
    """A bidirectional model that follows the distribution of the student's videos; a small head on the features before
    its last layer tells them from data (DMD2's discriminator, by token).

    Args:
        policy: starts as the teacher.
    """

    def __init__(self, policy: VideoPolicy) -> None:
        super().__init__()
        self.policy = policy
        config = policy.transformer.config
        width = config["num_attention_heads"] * config["attention_head_dim"]
        last = nn.Linear(width, 1)
        nn.init.zeros_(last.weight)  # undecided at first
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), last)

    def forward(self, x: Tensor, t: Tensor, given: Conditions) -> Judgement:
        """Of noisy videos x (B, F, C, h, w) at levels t (B,)."""
        features: list[Tensor] = []
        hook = self.policy.transformer.norm_out.register_forward_pre_hook(lambda _, args: features.append(args[0]))
        try:
            x0_hat = denoise(self.policy, x, t, given)
        finally:
            hook.remove()
        return Judgement(x0_hat, self.head(features[0].float())[..., 0])


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Of logits: -log D(real) - log (1 - D(fake)), the mean."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def adversarial_gradient(
    critic: Critic, x0: Tensor, eps: Tensor, t: Tensor, given: Conditions
) -> tuple[Tensor, Tensor, Tensor]:
    """The non-saturating loss -log D of noised student videos, and its gradient for x0; the critic's is untouched.

    Args:
        x0: (B, F, C, h, w), the student's prediction.
        eps: the noise it is noised with, of the same shape.
        t: (B,), how far.

    Returns:
        the loss, a scalar; its gradient, (B, F, C, h, w); and the critic's x0_hat of the same pass, (B, F, C, h, w).
    """
    with torch.enable_grad():
        x0 = x0.detach().float().requires_grad_()
        level = t[:, None, None, None, None]
        said = critic(interpolate(x0, eps, level), t, given)
        loss = F.softplus(-said.logits).mean()
        (gradient,) = torch.autograd.grad(loss, x0)
    return loss.detach(), gradient, said.x0_hat.detach()
