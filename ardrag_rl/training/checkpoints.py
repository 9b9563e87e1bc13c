"""Checkpoints of a Trainer run: the last that was written to its end."""

from __future__ import annotations

from pathlib import Path


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of a run, or None.

    The Trainer writes `trainer_state.json` last: a folder without it is of a save that was interrupted.
    """
    whole = [f.parent for f in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda p: int(p.name.rpartition("-")[2]), default=None)
