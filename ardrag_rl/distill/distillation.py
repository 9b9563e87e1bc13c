"""Distillation: what a causal few-step student learns from its own videos, by DMD and a discriminator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ardrag_rl.distill.critic import Critic, adversarial_gradient, discriminator_loss, guided
from ardrag_rl.distill.dmd import dmd_gradient, dmd_loss
from ardrag_rl.distill.flow_matching import bounded_weight, reference_of
from ardrag_rl.distill.self_rollout import HISTORIES, History, self_rollout
from ardrag_rl.flow import interpolate, shift_level
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.policies.chunks import Conditions


@dataclass(frozen=True)
class DistillSettings:
    """How a student is distilled; the weights are the paper's.

    Attributes:
        rollout: what the student's later frames look back on; see `self_rollout`.
        step_per_frame: draw the step s for every chunk (the paper's text), not once for a video (Algorithm 1).
        dmd: weight of distribution matching.
        adversarial: weight of the student's adversarial loss.
        discriminator: weight of the discriminator's, beside the critic's flow matching.
        guidance: of the teacher, in diffusers' convention: 1 is none.
        shift: of the noise levels at which the scores are compared; see `flow.shift_level`.
        lowest, highest: bounds of these levels.
    """

    rollout: History = "self_rollout"
    step_per_frame: bool = False
    dmd: float = 1.0
    adversarial: float = 0.1
    discriminator: float = 0.05
    guidance: float = 1.0
    shift: float = 1.0
    lowest: float = 0.02
    highest: float = 0.98

    def __post_init__(self) -> None:
        if self.rollout not in HISTORIES:
            raise ValueError(f"rollout={self.rollout!r}: choose one of {', '.join(HISTORIES)}.")
        if not 0 < self.lowest < self.highest <= 1:
            raise ValueError(f"lowest={self.lowest}, highest={self.highest}: expected 0 < lowest < highest <= 1.")


class Distillation(nn.Module):
    """Student and critic on one Self-Rollout (Algorithm 1): the critic learns from it every time, the student where it
    is its turn.

    The student's gradients are computed on its predictions, as DMD's is: neither loss leaves one in the critic.

    Args:
        student: causal, few-step.
        teacher: bidirectional; the real score. It is frozen, and no part of the module's state.
        critic: the fake score; start it as the teacher.
        settings: see there.
        negative: (L, D), the prompt that guidance leads away from; None is no prompt, zeros, as in training.
    """

    def __init__(
        self,
        student: VideoPolicy,
        teacher: VideoPolicy,
        critic: Critic,
        settings: DistillSettings | None = None,
        negative: Tensor | None = None,
    ) -> None:
        super().__init__()
        self._negative = negative
        self.policy, self.critic, self.settings = student, critic, settings or DistillSettings()
        self._teacher = (teacher.eval().requires_grad_(False),)  # in a tuple: not a submodule

    @property
    def teacher(self) -> VideoPolicy:
        """The real score."""
        return self._teacher[0]

    def forward(
        self, latents: Tensor, trajectory: Tensor, text: Tensor, student_turn: bool, image: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Losses on B videos of the student, made under the conditions of B true ones.

        Args:
            latents: (B, F, C, h, w), true videos.
            trajectory: (B, F, C, h, w); text: (B, L, D).
            student_turn: whether the student learns too.
            image: (B, L', D') tokens of the first frames, where the models read them.

        Returns:
            "loss", the weighted sum; and its parts, without gradient.
        """
        given = Conditions(torch.randn_like(latents), trajectory, reference_of(latents), text, image)
        with torch.set_grad_enabled(student_turn):
            chunks = -(-latents.shape[1] // self.policy.transformer.config["chunk_size"])
            drawn = torch.randint(self.policy.schedule.num_steps, (chunks,)).tolist()
            steps = drawn if self.settings.step_per_frame else drawn[0]
            x0 = self_rollout(self.policy, given, steps, self.settings.rollout, latents).predictions
        losses = self.critic_losses(x0.detach(), latents, given)
        if student_turn:
            losses |= self.student_losses(x0, given)
        return {"loss": sum(losses.values(), torch.zeros(())), **{k: v.detach() for k, v in losses.items()}}

    def critic_losses(self, x0: Tensor, real: Tensor, given: Conditions) -> dict[str, Tensor]:
        """Flow matching on the student's videos x0, and telling them from true ones; both (B, F, C, h, w)."""
        t, eps = self._levels(x0), torch.randn_like(x0)
        level = t[:, None, None, None, None]
        fake = self.critic(interpolate(x0, eps, level), t, given)
        true = self.critic(interpolate(real, eps, level), t, given)
        error = (fake.x0_hat - x0) / level  # of the velocity
        return {
            "critic": (bounded_weight(level) * error.square()).mean(),
            "discriminator": self.settings.discriminator * discriminator_loss(true.logits, fake.logits),
        }

    def student_losses(self, x0: Tensor, given: Conditions) -> dict[str, Tensor]:
        """DMD and the adversarial loss on the student's predictions x0 (B, F, C, h, w), with gradient."""
        t, eps = self._levels(x0), torch.randn_like(x0)
        value, gradient, fake = adversarial_gradient(self.critic, x0, eps, t, given)
        with torch.no_grad():
            x = interpolate(x0, eps, t[:, None, None, None, None])
            negative = torch.zeros_like(given.text)
            if self._negative is not None:
                negative = negative + self._negative.to(negative)
            real = guided(self.teacher, x, t, given, negative, self.settings.guidance)
        towards = (x0 * gradient).sum()
        return {
            "dmd": self.settings.dmd * dmd_loss(x0, dmd_gradient(x0, real, fake)),
            "adversarial": self.settings.adversarial * (value + towards - towards.detach()),
        }

    def _levels(self, x0: Tensor) -> Tensor:
        """(B,), uniform, shifted, within bounds."""
        t = shift_level(torch.rand(len(x0), device=x0.device), self.settings.shift)
        return t.clip(self.settings.lowest, self.settings.highest)
