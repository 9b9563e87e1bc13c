"""Task: one thing to generate, and the protocol of what gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ardrag_rl.control import Control


@dataclass(frozen=True)
class Task:
    """One video to generate.

    Attributes:
        id: names the task in `info["task"]`, logs and reports.
        control: its T pixel frames and its image's resolution are fitted to the environment's.
    """

    id: str
    control: Control


@runtime_checkable
class TaskSource(Protocol):
    """A sequence of tasks. `num_frames`, `height` and `width` say what the source would have by itself."""

    num_frames: int  # latent frames
    height: int
    width: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Task: ...
