"""Wrappers: flat spaces, and the noise of a frozen policy as the action."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from ardrag_rl.envs import FlattenSpaces, NoiseAction
from ardrag_rl.flow import GaussianStep

FRAMES, STEPS = 3, 3


@pytest.fixture
def make(tiny_pipeline):
    def make():
        return gym.make(
            "ARDrag-v0", pipeline=str(tiny_pipeline), tasks="sprites", rewards=["dynamic_degree"], num_frames=FRAMES
        )

    return make


def denoise(obs, step):
    """A made-up policy: moves the current frame toward its control."""
    m = int(obs["frame"][0, 0])
    return 0.5 * obs["latents"][:, m] + 0.1 * (step + 1) * obs["trajectory"][:, m]


class Sessions:
    """The same, in the form of a VideoPolicy."""

    def session(self, batch_size):
        assert batch_size == 1
        return self

    def transition(self, obs, kernel):
        assert kernel.name == "ode"
        return GaussianStep(torch.from_numpy(denoise(obs, int(obs["step"][0, 0]))), 0.0)


def test_flat_spaces_hold_the_same_numbers(make):
    env, flat = make(), FlattenSpaces(make())
    obs, _ = env.reset(seed=0)
    vector, _ = flat.reset(seed=0)
    assert vector.dtype == np.float32 and vector in flat.observation_space
    np.testing.assert_array_equal(vector, gym.spaces.flatten(env.observation_space, obs).astype(np.float32))
    action = np.random.default_rng(0).normal(size=flat.action_space.shape).astype(np.float32)
    a, b = env.step(action.reshape(env.action_space.shape)), flat.step(action)
    np.testing.assert_array_equal(b[0], gym.spaces.flatten(env.observation_space, a[0]).astype(np.float32))
    assert a[1:] == b[1:]
    with pytest.raises(ValueError, match="expected \\(256,\\)"):
        flat.step(action[:-1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("noise", [False, True])
def test_checkers(make, noise):
    def wrapped():
        return FlattenSpaces(NoiseAction(make(), denoise) if noise else make())

    check_env(wrapped(), skip_render_check=True, skip_close_check=True)
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    checker.check_env(wrapped())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", [lambda e: e, FlattenSpaces, lambda e: FlattenSpaces(NoiseAction(e, denoise))])
def test_sb3_ppo_learns(make, wrapper):
    sb3 = pytest.importorskip("stable_baselines3")
    env = wrapper(make())
    kind = "MlpPolicy" if isinstance(env.observation_space, gym.spaces.Box) else "MultiInputPolicy"
    model = sb3.PPO(kind, env, n_steps=125, batch_size=25, n_epochs=2, seed=0, policy_kwargs={"net_arch": [16]})
    before = [p.clone() for p in model.policy.parameters()]
    model.learn(500)
    assert model.num_timesteps == 500
    assert all(torch.isfinite(p).all() for p in model.policy.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))


@pytest.mark.parametrize("policy", [denoise, Sessions()])
def test_the_observed_noise_is_an_ordinary_episode(make, policy):
    env, steered = make(), NoiseAction(make(), policy)
    obs, _ = env.reset(seed=0)
    seen, _ = steered.reset(seed=0)
    for m in range(FRAMES):
        total = 0.0
        for n in range(STEPS):
            obs, reward, terminated, _, info = env.step(denoise({k: v[None] for k, v in obs.items()}, n)[0])
            total += reward
        seen, frame_reward, ended, _, frame_info = steered.step(seen["latents"][m])
        assert frame_reward == total and ended == terminated == (m == FRAMES - 1) and frame_info == info
        for key in obs:
            np.testing.assert_array_equal(obs[key], seen[key])


def test_other_noise_is_another_video(make):
    env = NoiseAction(make(), denoise)
    obs, _ = env.reset(seed=0)
    a, *_ = env.step(obs["latents"][0])
    env.reset(seed=0)
    b, *_ = env.step(-obs["latents"][0])
    assert not np.array_equal(a["latents"][0], b["latents"][0])
    np.testing.assert_array_equal(a["latents"][1:], b["latents"][1:])


def test_noise_is_set_at_a_frames_start_only(make):
    env = make().unwrapped
    env.reset(seed=0)
    noise = np.ones(env.action_space.shape, np.float32)
    assert (env.set_noise(noise)["latents"][0] == 1).all()
    env.step(noise)
    with pytest.raises(ValueError, match="it is at step 1"):
        env.set_noise(noise)
    with pytest.raises(ValueError, match="the noise has shape"):
        env.set_noise(noise[:1])


def test_noise_action_refuses_what_it_cannot_steer(make):
    with pytest.raises(ValueError, match="expected a function"):
        NoiseAction(make(), 3)
    with pytest.raises(ValueError, match="no set_noise"):
        NoiseAction(gym.make("CartPole-v1"), denoise)
