"""Where rollouts run: in this process or on Ray actors, with the same numbers bit for bit.

The unit of work is one batch of groups, seeded by (seed, update, group id). What decides its numbers - how many groups
stand in a batch, how many threads multiply matrices - is in the configuration, and the same in both places.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ardrag_rl.envs import ARDragVectorEnv
from ardrag_rl.flow import Reduction
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.rewards import DynamicDegree, RewardError
from ardrag_rl.rollout import Plan, Rollout
from ardrag_rl.training.collect import Timings, collect_timed, counted_frames
from ardrag_rl.training.lora import load_trainable_state, trainable_state
from ardrag_rl.training.order import task_indices

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # per unit of work, before a dying worker is an error


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

    def make(self, num_envs: int) -> ARDragVectorEnv:
        """The vector environment."""
        return ARDragVectorEnv(num_envs, **{f.name: getattr(self, f.name) for f in fields(self)})


@dataclass(frozen=True)
class RolloutSettings:
    """What is the same for all units of a run; fields as in `GRPOConfig`."""

    num_generations: int
    share_noise: bool = True
    log_prob_reduction: Reduction = "mean"
    threads: int = 1
    bf16: bool = False
    skip_failures: bool = False


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
        with _threads(self._settings.threads):
            return [self.run_unit(unit, policy) for unit in units]

    def run_unit(self, unit: Unit, policy: VideoPolicy) -> UnitResult:
        """One unit. A failing reward drops its group, where the settings allow it, and no other."""
        try:
            return self._collect(unit, policy)
        except RewardError as error:
            if not self._settings.skip_failures:
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
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=s.bf16):
            rollout, timings = collect_timed(
                envs, policy, unit.plan, unit.seed, tasks, unit.group_ids, s.share_noise, s.log_prob_reduction
            )
        pixels = envs.codec.decode(rollout.clean[:: s.num_generations])
        degree = DynamicDegree()(pixels, [task.control for task in envs.tasks[:: s.num_generations]]).mean(1)
        return UnitResult(rollout, counted_frames(envs), degree, timings)


class RayRollouts:
    """Rollouts on `num_workers` Ray actors. One that dies is replaced, and its unit runs again."""

    def __init__(self, env: EnvSpec, settings: RolloutSettings, num_workers: int) -> None:
        self._env, self._settings, self._num_workers = env, settings, num_workers
        self._actors: list[Any] = []
        self._start: Callable[[], Any] | None = None
        self._version = 0

    def run(self, units: Sequence[Unit], policy: VideoPolicy) -> list[UnitResult]:
        """See `Rollouts`."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        if self._start is None:
            self._connect(policy)
        assert self._start is not None
        self._version += 1
        weights = ray.put({name: p.cpu().numpy() for name, p in trainable_state(policy).items()})
        results: dict[int, UnitResult] = {}
        attempts = [0] * len(units)
        todo, idle = list(range(len(units))), list(range(len(self._actors)))
        running: dict[Any, tuple[int, int]] = {}  # ref -> (unit, actor)
        while todo or running:
            while todo and idle:
                i, a = todo.pop(0), idle.pop(0)
                attempts[i] += 1
                running[self._actors[a].run.remote(units[i], self._version, weights)] = (i, a)
            (ready,), _ = ray.wait(list(running), num_returns=1)
            i, a = running.pop(ready)
            try:
                results[i] = _from_numpy(ray.get(ready))
            except RayTaskError as error:
                raise error.cause from error
            except RayActorError as error:
                if attempts[i] >= ATTEMPTS:
                    raise RuntimeError(
                        f"the rollout workers died {ATTEMPTS} times on the groups {units[i].group_ids}; the usual "
                        "cause is memory: lower groups_per_batch or rollout_workers."
                    ) from error
                logger.warning("a rollout worker died (%s); it is replaced and its groups run again.", error)
                self._actors[a] = self._start()
                todo.insert(0, i)
            idle.append(a)
        return [results[i] for i in range(len(units))]

    def close(self) -> None:
        """See `Rollouts`. The Ray runtime stays up: it may not be ours."""
        if self._actors:
            import ray

            for actor in self._actors:
                ray.kill(actor)
        self._actors, self._start = [], None

    def _connect(self, policy: VideoPolicy) -> None:
        import copy

        import ray

        if not ray.is_initialized():
            ray.init(num_cpus=self._num_workers, include_dashboard=False, log_to_driver=False)
        gpus = ray.cluster_resources().get("GPU", 0.0) if policy.device.type == "cuda" else 0.0
        # a learner sits on these devices too, so workers share them
        actor = ray.remote(num_cpus=1, num_gpus=min(1.0, gpus / self._num_workers))(_Worker)
        env = replace(self._env, device=_worker_device(gpus))
        frozen = ray.put(copy.deepcopy(policy).cpu())  # whole once; later only what training changes
        self._start = lambda: actor.remote(env, self._settings, frozen)
        self._actors = [self._start() for _ in range(self._num_workers)]


class _Worker:
    """The actor: a policy, loaded by version, and its environments."""

    def __init__(self, env: EnvSpec, settings: RolloutSettings, policy: VideoPolicy) -> None:
        self._policy = policy.to(env.device)
        self._rollouts = LocalRollouts(env, settings)
        self._version = -1

    def run(self, unit: Unit, version: int, weights: dict[str, np.ndarray]) -> UnitResult:
        """One unit under the weights of this version, its tensors as numpy arrays: they cross without a copy."""
        if version != self._version:
            load_trainable_state(self._policy, {name: torch.tensor(w) for name, w in weights.items()})
            self._version = version
        return _to_numpy(self._rollouts.run([unit], self._policy)[0])


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


def _worker_device(gpus: float) -> str:
    return "cuda" if gpus else "cpu"


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _to_numpy(result: UnitResult) -> UnitResult:
    return _convert(result, Tensor, lambda t: t.numpy())


def _from_numpy(result: UnitResult) -> UnitResult:
    # what Ray hands out is read-only, so it is copied once here
    return _convert(result, np.ndarray, lambda a: torch.from_numpy(a.copy()))


def _convert(value: Any, kind: type, fn: Callable[[Any], Any]) -> Any:
    """Applies fn to all arrays of this kind in a result and its rollout."""
    if isinstance(value, kind):
        return fn(value)
    if isinstance(value, dict):
        return {name: _convert(v, kind, fn) for name, v in value.items()}
    if isinstance(value, (UnitResult, Rollout)):
        return type(value)(**{f.name: _convert(getattr(value, f.name), kind, fn) for f in fields(value)})
    return value
