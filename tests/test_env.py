"""The environments: Gymnasium's, SB3's and TorchRL's own checkers, and the identities of the MDP."""

import shutil
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from ardrag_rl.control import Control
from ardrag_rl.envs import RewardError, Task
from ardrag_rl.rewards import Reward

FRAMES, STEPS = 3, 3
LATENT = (8, 8)


class Brightness(Reward):
    """The mean of a frame."""

    def __call__(self, video, controls):
        return video.mean((2, 3, 4))


class Change(Reward):
    """How much a frame differs from the first: a causal reward with a memory."""

    def __call__(self, video, controls):
        return (video - video[:, :1]).abs().mean((2, 3, 4))


class Whole(Reward):
    """Each frame against the last: needs the whole video."""

    causal = False

    def __call__(self, video, controls):
        return (video - video[:, -1:]).abs().mean((2, 3, 4))


REWARDS = [Brightness(), Change()]


def make(path, **changes):
    return gym.make("ARDrag-v0", **{**settings(path), **changes})


def make_vec(path, num_envs, **changes):
    return gym.make_vec("ARDrag-v0", num_envs=num_envs, **{**settings(path), **changes})


def settings(path):
    return dict(pipeline=str(path), tasks="sprites-hard", rewards=REWARDS, num_frames=FRAMES)


@pytest.fixture
def env(tiny_pipeline):
    env = make(tiny_pipeline).unwrapped
    yield env
    env.close()


def actions(shape, count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, *shape)).astype(np.float32)


def play(env, plan):
    """Observations, rewards and infos of these actions."""
    out = [env.step(a) for a in plan]
    return [o[0] for o in out], [o[1] for o in out], [o[4] for o in out]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_gymnasium_checker(tiny_pipeline):
    check_env(make(tiny_pipeline, render_mode="rgb_array").unwrapped)


@pytest.mark.filterwarnings("ignore")
def test_sb3_checker(tiny_pipeline):
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    checker.check_env(make(tiny_pipeline))


@pytest.mark.filterwarnings("ignore")
def test_torchrl_checker(tiny_pipeline):
    pytest.importorskip("torchrl")
    from torchrl.envs import GymEnv
    from torchrl.envs.utils import check_env_specs

    env = GymEnv("ARDrag-v0", **settings(tiny_pipeline))
    check_env_specs(env)
    assert env.rollout(20)["next", "terminated"].sum() == 1


def test_import_is_light():
    heavy = ("diffusers", "trl", "ray", "cv2", "open_clip", "transformers")
    code = f"import sys, ardrag_rl.envs; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_spaces_are_the_designs_table(env):
    video = (FRAMES, env.codec.latent_channels, *LATENT)
    shapes = {key: space.shape for key, space in env.observation_space.items()}
    assert shapes == {
        "latents": video,
        "trajectory": video,
        "reference": video,
        "text": env.codec.text_shape,
        "frame": (1,),
        "step": (1,),
        "timestep": (1,),
    }
    assert env.observation_space["frame"].dtype == env.observation_space["step"].dtype == np.int64
    assert env.action_space == gym.spaces.Box(-10, 10, video[1:], np.float32)


def test_episode_is_the_mdp(env):
    obs, info = env.reset(seed=0)
    assert isinstance(info["task"], str) and info["task"] == env.task.id
    noise = obs["latents"].copy()
    levels = (1000.0, 755.0, 522.0)
    expected = noise.copy()
    for k, action in enumerate(actions(env.action_space.shape, FRAMES * STEPS)):
        m, n = divmod(k, STEPS)
        assert (obs["frame"], obs["step"], obs["timestep"]) == (m, n, np.float32(levels[n]))
        np.testing.assert_array_equal(obs["latents"], expected)
        # the control of later frames is not known yet
        assert not obs["trajectory"][m + 1 :].any() and obs["trajectory"][m].any()
        obs, reward, terminated, truncated, info = env.step(action)
        expected[m] = action
        ends = n == STEPS - 1
        assert ("reward_terms" in info) == ends and (reward != 0) == ends
        assert terminated == (k == FRAMES * STEPS - 1) and not truncated
    assert (obs["frame"], obs["step"], obs["timestep"]) == (FRAMES - 1, STEPS, 0.0)
    np.testing.assert_array_equal(obs["latents"], expected)
    assert obs in env.observation_space


def test_rewards_are_those_of_the_decoded_video(tiny_pipeline):
    rewards = [Brightness(), Change(), Whole()]
    env = make(tiny_pipeline, rewards=rewards).unwrapped
    env.reset(seed=3)
    observations, paid, infos = play(env, actions(env.action_space.shape, FRAMES * STEPS))
    video = env.codec.decode(torch.from_numpy(observations[-1]["latents"])[None])
    ends = [info["reward_terms"] for info in infos if "reward_terms" in info]
    control = [env.task.control]
    for reward in rewards[:2]:
        got = [terms[reward.name] for terms in ends]
        np.testing.assert_allclose(got, reward(video, control)[0].numpy(), atol=1e-5)
    # a reward that needs the whole video pays its sum at the end
    assert [terms["whole"] for terms in ends[:-1]] == [0.0] * (FRAMES - 1)
    np.testing.assert_allclose(ends[-1]["whole"], float(rewards[2](video, control).sum()), rtol=1e-5)
    assert sum(paid) == pytest.approx(sum(sum(terms.values()) for terms in ends))


def test_a_video_codec_gives_several_pixel_frames_per_latent_frame(tiny_pipeline, tmp_path):
    """Wan's VAE: T = 1 + 4 M pixel frames, streamed as it decodes the whole; a frame's score is their mean."""
    from diffusers import AutoencoderKLWan

    shutil.copytree(tiny_pipeline, tmp_path / "wan", ignore=shutil.ignore_patterns("vae"))
    torch.manual_seed(0)
    AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    ).save_pretrained(tmp_path / "wan" / "vae")
    env = make(tmp_path / "wan", rewards=[Brightness(), Whole()], render_mode="rgb_array").unwrapped
    env.reset(seed=0)
    assert env.task.control.num_frames == 1 + 4 * (FRAMES - 1)
    plan = actions(env.action_space.shape, FRAMES * STEPS)
    observations, _, infos = play(env, plan)
    video = env.codec.decode(torch.from_numpy(observations[-1]["latents"])[None])
    assert video.shape[1] == 1 + 4 * (FRAMES - 1)
    expected = [part.mean() for part in Brightness()(video, None)[0].split([1, 4, 4])]
    got = [info["reward_terms"]["brightness"] for info in infos if "reward_terms" in info]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    whole = sum(part.mean() for part in Whole()(video, None)[0].split([1, 4, 4]))
    np.testing.assert_allclose(infos[-1]["reward_terms"]["whole"], whole, atol=1e-5)
    assert env.render().shape == (256, 256, 3)
    env.reset(seed=0)
    play(env, plan[:4])
    state = env.snapshot()
    rest = play(env, plan[4:])[1]
    env.restore(state)
    assert play(env, plan[4:])[1] == rest


def test_weights(tiny_pipeline):
    env = make(tiny_pipeline, rewards={"motion": 0.0, "smoothness": 2.0}).unwrapped
    env.reset(seed=0)
    _, paid, infos = play(env, actions(env.action_space.shape, 2 * STEPS))
    assert paid[-1] == pytest.approx(2 * infos[-1]["reward_terms"]["smoothness"])


def test_reference_is_the_image_then_noise(env):
    obs, _ = env.reset(seed=0)
    image = env.codec.encode(env.task.control.image[None, None])[0, 0].numpy()
    np.testing.assert_allclose(obs["reference"][0], image, atol=1e-5)
    later = obs["reference"][1:]
    assert abs(later.mean()) < 0.2 and 0.8 < later.std() < 1.2
    assert not np.array_equal(later[0], obs["latents"][1])


def test_seed_fixes_noise_and_order(env):
    first = [env.reset(seed=5)] + [env.reset() for _ in range(3)]
    again = [env.reset(seed=5)] + [env.reset() for _ in range(3)]
    for (a, info_a), (b, info_b) in zip(first, again, strict=True):
        assert_equal(a, b)
        assert info_a == info_b
    assert len({info["task"] for _, info in first}) == 4
    other, _ = env.reset(seed=6)
    assert not np.array_equal(other["latents"], first[0][0]["latents"])


def test_noise_does_not_depend_on_the_task(env):
    a, _ = env.reset(seed=5)
    b, info = env.reset(seed=5, options={"index": 7})
    c, _ = env.reset(seed=5, options={"task": env.source[7]})
    np.testing.assert_array_equal(a["latents"], b["latents"])
    assert info["task"].endswith("/7")
    assert_equal(b, c)


def test_every_task_comes_before_any_again(tiny_pipeline):
    tasks = [Task(f"t{i}", Control(torch.rand(FRAMES, 1, 3), "p", torch.rand(3, 32, 32))) for i in range(4)]
    env = make(tiny_pipeline, tasks=tasks)
    ids = [env.reset(seed=0)[1]["task"]] + [env.reset()[1]["task"] for _ in range(7)]
    assert sorted(ids[:4]) == sorted(ids[4:]) == [f"t{i}" for i in range(4)]


def test_encodings_are_kept_per_content_not_per_id(env):
    image = torch.rand(3, 32, 32)
    a = Task("same", Control(torch.full((FRAMES, 1, 3), 0.3), "p", image))
    b = Task("same", Control(torch.full((FRAMES, 1, 3), 0.7), "p", image))
    obs_a, _ = env.reset(options={"task": a})
    obs_b, _ = env.reset(options={"task": b})
    assert not np.array_equal(obs_a["trajectory"], obs_b["trajectory"])


def test_no_points_is_no_control(env):
    task = Task("free", Control(torch.zeros(FRAMES, 0, 3), "p", torch.rand(3, 32, 32)))
    obs, _ = env.reset(options={"task": task})
    assert not obs["trajectory"].any()


def test_task_is_fitted(env):
    task = Task("long", Control(torch.full((40, 1, 3), 0.5), "p", torch.rand(3, 50, 90)))
    env.reset(options={"task": task})
    assert env.task.control.num_frames == FRAMES and env.task.control.image.shape == (3, 32, 32)


def test_snapshot_forks_and_rewinds(tiny_pipeline):
    env = make(tiny_pipeline, rewards=[Brightness(), Change(), Whole()]).unwrapped
    env.reset(seed=1)
    plan = actions(env.action_space.shape, FRAMES * STEPS)
    at = play(env, plan[:4])[0][-1]
    state = env.snapshot()
    first = play(env, plan[4:])
    assert_equal(env.restore(state), at)
    play(env, -plan[4:])  # another future, which must not reach into the snapshot
    for _ in range(2):
        env.restore(state)
        again = play(env, plan[4:])
        for a, b in zip(first[0], again[0], strict=True):
            assert_equal(a, b)
        assert first[1:] == again[1:]
    other = make(tiny_pipeline, rewards=[Brightness(), Change(), Whole()]).unwrapped
    other.restore(state)
    assert play(other, plan[4:])[1] == first[1]
    with pytest.raises(ValueError, match="other spaces"):
        make(tiny_pipeline, num_frames=2).unwrapped.restore(state)


def test_observations_own_their_memory(env):
    seen = [env.reset(seed=0)[0]]
    seen += play(env, actions(env.action_space.shape, 4))[0]
    kept = [{k: v.copy() for k, v in obs.items()} for obs in seen]
    for i, a in enumerate(seen):
        assert not any(np.shares_memory(a[k], b[k]) for b in seen[i + 1 :] for k in a)
    seen[-1]["latents"][:] = 99.0
    seen[-1]["text"][:] = 99.0
    after, *_ = env.step(np.zeros(env.action_space.shape))
    np.testing.assert_array_equal(after["latents"][0], kept[-1]["latents"][0])
    np.testing.assert_array_equal(after["text"], kept[-1]["text"])


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros((4, 8)), r"shape \(4, 8\); expected real numbers of shape \(4, 8, 8\)"),
        (np.full((4, 8, 8), np.nan), "256 of 256 values that are NaN or infinite"),
        (np.full((4, 8, 8), 1e300), "NaN or infinite"),
        (np.zeros((4, 8, 8), complex), "dtype complex128"),
        (np.zeros((4, 8, 8), bool), "dtype bool"),
        (None, "dtype object"),
    ],
)
def test_a_bad_action_changes_nothing(env, action, message):
    before, _ = env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(action)
    assert_equal(before, {k: v[0] for k, v in env._episodes.observe().items()})


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64])
def test_real_actions_are_cast(env, dtype):
    env.reset(seed=0)
    obs, *_ = env.step(np.full(env.action_space.shape, 2, dtype))
    assert obs["latents"].dtype == np.float32 and (obs["latents"][0] == 2).all()


def test_tensor_actions(env):
    env.reset(seed=0)
    obs, *_ = env.step(torch.full(env.action_space.shape, 0.5, dtype=torch.bfloat16, requires_grad=True))
    assert (obs["latents"][0] == 0.5).all()


def test_reset_is_needed(env):
    zero = np.zeros(env.action_space.shape)
    with pytest.raises(gym.error.ResetNeeded, match=r"call reset\(\) first"):
        env.step(zero)
    env.reset(seed=0)
    play(env, [zero] * (FRAMES * STEPS))
    with pytest.raises(gym.error.ResetNeeded, match="the last frame is clean"):
        env.step(zero)
    env.reset()
    env.step(zero)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": 3}, "'tasks' is unknown; choose of task, index"),
        ({"task": 3}, "'task' is a int"),
        ({"index": -1}, "index=-1"),
        ({"index": 1.5}, "index=1.5"),
        ({"index": 1, "task": 2}, "both given"),
    ],
)
def test_bad_options(env, options, message):
    with pytest.raises(ValueError, match=message):
        env.reset(options=options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline": "nope"}, "nope"),
        ({"tasks": "nope"}, "sprites, sprites-hard"),
        ({"rewards": ["nope"]}, "nope"),
        ({"height": 30}, "multiples of the codec's stride 4"),
        ({"num_frames": 0}, "num_frames=0"),
        ({"render_mode": "ansi"}, "ansi"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_bad_arguments(tiny_pipeline, changes, message):
    with pytest.raises(ValueError, match=message):
        make(tiny_pipeline, **changes)


def test_a_failing_reward_is_named(tiny_pipeline):
    class Broken(Brightness):
        def __call__(self, video, controls):
            return video.mean((2, 3, 4)) * float("nan")

    env = make(tiny_pipeline, rewards=[Broken()]).unwrapped
    env.reset(seed=0)
    zero = np.zeros(env.action_space.shape)
    with pytest.raises(RewardError, match="'broken'"):
        play(env, [zero] * STEPS)
    with pytest.raises(gym.error.ResetNeeded, match="a reward failed"):
        env.step(zero)
    env.reset()
    env.step(zero)


def test_render(tiny_pipeline):
    env = make(tiny_pipeline, render_mode="rgb_array").unwrapped
    env.reset(seed=0)
    first = env.render()
    assert first.shape == (256, 256, 3) and first.dtype == np.uint8
    play(env, actions(env.action_space.shape, STEPS))
    assert not np.array_equal(first, env.render())


# the batched form


@pytest.mark.parametrize("same_task", [True, False])
def test_batched_equals_single(tiny_pipeline, same_task):
    g, seeds = 3, [4, 9, 4]
    envs = make_vec(tiny_pipeline, g, rewards=[Brightness(), Change(), Whole()])
    options = {"index": 2} if same_task else {"index": [0, 1, 2]}
    obs, infos = envs.reset(seed=seeds, options=options)
    plan = actions((g, *envs.single_action_space.shape), FRAMES * STEPS)
    batched = [envs.step(a) for a in plan]
    for i in range(g):
        env = make(tiny_pipeline, rewards=[Brightness(), Change(), Whole()])
        one, info = env.reset(seed=seeds[i], options={"index": 2 if same_task else i})
        assert info["task"] == infos["task"][i]
        assert_equal(one, {k: v[i] for k, v in obs.items()})
        for (o, r, term, _, inf), a in zip(batched, plan[:, i], strict=True):
            o1, r1, term1, _, inf1 = env.step(a)
            assert_equal(o1, {k: v[i] for k, v in o.items()})
            np.testing.assert_allclose(r1, r[i], atol=1e-5)
            assert term1 == term[i]
            if "reward_terms" in inf1:
                assert inf["_reward_terms"][i]
                for name, value in inf1["reward_terms"].items():
                    np.testing.assert_allclose(value, inf["reward_terms"][name][i], atol=1e-5)


def test_vector_form_is_gymnasiums(tiny_pipeline):
    """Seeds, autoreset and infos as SyncVectorEnv of single environments gives them."""
    ours = make_vec(tiny_pipeline, 2)
    theirs = make_vec(tiny_pipeline, 2, vectorization_mode="sync")
    assert type(theirs).__name__ == "SyncVectorEnv"
    assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
    assert ours.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"]
    results = [ours.reset(seed=3), theirs.reset(seed=3)]
    assert_equal(results[0][0], results[1][0])
    assert_same_infos(results[0][1], results[1][1])
    for action in actions((2, *ours.single_action_space.shape), 2 * FRAMES * STEPS + 2):
        a, b = ours.step(action), theirs.step(action)
        assert_equal(a[0], b[0])
        np.testing.assert_allclose(a[1], b[1], atol=1e-5)
        assert (a[2] == b[2]).all() and (a[3] == b[3]).all()
        assert_same_infos(a[4], b[4])


def assert_same_infos(a, b):
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], dict):
            assert_same_infos(a[key], b[key])
        else:
            assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape
            floats = a[key].dtype.kind == "f"
            assert np.allclose(a[key], b[key], atol=1e-5) if floats else np.array_equal(a[key], b[key])


def test_a_group_shares_control_and_noise(tiny_pipeline):
    envs = make_vec(tiny_pipeline, 3)
    obs, infos = envs.reset(seed=[8] * 3, options={"task": envs.unwrapped.source[4]})
    assert len(set(infos["task"])) == 1
    for key, value in obs.items():
        assert (value == value[:1]).all(), key
    obs, _ = envs.reset(seed=[8, 9, 8])
    assert (obs["latents"][0] == obs["latents"][2]).all() and (obs["latents"][0] != obs["latents"][1]).any()


def test_one_decode_and_one_reward_call_per_frame(tiny_pipeline, monkeypatch):
    envs = make_vec(tiny_pipeline, 4)
    calls = []
    decode = type(envs.codec).decode_next
    monkeypatch.setattr(
        type(envs.codec), "decode_next", lambda self, z, state: calls.append(len(z)) or decode(self, z, state)
    )
    envs.reset(seed=0, options={"index": 0})
    for action in actions(envs.action_space.shape, FRAMES * STEPS):
        envs.step(action)
    assert calls == [4] * FRAMES


def test_partial_reset_equals_a_fresh_environment(tiny_pipeline):
    envs = make_vec(tiny_pipeline, 3, autoreset_mode="Disabled")
    envs.reset(seed=[1, 2, 3])
    plan = actions((3, *envs.single_action_space.shape), FRAMES * STEPS + 4)
    for action in plan[:4]:
        before = envs.step(action)[0]
    mask = np.array([False, True, False])
    obs, infos = envs.reset(seed=[0, 7, 0], options={"reset_mask": mask, "index": 5})
    assert (infos["_task"] == mask).all()
    env, other = make(tiny_pipeline), make(tiny_pipeline)
    fresh, _ = env.reset(seed=7, options={"index": 5})
    assert_equal(fresh, {k: v[1] for k, v in obs.items()})
    for row in (0, 2):
        assert_equal({k: v[row] for k, v in before.items()}, {k: v[row] for k, v in obs.items()})
    other.reset(seed=3)
    play(other, plan[:4, 2])
    for action in plan[4 : FRAMES * STEPS]:
        obs, rewards, terminated, _, _ = envs.step(action)
        one, reward, *_ = env.step(action[1])
        third, reward_3, *_ = other.step(action[2])
        assert_equal(one, {k: v[1] for k, v in obs.items()})
        assert_equal(third, {k: v[2] for k, v in obs.items()})
        np.testing.assert_allclose([rewards[1], rewards[2]], [reward, reward_3], atol=1e-5)
    assert terminated.tolist() == [True, False, True]
    with pytest.raises(gym.error.ResetNeeded, match=r"\[0, 2\]"):
        envs.step(plan[0])
    envs.reset(options={"reset_mask": terminated})
    envs.step(plan[0])


def test_ended_rows_are_reset_whatever_their_action_says(tiny_pipeline):
    envs = make_vec(tiny_pipeline, 2)
    envs.reset(seed=0)
    for action in actions(envs.action_space.shape, FRAMES * STEPS):
        *_, terminated, _, _ = envs.step(action)
    assert terminated.all()
    obs, rewards, terminated, _, infos = envs.step(np.full(envs.action_space.shape, np.nan))
    assert not terminated.any() and not rewards.any() and infos["_task"].all()
    assert (obs["frame"] == 0).all() and (obs["step"] == 0).all()


def test_vector_snapshot(tiny_pipeline):
    envs = make_vec(tiny_pipeline, 2, autoreset_mode="Disabled")
    envs.reset(seed=0)
    plan = actions(envs.action_space.shape, 2 * STEPS)
    envs.step(plan[0])
    envs.reset(seed=5, options={"reset_mask": np.array([True, False])})  # two cohorts
    state = envs.snapshot()
    first = [envs.step(a) for a in plan]
    envs.restore(state)
    for a, b in zip(first, [envs.step(a) for a in plan], strict=True):
        assert_equal(a[0], b[0])
        assert (a[1] == b[1]).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda e: e.reset(seed=[1]), ValueError, "1 seeds for 2"),
        (lambda e: e.reset(options={"index": [1]}), ValueError, "'index' has 1 entries"),
        (lambda e: e.reset(options={"reset_mask": [True, False]}), TypeError, "numpy array of bool"),
        (lambda e: e.reset(options={"reset_mask": np.zeros(2, bool)}), ValueError, "no True"),
        (lambda e: e.step(np.zeros(e.single_action_space.shape)), ValueError, "the actions has shape"),
    ],
)
def test_vector_bad_input(tiny_pipeline, call, error, message):
    envs = make_vec(tiny_pipeline, 2)
    envs.reset(seed=0)
    with pytest.raises(error, match=message):
        call(envs)


def test_same_step_autoreset_is_refused(tiny_pipeline):
    with pytest.raises(ValueError, match="SameStep"):
        make_vec(tiny_pipeline, 2, autoreset_mode="SameStep")
