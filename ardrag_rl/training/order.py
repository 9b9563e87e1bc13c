"""Which tasks an update takes: a function of (seed, position) only, so that resuming needs no state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHUFFLED = 2**16  # sources up to this length are dealt completely before a task comes again


def task_indices(length: int, seed: int, positions: Sequence[int]) -> tuple[int, ...]:
    """The tasks at these positions of an endless order.

    Args:
        length: of the task source. One of up to 65,536 tasks is dealt in a new permutation each time round; from a
            longer one every position draws.
        seed: another seed is another order.
        positions: 0 or more.
    """
    if length > SHUFFLED:
        return tuple(int(np.random.default_rng([seed, p]).integers(length)) for p in positions)
    rounds = {r: np.random.default_rng([seed, r]).permutation(length) for r in {p // length for p in positions}}
    return tuple(int(rounds[p // length][p % length]) for p in positions)
