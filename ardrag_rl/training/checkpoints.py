"""Checkpoints of a Trainer run: the last that was written to its end, and room for the next."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of a run, or None.

    The Trainer writes `trainer_state.json` last: a folder without it is of a save that was interrupted.
    """
    whole = [f.parent for f in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def check_room(folder: str | Path, size: int) -> None:
    """Sees that a checkpoint of `size` bytes fits, before anything of it is written.

    Raises:
        OSError: ENOSPC, the disk has less room.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint takes {size / 2**20:.0f} MiB and the disk has {free / 2**20:.0f} MiB left: nothing was "
            "written, earlier checkpoints are whole. Make room, or lower save_total_limit",
            str(folder),
        )
