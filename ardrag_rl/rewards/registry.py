"""Rewards by name: a decorator, an entry-point group, and the weighted tuple an environment is made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from ardrag_rl.rewards.reward import Reward

GROUP = "ardrag_rl.rewards"
DEFAULT = {"aesthetic": 1.0, "motion": 1.0}

Factory = TypeVar("Factory", bound=Callable[[], Reward])
_registered: dict[str, Callable[[], Reward]] = {}


@dataclass(frozen=True)
class WeightedReward:
    """A term of the environment's reward: `weight * reward`. Weight 0 is logged and not paid."""

    reward: Reward
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The reward's name."""
        return self.reward.name


def register_reward(name: str) -> Callable[[Factory], Factory]:
    """Decorates a `Reward` class, or a function without arguments that returns one, to be asked for by `name`.

    A package registers for all its users with the entry point `name = "package.module:Class"` in the group
    "ardrag_rl.rewards". A class keeps `name` as its own.

    Raises:
        ValueError: the name is taken by something else.
    """

    def register(factory: Factory) -> Factory:
        other = _registered.get(name)
        # the same definition run again, as in a notebook, replaces itself
        if other is not None and _source(other) != _source(factory):
            raise ValueError(f"reward {name!r} is registered already, by {_source(other)}; choose another name.")
        if isinstance(factory, type):
            factory.name = name  # type: ignore[attr-defined]
        _registered[name] = factory
        return factory

    return register


def reward_names() -> tuple[str, ...]:
    """All names that `make_rewards` knows."""
    return tuple(sorted({*_registered, *_installed()}))


def make_rewards(
    spec: Mapping[str, float] | Sequence[str | Reward | WeightedReward] | None = None,
) -> tuple[WeightedReward, ...]:
    """The weighted rewards of an environment.

    Args:
        spec: weights by name; or names, `Reward` objects and `WeightedReward`s; None is aesthetic and motion, 1 each.

    Raises:
        ValueError: a name is unknown or given twice, a weight is not finite, or nothing is given.
        TypeError: an entry is neither a name nor a reward, or a weight is not a number.
    """
    if spec is None:
        spec = DEFAULT
    if isinstance(spec, str | Reward | WeightedReward) or not isinstance(spec, Mapping | Sequence):
        raise TypeError(f"rewards={spec!r}: expected weights by name, or a list, such as ['motion'].")
    entries = [_weigh(entry, 1.0) for entry in spec] if not isinstance(spec, Mapping) else []
    if isinstance(spec, Mapping):
        entries = [_weigh(name, weight) for name, weight in spec.items()]
    if not entries:
        raise ValueError("no rewards are given; for the defaults pass None.")
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"reward {name!r} is given twice; set the attribute `name` of one of them to another.")
    return tuple(entries)


def _weigh(entry: str | Reward | WeightedReward, weight: float) -> WeightedReward:
    if isinstance(entry, WeightedReward):
        return _weigh(entry.reward, entry.weight)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise TypeError(f"weight {weight!r} of reward {entry!r}: expected a number.")
    if not math.isfinite(weight):
        raise ValueError(f"weight {weight} of reward {entry!r}: expected a finite number.")
    if isinstance(entry, str):
        entry = _make(entry)
    if not isinstance(entry, Reward):
        hint = f"; make an object of it: {entry.__name__}()" if isinstance(entry, type) else ""
        raise TypeError(f"reward {entry!r} is a {type(entry).__name__}: expected a name or a Reward{hint}.")
    return WeightedReward(entry, float(weight))


def _make(name: str) -> Reward:
    factory = _registered.get(name)
    if factory is None:
        point = _installed().get(name)
        if point is None:
            raise ValueError(f"reward {name!r} is unknown; choose one of {', '.join(reward_names())}.")
        factory = point.load()
    reward = factory()
    if not isinstance(reward, Reward):
        raise TypeError(f"reward {name!r} made a {type(reward).__name__}: expected a Reward ({_source(factory)}).")
    reward.name = name  # a factory may be known by another name than the class it makes
    return reward


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _source(factory: Callable[[], Reward]) -> str:
    return f"{factory.__module__}.{getattr(factory, '__qualname__', factory)}"
