"""Ahead: generations that are rolled out while the learner updates, with the weights that it had before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ardrag_rl.policies import VideoPolicy
from ardrag_rl.training.lora import trainable_state
from ardrag_rl.training.workers import Rollouts, Unit, UnitResult


class Startable(Rollouts, Protocol):
    """Rollouts that run beside their caller."""

    def start(
        self, units: Sequence[Unit], policy: VideoPolicy, weights: Mapping[str, Tensor]
    ) -> Future[list[UnitResult]]:
        """See `RayRollouts.start`."""
        ...


@dataclass(frozen=True)
class _Pending:
    generation: int
    future: Future[list[UnitResult]]
    weights: dict[str, Tensor]


class Ahead:
    """At most one generation is under way while another is trained on, so that nothing queues up.

    A generation that was started ahead is one update old: its videos are of the policy before that update, and so are
    the log-probabilities on record, against which the learner's ratio is taken.

    Args:
        rollouts: where generations run.
        units: of a generation.
        last: the last generation, which none follows.
    """

    def __init__(self, rollouts: Startable, units: Callable[[int], Sequence[Unit]], last: int) -> None:
        self._rollouts, self._units, self._last = rollouts, units, last
        self._pending: _Pending | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        """With which the generation under way is rolled out; a checkpoint needs them. Empty where none is."""
        return {} if self._pending is None else self._pending.weights

    def take(self, generation: int, policy: VideoPolicy) -> tuple[list[UnitResult], int]:
        """The results of a generation and how many updates old they are; the next generation is started."""
        if self._pending is None:
            results, age = self._rollouts.run(self._units(generation), policy), 0
        else:
            assert self._pending.generation == generation, "generations are taken in order"
            results, age = self._pending.future.result(), 1  # where it raises, its weights are still known
            self._pending = None
        weights = {name: w.to("cpu", copy=True) for name, w in trainable_state(policy).items()}
        self.begin(generation + 1, policy, weights)
        return results, age

    def begin(self, generation: int, policy: VideoPolicy, weights: dict[str, Tensor]) -> None:
        """Starts a generation with these weights, where the run has one more."""
        if generation <= self._last:
            future = self._rollouts.start(self._units(generation), policy, weights)
            self._pending = _Pending(generation, future, weights)
