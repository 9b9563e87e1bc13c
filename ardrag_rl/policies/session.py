"""Session: a policy acting in a batch of running episodes, with their KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ardrag_rl.flow import GaussianStep, Kernel
from ardrag_rl.policies.cache import Cache
from ardrag_rl.policies.static_cache import StaticCache
from ardrag_rl.policies.strategies import Strategy
from ardrag_rl.policies.transformer import Context

if TYPE_CHECKING:
    from ardrag_rl.policies.policy import VideoPolicy

_FRAME_KEYS = ("latents", "reference", "trajectory")
Observation = Mapping[str, Any]  # the environment's keys; numpy or torch, with a leading batch dimension


class Session:
    """Turns observations into Gaussian steps, without gradient.

    An observation holds the whole Markov state, so any sequence of observations is answered correctly: where one
    continues the episode the cache is used, where it does not (a rewind, a fork, a new episode) the cache is rebuilt
    by running all frames before m, under the banded mask where the strategy has one. So is it where the prompt or the
    control so far has changed, which is LongLive's re-cache, of the whole history and not of the window alone. Weights
    are not watched: after an update, take a new session.

    Args:
        policy: a `VideoPolicy`.
        batch_size: B, the number of episodes; every observation has it as its first dimension.
        cache: the caching strategy; None for the transformer's own.
    """

    def __init__(self, policy: VideoPolicy, batch_size: int, cache: Strategy | None = None) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1.")
        chunk = policy.transformer.config["chunk_size"]
        if chunk != 1:
            raise ValueError(f"the transformer has chunk_size={chunk}: an environment goes frame by frame, with 1.")
        self.policy, self.batch_size = policy, batch_size
        self._prompt: tuple[Tensor, ...] = ()  # what the context was computed from: text, and image where there is one
        self._frames: tuple[tuple[Tensor, ...], ...] = ()  # what the cache was computed from, frame by frame
        self._context: Context | None = None
        self._strategy = cache
        self._cache: Cache = policy.transformer.new_cache(cache)

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
        if state["latents"].ndim != 5:
            raise ValueError(
                f"latents of shape {tuple(state['latents'].shape)}: expected a batch, (B, M+1, C, h, w); give every "
                "entry of a single observation a first dimension, value[None]."
            )
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
            strategy = self._cache.immutable() if isinstance(self._cache, StaticCache) else self._strategy
            velocity = torch.empty_like(x)
            for m in sorted(set(frame)):
                rows = [i for i, f in enumerate(frame) if f == m]
                part = {key: value[rows] for key, value in state.items()}
                alone = Session(self.policy, len(rows), strategy)
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
        """Brings context and cache to the frames before `frame`."""
        prompt = tuple(state[key] for key in ("text", "image") if key in state)
        if not _equal(self._prompt, prompt):
            self._context = self.policy.transformer.encode_context(*prompt)
            self._prompt, self._frames = _copy(prompt), ()
        known = len(self._frames)
        if known > frame or not all(_equal(old, _frame(state, j)) for j, old in enumerate(self._frames)):
            known = 0
        if not self._cache.current:  # another session of the same static cache came between
            known = 0
        if known == 0:
            self._cache, self._frames = self.policy.transformer.new_cache(self._strategy), ()
        if known < frame:
            latents, reference, trajectory = (state[k][:, known:frame] for k in _FRAME_KEYS)
            inputs = self.policy.frame_inputs(latents, reference, trajectory, first=known)
            for part in inputs.split(frame - known if self._cache.band else 1, 1):
                _, entries = self.policy.transformer(self._context, part, cache=self._cache)
                self._cache = self._cache.append(entries)
            # copies: the caller may write into the arrays it observed
            self._frames += tuple(_copy(_frame(state, j)) for j in range(known, frame))


def _frame(state: Mapping[str, Tensor], j: int) -> tuple[Tensor, ...]:
    """What the cache entry of frame j depends on, beside the frames before it; (B, C, h, w) each."""
    return tuple(state[key][:, j] for key in _FRAME_KEYS)


def _equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _copy(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.clone() for t in tensors)
