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


@dataclass(frozen=True)
class Limits:
    """Of every reward.

    Attributes:
        seconds: one call may take. It is interrupted only where Python runs in between, in a process's main thread: a
            reward that waits for an answer is, one that is stuck in C is not.
        mebibytes: its calls may add to the process's resident memory, from one rollout to the next.
    """

    seconds: float | None = None
    mebibytes: float | None = None


NONE = Limits()
_limits: ContextVar[Limits] = ContextVar("limits", default=NONE)
_grown: dict[str, int] = defaultdict(int)  # bytes that each reward's calls added
_active: set[str] = set()  # a session asks its reward: one call
_baseline: list[int] = []  # resident bytes after the first rollout, in which models are loaded


@contextlib.contextmanager
def reward_limits(limits: Limits) -> Iterator[None]:
    """Sets the limits of the rewards that are called within, one rollout.

    What a running video keeps is given back with the next one, so memory is compared between ends of rollouts; which
    reward took it is seen in its calls.

    Raises:
        RewardLeak: memory has grown by more than the limit since the first rollout, and so has a reward's part.
    """
    token = _limits.set(limits)
    try:
        yield
    finally:
        _limits.reset(token)
    if limits.mebibytes is None:
        return
    now, allowed = psutil.Process().memory_info().rss, limits.mebibytes * 2**20
    if not _baseline:
        _baseline.append(now)
        _grown.clear()
    elif _grown and now - _baseline[0] > allowed:
        name, grown = max(_grown.items(), key=lambda item: item[1])
        if grown > allowed:
            _baseline.clear()
            raise RewardLeak(
                f"reward {name!r} has taken {grown / 2**20:.0f} MiB and not given them back, more than "
                f"reward_memory={limits.mebibytes:.0f}: it keeps something of every call."
            )


@contextlib.contextmanager
def watched(name: str) -> Iterator[None]:
    """Around one call of the reward `name`.

    Raises:
        RewardError: it took too long.
    """
    limits = _limits.get()
    if name in _active:
        yield
        return
    _active.add(name)
    before = _resident(limits)
    try:
        with _alarm(limits.seconds):
            yield
    except _Overdue as late:
        raise RewardError(f"reward {name!r} did not answer within reward_timeout={limits.seconds:g} seconds.") from late
    finally:
        _active.discard(name)
        _grown[name] += _resident(limits) - before


def _resident(limits: Limits) -> int:
    return psutil.Process().memory_info().rss if limits.mebibytes is not None else 0


class _Overdue(BaseException):
    """No Exception: a reward that catches these to try again would catch it too."""


@contextlib.contextmanager
def _alarm(seconds: float | None) -> Iterator[None]:
    if seconds is None or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(*_: object) -> None:
        raise _Overdue

    handler = signal.signal(signal.SIGALRM, ring)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # somebody else's
