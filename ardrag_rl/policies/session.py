"""Session: a policy acting in a batch of running episodes, with their KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ardrag_rl.flow import GaussianStep, Kernel
from ardrag_rl.policies.cache import Cache
from ardrag_rl.policies.transformer import Context

if TYPE_CHECKING:
    from ardrag_rl.policies.policy import VideoPolicy

Observation = Mapping[str, Any]  # the environment's keys; numpy or torch, with a leading batch dimension


@dataclass(frozen=True)
class _History:
    """The clean frames a cache was computed from.

    latents, trajectory, reference: (B, m, C, h, w); text: (B, L, D); image: (B, L', D') or None.
    """

    latents: Tensor
    trajectory: Tensor
    reference: Tensor
    text: Tensor
    image: Tensor | None

    @classmethod
    def of(cls, obs: Mapping[str, Tensor], frame: int) -> _History:
        latents, trajectory, reference = (obs[key][:, :frame] for key in ("latents", "trajectory", "reference"))
        return cls(latents, trajectory, reference, obs["text"], obs.get("image"))

    def clone(self) -> _History:
        parts = (self.latents, self.trajectory, self.reference, self.text)
        latents, trajectory, reference, text = (a.clone() for a in parts)
        return _History(latents, trajectory, reference, text, None if self.image is None else self.image.clone())

    def same_prompt(self, other: _History) -> bool:
        if (self.image is None) != (other.image is None):
            return False
        image = self.image is None or other.image is None or torch.equal(self.image, other.image)
        return image and torch.equal(self.text, other.text)

    def same_frames(self, other: _History) -> bool:
        pairs = zip(
            (self.latents, self.trajectory, self.reference),
            (other.latents, other.trajectory, other.reference),
            strict=True,
        )
        return all(torch.equal(a, b) for a, b in pairs)


class Session:
    """Turns observations into Gaussian steps, without gradient.

    An observation holds the whole Markov state, so any sequence of observations is answered correctly: where one
    continues the episode the cache is used, where it does not (a rewind, a fork, a new episode) the cache is rebuilt
    by running all frames before m under the banded mask.

    Args:
        policy: a `VideoPolicy`.
        batch_size: B, the number of episodes; every observation has it as its first dimension.
    """

    def __init__(self, policy: VideoPolicy, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1.")
        self.policy, self.batch_size = policy, batch_size
        self._history: _History | None = None
        self._context: Context | None = None
        self._cache: Cache = policy.transformer.new_cache()

    @torch.no_grad()
    def transition(self, obs: Observation, kernel: Kernel) -> GaussianStep:
        """p(x[m,n+1] | s[m,n]) under a kernel.

        Args:
            obs: the environment's observation, batched: latents (B, M+1, C, h, w) and so on.
            kernel: of step n.

        Returns:
            a step with mean (B, C, h, w) and std () or (B, 1, 1, 1).

        Raises:
            ValueError: the batch size differs, or an episode is over (step = N).
        """
        state = {key: torch.as_tensor(value).to(self.policy.device) for key, value in obs.items()}
        frame, step = state["frame"].flatten().tolist(), state["step"].flatten().tolist()
        if len(frame) != self.batch_size:
            raise ValueError(f"observations of {len(frame)} episodes in a session of {self.batch_size}.")
        num_steps = self.policy.schedule.num_steps
        if max(step) >= num_steps:
            raise ValueError(f"step {max(step)} of {num_steps}: the episode is over and has no next action; reset it.")
        x = state["latents"][torch.arange(self.batch_size), state["frame"].flatten()]  # (B, C, h, w)
        if len(set(frame)) == 1:
            velocity = self._velocity(state, frame[0], x, step)
        else:  # episodes at different frames share no cache: each is answered from its own history
            velocity = torch.empty_like(x)
            for m in sorted(set(frame)):
                rows = [i for i, f in enumerate(frame) if f == m]
                part = {key: value[rows] for key, value in state.items()}
                alone = Session(self.policy, len(rows))
                velocity[rows] = alone._velocity(part, m, x[rows], [step[i] for i in rows])
        levels = self.policy.schedule.levels
        if len(set(step)) == 1:
            return kernel.step(x, velocity, levels[step[0]], levels[step[0] + 1])
        t, t_next = (torch.tensor([levels[n + k] for n in step]) for k in (0, 1))
        return kernel.step(x, velocity, t, t_next)

    def _velocity(self, state: Mapping[str, Tensor], frame: int, x: Tensor, step: list[int]) -> Tensor:
        self._follow(state, frame)
        inputs = self.policy.frame_inputs(
            x[:, None], state["reference"][:, frame : frame + 1], state["trajectory"][:, frame : frame + 1], frame
        )
        levels = self.policy.schedule.levels
        timestep = torch.tensor([1000 * levels[n] for n in step])[:, None, None]
        velocity, _ = self.policy.transformer(self._context, None, inputs[:, None], timestep, self._cache)
        return velocity[:, 0, 0].float()

    def _follow(self, state: Mapping[str, Tensor], frame: int) -> None:
        """Brings the cache to the frames before `frame`."""
        new, old = _History.of(state, frame), self._history
        if old is None or not old.same_prompt(new):
            self._context = self.policy.transformer.encode_context(new.text, new.image)
        known = 0 if old is None else old.latents.shape[1]
        if old is None or known > frame or not old.same_prompt(new) or not old.same_frames(_History.of(state, known)):
            self._cache, known = self.policy.transformer.new_cache(), 0
        if known < frame:
            latents, reference, trajectory = (a[:, known:] for a in (new.latents, new.reference, new.trajectory))
            inputs = self.policy.frame_inputs(latents, reference, trajectory, first=known)
            _, entries = self.policy.transformer(self._context, inputs, cache=self._cache)
            self._cache = self._cache.append(entries)
        if old is None or known != frame or old.latents.shape[1] != frame or not old.same_prompt(new):
            self._history = new.clone()  # the caller may write into the arrays it observed
