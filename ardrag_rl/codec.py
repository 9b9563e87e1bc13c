"""Codec: pixels, heat maps and prompts to latents and back, whole or frame by frame. Never trained by RL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ardrag_rl.control import Control
from ardrag_rl.hub import pipeline_path, read_json

DEFAULT_TEXT_LENGTH = 512  # Wan's, for tokenizers that name no limit of their own


class Codec:
    """A diffusers autoencoder and a transformers text encoder behind one small interface.

    "Frame" is a latent frame; `temporal_stride` r makes T = 1 + (F-1) r pixel frames of F latent ones.

    Args:
        vae: a diffusers autoencoder for images (AutoencoderDC, AutoencoderKL, AutoencoderTiny: r = 1) or a causal
            one for videos (AutoencoderKLWan).
        text_encoder: a transformers encoder with `last_hidden_state` (B, L, D).
        tokenizer: its tokenizer; `model_max_length` is L.
        device: where both run.
    """

    def __init__(self, vae: Any, text_encoder: Any, tokenizer: Any, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.vae = vae.eval().requires_grad_(False).to(self.device)
        self.text_encoder = text_encoder.eval().requires_grad_(False).to(self.device)
        self.tokenizer = tokenizer
        config = vae.config
        if "temperal_downsample" not in config:
            self.vae.to(memory_format=torch.channels_last)  # 2.5 times as fast for small images on a CPU
        self.video = "temperal_downsample" in config  # diffusers' spelling
        self.temporal_stride = 2 ** sum(config["temperal_downsample"]) if self.video else 1
        self.latent_channels: int = config["z_dim"] if self.video else config["latent_channels"]
        self.spatial_stride: int = _spatial_stride(vae)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        shape = (1, -1, 1, 1, 1) if self.video else (1, -1, 1, 1)
        self._shift = _tensor(mean if mean is not None else [config.get("shift_factor") or 0.0], shape, self.device)
        scale = [1 / s for s in std] if std is not None else [config.get("scaling_factor") or 1.0]
        self._scale = _tensor(scale, shape, self.device)

    @classmethod
    def from_pretrained(cls, pipeline: str | Path, device: str | torch.device = "cpu") -> Codec:
        """Loads vae, text encoder and tokenizer of a pipeline (name, folder or hub id), without its transformer."""
        import diffusers
        from transformers import AutoModelForTextEncoding, AutoTokenizer

        path = pipeline_path(pipeline)
        name = read_json(path / "vae" / "config.json").get("_class_name", "")
        vae_class = getattr(diffusers, name, None) if str(name).startswith("Autoencoder") else None
        if vae_class is None:
            raise ValueError(
                f"vae/config.json of {str(path)!r} names the class {name!r}: expected a diffusers autoencoder."
            )
        for part in ("text_encoder", "tokenizer"):  # a missing one is otherwise looked for on the hub
            if not (path / part).is_dir():
                raise ValueError(f"pipeline {str(path)!r} has no folder {part}/.")
        vae = vae_class.from_pretrained(path / "vae", use_safetensors=True)
        text_encoder = AutoModelForTextEncoding.from_pretrained(path / "text_encoder", use_safetensors=True)
        return cls(vae, text_encoder, AutoTokenizer.from_pretrained(path / "tokenizer"), device)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of one latent frame.

        Raises:
            ValueError: height or width is not a multiple of the spatial stride.
        """
        s = self.spatial_stride
        if height <= 0 or width <= 0 or height % s or width % s:
            raise ValueError(f"height={height}, width={width}: expected multiples of the codec's stride {s}.")
        return self.latent_channels, height // s, width // s

    def pixel_frames(self, num_frames: int) -> int:
        """T pixel frames of `num_frames` latent ones."""
        return 1 + (num_frames - 1) * self.temporal_stride

    def latent_frames(self, num_pixel_frames: int) -> int:
        """F latent frames of T pixel frames, T = 1 + (F-1) r.

        Raises:
            ValueError: no F gives this T.
        """
        frames, rest = divmod(num_pixel_frames - 1, self.temporal_stride)
        if rest or num_pixel_frames < 1:
            raise ValueError(f"{num_pixel_frames} pixel frames: expected 1 + k * {self.temporal_stride}.")
        return frames + 1

    @property
    def text_shape(self) -> tuple[int, int]:
        """(L, D) of one prompt embedding."""
        length = self.tokenizer.model_max_length
        return (length if length < 10**6 else DEFAULT_TEXT_LENGTH), self.text_encoder.config.hidden_size

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """(B, T, 3, H, W) in [0, 1] -> (B, F, C, h, w) float32, about unit variance."""
        if video.ndim != 5 or video.shape[2] != 3:
            raise ValueError(f"video has shape {tuple(video.shape)}: expected (B, T, 3, H, W).")
        self.latent_shape(*video.shape[-2:])
        frames = self.latent_frames(video.shape[1])
        pixels = (2 * video - 1).to(self.device, self.vae.dtype)
        if self.video:
            z = self._normalise(_latents(self.vae.encode(pixels.transpose(1, 2))))
            return z.transpose(1, 2)
        z = self._normalise(_latents(self.vae.encode(pixels.flatten(0, 1))))
        return z.unflatten(0, (-1, frames))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, F, C, h, w) -> (B, T, 3, H, W) float32 in [0, 1]."""
        z = latents.to(self.device, torch.float32)
        if self.video:
            pixels = self.vae.decode(self._denormalise(z.transpose(1, 2))).sample.transpose(1, 2)
        else:
            pixels = self.vae.decode(self._denormalise(z.flatten(0, 1))).sample.unflatten(0, z.shape[:2])
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def decoder(self) -> DecoderSession:
        """A session that decodes videos frame by frame."""
        return DecoderSession(self)

    def encode_heat_maps(self, controls: Sequence[Control], height: int, width: int) -> Tensor:
        """Eq. 6: controls drawn as videos and encoded like them.

        Returns:
            (B, F, C, h, w); zeros where a control has no points.
        """
        maps = torch.stack([c.heat_maps(height, width) for c in controls])  # (B, T, 3, H, W)
        z = self.encode(maps / 2 + 0.5)
        empty = torch.tensor([c.points.shape[1] == 0 for c in controls], device=z.device)
        return torch.where(empty[:, None, None, None, None], 0.0, z)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> (B, L, D) float32, zeros after a prompt's end (as Wan's pipelines do)."""
        length, _ = self.text_shape
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.device)
        hidden = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return hidden.float() * tokens.attention_mask[..., None]

    def _normalise(self, z: Tensor) -> Tensor:
        return (z.float() - self._shift) * self._scale

    def _denormalise(self, z: Tensor) -> Tensor:
        return (z / self._scale + self._shift).to(self.vae.dtype)


class DecoderSession:
    """Decodes the frames of a batch of videos as they come.

    An image codec decodes each frame by itself. A causal video codec decodes the latents so far and gives the new
    pixel frames, which is exact; its cost grows with the number of frames.
    """

    def __init__(self, codec: Codec, past: Tensor | None = None) -> None:
        self._codec = codec
        self._past = past  # (B, m, C, h, w), only for video codecs

    def append(self, latents: Tensor) -> Tensor:
        """The next clean latent frame (B, C, h, w) -> its (B, t, 3, H, W) pixel frames in [0, 1]."""
        z = latents[:, None]
        if not self._codec.video:
            return self._codec.decode(z)
        done = 0 if self._past is None else self._codec.pixel_frames(self._past.shape[1])
        self._past = z if self._past is None else torch.cat([self._past, z], 1)
        return self._codec.decode(self._past)[:, done:]

    def select(self, rows: Sequence[int]) -> DecoderSession:
        """An independent copy for these rows of the batch."""
        return DecoderSession(self._codec, None if self._past is None else self._past[list(rows)])


def _latents(output: Any) -> Tensor:
    """The deterministic latent of a diffusers encoder's output."""
    if hasattr(output, "latent_dist"):
        return output.latent_dist.mode()
    return output.latent if hasattr(output, "latent") else output.latents


def _spatial_stride(vae: Any) -> int:
    config = vae.config
    for key in ("scale_factor_spatial", "spatial_compression_ratio"):
        if config.get(key):
            return int(config[key])
    if hasattr(vae, "spatial_compression_ratio"):
        return int(vae.spatial_compression_ratio)
    channels = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    return 2 ** (len(channels) - 1)


def _tensor(values: Sequence[float], shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float32, device=device).view(shape)
