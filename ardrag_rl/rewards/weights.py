"""Weights: tensors from a file that the user brings, read as data only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ardrag_rl.hub import local_file


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a state dict saved by torch, also of one below the key `model`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    path = local_file(file)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{file} does not load as weights ({type(error).__name__}): expected .safetensors, or a state dict by "
            "torch.save; nothing else that a pickle or torchscript may hold is read."
        ) from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} holds a {type(state).__name__}: expected a state dict, tensors by name.")
    return state


def load_weights(module: nn.Module, file: str | Path, state: dict[str, Tensor] | None = None) -> None:
    """Fills a module from a file; `state` if it has been read already.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: keys are missing or unexpected, or shapes differ; the message lists them.
    """
    try:
        module.load_state_dict(read_weights(file) if state is None else state)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit: {error}") from error
