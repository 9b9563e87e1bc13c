"""Rollouts are the same in process, on one Ray worker, on three, and whatever happens to them."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ardrag_rl.policies import VideoPolicy
from ardrag_rl.rewards import Limits, Reward, RewardError, RewardLeak
from ardrag_rl.rollout import Plan
from ardrag_rl.training.lora import trainable_state
from ardrag_rl.training.ray_rollouts import RayRollouts, RolloutError
from ardrag_rl.training.workers import EnvSpec, LocalRollouts, RolloutSettings, Unit, join_results

SETTINGS = RolloutSettings(num_generations=2, threads=1)
PLAN = Plan.selective(1, "cps")
UNITS = [Unit((0, 3), PLAN, (2 * i, 2 * i + 1), (10 + i, 20 + i)) for i in range(4)]


@pytest.fixture(scope="module")
def env(tiny_pipeline):
    return EnvSpec(str(tiny_pipeline), "sprites", ["dynamic_degree"], 3, None, None)


@pytest.fixture(scope="module")
def policy(tiny_pipeline):
    return VideoPolicy.from_pretrained(tiny_pipeline)


@pytest.fixture(scope="module")
def local(env, policy):
    return join_results(LocalRollouts(env, SETTINGS).run(UNITS, policy)).rollout


@pytest.fixture(scope="module")
def runtime():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import this file
    yield ray
    ray.shutdown()


def assert_same(a, b):
    for name in ("latents", "log_probs", "rewards", "trajectory", "reference", "text", "groups"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.task_ids == b.task_ids and a.plan == b.plan
    assert all(torch.equal(a.reward_terms[name], b.reward_terms[name]) for name in a.reward_terms)


def test_order_of_work_does_not_matter(env, policy, local):
    reversed_ = LocalRollouts(env, SETTINGS).run(UNITS[::-1], policy)
    assert_same(local, join_results(reversed_[::-1]).rollout)
    assert local.groups.tolist() == [g for g in range(8) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_of_the_products_alone(env, policy, local, dtype):
    """The kernels stay float32: the action is scored on the mean it was drawn around, and all of it near float32's."""
    mixed = join_results(LocalRollouts(env, replace(SETTINGS, dtype=dtype)).run(UNITS[:1], policy)).rollout
    scored, whole = mixed.latents[:, 0, :2], local.latents[: len(mixed), 0, :2]  # of frame 0, before they part
    assert mixed.latents.dtype == mixed.log_probs.dtype == torch.float32
    assert 0 < (scored - whole).abs().max() < 0.1


def test_one_worker_gives_the_same_numbers(runtime, env, policy, local):
    rollouts = RayRollouts(env, SETTINGS, policy, 1)
    try:
        assert_same(local, join_results(rollouts.run(UNITS, policy)).rollout)
        # new weights reach the worker
        changed = VideoPolicy(policy.transformer, policy.schedule, policy.source)
        state = {k: v.clone() for k, v in policy.state_dict().items()}
        with torch.no_grad():
            for p in changed.parameters():
                p.mul_(1.01)
        again = join_results(rollouts.run(UNITS, changed)).rollout
        expected = join_results(LocalRollouts(env, SETTINGS).run(UNITS, changed)).rollout
        policy.load_state_dict(state)
        assert_same(again, expected)
        assert not torch.equal(again.latents, local.latents)
    finally:
        rollouts.close()


@pytest.mark.slow
def test_three_workers_give_the_same_numbers_when_one_or_all_are_killed(runtime, env, policy, local):
    rollouts = RayRollouts(env, SETTINGS, policy, 3)
    try:
        assert_same(local, join_results(rollouts.run(UNITS, policy)).rollout)
        for number in (1, 3):
            for actor in rollouts._actors[:number]:
                runtime.kill(actor)
            assert_same(local, join_results(rollouts.run(UNITS, policy)).rollout)
    finally:
        rollouts.close()


class Chaos(Reward):
    """Does `what` in its first calls, counted in a file that all processes share; then scores like the real one."""

    memory = 0

    def __init__(self, what, file, times=1):
        self.what, self.file, self.times, self.kept = what, Path(file), times, []

    def __call__(self, video, controls):
        with self.file.open("a") as file:
            file.write(".")
        if self.file.stat().st_size <= self.times:
            {
                "die": lambda: os._exit(1),
                "hang": lambda: time.sleep(600),
                "raise": self.fail,
                "leak": self.keep,
                "keep": self.keep,
            }[self.what]()
        return video.mean((2, 3, 4))

    def start(self, controls):
        if self.what == "keep":
            self.kept.clear()
        return super().start(controls)

    def fail(self):
        raise OSError("the reward server is gone")

    def keep(self):
        self.kept.append(np.ones(50 * 2**17))  # 50 MiB


def run(env, policy, workers, chaos, **settings):
    env = replace(env, rewards=[chaos])
    settings = replace(SETTINGS, **settings)
    rollouts = RayRollouts(env, settings, policy, workers) if workers else LocalRollouts(env, settings)
    try:
        return rollouts.run(UNITS[:2], policy)
    finally:
        rollouts.close()


@pytest.fixture(scope="module")
def calm(env, policy, tmp_path_factory):
    """What comes out where nothing happens."""
    return join_results(run(env, policy, 0, Chaos("raise", tmp_path_factory.mktemp("calm") / "calls", 0))).rollout


@pytest.mark.slow
@pytest.mark.parametrize("what", ["die", "hang"])
def test_an_actor_that_dies_or_hangs_is_replaced(runtime, env, policy, calm, tmp_path, what):
    timeout = 40.0 if what == "hang" else None  # a new actor's first unit loads a pipeline
    assert_same(calm, join_results(run(env, policy, 1, Chaos(what, tmp_path / "calls"), timeout=timeout)).rollout)


@pytest.mark.slow
def test_what_fails_again_and_again_is_named_and_raised_or_skipped(runtime, env, policy, tmp_path):
    chaos = Chaos("die", tmp_path / "calls", 10**6)
    with pytest.raises(
        RolloutError, match=r"groups \[\d, \d\] of update 3 \(tasks sprites-gentle:train/0/.*failed 2 times"
    ):
        run(env, policy, 2, chaos, attempts=2)
    skipped = run(env, policy, 2, chaos, attempts=1, skip_failures=True)
    assert [r.rollout for r in skipped] == [None, None] and all("failed 1 times" in r.failures[1] for r in skipped)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "what, says", [("hang", "did not answer within reward_timeout=0.5"), ("raise", "server is gone")]
)
def test_a_failing_reward_is_named_and_raised_or_skipped(request, env, policy, calm, tmp_path, workers, what, says):
    if workers:
        request.getfixturevalue("runtime")
    limits = Limits(seconds=0.5 if what == "hang" else None)
    with pytest.raises(RewardError, match=f"'chaos'.*{says}"):
        run(env, policy, workers, Chaos(what, tmp_path / "a"), limits=limits)
    first, second = run(env, policy, workers, Chaos(what, tmp_path / "b", 2), limits=limits, skip_failures=True)
    assert len(first.failures) == 1 and says in first.failures[0] and not second.failures
    # the batch failed, then its first group alone; the other stood in a batch of one, which rounds otherwise
    torch.testing.assert_close(first.rollout.latents, calm.latents[2:4], atol=1e-4, rtol=1e-4)
    assert torch.equal(second.rollout.latents, calm.latents[4:])


def test_a_reward_that_keeps_memory_is_named(env, policy, tmp_path):
    with pytest.raises(RewardLeak, match=r"'chaos' has taken \d\d\d MiB.*reward_memory=120"):
        run(env, policy, 0, Chaos("leak", tmp_path / "calls", 10**6), limits=Limits(mebibytes=120.0))


def test_what_a_video_keeps_until_the_next_one_is_no_leak(env, policy, tmp_path):
    """A buffering session of large frames grows along a video and starts anew with the next."""
    chaos = Chaos("keep", tmp_path / "calls", 10**6)
    rollouts = LocalRollouts(replace(env, rewards=[chaos]), replace(SETTINGS, limits=Limits(mebibytes=120.0)))
    for _ in range(3):
        rollouts.run(UNITS[:2], policy)


@pytest.mark.slow
def test_a_reward_that_keeps_memory_gets_a_new_actor(runtime, env, policy, calm, tmp_path, caplog):
    chaos = Chaos("leak", tmp_path / "calls", 12)
    results = run(env, policy, 1, chaos, limits=Limits(mebibytes=120.0))
    assert "'chaos' has taken" in caplog.text and "it is replaced" in caplog.text
    assert_same(calm, join_results(results).rollout)


@pytest.mark.slow
def test_what_runs_beside_its_caller_can_be_closed_and_run_again(runtime, env, policy, calm, tmp_path):
    rollouts = RayRollouts(replace(env, rewards=[Chaos("hang", tmp_path / "calls")]), SETTINGS, policy, 1)
    try:
        future = rollouts.start(UNITS[:2], policy, trainable_state(policy))
        while not (tmp_path / "calls").exists():
            time.sleep(0.1)
        rollouts.close()
        assert_same(calm, join_results(rollouts.run(UNITS[:2], policy)).rollout)
        with pytest.raises(RuntimeError, match="closed while they ran"):
            future.result(timeout=30)
    finally:
        rollouts.close()
