"""What is rolled out at a time, and where: here in this process, in `ray_rollouts` on actors, with the same numbers.

The unit of work is one batch of groups, seeded by (seed, update, group id). What decides its numbers - how many groups
stand in a batch, how many threads multiply matrices - is in the configuration, and the same in both places.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ardrag_rl.envs import ARDragVectorEnv
from ardrag_rl.envs.tasks import make_tasks
from ardrag_rl.flow import Reduction
from ardrag_rl.hub import pipeline_path, pipeline_size
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.rewards import DynamicDegree, Limits, RewardError, RewardLeak, reward_limits
from ardrag_rl.rewards.limits import NONE
from ardrag_rl.rollout import Plan, Rollout
from ardrag_rl.training.collect import Timings, collect_timed, counted_frames
from ardrag_rl.training.order import task_indices
from ardrag_rl.training.sharded import unsharded

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EnvSpec:
    """What `gym.make_vec("ARDrag-v0", ...)` takes, to make environments in another process."""

    pipeline: Any
    tasks: Any
    rewards: Any
    num_frames: int | None
    height: int | None
    width: int | None
    device: str = "cpu"
    codec_settings: Any = None

    def task_ids(self, seed: int, positions: Sequence[int]) -> tuple[str, ...]:
        """The names of the tasks at these places of a run's order."""
        size = pipeline_size(pipeline_path(self.pipeline), self.height, self.width)
        source = make_tasks(self.tasks, self.num_frames, *size)
        return tuple(source[i].id for i in task_indices(len(source), seed, positions))

    def make(self, num_envs: int) -> ARDragVectorEnv:
        """The vector environment."""
        return ARDragVectorEnv(num_envs, **{f.name: getattr(self, f.name) for f in fields(self)})


@dataclass(frozen=True)
class RolloutSettings:
    """What is the same for all units of a run.

    Attributes:
        skip_failures: go on without a group that fails, in place of raising.
        dtype: of the policy's matrix products; float32 is no mixed precision.
        limits: of rewards.
        timeout, attempts: of a unit on an actor: seconds it may take, and how often it is tried.
        others: as in `GRPOConfig`.
    """

    num_generations: int
    share_noise: bool = True
    log_prob_reduction: Reduction = "mean"
    threads: int = 1
    dtype: torch.dtype = torch.float32
    skip_failures: bool = False
    limits: Limits = NONE
    timeout: float | None = None
    attempts: int = 3


@dataclass(frozen=True)
class Unit:
    """One batch of groups to roll out.

    Attributes:
        seed: (seed, update).
        plan: the kernels.
        group_ids: the groups' numbers in the update.
        positions: the place of each group's task in the run's order of tasks.
    """

    seed: tuple[int, ...]
    plan: Plan
    group_ids: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class UnitResult:
    """What came of a unit.

    Attributes:
        rollout: None where every group failed.
        counted: reward name -> (B, F) bool, the frames that enter reported means.
        dynamic_degree: of the first video of each group, which is enough to see a policy stop moving and costs little.
        timings: seconds.
        failures: what the rewards of dropped groups said.
    """

    rollout: Rollout | None
    counted: dict[str, Tensor]
    dynamic_degree: Tensor
    timings: Timings
    failures: tuple[str, ...] = ()


class Rollouts(Protocol):
    """A place where units run."""

    def run(self, units: Sequence[Unit], policy: VideoPolicy) -> list[UnitResult]:
        """The results in the order of the units, under the policy's present weights."""
        ...

    def close(self) -> None:
        """Gives the resources back; running again starts anew."""
        ...


class LocalRollouts:
    """Rollouts in this process, one unit after another."""

    def __init__(self, env: EnvSpec, settings: RolloutSettings) -> None:
        self._env, self._settings = env, settings
        self._envs: dict[int, ARDragVectorEnv] = {}

    def run(self, units: Sequence[Unit], policy: VideoPolicy) -> list[UnitResult]:
        """See `Rollouts`."""
        with _threads(self._settings.threads), unsharded(policy):
            return [self.run_unit(unit, policy) for unit in units]

    def run_unit(self, unit: Unit, policy: VideoPolicy) -> UnitResult:
        """One unit. A failing reward drops its group, where the settings allow it, and no other."""
        try:
            with reward_limits(self._settings.limits):
                return self._collect(unit, policy)
        except RewardError as error:
            if not self._settings.skip_failures or isinstance(error, RewardLeak):  # it would go on in this process
                raise
            if len(unit.group_ids) == 1:
                logger.warning("group %d of %s is left out: %s", unit.group_ids[0], unit.seed, error)
                return UnitResult(None, {}, torch.zeros(0), Timings(), (str(error),))
        pairs = zip(unit.group_ids, unit.positions, strict=True)
        alone = [replace(unit, group_ids=(g,), positions=(p,)) for g, p in pairs]
        return join_results([self.run_unit(part, policy) for part in alone])

    def close(self) -> None:
        """See `Rollouts`."""
        self._envs.clear()

    def _collect(self, unit: Unit, policy: VideoPolicy) -> UnitResult:
        s = self._settings
        num_envs = len(unit.group_ids) * s.num_generations
        if num_envs not in self._envs:
            self._envs[num_envs] = self._env.make(num_envs)
        envs = self._envs[num_envs]
        tasks = task_indices(len(envs.source), unit.seed[0], unit.positions)
        with torch.autocast(policy.device.type, s.dtype, enabled=s.dtype != torch.float32):
            rollout, timings = collect_timed(
                envs, policy, unit.plan, unit.seed, tasks, unit.group_ids, s.share_noise, s.log_prob_reduction
            )
        pixels = envs.codec.decode(rollout.clean[:: s.num_generations])
        degree = DynamicDegree()(pixels, [task.control for task in envs.tasks[:: s.num_generations]]).mean(1)
        return UnitResult(rollout, counted_frames(envs), degree, timings)


def join_results(results: Sequence[UnitResult]) -> UnitResult:
    """Several results as one; what failed leaves its message."""
    good = [r for r in results if r.rollout is not None]
    return UnitResult(
        rollout=Rollout.cat([r.rollout for r in good if r.rollout is not None]) if good else None,
        counted={name: torch.cat([r.counted[name] for r in good]) for name in (good[0].counted if good else {})},
        dynamic_degree=torch.cat([r.dynamic_degree for r in results]),
        timings=sum((r.timings for r in results), Timings()),
        failures=tuple(f for r in results for f in r.failures),
    )


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
