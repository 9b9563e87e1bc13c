"""Rollouts are the same in process, on one Ray worker, on three, and after one was killed."""

import pytest
import torch

from ardrag_rl.policies import VideoPolicy
from ardrag_rl.rollout import Plan
from ardrag_rl.training.workers import EnvSpec, LocalRollouts, RayRollouts, RolloutSettings, Unit, join_results

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


def test_one_worker_gives_the_same_numbers(runtime, env, policy, local):
    rollouts = RayRollouts(env, SETTINGS, 1)
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
def test_three_workers_and_a_killed_one_give_the_same_numbers(runtime, env, policy, local):
    rollouts = RayRollouts(env, SETTINGS, 3)
    try:
        assert_same(local, join_results(rollouts.run(UNITS, policy)).rollout)
        runtime.kill(rollouts._actors[1])
        assert_same(local, join_results(rollouts.run(UNITS, policy)).rollout)
    finally:
        rollouts.close()
