"""Wrappers: flat spaces for generic clients, and the noise of a frozen policy as the action."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from ardrag_rl.envs.mdp import Observation
from ardrag_rl.flow import Kernel

NOISE_BOUND = 5.0

Act = Callable[[Mapping[str, NDArray[Any]], int], Any]


class _Session(Protocol):
    def transition(self, obs: Mapping[str, Any], kernel: Kernel) -> Any: ...


class SessionPolicy(Protocol):
    """What has sessions, such as a VideoPolicy."""

    def session(self, batch_size: int) -> _Session: ...


class FlattenSpaces(gym.Wrapper[NDArray[np.float32], NDArray[np.float32], Any, Any]):
    """One float32 vector as the observation and one as the action, for clients that know nothing else.

    Gymnasium's FlattenObservation makes float64 of the mixed dtypes, and it has no wrapper that flattens a Box action.

    Args:
        env: with a Dict or Box observation space and a Box action space.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        if not isinstance(env.action_space, spaces.Box):
            raise ValueError(f"the action space is {env.action_space}: expected a Box.")
        box = env.action_space
        flat = spaces.flatten_space(env.observation_space)
        assert isinstance(flat, spaces.Box)
        self.observation_space = spaces.Box(flat.low.astype(np.float32), flat.high.astype(np.float32), dtype=np.float32)
        self.action_space = spaces.Box(box.low.ravel(), box.high.ravel(), dtype=np.float32)
        self._shape = box.shape

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """As the environment's, flat."""
        obs, info = self.env.reset(seed=seed, options=options)
        return self._flat(obs), info

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], Any, bool, bool, dict[str, Any]]:
        """As the environment's, flat."""
        array = np.asarray(action)
        if array.shape != self.action_space.shape:
            raise ValueError(f"the action has shape {array.shape}: expected {self.action_space.shape}.")
        obs, reward, terminated, truncated, info = self.env.step(array.reshape(self._shape))
        return self._flat(obs), reward, terminated, truncated, info

    def _flat(self, obs: Any) -> NDArray[np.float32]:
        return np.asarray(spaces.flatten(self.env.observation_space, obs), np.float32)


class NoiseAction(gym.Wrapper[Observation, NDArray[np.float32], Observation, NDArray[np.float32]]):
    """A frozen policy denoises; the action is the noise it starts a frame from. One step is one frame.

    So any algorithm for continuous actions can steer a policy without touching its weights (DSRL, noise search). The
    action that repeats the observed noise, `obs["latents"][m]`, is an ordinary episode of the policy.

    Args:
        env: of `gym.make("ARDrag-v0")`, not flattened; flatten outside.
        policy: something with sessions, as a VideoPolicy, which then runs with the `ode` kernel; or a function of the
            batched observation (each array (1, ...)) and the step n, that gives the next latent, (1, C, h, w) or
            (C, h, w).
        bound: the noise is a Box(-bound, bound); nothing is clipped. Standard normal noise stays within 5.
    """

    def __init__(
        self, env: gym.Env[Observation, NDArray[np.float32]], policy: Act | SessionPolicy, bound: float = NOISE_BOUND
    ) -> None:
        super().__init__(env)
        if not hasattr(env.unwrapped, "set_noise"):
            raise ValueError(f"{env} has no set_noise: expected an ARDragEnv.")
        if not callable(getattr(policy, "session", None)) and not callable(policy):
            raise ValueError(
                f"policy={policy!r}: expected a function of (observation, step) or an object with sessions."
            )
        shape = env.action_space.shape
        assert shape is not None
        self.action_space = spaces.Box(-bound, bound, shape, np.float32)
        self._act = _act_of(policy)

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Generates one frame from this noise.

        Returns:
            the observation at the next frame's start, the frame's reward, and the rest as the environment gives it.
        """
        core: Any = self.env.unwrapped
        obs = core.set_noise(action)
        terminated = truncated = False
        total = 0.0
        info: dict[str, Any] = {}
        for n in range(core.num_steps):
            latent = self._act({key: value[None] for key, value in obs.items()}, n)
            latent = latent.detach().cpu().float().numpy() if isinstance(latent, torch.Tensor) else np.asarray(latent)
            shape = core.action_space.shape
            latent = latent[0] if latent.shape == (1, *shape) else latent
            obs, reward, terminated, truncated, info = self.env.step(latent)
            total += float(reward)
        return obs, total, terminated, truncated, info


def _act_of(policy: Act | SessionPolicy) -> Act:
    """The policy as a function; one session serves all episodes, as it sees from an observation where they begin."""
    if not callable(getattr(policy, "session", None)):
        return policy  # type: ignore[return-value]
    session = policy.session(1)  # type: ignore[union-attr]
    ode = Kernel("ode")

    def act(obs: Mapping[str, NDArray[Any]], step: int) -> torch.Tensor:
        return session.transition(obs, ode).mean

    return act
