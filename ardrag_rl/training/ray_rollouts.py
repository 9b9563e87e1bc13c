"""Rollouts on Ray actors: what dies, hangs or raises is replaced, and its groups run again with the same result."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from threading import Lock
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ardrag_rl.policies import VideoPolicy
from ardrag_rl.rewards import RewardError, RewardLeak
from ardrag_rl.rollout import Rollout
from ardrag_rl.training.collect import Timings
from ardrag_rl.training.lora import load_trainable_state, trainable_state
from ardrag_rl.training.workers import EnvSpec, LocalRollouts, RolloutSettings, Unit, UnitResult

logger = logging.getLogger(__name__)


class RolloutError(RuntimeError):
    """Groups that no actor brought to an end; the message names them and their tasks."""


START_ATTEMPTS = 3  # of an actor in a row; one that died since the last update needs the second
START_SECONDS = 600.0  # an actor may take to start: it imports torch and loads a policy


@dataclass(frozen=True)
class _Job:
    """What an actor does: a unit, or None while it starts; the seconds it may take, and the moment they are over."""

    unit: int | None
    actor: int
    seconds: float
    until: float


class RayRollouts:
    """Rollouts on Ray actors.

    A task is (unit, version, reference to the weights); an actor keeps nothing that its results depend on, so it does
    not matter which one runs what, when, or how often.

    Args:
        env: what the actors roll out in.
        settings: of the run.
        policy: the actors get a copy; later only what training changes.
        num_workers: actors of all learner processes together; each has its share.
        num_gpus: GPUs that are kept for the actors, the machine's last; 0: they share the learners'.

    Raises:
        ValueError: the learner processes do not divide the workers.
    """

    def __init__(
        self, env: EnvSpec, settings: RolloutSettings, policy: VideoPolicy, num_workers: int, num_gpus: int = 0
    ) -> None:
        processes = PartialState().num_processes
        if num_workers % processes:
            raise ValueError(
                f"rollout_workers={num_workers} for {processes} learner processes: it is their total; make it a "
                "multiple."
            )
        self._env, self._settings, self._num_workers, self._num_gpus = env, settings, num_workers, num_gpus
        self._frozen = copy.deepcopy(policy).cpu()  # now: once it is sharded it cannot be copied
        self._actors: list[Any] = []
        self._start: Callable[[], Any] | None = None
        self._version = 0
        self._thread, self._lock = ThreadPoolExecutor(1), Lock()

    def run(self, units: Sequence[Unit], policy: VideoPolicy) -> list[UnitResult]:
        """See `Rollouts`.

        Raises:
            RewardError: a reward failed.
            RolloutError: a unit failed as often as the settings allow.
        """
        return self._work(units, *self._put(policy, trainable_state(policy)))

    def start(
        self, units: Sequence[Unit], policy: VideoPolicy, weights: Mapping[str, Tensor]
    ) -> Future[list[UnitResult]]:
        """`run` under other weights than the policy's own, while the caller does something else; one at a time.

        Args:
            policy: of the same make, where the learner has it.
            weights: of `trainable_state`.
        """
        return self._thread.submit(self._work, units, *self._put(policy, weights))

    def _put(self, policy: VideoPolicy, weights: Mapping[str, Tensor]) -> tuple[int, Any]:
        """The weights' version and where they are."""
        if self._start is None:
            self._connect(policy)
        import ray  # after it is known how to connect

        self._version += 1
        return self._version, ray.put({name: value.cpu().numpy() for name, value in weights.items()})

    def _work(self, units: Sequence[Unit], version: int, weights: Any) -> list[UnitResult]:
        pool = self._actors
        try:
            return self._run(units, version, weights, pool)
        except BaseException:
            if pool is self._actors:
                self.close()  # what still runs must not delay what is asked next
            raise

    def _run(self, units: Sequence[Unit], version: int, weights: Any, pool: list[Any]) -> list[UnitResult]:
        results: dict[int, UnitResult] = {}
        todo, tries, idle = list(range(len(units))), Counter[tuple[str, int]](), list[int]()
        running = {actor.ready.remote(): self._job(None, a) for a, actor in enumerate(pool)}
        while len(results) < len(units):
            for job, outcome in _ended(running):
                if isinstance(outcome, Exception):
                    tried = ("start", job.actor) if job.unit is None else ("unit", job.unit)
                    tries[tried] += 1
                    left_out = self._failure(None if job.unit is None else units[job.unit], tries[tried], outcome)
                    if job.unit is not None and left_out is None:
                        todo.insert(0, job.unit)
                    elif job.unit is not None and left_out is not None:
                        results[job.unit] = left_out
                    running[self._replace(pool, job.actor).ready.remote()] = self._job(None, job.actor)
                    continue
                idle.append(job.actor)
                if job.unit is not None:
                    results[job.unit] = outcome
            while todo and idle:  # an actor has one unit at a time: there is no queue to overflow
                i, a = todo.pop(0), idle.pop(0)
                running[pool[a].run.remote(units[i], version, weights)] = self._job(i, a)
        return [results[i] for i in range(len(units))]

    def _replace(self, pool: list[Any], a: int) -> Any:
        """A new actor in the place of one.

        Raises:
            RuntimeError: the pool was closed meanwhile.
        """
        import ray

        with self._lock:
            if pool is not self._actors or self._start is None:
                raise RuntimeError("the rollouts were closed while they ran.")
            ray.kill(pool[a])
            pool[a] = self._start()
            return pool[a]

    def _job(self, unit: int | None, actor: int) -> _Job:
        seconds = START_SECONDS if unit is None else self._settings.timeout or float("inf")
        return _Job(unit, actor, seconds, time.monotonic() + seconds)

    def _failure(self, unit: Unit | None, tries: int, error: Exception) -> UnitResult | None:
        """None where it is tried again; the result of a unit that is given up, where these are skipped."""
        if isinstance(error, RewardError) and not isinstance(error, RewardLeak):
            raise error
        what = "it starts" if unit is None else f"groups {list(unit.group_ids)} of update {unit.seed[-1]} run"
        why = f"{type(error).__name__}: {error}"
        if tries < (START_ATTEMPTS if unit is None else self._settings.attempts):
            logger.warning("a rollout worker failed (%s); it is replaced and %s again.", why, what)
            return None
        if unit is None:
            raise RolloutError(f"a rollout worker failed to start {tries} times, the last time with {why}.") from error
        tasks = ", ".join(self._env.task_ids(unit.seed[0], unit.positions))
        message = (
            f"groups {list(unit.group_ids)} of update {unit.seed[-1]} (tasks {tasks}) failed {tries} times, the last "
            f"time with {why}. Where workers die, the usual cause is memory: lower groups_per_batch or rollout_workers."
        )
        if not self._settings.skip_failures:
            raise RolloutError(message) from error
        logger.warning("left out: %s", message)
        return UnitResult(None, {}, torch.zeros(0), Timings(), (message,) * len(unit.group_ids))

    def close(self) -> None:
        """See `Rollouts`. The Ray runtime stays up: it may not be ours."""
        with self._lock:
            actors, self._actors, self._start = self._actors, [], None
        self._thread.shutdown(wait=False, cancel_futures=True)  # what runs there sees that the pool is another
        self._thread = ThreadPoolExecutor(1)
        if actors:
            import ray

            for actor in actors:
                ray.kill(actor)

    def _connect(self, policy: VideoPolicy) -> None:
        join_ray(self._num_workers, self._num_gpus)
        import ray

        here = self._num_workers // PartialState().num_processes
        gpus = float(self._num_gpus)
        if not gpus and policy.device.type == "cuda":  # a learner sits on these devices too
            gpus = ray.cluster_resources().get("GPU", 0.0)
        actor = ray.remote(num_cpus=1, num_gpus=min(1.0, gpus / self._num_workers))(_Worker)
        env = replace(self._env, device="cuda" if gpus else "cpu")
        frozen = ray.put(self._frozen)
        self._start = lambda: actor.remote(env, self._settings, frozen)
        self._actors = [self._start() for _ in range(here)]


def join_ray(num_cpus: int, num_gpus: int = 0) -> None:
    """Connects all learner processes to one Ray: the one of RAY_ADDRESS, or one that the first of them starts here.

    Args:
        num_cpus: of the one that is started.
        num_gpus: that it has, the machine's last; 0: all.
    """
    state = PartialState()
    if not state.is_main_process:
        address, mode = broadcast_object_list([None, None])
        if mode is not None:
            os.environ["RAY_AUTH_MODE"] = mode  # Ray reads it when it is imported
        import ray

        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False)
        return
    import ray

    if not ray.is_initialized() and os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
    elif not ray.is_initialized():
        with _last_gpus(num_gpus):
            ray.init(num_cpus=num_cpus, num_gpus=num_gpus or None, include_dashboard=False, log_to_driver=False)
    if state.num_processes > 1:
        broadcast_object_list([ray.get_runtime_context().gcs_address, os.environ.get("RAY_AUTH_MODE")])


@contextlib.contextmanager
def _last_gpus(count: int) -> Iterator[None]:
    """What starts within sees these devices only."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if count:
        devices = before.split(",") if before else [str(i) for i in range(torch.cuda.device_count())]
        if len(devices) <= count:
            raise ValueError(f"rollout_gpus={count} of {len(devices)} GPUs: expected to leave some for the learner.")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices[-count:])
    try:
        yield
    finally:
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        elif count:
            del os.environ["CUDA_VISIBLE_DEVICES"]


def _ended(running: dict[Any, _Job]) -> Iterator[tuple[_Job, Any]]:
    """Waits for at least one job and takes out those that ended or ran out of time, with result or exception."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    first = min(job.until for job in running.values()) - time.monotonic()
    ready, _ = ray.wait(list(running), num_returns=1, timeout=None if first == float("inf") else max(0.0, first))
    for ref in ready:
        job = running.pop(ref)
        try:
            outcome = ray.get(ref)
        except RayTaskError as error:
            outcome = error.cause if isinstance(error.cause, Exception) else error
        except RayError as error:
            outcome = error
        yield job, _from_numpy(outcome)
    if not ready:
        now = time.monotonic()
        for ref in [ref for ref, job in running.items() if job.until <= now]:
            job = running.pop(ref)
            yield job, TimeoutError(f"no answer within {job.seconds:g} seconds")


class _Worker:
    """The actor: a policy, loaded by version, and its environments."""

    def __init__(self, env: EnvSpec, settings: RolloutSettings, policy: VideoPolicy) -> None:
        self._policy = policy.to(env.device)
        self._rollouts = LocalRollouts(env, settings)
        self._version = -1

    def ready(self) -> None:
        """It has started."""

    def run(self, unit: Unit, version: int, weights: dict[str, np.ndarray]) -> UnitResult:
        """One unit under the weights of this version, its tensors as numpy arrays: they cross without a copy."""
        if version != self._version:
            load_trainable_state(self._policy, {name: torch.tensor(w) for name, w in weights.items()})
            self._version = version
        return _to_numpy(self._rollouts.run([unit], self._policy)[0])


def _to_numpy(result: UnitResult) -> UnitResult:
    return _convert(result, Tensor, lambda t: t.numpy())


def _from_numpy(result: Any) -> Any:
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
