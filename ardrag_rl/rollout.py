"""Plan and Rollout: the records that policy, collector and learner exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ardrag_rl.flow import GaussianStep, Kernel, Schedule


@dataclass(frozen=True)
class Plan:
    """Which kernel each of the N denoising steps of a frame follows, the same in every frame.

    Attributes:
        kernels: N of them.
        scored: the steps whose log-probability is recorded and trained, increasing; each has a density.
    """

    kernels: tuple[Kernel, ...]
    scored: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        last = len(self.kernels) - 1
        for n in self.scored:
            if not 0 <= n < last or self.kernels[n].name == "ode":
                raise ValueError(
                    f"scored step {n} of {len(self.kernels)} has no density: score steps before the last whose "
                    "kernel is not 'ode'."
                )

    @classmethod
    def every(cls, kernel: Kernel | str, num_steps: int = 3) -> Plan:
        """All steps but the last follow `kernel` and are scored (Flow-GRPO); the last is `ode`."""
        kernel = _kernel(kernel)
        scored = tuple(range(num_steps - 1)) if kernel.name != "ode" else ()
        return cls((kernel,) * (num_steps - 1) + (Kernel("ode"),), scored)

    @classmethod
    def selective(cls, step: int, kernel: Kernel | str, others: Kernel | str = "ode", num_steps: int = 3) -> Plan:
        """One stochastic step, 0 <= step < N-1 (AR-Drag); the others follow `ode`, or `renoise` unscored."""
        if not 0 <= step < num_steps - 1:
            raise ValueError(
                f"stochastic step {step}: expected 0 <= step < {num_steps - 1}; the last step has no noise."
            )
        kernels = [_kernel(others)] * num_steps
        kernels[step] = _kernel(kernel)
        return cls(tuple(kernels), (step,))

    @classmethod
    def all(cls, kernel: Kernel | str = "ode", num_steps: int = 3) -> Plan:
        """Every step follows `kernel`, none is scored: for evaluation."""
        return cls((_kernel(kernel),) * num_steps)

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.kernels)


@dataclass(frozen=True)
class Rollout:
    """B whole episodes of one plan, and what came of them. F = M+1 latent frames, N steps, S scored steps.

    Conditions, as observed:
        trajectory: (B, F, C, h, w) encoded control.
        reference: (B, F, C, h, w) encoded image at frame 0, fixed noise after.
        text: (B, L, D).
        image: (B, L', D') image tokens, for pipelines that have an image encoder.
    Trajectory of the MDP:
        latents: (B, F, N+1, C, h, w), x[m,n]: noise at n=0, clean at n=N; x[m,n+1] is the action of step n.
        plan, schedule: what every frame followed.
        log_probs: (B, F, S) of the scored actions under the policy that took them; the mean over the latent.
    Outcome:
        rewards: (B, F) on frame ends, weighted sum of the terms.
        reward_terms: name -> (B, F), unweighted.
        task_ids: B names; groups: (B,) int64, equal within a group.
    Filled in by the learner:
        advantages: (B, F).
        ref_steps: the reference policy's steps, mean (B, F, S, C, h, w).
    """

    trajectory: Tensor
    reference: Tensor
    text: Tensor
    latents: Tensor
    plan: Plan
    schedule: Schedule
    log_probs: Tensor
    rewards: Tensor
    reward_terms: dict[str, Tensor]
    task_ids: tuple[str, ...]
    groups: Tensor
    image: Tensor | None = None
    advantages: Tensor | None = None
    ref_steps: GaussianStep | None = None

    def __len__(self) -> int:
        return self.latents.shape[0]

    @property
    def num_frames(self) -> int:
        """F."""
        return self.latents.shape[1]

    @property
    def clean(self) -> Tensor:
        """(B, F, C, h, w), x[m,N]."""
        return self.latents[:, :, -1]

    @property
    def states(self) -> Tensor:
        """(B, F, S, C, h, w), x[m,n] of the scored steps."""
        return self.latents[:, :, list(self.plan.scored)]

    @property
    def actions(self) -> Tensor:
        """(B, F, S, C, h, w), x[m,n+1] of the scored steps."""
        return self.latents[:, :, [n + 1 for n in self.plan.scored]]

    def select(self, rows: Sequence[int] | Tensor | slice) -> Rollout:
        """The given episodes."""
        index = torch.arange(len(self))[rows]

        def pick(value: object) -> object:
            if isinstance(value, Tensor):
                return value[index.to(value.device)]
            if isinstance(value, GaussianStep):
                return replace(value, mean=value.mean[index.to(value.mean.device)])
            if isinstance(value, dict):
                return {k: pick(v) for k, v in value.items()}
            return value

        picked = {f.name: pick(getattr(self, f.name)) for f in fields(self)}
        picked["task_ids"] = tuple(self.task_ids[i] for i in index.tolist())
        return Rollout(**picked)  # type: ignore[arg-type]

    def filled(self, size: int) -> Rollout:
        """`size` episodes: where some are missing, copies of the first that count nothing (advantage 0).

        The others weigh more, so that a mean over all is the mean over them.
        """
        if len(self) == size:
            return self
        assert self.advantages is not None
        weight = torch.tensor([size / len(self)] * len(self) + [0.0] * (size - len(self)))
        rows = self.select([*range(len(self)), *[0] * (size - len(self))])
        assert rows.advantages is not None
        return replace(rows, advantages=rows.advantages * weight[:, None])

    def to(self, device: torch.device | str) -> Rollout:
        """All tensors on another device."""

        def move(value: object) -> object:
            if isinstance(value, Tensor):
                return value.to(device)
            if isinstance(value, GaussianStep):
                return GaussianStep(value.mean.to(device), torch.as_tensor(value.std).to(device))
            if isinstance(value, dict):
                return {k: move(v) for k, v in value.items()}
            return value

        return Rollout(**{f.name: move(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]

    @staticmethod
    def cat(rollouts: Sequence[Rollout]) -> Rollout:
        """Episodes of several rollouts of one plan, one after another."""
        first = rollouts[0]
        for other in rollouts[1:]:
            if other.plan != first.plan or other.schedule != first.schedule:
                raise ValueError("only rollouts of one plan and schedule can be joined.")

        def join(name: str) -> object:
            values = [getattr(r, name) for r in rollouts]
            if isinstance(values[0], Tensor):
                return torch.cat(values)
            if isinstance(values[0], GaussianStep):
                return GaussianStep(torch.cat([v.mean for v in values]), values[0].std)
            if isinstance(values[0], dict):
                return {k: torch.cat([v[k] for v in values]) for k in values[0]}
            if name == "task_ids":
                return tuple(i for v in values for i in v)
            return values[0]

        return Rollout(**{f.name: join(f.name) for f in fields(first)})  # type: ignore[arg-type]


def _kernel(kernel: Kernel | str) -> Kernel:
    return kernel if isinstance(kernel, Kernel) else Kernel(kernel)
