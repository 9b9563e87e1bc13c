"""PPO of Stable-Baselines3 on the noise of a frozen policy: the odd one out of compare.py's variants.

An action is the initial noise of a frame (`NoiseAction`), an episode has as many actions as frames, and the policy is
never changed. In evaluations the actor gives the noise it likes best, so one drag path has one video.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np

from ardrag_rl.envs import ARDragEnv, NoiseAction
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.training.config import GRPOConfig
from ardrag_rl.training.order import task_indices
from ardrag_rl.training.workers import EnvSpec


def train_ppo(
    policy: VideoPolicy,
    env: EnvSpec,
    args: GRPOConfig,
    settings: Mapping[str, Any],
    measured: Sequence[int],
    measure: Callable[[int, Any], None],
) -> None:
    """Trains an actor; its policy is never changed.

    Args:
        policy: denoises.
        env: what it acts in.
        args: its seed, and the sizes of a group and of an update in videos.
        settings: of SB3's PPO.
        measured: numbers of updates, increasing; training ends after the last.
        measure: called before training and after each of these with the videos so far and a policy for `evaluate`.
    """
    assert args.generation_batch_size is not None and args.num_generations is not None
    core = ARDragEnv(**{f.name: getattr(env, f.name) for f in fields(env)})
    core_env = NoiseAction(SameTasks(core, args.seed, args.num_generations), policy)
    shape = current_frame({k: v[None] for k, v in core.observation_space.sample().items()})[0].shape
    seen = gym.wrappers.TransformObservation(
        core_env,
        lambda obs: current_frame({k: v[None] for k, v in obs.items()})[0],
        gym.spaces.Box(-np.inf, np.inf, shape, np.float32),
    )
    per_update = args.generation_batch_size * core.num_frames  # one action is one frame
    model = ppo_class()(
        "MlpPolicy",
        seen,
        n_steps=per_update,
        batch_size=per_update // math.gcd(per_update, 8),
        seed=args.seed,
        device="cpu",
        **settings,
    )
    steered = Steered(policy, model)
    measure(0, steered)
    for g in measured:
        model.learn(g * per_update - model.num_timesteps, reset_num_timesteps=False)
        measure(g * args.generation_batch_size, steered)


def ppo_class() -> Any:
    """Stable-Baselines3's PPO."""
    try:
        from stable_baselines3 import PPO
    except ImportError as error:
        raise SystemExit(
            'noise-ppo needs Stable-Baselines3: pip install "ardrag-rl[sb3]", or leave it out of --variants.'
        ) from error
    return PPO


def current_frame(obs: Mapping[str, np.ndarray]) -> np.ndarray:
    """What the actor sees, (B, 4 C h w): the frame's noise, the frame before, the control now, the reference image.

    The whole observation has 3 F latents and a prompt, of which most do not concern the next frame.
    """
    frame = obs["frame"][:, 0]
    rows = np.arange(len(frame))
    image = obs["reference"][:, 0]
    first = (frame == 0).reshape(-1, 1, 1, 1)
    before = np.where(first, image, obs["latents"][rows, np.maximum(frame - 1, 0)])
    parts = (obs["latents"][rows, frame], before, obs["trajectory"][rows, frame], image)
    return np.concatenate([part.reshape(len(frame), -1) for part in parts], 1, dtype=np.float32)


class SameTasks(gym.Wrapper):
    """Deals the trainer's tasks in its order, each as often as a group has videos."""

    def __init__(self, env: ARDragEnv, seed: int, repeats: int) -> None:
        super().__init__(env)
        self._length, self._seed, self._repeats, self._episode = len(env.source), seed, repeats, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """The next task."""
        index = task_indices(self._length, self._seed, [self._episode // self._repeats])[0]
        self._episode += 1
        return self.env.reset(seed=seed, options={"index": index})


class Steered:
    """The frozen policy from the noise that the actor likes best, in the form `evaluate` takes."""

    def __init__(self, policy: VideoPolicy, model: Any) -> None:
        self._policy, self._model = policy, model
        self.schedule, self.device, self.training = policy.schedule, policy.device, False

    def eval(self) -> None:
        """As of a module."""

    def train(self, mode: bool = True) -> None:
        """As of a module; the policy is frozen."""

    def session(self, batch_size: int) -> Any:
        """A session that replaces the noise at a frame's first step; later steps start from what it led to."""
        inner = self._policy.session(batch_size)

        def transition(obs: Mapping[str, np.ndarray], kernel: Any) -> Any:
            if obs["step"][0, 0] == 0:
                latents = obs["latents"].copy()
                latents[np.arange(batch_size), obs["frame"][:, 0]] = self._noise(obs)
                obs = {**obs, "latents": latents}
            return inner.transition(obs, kernel)

        return SimpleNamespace(transition=transition)

    def _noise(self, obs: Mapping[str, np.ndarray]) -> np.ndarray:
        return self._model.predict(current_frame(obs), deterministic=True)[0]
