"""Caching strategies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ardrag_rl.policies.cache import Cache, RollingCache, SinkCache
from ardrag_rl.policies.deep_cache import DeepSinkCache
from ardrag_rl.policies.quantised_cache import QuantisedCache
from ardrag_rl.policies.relative_cache import EmaSinkCache, RelativeCache
from ardrag_rl.policies.static_cache import StaticCache
from ardrag_rl.policies.tether_cache import TetherCache

Strategy = str | Mapping[str, Any] | Cache

STRATEGIES: dict[str, Callable[..., Cache]] = {
    "rolling": RollingCache,
    "sink": SinkCache,
    "static": StaticCache,
    "relative": RelativeCache,
    "ema": EmaSinkCache,
    "deep": DeepSinkCache.scaled,
    "tether": TetherCache.scaled,
    "int8": partial(QuantisedCache, kind="int8"),
    "fp8": partial(QuantisedCache, kind="fp8"),
}


def make_cache(strategy: Strategy, window: int) -> Cache:
    """An empty cache.

    Args:
        strategy: a name of `STRATEGIES`, a mapping of "name" and the strategy's own arguments such as
            {"name": "sink", "sink": 3}, or an empty cache.
        window: clean frames that a chunk can look back on.

    Raises:
        ValueError: the name or an argument is unknown, or a value is out of range.
    """
    if not isinstance(strategy, (str, Mapping)):
        return strategy
    options = {"name": strategy} if isinstance(strategy, str) else dict(strategy)
    name = options.pop("name", None)
    if name not in STRATEGIES:
        raise ValueError(f"cache={strategy!r} is unknown: expected a name of {', '.join(STRATEGIES)}.")
    try:
        return STRATEGIES[name](window=window, **options)
    except TypeError as error:
        raise ValueError(f"cache={strategy!r} has an argument that {name!r} does not take: {error}") from error
