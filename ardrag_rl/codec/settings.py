"""CodecSettings: memory and speed of a codec against exactness."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


@dataclass(frozen=True)
class CodecSettings:
    """The default is exact and needs no file.

    Attributes:
        tiling: frames above diffusers' tile size (256 px) are coded in overlapping tiles: less memory, other numbers.
        slicing: the videos of a batch are coded one after another: less memory, more time.
        offload: text and image encoder wait in main memory and are moved to the device for each call.
        dtype: of the autoencoder: "float32", "bfloat16" or "float16".
        encoder_dtype: of text and image encoder.
        text_cache: a folder that keeps prompts' embeddings; where all are known, no text encoder is loaded.
        decoder: a TAEHV file of the autoencoder's latents (taew2_1 for Wan2.1) that decodes in its place: many times
            faster, a little blurred.

    Raises:
        ValueError: an unknown dtype.
    """

    tiling: bool = False
    slicing: bool = False
    offload: bool = False
    dtype: str = "float32"
    encoder_dtype: str = "float32"
    text_cache: str | None = None
    decoder: str | None = None

    def __post_init__(self) -> None:
        for name in (self.dtype, self.encoder_dtype):
            if name not in DTYPES:
                raise ValueError(f"codec settings: the dtype {name!r} is unknown; expected one of {', '.join(DTYPES)}.")

    @classmethod
    def of(cls, value: CodecSettings | Mapping[str, Any] | None) -> CodecSettings:
        """Settings from settings, from their values by name, or from None, the defaults.

        Raises:
            ValueError: an unknown name.
        """
        if isinstance(value, CodecSettings):
            return value
        known = [f.name for f in fields(cls)]
        given = {} if value is None else dict(value)
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"codec settings {unknown} are unknown: expected some of {', '.join(known)}.")
        return cls(**given)
