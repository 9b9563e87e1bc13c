"""Limits: what one reward may take of time and memory before it is an error with its name."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import psutil

from ardrag_rl.rewards.error import RewardError, RewardLeak

WARM_UP = 3  # calls of a reward before its memory counts: it loads its models in the first


@dataclass(frozen=True)
class Limits:
    """Of every reward.

    Attributes:
        seconds: one call may take. It is interrupted only where Python runs in between, in a process's main thread: a
            reward that waits for an answer is, one that is stuck in C is not.
        mebibytes: all calls together may take and not give back, by the process's resident memory.
    """

    seconds: float | None = None
    mebibytes: float | None = None


NONE = Limits()
_limits: ContextVar[Limits] = ContextVar("limits", default=NONE)
_calls: dict[str, int] = defaultdict(int)
_kept: dict[str, int] = defaultdict(int)  # bytes
_active: set[str] = set()  # a session asks its reward: one call


@contextlib.contextmanager
def reward_limits(limits: Limits) -> Iterator[None]:
    """Sets the limits of the rewards that are called within."""
    token = _limits.set(limits)
    try:
        yield
    finally:
        _limits.reset(token)


@contextlib.contextmanager
def watched(name: str) -> Iterator[None]:
    """Around one call of the reward `name`.

    Raises:
        RewardError: it took too long.
        RewardLeak: it keeps too much memory.
    """
    limits = _limits.get()
    if name in _active:
        yield
        return
    _active.add(name)
    before = _resident(limits)
    try:
        with _alarm(name, limits.seconds):
            yield
    finally:
        _active.discard(name)
    grown = _resident(limits) - before
    _calls[name] += 1
    if limits.mebibytes is None or _calls[name] <= WARM_UP:
        return
    _kept[name] = max(0, _kept[name] + grown)
    if _kept[name] > limits.mebibytes * 2**20:
        kept, calls = _kept.pop(name) / 2**20, _calls.pop(name) - WARM_UP
        raise RewardLeak(
            f"reward {name!r} has taken {kept:.0f} MiB in {calls} calls and not given them back, more than "
            f"reward_memory={limits.mebibytes:.0f}: it keeps something of every call."
        )


def _resident(limits: Limits) -> int:
    return psutil.Process().memory_info().rss if limits.mebibytes is not None else 0


@contextlib.contextmanager
def _alarm(name: str, seconds: float | None) -> Iterator[None]:
    if seconds is None or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(*_: object) -> None:
        raise RewardError(f"reward {name!r} did not answer within reward_timeout={seconds:g} seconds.")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
