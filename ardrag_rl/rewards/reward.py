"""Reward: video in, a number per frame out; and the session that asks for it frame by frame."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ardrag_rl.control import Control
from ardrag_rl.rewards.error import RewardError
from ardrag_rl.rewards.limits import watched


class RewardSession(Protocol):
    """One reward along B running videos. Sessions never change what an earlier `select` returned."""

    def append(self, frames: Tensor) -> Tensor:
        """The scores (B, t) of t new frames (B, t, 3, H, W) in [0, 1]."""
        ...

    def select(self, rows: Sequence[int]) -> RewardSession:
        """An independent session of these rows; all rows is a copy."""
        ...


class Reward(ABC):
    """Scores each pixel frame of a video.

    A plugin needs `__call__` only. Load models in the first call, not in the constructor: Gymnasium deep-copies
    what an environment is made from.

    Attributes:
        name: what the reward is called in specifications, logs and errors.
        causal: entry t looks at frames <= t only. A reward that needs the whole video sets this to False: it has no
            session, and the environment calls it once at the end of the episode, on all frames, and pays it there.
        memory: how many earlier frames an entry looks at; None is all of them. The default session buffers that
            many, so a small memory makes the cost per frame constant. A reward with a memory sees a window of the
            video and must not read time-dependent parts of the controls.
    """

    name: str = ""
    causal: bool = True
    memory: int | None = None

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__dict__.get("name"):
            cls.name = cls.__name__.lower()

    @abstractmethod
    def __call__(self, video: Tensor, controls: Sequence[Control]) -> Tensor:
        """The scores of B videos.

        Args:
            video: (B, T, 3, H, W) in [0, 1]; T may be less than the controls' frames: the first T of them.
            controls: B of them.

        Returns:
            (B, T) float32, finite.
        """

    def start(self, controls: Sequence[Control]) -> RewardSession:
        """A session for B new videos. The default buffers frames and calls the reward again."""
        return BufferedSession(self, controls)

    def counted(self, controls: Sequence[Control]) -> Tensor:
        """(B, T) bool, T of the controls: the frames that enter reported means. All, unless a reward says otherwise."""
        return torch.ones(len(controls), controls[0].num_frames, dtype=torch.bool)


class BufferedSession:
    """The session that any causal reward has: keeps the frames it needs and scores them with the new ones.

    Args:
        reward: asked with the kept and the new frames; its `memory` says how many are kept.
        controls: B of them.
        frames: the frames so far, (B, t_i, 3, H, W) each; never written to.

    Raises:
        ValueError: the reward is not causal.
    """

    def __init__(self, reward: Reward, controls: Sequence[Control], frames: tuple[Tensor, ...] = ()) -> None:
        if not reward.causal:
            raise ValueError(
                f"reward {reward.name!r} is not causal and has no session: call it once, on the whole video."
            )
        self._reward, self._controls, self._frames = reward, tuple(controls), frames

    def append(self, frames: Tensor) -> Tensor:
        """The scores (B, t) of t new frames (B, t, 3, H, W)."""
        kept = torch.cat((*self._frames, frames), dim=1)
        scores = check_scores(self._reward, lambda: self._reward(kept, self._controls), kept.shape[:2])
        memory = self._reward.memory
        # a copy: a view would hold on to all of them
        last = None if memory is None else kept[:, max(kept.shape[1] - memory, 0) :].clone()
        self._frames = (*self._frames, frames) if last is None else (last,)
        return scores[:, -frames.shape[1] :]

    def select(self, rows: Sequence[int]) -> BufferedSession:
        """An independent session of these rows."""
        index = list(rows)
        frames = tuple(f[index] for f in self._frames)
        return BufferedSession(self._reward, [self._controls[i] for i in index], frames)


def check_scores(reward: Reward, scores: Tensor | Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
    """What a reward returned, as float32 on the CPU, if it is usable.

    Args:
        reward: named in errors.
        scores: what it returned, or a function that asks it, so that what it raises is named too.
        shape: what was wanted, say (B, T).

    Raises:
        RewardError: the reward raised, passed a limit, or returned no tensor, the wrong shape, NaN or infinity.
    """
    if callable(scores):
        try:
            with watched(reward.name):
                scores = scores()
        except RewardError:
            raise
        except Exception as error:
            raise RewardError(f"reward {reward.name!r} raised {type(error).__name__}: {error}") from error
    if not isinstance(scores, Tensor):
        wanted = f"expected a tensor of shape {tuple(shape)}, a score for every video and frame"
        raise RewardError(f"reward {reward.name!r} returned a {type(scores).__name__}: {wanted}.")
    if tuple(scores.shape) != tuple(shape):
        raise RewardError(
            f"reward {reward.name!r} returned the shape {tuple(scores.shape)}: expected {tuple(shape)}, "
            "a score for every video and frame."
        )
    scores = scores.detach().to("cpu", torch.float32)
    bad = ~torch.isfinite(scores)
    if bad.any():
        first = bad.nonzero()[0].tolist()
        raise RewardError(
            f"reward {reward.name!r} returned {float(scores[tuple(first)])} at {first} (video, frame), one of "
            f"{int(bad.sum())} non-finite scores: a reward must be finite; give 0 where there is nothing to score."
        )
    return scores
