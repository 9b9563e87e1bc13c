"""Advantages (Eq. 13) and losses (Eq. 14), on numbers small enough to work out by hand or in closed form."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ardrag_rl.flow import GaussianStep, Schedule
from ardrag_rl.rollout import Plan, Rollout
from ardrag_rl.training.advantages import compute_advantages, credit_signal, zero_spread
from ardrag_rl.training.algorithms import algorithm_names, get_algorithm, grpo, register_algorithm, reinforce, rloo
from ardrag_rl.training.stats import loss_stats

GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])


def settings(**changes):
    defaults = dict(epsilon=0.2, epsilon_high=None, beta=0.0, log_prob_reduction="mean", num_generations=3)
    return SimpleNamespace(**(defaults | changes))


def make_rollout(latents, advantages=None, rewards=None, groups=None, scored=0):
    """latents (B, F, N+1, C, h, w) of a plan whose step `scored` is stochastic."""
    b, f = latents.shape[:2]
    n = latents.shape[2] - 1
    empty = torch.zeros(b, f, *latents.shape[3:])
    return Rollout(
        trajectory=empty,
        reference=empty,
        text=torch.zeros(b, 1, 1),
        latents=latents,
        plan=Plan.selective(scored, "renoise", num_steps=n),
        schedule=Schedule((1000.0, 500.0)),
        log_probs=torch.zeros(b, f, 1),
        rewards=torch.zeros(b, f) if rewards is None else rewards,
        reward_terms={},
        task_ids=("t",) * b,
        groups=torch.zeros(b, dtype=torch.int64) if groups is None else groups,
        advantages=advantages,
    )


# --- advantages


def test_advantage_is_equation_13():
    rewards = torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 3.0], [5.0, 1.0], [5.0, 2.0], [5.0, 9.0]])
    got = compute_advantages(rewards, GROUPS, "group")
    column = rewards[:3, 0]
    assert torch.allclose(got[:3, 0], (column - 3.0) / (column.var(correction=1).sqrt() + 1e-4))
    assert got[0, 0] == pytest.approx(-2 / (7**0.5 + 1e-4))  # variance (4 + 1 + 9) / 2, Bessel-corrected
    assert (got[3:, 0] == 0).all()  # no spread


def test_constant_group_gets_exactly_zero_despite_rounding():
    rewards = torch.full((12, 3), 0.1) + 0.2  # the mean of equal floats is not always the float
    groups = torch.zeros(12, dtype=torch.int64)
    for scale in ("group", "batch", "none"):
        assert (compute_advantages(rewards, groups, scale) == 0).all()
    assert zero_spread(rewards, groups) == 1


def test_scales_are_trl_s():
    rewards = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    centred = rewards - torch.cat([rewards[:3].mean(0).expand(3, 4), rewards[3:].mean(0).expand(3, 4)])
    assert torch.allclose(compute_advantages(rewards, GROUPS, "none"), centred, atol=1e-6)
    assert torch.allclose(compute_advantages(rewards, GROUPS, "batch"), centred / (rewards.std() + 1e-4), atol=1e-5)
    for name, flag in (("group", True), ("none", False)):
        assert torch.equal(compute_advantages(rewards, GROUPS, flag), compute_advantages(rewards, GROUPS, name))
    with pytest.raises(ValueError, match="group, batch, none"):
        compute_advantages(rewards, GROUPS, "std")


def test_groups_do_not_mix_and_need_not_be_neighbours():
    rewards = torch.rand(6, 2, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    mixed = compute_advantages(rewards[order], GROUPS[order], "group")
    assert torch.allclose(mixed, compute_advantages(rewards, GROUPS, "group")[order])


def test_credit():
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    assert credit_signal(rewards, "frame").tolist() == [[1, 2, 4]]
    assert credit_signal(rewards, "return_to_go").tolist() == [[7, 6, 4]]
    assert credit_signal(rewards, "episode").tolist() == [[7, 7, 7]]
    with pytest.raises(ValueError, match="return_to_go"):
        credit_signal(rewards, "discounted")


def test_zero_spread_counts_groups():
    rewards = torch.tensor([[1.0], [1.0], [1.0], [1.0], [2.0], [1.0]])
    assert zero_spread(rewards, GROUPS) == 0.5


# --- losses


def scored_rollout(seed=0, b=6, f=2):
    g = torch.Generator().manual_seed(seed)
    latents = torch.randn(b, f, 3, 2, 2, 2, generator=g)
    rollout = make_rollout(latents, torch.randn(b, f, generator=g), groups=GROUPS)
    mean = torch.randn(b, f, 1, 2, 2, 2, generator=g)
    return rollout, mean


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_grpo_at_ratio_one_is_the_policy_gradient(reduction):
    rollout, mean = scored_rollout()
    args = settings(log_prob_reduction=reduction)
    std = 0.5
    rollout = replace(rollout, log_probs=GaussianStep(mean, std).log_prob(rollout.actions, reduction))
    grads = []
    for loss in (grpo, reinforce):
        x = mean.clone().requires_grad_(True)
        loss(GaussianStep(x, std), rollout, args).backward()
        grads.append(x.grad)
    # by hand: -A d log p / d mean = -A (a - mean) / std^2, averaged over 12 transitions
    score = (rollout.actions - mean) / std**2
    by_hand = -rollout.advantages[..., None, None, None, None] * score / 12 / (8 if reduction == "mean" else 1)
    assert torch.allclose(grads[0], by_hand, atol=1e-6)
    assert torch.allclose(grads[1], by_hand, atol=1e-6)


def test_grpo_clips_where_the_ratio_has_gone_too_far():
    """Four transitions: ratio 0.5 and 1.5, advantage -1 and 1; epsilon 0.2 below, 0.3 above."""
    rollout, mean = scored_rollout(b=4, f=1)
    advantages = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5])[:, None, None]
    args = settings(epsilon=0.2, epsilon_high=0.3)
    now = GaussianStep(mean, 1.0).log_prob(rollout.actions)
    rollout = replace(rollout, log_probs=now - ratio.log(), advantages=advantages)
    x = mean.clone().requires_grad_(True)
    loss = grpo(GaussianStep(x, 1.0), rollout, args)
    # min(rA, clip(r)A): max(0.5, 0.8) = 0.8, 0.5, 1.5, min(1.5, 1.3) = 1.3
    assert loss.item() == pytest.approx((0.8 - 0.5 + 1.5 - 1.3) / 4)
    loss.backward()
    moved = x.grad.abs().sum((1, 2, 3, 4, 5)) > 0
    assert moved.tolist() == [False, True, True, False]
    stats = loss_stats(GaussianStep(mean, 1.0), rollout, args)
    assert (stats.clip_low, stats.clip_high) == (0.25, 0.25)
    assert stats.ratio_mean == pytest.approx(1.0) and stats.ratio_max == pytest.approx(1.5)
    assert stats.approx_kl > 0


def test_kl_penalty_is_the_closed_form():
    rollout, mean = scored_rollout()
    reference = mean + 0.3
    now = GaussianStep(mean, 0.5)
    rollout = replace(rollout, ref_steps=GaussianStep(reference, 0.5), log_probs=now.log_prob(rollout.actions))
    plain, penalised = (grpo(now, rollout, settings(beta=beta)) for beta in (0.0, 2.0))
    assert penalised - plain == pytest.approx(2.0 * 0.09 / (2 * 0.25), rel=1e-4)
    assert loss_stats(now, rollout, settings()).kl == pytest.approx(0.18, rel=1e-4)
    with pytest.raises(ValueError, match="reference"):
        grpo(now, replace(rollout, ref_steps=None), settings(beta=1.0))


def test_rloo_baseline_leaves_one_out():
    rollout, mean = scored_rollout()
    rewards = torch.rand(6, 2, generator=torch.Generator().manual_seed(2))
    rollout = replace(rollout, advantages=compute_advantages(rewards, GROUPS, "none"))
    left_out = torch.stack(
        [rewards[i] - rewards[[j for j in range(6) if GROUPS[j] == GROUPS[i] and j != i]].mean(0) for i in range(6)]
    )
    step = GaussianStep(mean, 0.7)
    expected = reinforce(step, replace(rollout, advantages=left_out), settings())
    assert rloo(step, rollout, settings()) == pytest.approx(expected.item(), rel=1e-5)


def test_registry():
    assert {"grpo", "reinforce", "rloo"} <= set(algorithm_names())
    with pytest.raises(ValueError, match=r"loss_type='ppo' is unknown; choose one of .*grpo"):
        get_algorithm("ppo")

    @register_algorithm("test-mine")
    def mine(steps, rollout, args):
        return steps.mean.sum()

    assert get_algorithm("test-mine") is mine


# --- the linear-Gaussian toy: s' = a, a ~ N(k s + b, sigma^2), reward -(a - goal_m)^2 at each of 2 frames

SIGMA, START = 0.5, 1.0
GOALS = torch.tensor([0.5, -1.0], dtype=torch.float64)


def objective(k, b, myopic=False):
    """The expected return in closed form; myopic: what a frame's action does to later frames is not counted."""
    mean, var, total = torch.tensor(START, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64), 0.0
    for goal in GOALS:
        if myopic:
            mean, var = mean.detach(), var.detach()
        mean, var = k * mean + b, k**2 * var + SIGMA**2
        total = total - ((mean - goal) ** 2 + var)
    return total


def toy_gradient(loss, credit, k, b, groups=40_000, size=4):
    """The gradient of -loss, per video, on sampled groups."""
    g = torch.Generator().manual_seed(0)
    count = groups * size
    state, latents = torch.full((count,), START, dtype=torch.float64), []
    for _ in GOALS:
        action = k.detach() * state + b.detach() + SIGMA * torch.randn(count, generator=g, dtype=torch.float64)
        latents.append(torch.stack([state, action, action], 1))
        state = action
    latents = torch.stack(latents, 1)[..., None, None, None]  # (B, F, N+1, 1, 1, 1)
    rollout = make_rollout(latents, groups=torch.arange(groups).repeat_interleave(size))
    rewards = -((rollout.actions.flatten(1) - GOALS) ** 2)
    # compute_advantages loops over groups; the same in one line for many of them
    signal = credit_signal(rewards, credit).view(groups, size, -1)
    advantages = (signal - signal.mean(1, keepdim=True)).flatten(0, 1)
    part = slice(0, 40)
    assert torch.allclose(
        compute_advantages(rewards[part], rollout.groups[part], "none", credit).double(), advantages[part], atol=1e-5
    )
    steps = GaussianStep(k * rollout.states + b, SIGMA)
    args = settings(log_prob_reduction="sum", num_generations=size)
    rollout = replace(rollout, advantages=advantages, log_probs=steps.log_prob(rollout.actions, "sum").detach())
    grads = torch.autograd.grad(-loss(steps, rollout, args) * len(GOALS), (k, b))
    return torch.stack(grads)


def parameters(k, b):
    return [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (k, b)]


@pytest.mark.parametrize(
    ("credit", "myopic"), [("return_to_go", False), ("episode", False), ("frame", True)], ids=lambda x: str(x)
)
@pytest.mark.parametrize(("loss", "factor"), [(reinforce, 3 / 4), (grpo, 3 / 4), (rloo, 1.0)])
def test_expected_gradient_on_the_linear_gaussian_toy(loss, factor, credit, myopic):
    """(G-1)/G times the analytic gradient; frame credit follows its own, myopic objective; RLOO has no factor."""
    k, b = parameters(0.8, 0.3)
    exact = torch.stack(torch.autograd.grad(objective(k, b, myopic), (k, b)))
    sampled = toy_gradient(loss, credit, k, b)
    assert torch.allclose(sampled, factor * exact, rtol=0.02, atol=0.03), (sampled, factor * exact)


def test_toy_gradient_vanishes_at_the_known_optimum():
    """Without noise in the first state the best line goes through both goals as far as sigma allows."""
    k, b = parameters(0.0, 0.0)
    optimiser = torch.optim.LBFGS([k, b], max_iter=100)

    def closure():
        optimiser.zero_grad()
        loss = -objective(k, b)
        loss.backward()
        return loss

    optimiser.step(closure)
    sampled = toy_gradient(reinforce, "return_to_go", k, b)
    assert sampled.abs().max() < 0.03
    assert toy_gradient(reinforce, "return_to_go", *parameters(0.8, 0.3)).abs().max() > 0.5
