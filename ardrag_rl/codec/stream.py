"""Stream: the frames of a batch of videos coded as they come, and the state that takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """What a causal coder keeps of B videos between two frames. Its tensors are never written to, so copies share them.

    Attributes:
        frames: latent frames so far.
        features: (B, ...) each; layers without a memory have None or a mark of their own.
    """

    frames: int
    features: tuple[Tensor | str | None, ...] = ()

    def select(self, rows: Sequence[int]) -> State:
        """The state of these rows; of all in their order it is this one."""
        rows = list(rows)
        batch = next((len(f) for f in self.features if isinstance(f, Tensor)), None)
        if batch is None or rows == list(range(batch)):
            return self
        return replace(self, features=tuple(f[rows] if isinstance(f, Tensor) else f for f in self.features))

    @staticmethod
    def cat(states: Sequence[State]) -> State:
        """The rows of several states at one frame, one after another."""
        columns = zip(*(s.features for s in states), strict=True)
        joined = (torch.cat(c) if isinstance(c[0], Tensor) else c[0] for c in columns)  # type: ignore[arg-type]
        return replace(states[0], features=tuple(joined))


Code = Callable[[Tensor, State | None], tuple[Tensor, State]]


class Stream:
    """Codes the frames of B videos as they come.

    Args:
        code: (frame, state) -> (coded, next state); None is the state before the first frame.
        state: where it begins.
    """

    def __init__(
        self, code: Callable[[Tensor, State | None], tuple[Tensor, State]], state: State | None = None
    ) -> None:
        self._code, self._state = code, state

    def append(self, frame: Tensor) -> Tensor:
        """The next frame (B, ...), coded."""
        coded, self._state = self._code(frame, self._state)
        return coded

    def select(self, rows: Sequence[int]) -> Stream:
        """An independent stream that goes on with these rows of the batch."""
        return Stream(self._code, None if self._state is None else self._state.select(rows))
