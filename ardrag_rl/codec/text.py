"""TextEncoder: prompts to embeddings, which can be kept on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ardrag_rl.codec.frozen import FrozenModel

logger = logging.getLogger(__name__)

DEFAULT_LENGTH = 512  # Wan's, for tokenizers that name no limit of their own
BLOCK, BLOCKS = 2**20, 64  # what is read of a large file to know it again


class TextEncoder:
    """A transformers encoder with `last_hidden_state`, such as Wan's UMT5, and its tokenizer.

    Args:
        encoder: the model.
        tokenizer: its `model_max_length` is L.
        cache: where embeddings are kept; None for nowhere.
    """

    def __init__(self, encoder: FrozenModel, tokenizer: Any, cache: PromptCache | None = None) -> None:
        self.encoder, self.tokenizer, self.cache = encoder, tokenizer, cache

    @property
    def shape(self) -> tuple[int, int]:
        """(L, D) of one embedding."""
        length = self.tokenizer.model_max_length
        return (length if length < 10**6 else DEFAULT_LENGTH), int(self.encoder.config.hidden_size)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> (B, L, D) float32 on the encoder's device, zeros after a prompt's end (as Wan's pipelines do)."""
        if self.cache is None:
            return self._encode(prompts)
        return torch.stack([self._kept(self.cache, prompt) for prompt in prompts])

    def _kept(self, cache: PromptCache, prompt: str) -> Tensor:
        found = cache.get(prompt, self.shape)
        if found is None:
            found = self._encode([prompt])[0]  # alone: what is kept does not depend on what it came with
            cache.put(prompt, found)
        return found.to(self.encoder.device)

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        with self.encoder.on_device() as model:
            tokens = self.tokenizer(
                list(prompts), padding="max_length", max_length=self.shape[0], truncation=True, return_tensors="pt"
            ).to(self.encoder.device)
            hidden = model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
            return hidden.float() * tokens.attention_mask[..., None]


class PromptCache:
    """Embeddings on disk, a safetensors file each, by prompt and text encoder. Several processes may share it.

    Args:
        folder: of the cache.
        identity: of the text encoder, `identity_of`.
    """

    def __init__(self, folder: str | Path, identity: str) -> None:
        self.folder = Path(folder).expanduser() / identity

    def get(self, prompt: str, shape: tuple[int, int]) -> Tensor | None:
        """The embedding (L, D), or None where it is not known; a broken file is reported and not known."""
        file = self._file(prompt)
        if not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as stored:
                text, named = stored.get_tensor("text"), (stored.metadata() or {}).get("prompt")
            if named != prompt or text.ndim != 2 or len(text) > shape[0] or text.shape[1] != shape[1]:
                raise ValueError(f"it holds {tuple(text.shape)} of the prompt {named!r}, expected {shape}")
        except (SafetensorError, OSError, ValueError) as error:
            logger.warning("the cached embedding %s is broken (%s): it is made again.", file, error)
            return None
        return torch.cat([text, text.new_zeros(shape[0] - len(text), shape[1])])

    def put(self, prompt: str, embedding: Tensor) -> None:
        """Keeps an embedding (L, D), without the zeros after the prompt's end."""
        used = int(embedding.any(1).nonzero().max()) + 1 if embedding.any() else 0
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=self.folder, suffix=".partial")  # its own, should two write at once
        os.close(handle)
        try:
            save_file({"text": embedding[:used].cpu().contiguous()}, partial, {"prompt": prompt})
            os.replace(partial, self._file(prompt))
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise

    def _file(self, prompt: str) -> Path:
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()}.safetensors"


def identity_of(folders: Sequence[Path], note: str = "") -> str:
    """A name for what is in these folders: of each file its name, size and bytes, of a large one 64 blocks of 1 MiB.

    Args:
        folders: of a text encoder and its tokenizer.
        note: what else decides an embedding, such as the dtype.
    """
    digest = hashlib.sha256(note.encode())
    for folder in folders:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            digest.update(f"{folder.name}/{file.relative_to(folder)} {file.stat().st_size}".encode())
            for block in _sampled(file):
                digest.update(block)
    return digest.hexdigest()[:32]


def _sampled(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    step = max(BLOCK, size // BLOCKS)
    with file.open("rb") as stream:
        for start in range(0, size, step):
            stream.seek(start)
            yield stream.read(BLOCK)
