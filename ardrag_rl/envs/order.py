"""TaskOrder: in which order an environment deals the tasks of a source, and with which noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ardrag_rl.envs.task import Task, TaskSource

SHUFFLED = 2**16  # sources up to this length are dealt without repetition


@dataclass
class TaskOrder:
    """The order of one environment, from its own random numbers.

    A source of up to 65,536 tasks is shuffled and dealt completely before any task comes again; a longer one is drawn
    from.

    Args:
        source: what to deal.
        rng: of the environment; a new seed is a new rng and a new order.
    """

    source: TaskSource
    rng: np.random.Generator
    _left: list[int] = field(default_factory=list)

    def noise_seed(self) -> int:
        """The seed of an episode's noise. Drawn before the task, so that a given task does not change the noise."""
        return int(self.rng.integers(2**63))

    def next(self) -> int:
        """The index of the next task."""
        count = len(self.source)
        if count > SHUFFLED:
            return int(self.rng.integers(count))
        if not self._left:
            self._left = self.rng.permutation(count).tolist()
        return self._left.pop()


def chosen(options: dict[str, Any] | None, extra: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """(`task`, `index`) of reset options; at most one is not None.

    Raises:
        ValueError: an option is unknown, or both are given.
    """
    options = options or {}
    known = ("task", "index", *extra)
    unknown = [k for k in options if k not in known]
    if unknown:
        raise ValueError(f"the reset option {unknown[0]!r} is unknown; choose of {', '.join(known)}.")
    task, index = options.get("task"), options.get("index")
    if task is not None and index is not None:
        raise ValueError("the reset options 'task' and 'index' are both given; give one.")
    return task, index


def checked_index(index: Any, source: TaskSource) -> int:
    """An index into the source.

    Raises:
        ValueError: not an integer, or outside the source.
    """
    if isinstance(index, bool) or not isinstance(index, (int, np.integer)):
        raise ValueError(f"the reset option index={index!r}: expected an integer.")
    if not 0 <= index < len(source):
        raise ValueError(f"the reset option index={index}: the source has the tasks 0..{len(source) - 1}.")
    return int(index)


def checked_task(task: Any) -> Task:
    """A Task.

    Raises:
        ValueError: something else.
    """
    if not isinstance(task, Task):
        raise ValueError(f"the reset option 'task' is a {type(task).__name__}: expected an ardrag_rl.envs.Task.")
    return task
