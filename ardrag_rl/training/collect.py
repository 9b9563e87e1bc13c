"""collect: whole episodes of a vector environment under a policy and a plan, as one Rollout."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ardrag_rl.envs import ARDragVectorEnv, Task
from ardrag_rl.flow import Reduction
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.rollout import Plan, Rollout

Seed = int | Sequence[int]


@dataclass(frozen=True)
class Timings:
    """Seconds of a rollout: in the policy, and in the environment (codec and rewards)."""

    policy: float = 0.0
    env: float = 0.0

    def __add__(self, other: Timings) -> Timings:
        return Timings(self.policy + other.policy, self.env + other.env)


def collect(
    envs: ARDragVectorEnv,
    policy: VideoPolicy,
    plan: Plan,
    seed: Seed,
    tasks: Sequence[Task] | Sequence[int] | None = None,
    group_ids: Sequence[int] | None = None,
    share_noise: bool = True,
    log_prob_reduction: Reduction = "mean",
) -> Rollout:
    """One episode in every environment of `envs`, which are divided evenly into the groups of `tasks`.

    Each video has its own generators, seeded by (seed, group id, number in the group): what a group does depends on
    neither the other groups nor on where it runs, up to the rounding of another batch size.

    Args:
        envs: of `gym.make_vec("ARDrag-v0", num_envs=B)`.
        policy: not changed; runs without gradients.
        plan: N kernels; the log-probabilities of its scored steps are recorded.
        seed: a number, or several, such as (seed, update).
        tasks: one for each group, or its index in the environments' source. None: one group, of the first task that
            the environments draw with this seed.
        group_ids: the groups' numbers, 0, 1, ... by default; they enter the seeds and `Rollout.groups`.
        share_noise: whether the videos of a group start from the same noise.
        log_prob_reduction: over the latent's values, "mean" or "sum".

    Returns:
        B = num_envs episodes, on the CPU, groups one after another.

    Raises:
        ValueError: the groups do not divide the environments, or the plan has another number of steps.
        RewardError: a reward raised or returned something that is not finite; the message names it.
    """
    return collect_timed(envs, policy, plan, seed, tasks, group_ids, share_noise, log_prob_reduction)[0]


@torch.no_grad()
def collect_timed(
    envs: ARDragVectorEnv,
    policy: VideoPolicy,
    plan: Plan,
    seed: Seed,
    tasks: Sequence[Task] | Sequence[int] | None = None,
    group_ids: Sequence[int] | None = None,
    share_noise: bool = True,
    log_prob_reduction: Reduction = "mean",
) -> tuple[Rollout, Timings]:
    """`collect`, and where its time went."""
    schedule, batch = policy.schedule, envs.num_envs
    if plan.num_steps != schedule.num_steps:
        raise ValueError(f"the plan has {plan.num_steps} steps, the policy's schedule {schedule.num_steps}.")
    num_groups = 1 if tasks is None else len(tasks)
    ids = tuple(range(num_groups)) if group_ids is None else tuple(group_ids)
    if batch % num_groups or len(ids) != num_groups:
        raise ValueError(
            f"{batch} environments, {num_groups} tasks and {len(ids)} group ids: expected an id for each task, and a "
            "number of environments that the groups divide."
        )
    size = batch // num_groups
    seeds, generators = _randomness(seed, ids, size, share_noise)

    watch = _Watch()
    options = None
    if tasks is not None:
        kind = "task" if isinstance(tasks[0], Task) else "index"
        options = {kind: [task for task in tasks for _ in range(size)]}
    with watch.env():
        obs, _ = envs.reset(seed=seeds, options=options)
    start = _tensor(obs["latents"])  # (B, F, C, h, w), the noise of every frame
    frames, shape = start.shape[1], start.shape[2:]
    latents = start.new_empty(batch, frames, plan.num_steps + 1, *shape)
    latents[:, :, 0] = start
    log_probs = start.new_zeros(batch, frames, len(plan.scored))
    rewards = start.new_zeros(batch, frames)
    terms: dict[str, Tensor] = {}

    training = policy.training
    policy.eval()
    session = policy.session(batch)
    for m in range(frames):
        for n, kernel in enumerate(plan.kernels):
            with watch.policy():
                step = session.transition(obs, kernel)
                action = step.sample(generators)
                latents[:, m, n + 1] = action.cpu()
                if n in plan.scored:
                    log_probs[:, m, plan.scored.index(n)] = step.log_prob(action, log_prob_reduction).cpu()
            with watch.env():
                obs, reward, terminated, truncated, info = envs.step(latents[:, m, n + 1].numpy())
        rewards[:, m] = _tensor(reward)
        for name, values in _terms(info).items():
            terms.setdefault(name, torch.zeros_like(rewards))[:, m] = values
    if not terminated.all() or truncated.any():
        raise RuntimeError(f"an episode of {frames} frames of {plan.num_steps} steps did not end as expected.")
    policy.train(training)
    rollout = Rollout(
        trajectory=_tensor(obs["trajectory"]),
        reference=_tensor(obs["reference"]),
        text=_tensor(obs["text"]),
        image=_tensor(obs["image"]) if "image" in obs else None,
        latents=latents,
        plan=plan,
        schedule=schedule,
        log_probs=log_probs,
        rewards=rewards,
        reward_terms=terms,
        task_ids=tuple(str(i) for i in info["task"]),
        groups=torch.tensor(ids).repeat_interleave(size),
    )
    return rollout, watch.read()


def counted_frames(envs: ARDragVectorEnv) -> dict[str, Tensor]:
    """Reward name -> (B, F) bool: the frames of the running episodes that enter reported means.

    A latent frame counts where one of its pixel frames does.
    """
    controls = [task.control for task in envs.tasks]
    lengths = [1] + [envs.codec.temporal_stride] * (envs.num_frames - 1)
    return {
        term.reward.name: torch.stack([part.any(1) for part in term.reward.counted(controls).split(lengths, 1)], 1)
        for term in envs.rewards
    }


def _randomness(
    seed: Seed, ids: Sequence[int], size: int, share_noise: bool
) -> tuple[list[int], list[torch.Generator]]:
    """Reset seeds (B) and action generators (B) of `size` videos for each group."""
    key = [seed] if isinstance(seed, int) else list(seed)
    seeds, generators = [], []
    for g in ids:
        # children 0..size-1 draw actions, size..2 size-1 initial noise
        numbers = [int(c.generate_state(1)[0]) for c in np.random.SeedSequence([*key, g]).spawn(2 * size)]
        generators += [torch.Generator().manual_seed(number) for number in numbers[:size]]
        seeds += [numbers[size]] * size if share_noise else numbers[size:]
    return seeds, generators


def _terms(info: Mapping[str, Any]) -> dict[str, Tensor]:
    """The unweighted reward terms (B) of a frame's end, from a vector environment's info."""
    terms = info["reward_terms"]
    return {name: _tensor(values) for name, values in terms.items() if not name.startswith("_")}


def _tensor(array: Any) -> Tensor:
    return torch.tensor(np.asarray(array), dtype=torch.float32)


class _Watch:
    """Two stop watches."""

    def __init__(self) -> None:
        self._seconds = {"policy": 0.0, "env": 0.0}

    def policy(self) -> _Lap:
        return _Lap(self._seconds, "policy")

    def env(self) -> _Lap:
        return _Lap(self._seconds, "env")

    def read(self) -> Timings:
        return Timings(**self._seconds)


class _Lap:
    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._seconds[self._name] += time.perf_counter() - self._start
