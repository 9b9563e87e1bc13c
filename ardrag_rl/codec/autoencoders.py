"""Autoencoders: diffusers' image and video autoencoders behind one interface, whole or latent by latent.

Everywhere: pixels (B, T, 3, H, W) in [-1, 1] and latents (B, F, C, h, w) of about unit variance, on the autoencoder's
device, with T = 1 + (F-1) r; `encode_next` and `decode_next` take what belongs to one latent frame.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ardrag_rl.codec.stream import State

logger = logging.getLogger(__name__)


class ImageAutoencoder:
    """A diffusers autoencoder for images (AutoencoderDC, AutoencoderKL, AutoencoderTiny): each frame by itself.

    Attributes:
        vae: diffusers' module.
        temporal_stride, spatial_stride: r pixel frames for each latent one after the first, and the ratio of sides.
        latent_channels: C.
        shift, scale: latents are (z - shift) * scale.
    """

    def __init__(self, vae: Any) -> None:
        self.vae, config = vae, vae.config
        self.temporal_stride = temporal_stride(vae)
        self.spatial_stride = _spatial_stride(vae)
        self.latent_channels: int = config.get("z_dim") or config["latent_channels"]
        buffers = dict(vae.named_buffers())  # where LTX has them
        mean, std = (config.get(k, buffers.get(k)) for k in ("latents_mean", "latents_std"))
        self.shift = self._per_channel(mean if mean is not None else [config.get("shift_factor") or 0.0])
        scale = [1 / s for s in std] if std is not None else [config.get("scaling_factor") or 1.0]
        self.scale = self._per_channel(scale)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels -> latents, float32."""
        z = _latents(self.vae.encode(pixels.flatten(0, 1).to(self.vae.dtype)))
        return self._normalise(z.unflatten(0, pixels.shape[:2]))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> pixels."""
        return self.vae.decode(self._denormalise(latents).flatten(0, 1)).sample.unflatten(0, latents.shape[:2])

    def encode_next(self, pixels: Tensor, state: State | None) -> tuple[Tensor, State]:
        """The pixels of the next latent frame (B, t, 3, H, W) -> (B, 1, C, h, w)."""
        return self.encode(pixels), _after(state)

    def decode_next(self, latents: Tensor, state: State | None) -> tuple[Tensor, State]:
        """The next latent frame (B, 1, C, h, w) -> its pixels (B, t, 3, H, W)."""
        return self.decode(latents), _after(state)

    def _normalise(self, z: Tensor) -> Tensor:
        return (z.float() - self.shift) * self.scale

    def _denormalise(self, z: Tensor) -> Tensor:
        return (z / self.scale + self.shift).to(self.vae.dtype)

    def _per_channel(self, values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=self.vae.device).reshape(-1, 1, 1)


class VideoAutoencoder(ImageAutoencoder):
    """Any diffusers autoencoder for videos.

    It has no way to go on where it stopped, so the next frame is coded with all frames before it: the cost grows with
    their number, and only a causal autoencoder then gives what it gives for the whole clip.
    """

    _said = False

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels -> latents, float32."""
        z = _latents(self.vae.encode(pixels.transpose(1, 2).to(self.vae.dtype)))
        return self._normalise(z.transpose(1, 2))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> pixels."""
        return self.vae.decode(self._denormalise(latents).transpose(1, 2)).sample.transpose(1, 2)

    def encode_next(self, pixels: Tensor, state: State | None) -> tuple[Tensor, State]:
        """See `ImageAutoencoder.encode_next`."""
        video, after = self._with_past(pixels, state)
        return self.encode(video)[:, -1:], after

    def decode_next(self, latents: Tensor, state: State | None) -> tuple[Tensor, State]:
        """See `ImageAutoencoder.decode_next`."""
        video, after = self._with_past(latents, state)
        new = 1 if state is None else self.temporal_stride
        return self.decode(video)[:, -new:], after

    def _with_past(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        if state is None:
            return x, State(1, (x,))
        if not self._said:
            self._said = True
            logger.warning(
                "%s cannot go on where it stopped: each frame is coded with all before it, which costs more with every "
                "frame, and gives what whole clips give only if it is causal.",
                type(self.vae).__name__,
            )
        (past,) = state.features
        assert isinstance(past, Tensor)
        video = torch.cat([past, x], 1)
        return video, State(state.frames + 1, (video,))


def temporal_stride(vae: Any) -> int:
    """r of a diffusers autoencoder, 1 for images."""
    if "temperal_downsample" in vae.config:  # diffusers' spelling
        return 2 ** sum(vae.config["temperal_downsample"])
    return int(vae.config.get("temporal_compression_ratio") or getattr(vae, "temporal_compression_ratio", 1))


def _spatial_stride(vae: Any) -> int:
    config = vae.config
    for key in ("scale_factor_spatial", "spatial_compression_ratio"):
        if config.get(key):
            return int(config[key])
    if hasattr(vae, "spatial_compression_ratio"):
        return int(vae.spatial_compression_ratio)
    channels = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    return 2 ** (len(channels) - 1)


def _latents(output: Any) -> Tensor:
    """The deterministic latent of a diffusers encoder's output."""
    if hasattr(output, "latent_dist"):
        return output.latent_dist.mode()
    return output.latent if hasattr(output, "latent") else output.latents


def _after(state: State | None) -> State:
    return State(1 if state is None else state.frames + 1)
