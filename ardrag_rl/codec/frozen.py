"""FrozenModel: a model of which a codec needs an answer now and then."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


class FrozenModel:
    """A transformers model, never trained, that is loaded when its first answer is asked for.

    Args:
        model: the model, or the folder it is in.
        load: of a transformers class, `from_pretrained`.
        device: where it runs.
        dtype: of its weights; a given model keeps its own.
        offload: it waits in main memory, and is on the device during calls only.
    """

    def __init__(
        self,
        model: Any,
        load: Callable[..., Any],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        offload: bool = False,
    ) -> None:
        self.device, self.offload = device, offload
        self.folder = Path(model) if isinstance(model, str | Path) else None
        self._load, self._dtype = load, dtype
        self._model = None if self.folder else self._prepared(model)

    @property
    def model(self) -> Any:
        """The module, loaded now if it was not before."""
        if self._model is None:
            self._model = self._prepared(self._load(self.folder, dtype=self._dtype, use_safetensors=True))
        return self._model

    @property
    def config(self) -> Any:
        """transformers' config, without loading the weights."""
        if self.folder is None or self._model is not None:
            return self.model.config
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.folder)

    @contextlib.contextmanager
    def on_device(self) -> Iterator[Any]:
        """The module, ready to be called without gradient and in its own precision."""
        model = self.model.to(self.device)
        try:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                yield model
        finally:
            if self.offload:
                model.to("cpu")

    def _prepared(self, model: Any) -> Any:
        return model.eval().requires_grad_(False).to("cpu" if self.offload else self.device)
