"""Noise schedule, transition kernels and the Gaussian they give: the mathematics of one denoising step.

One notation throughout: `t` in [0, 1] is the noise level (timestep / 1000), t=1 noise and t=0 data,
`x_t = (1-t) x0 + t eps`, `v = eps - x0`. Every sampler in use is one line (paper Eq. 1 and 4)

    x' = (1-t') x0_hat + c eps_hat + s z,    z ~ N(0, I),    h = t - t' > 0

and a kernel is its pair of coefficients (c, s). Log-probability and KL are closed forms of (c, s).
Kernel arithmetic is float32 whatever the dtype of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum"]

LATENT_DIMS = (-3, -2, -1)  # (C, h, w): what a log-probability is reduced over


def interpolate(x0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
    """x_t = (1-t) x0 + t eps (Eq. 1, with t=1 noise)."""
    return (1 - t) * x0 + t * eps


def velocity(x0: Tensor, eps: Tensor) -> Tensor:
    """v = eps - x0, the target of flow matching."""
    return eps - x0


def predict_x0(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """x0_hat = x - t v."""
    return x - t * v


def predict_eps(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """eps_hat = x + (1-t) v."""
    return x + (1 - t) * v


def shift_level(t: Tensor, shift: float) -> Tensor:
    """shift t / (1 + (shift - 1) t): noise levels moved towards 1, as Wan's and SD3's schedules are; 1 moves none."""
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class Schedule:
    """The N noise levels a frame passes through; after the last it is clean (t=0).

    Args:
        timesteps: N strictly decreasing timesteps in (0, 1000], the first of them 1000.
            The default is AR-Drag's: 1000, 755, 522 of a 50-step grid with shift 8.
    """

    timesteps: tuple[float, ...] = (1000.0, 755.0, 522.0)

    def __post_init__(self) -> None:
        steps = tuple(float(t) for t in self.timesteps)
        object.__setattr__(self, "timesteps", steps)
        if not steps or steps[0] != 1000.0 or steps[-1] <= 0:
            raise ValueError(
                f"timesteps={steps}: expected at least one, the first 1000 (pure noise) and the last above 0."
            )
        if any(a <= b for a, b in pairwise(steps)):
            raise ValueError(f"timesteps={steps}: expected strictly decreasing values; sort them from 1000 down.")

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.timesteps)

    @property
    def levels(self) -> tuple[float, ...]:
        """(N+1,) noise levels t_0=1 > ... > t_N=0."""
        return (*(t / 1000.0 for t in self.timesteps), 0.0)


@dataclass(frozen=True)
class GaussianStep:
    """N(mean, std^2 I) over the next latent: what a kernel makes of one velocity prediction.

    Attributes:
        mean: (..., C, h, w) float32.
        std: a float, or a float32 tensor that broadcasts against `mean`; 0 is a deterministic step.
    """

    mean: Tensor
    std: Tensor | float

    @property
    def stochastic(self) -> bool:
        """Whether the step has a density."""
        return bool((torch.as_tensor(self.std) > 0).all())

    def sample(self, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """Draws the next latent, or returns the mean where std is 0.

        Args:
            generator: one for the whole batch, or one for each entry of the first dimension, so that a batch
                draws what its entries would have drawn alone (diffusers' convention).
        """
        if not torch.as_tensor(self.std).any():
            return self.mean
        return self.mean + self.std * randn(self.mean.shape, generator, self.mean.device)

    def log_prob(self, action: Tensor, reduction: Reduction = "mean") -> Tensor:
        """log p(action), reduced over (C, h, w) by the mean (comparable across sizes) or the sum (Eq. 14's ratio).

        Args:
            action: (..., C, h, w), broadcast against `mean`.

        Returns:
            (...) float32.

        Raises:
            ValueError: the step is deterministic and has no density.
        """
        std = self._density("log_prob")
        log_p = -((action.float() - self.mean) ** 2 / (2 * std**2) + std.log() + math.log(2 * math.pi) / 2)
        return _reduce(log_p, reduction)

    def kl(self, other: GaussianStep, reduction: Reduction = "mean") -> Tensor:
        """KL(self || other) = (mu_p - mu_q)^2 / (2 s^2) for two steps of one kernel, reduced like `log_prob`."""
        std = self._density("kl")
        if not torch.equal(*torch.broadcast_tensors(std, torch.as_tensor(other.std, device=std.device).float())):
            raise ValueError("kl needs two steps of the same kernel at the same noise level; their std differ.")
        return _reduce((self.mean - other.mean) ** 2 / (2 * std**2), reduction)

    def _density(self, what: str) -> Tensor:
        std = torch.as_tensor(self.std, dtype=torch.float32)
        if not (std > 0).all():
            raise ValueError(
                f"{what} of a deterministic step (std=0) does not exist; ask only the stochastic steps of a plan."
            )
        return std.to(self.mean.device)


@dataclass(frozen=True)
class Kernel:
    """A row of the kernel table: `x' = (1-t') x0_hat + c eps_hat + s z`.

    | name        | c                       | s                     | from |
    |-------------|-------------------------|-----------------------|------|
    | `ode`       | t'                      | 0                     | Euler on Eq. 1 |
    | `flow_sde`  | t' - eta^2 h / (2(1-t)) | eta sqrt(t h / (1-t)) | Eq. 4, sigma_t = eta sqrt(t/(1-t)) (Flow-GRPO) |
    | `dance_sde` | t' - eta^2 h / (2t)     | eta sqrt(h)           | Eq. 4, sigma_t = eta (DanceGRPO) |
    | `cps`       | t' cos(eta pi/2)        | t' sin(eta pi/2)      | coefficient-preserving: c^2 + s^2 = t'^2 |
    | `renoise`   | 0                       | t'                    | Psi of Algorithm 1; `cps` with eta=1 |

    Args:
        name: one of the table.
        eta: how much noise; no meaning for `ode` and `renoise`.
    """

    name: str = "ode"
    eta: float = 0.7

    NAMES = ("ode", "flow_sde", "dance_sde", "cps", "renoise")

    def __post_init__(self) -> None:
        if self.name not in self.NAMES:
            raise ValueError(f"kernel {self.name!r} is unknown; choose one of {', '.join(self.NAMES)}.")
        if not (math.isfinite(self.eta) and self.eta > 0):
            raise ValueError(f"eta={self.eta}: expected a finite number above 0; for no noise use the kernel 'ode'.")
        if self.name == "cps" and self.eta > 1:
            raise ValueError(f"eta={self.eta}: 'cps' takes 0 < eta <= 1 (1 renoises completely).")

    def coefficients(self, t: Tensor | float, t_next: Tensor | float) -> tuple[Tensor, Tensor]:
        """(c, s) of the step from noise level t down to t_next, as float32 tensors of the broadcast shape.

        Raises:
            ValueError: not 0 <= t_next < t <= 1, or an Euler SDE is asked for the step to t_next=0.
        """
        level, level_next = (torch.as_tensor(a, dtype=torch.float32) for a in (t, t_next))
        level, level_next = torch.broadcast_tensors(level, level_next)
        if not ((level_next >= 0) & (level_next < level) & (level <= 1)).all():
            raise ValueError(
                f"noise levels t={level.tolist()}, t_next={level_next.tolist()}: expected 0 <= t_next < t <= 1."
            )
        return self._coefficients(level, level_next)

    def _coefficients(self, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The table, with u for t'."""
        h, zero = t - u, torch.zeros_like(t)
        if self.name == "ode":
            return u, zero
        if self.name == "renoise":
            return zero, u
        if self.name == "cps":
            # sin and cos of exactly eta=1 must be 1 and 0, so that cps(1) is renoise
            cos = 0.0 if self.eta == 1 else math.cos(self.eta * math.pi / 2)
            return u * cos, u * math.sin(self.eta * math.pi / 2)
        if (u == 0).any():
            raise ValueError(
                f"{self.name!r} cannot take the last step (t_next=0): an Euler SDE would leave noise in the clean "
                "frame. Use 'ode', 'cps' or 'renoise' there (Plan.selective and Plan.every do)."
            )
        if self.name == "dance_sde":
            return u - self.eta**2 * h / (2 * t), self.eta * h.sqrt()
        rest = torch.where(t < 1, 1 - t, 1 - u)  # at t=1 only the denominator 1-t is replaced, by 1-t'
        return u - self.eta**2 * h / (2 * rest), self.eta * (t * h / rest).sqrt()

    def step(self, x: Tensor, v: Tensor, t: Tensor | float, t_next: Tensor | float) -> GaussianStep:
        """The Gaussian over x' given x at level t and the predicted velocity.

        Args:
            x, v: (..., C, h, w).
            t, t_next: floats, or tensors that broadcast against (...), one level per latent; or against x itself.
        """
        # numbers stay on the CPU: a GPU that checks them waits
        level, level_next = (torch.as_tensor(a, dtype=torch.float32) for a in (t, t_next))
        if any(a.ndim or (a.device != x.device and a.is_cuda) for a in (level, level_next)):
            level, level_next = level.to(x.device), level_next.to(x.device)
        c, s = self.coefficients(level, level_next)
        level, level_next, c, s = (_per_latent(a, x) for a in (level, level_next, c, s))
        x, v = x.float(), v.float()
        mean = (1 - level_next) * predict_x0(x, v, level) + c * predict_eps(x, v, level)
        return GaussianStep(mean, s)

    def sensitivity(self, t: Tensor | float, t_next: Tensor | float) -> Tensor:
        """d mu / d v = -t (1-t') + c (1-t)."""
        c, _ = self.coefficients(t, t_next)
        t, u = torch.as_tensor(t, dtype=torch.float32), torch.as_tensor(t_next, dtype=torch.float32)
        return -t * (1 - u) + c * (1 - t)

    def stochastic(self, t_next: float) -> bool:
        """Whether a step to level t_next has a density."""
        return self.name != "ode" and t_next > 0


def randn(
    shape: torch.Size | Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Float32 normal noise drawn on the generator's own device, one generator for all or one per first entry.

    Noise drawn on the CPU and moved is the same on every machine.
    """
    if generator is None or isinstance(generator, torch.Generator):
        source = generator.device if generator is not None else device
        return _moved(torch.randn(tuple(shape), generator=generator, device=source), device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}: expected one for each entry.")
    rows = [torch.randn(tuple(shape[1:]), generator=g, device=g.device) for g in generator]
    return _moved(torch.stack(rows), device)


def _moved(x: Tensor, device: torch.device | str) -> Tensor:
    """To a GPU without waiting for what it is doing."""
    if torch.device(device).type == "cuda" and not x.is_cuda:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _per_latent(a: Tensor, x: Tensor) -> Tensor:
    """Levels (...) -> (..., 1, 1, 1), against x (..., C, h, w); as many dimensions as x are left as they are."""
    if a.ndim in (0, x.ndim):
        return a
    if a.ndim > x.ndim - len(LATENT_DIMS):
        raise ValueError(f"noise levels of shape {tuple(a.shape)} do not fit latents {tuple(x.shape)}: one per latent.")
    return a.reshape(*a.shape, *(1 for _ in LATENT_DIMS))


def _reduce(x: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "mean":
        return x.mean(LATENT_DIMS)
    if reduction == "sum":
        return x.sum(LATENT_DIMS)
    raise ValueError(f"reduction={reduction!r}: expected 'mean' or 'sum'.")
