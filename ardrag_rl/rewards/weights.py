"""Weights: modules filled from files that the user brings."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from ardrag_rl.hub import read_weights


def load_weights(module: nn.Module, file: str | Path, state: dict[str, Tensor] | None = None) -> None:
    """Fills a module from a file; `state` if it has been read already.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: keys are missing or unexpected, or shapes differ; the message lists them.
    """
    try:
        module.load_state_dict(read_weights(file, ("model",)) if state is None else state)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit: {error}") from error
