"""Training a small image codec on the task domain: frames, heat maps, and noise with natural statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC, ResBlock
from torch import Tensor, nn
from torch.utils.data import Dataset

from ardrag_rl.envs.sprites import Sprites


class CodecImages(Dataset[dict[str, Tensor]]):
    """Item i: `frames_per_clip` images (n, 3, H, W) in [0, 1]: mostly sprite frames, then heat maps and noise.

    Noise images have a 1/f spectrum and random colours, as photographs do: with them the codec also carries what
    is not a sprite.
    """

    def __init__(self, num_clips: int, size: int, seed: int = 0, frames: int = 4, heat_maps: int = 1, noise: int = 1):
        self.num_clips, self.size, self.seed = num_clips, size, seed
        self.frames, self.heat_maps, self.noise = frames, heat_maps, noise
        self.sources = [Sprites(level, "train", 12, size, size, seed) for level in ("gentle", "hard")]

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, index])
        source = self.sources[index % len(self.sources)]
        video, control = source.video(index), source[index].control
        frames = video[rng.choice(len(video), self.frames, replace=False)]
        if rng.random() < 0.3:  # other colours than the palette's
            mix = torch.from_numpy(rng.dirichlet((1, 1, 1), 3)).float()
            frames = torch.einsum("ij,njhw->nihw", mix, frames)
        maps = control.heat_maps(self.size, self.size) / 2 + 0.5
        maps = maps[rng.choice(len(maps), self.heat_maps, replace=False)] * float(rng.choice([1.0, rng.random()]))
        noise = torch.from_numpy(np.stack([_natural_noise(rng, self.size) for _ in range(self.noise)]))
        return {"pixels": torch.cat([frames, maps, noise])}


class CodecLoss(nn.Module):
    """Reconstruction of a deterministic autoencoder whose latents are kept near unit variance and robust to noise.

    Args:
        vae: a diffusers image autoencoder with deterministic latents (AutoencoderDC, AutoencoderTiny).
        latent_noise: std of the noise added to latents before decoding, so that small model errors stay small.
    """

    vae: Any

    def __init__(self, vae: nn.Module, latent_noise: float = 0.05) -> None:
        super().__init__()
        self.vae, self.latent_noise = vae, latent_noise

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels: (B, n, 3, H, W) in [0, 1]."""
        x = (2 * pixels.flatten(0, 1) - 1).contiguous(memory_format=torch.channels_last)
        z = self.vae.encode(x).latent
        y = self.vae.decode(z + self.latent_noise * torch.randn_like(z)).sample.float()
        edges = sum((_difference(y, d) - _difference(x, d)).abs().mean() for d in (-1, -2))
        z = z.float()
        prior = z.mean((0, 2, 3)).square().mean() + z.square().mean().log().square()
        l1 = (y - x).abs().mean()
        return {"loss": l1 + edges + 4 * (y - x).square().mean() + 0.02 * prior, "l1": l1.detach()}


def image_autoencoder(
    latent_channels: int, widths: tuple[int, int, int], blocks: int, shortcuts: bool = False, head_dim: int = 16
) -> AutoencoderDC:
    """A 4x image autoencoder that convolves at reduced resolution: it unshuffles pixels before its first block.

    Args:
        widths: channels at full, half and quarter resolution, the same in encoder and decoder.
        blocks: residual blocks at quarter resolution; there is one at half and none at full.
        shortcuts: over the ends of encoder and decoder; `start_linear` needs a codec without.
    """
    return AutoencoderDC(
        in_channels=3,
        latent_channels=latent_channels,
        attention_head_dim=head_dim,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(0, 1, blocks),
        decoder_layers_per_block=(0, 1, blocks),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        encoder_out_shortcut=shortcuts,
        decoder_in_shortcut=shortcuts,
    )


@torch.no_grad()
def start_linear(vae: Any, images: Tensor) -> None:
    """Initialises a 4x `AutoencoderDC` as the best linear codec of 4x4 patches, for training to improve on.

    From random weights a small codec needs thousands of updates to pass what a principal component analysis gives at
    once. Residual branches start at zero; pixels travel through the shuffles in fixed slots; spare channels carry a
    constant, against which the decoder's last normalisation is all but linear.

    Args:
        vae: of `image_autoencoder`, without shortcuts.
        images: (n, 3, H, W) in [0, 1], a sample of the domain.
    """
    patches = F.pixel_unshuffle(2 * images - 1, 4).movedim(1, -1).reshape(-1, 48)  # (patches, 3 * 4 * 4)
    mean = patches.mean(0)
    _, s, basis = torch.linalg.svd(patches - mean, full_matrices=False)
    count = vae.config.latent_channels
    sigma, basis = s[:count] / len(patches) ** 0.5, basis[:count]  # (C,), (C, 48)
    gain = sigma.rsqrt()  # between equal and natural variances
    gain = gain / ((gain * sigma).square().mean()).sqrt()
    # a pixel (c, y, x) of a patch sits in slot ((c, y % 2, x % 2), y // 2, x // 2) after two unshuffles
    slot = torch.arange(48).view(3, 2, 2, 2, 2).permute(0, 3, 1, 4, 2).flatten()  # slot of pixel (c, Y, y, X, x)
    blocks: list[Any] = [m for m in vae.modules() if isinstance(m, ResBlock)]
    for block in blocks:
        block.norm.weight.zero_()
    encoder, decoder = vae.encoder, vae.decoder
    _center(encoder.conv_in.conv, torch.eye(3))
    encoder.down_blocks[1][-1].conv.weight.zero_()
    encoder.down_blocks[1][-1].conv.bias.zero_()
    project = torch.zeros(count, 48)
    project[:, slot] = gain[:, None] * basis
    _center(encoder.conv_out, project)
    encoder.conv_out.bias.copy_(-(gain[:, None] * basis) @ mean)
    expand = torch.zeros(48, count)
    expand[slot] = (basis / gain[:, None]).T
    _center(decoder.conv_in, expand)
    constant, shift = 10.0, 2.0
    decoder.conv_in.bias.fill_(constant)
    decoder.conv_in.bias[slot] = mean
    decoder.up_blocks[1][0].conv.weight.zero_()
    decoder.up_blocks[1][0].conv.bias.zero_()
    width = decoder.norm_out.weight.numel()
    decoder.norm_out.weight[:12] = constant * ((width - 12) / width) ** 0.5
    decoder.norm_out.bias[:12] = shift
    _center(decoder.conv_out.conv, torch.eye(12))
    decoder.conv_out.conv.bias.fill_(-shift)


def _center(conv: nn.Conv2d, matrix: Tensor) -> None:
    """Makes the first channels of a 3x3 convolution a matrix on the middle pixel, the rest nearly zero."""
    rows, columns = matrix.shape
    conv.weight[:rows] *= 0.02
    conv.weight[:rows, :columns, 1, 1] = matrix
    assert conv.bias is not None
    conv.bias[:rows] = 0


def _difference(x: Tensor, dim: int) -> Tensor:
    return x.diff(dim=dim)


def _natural_noise(rng: np.random.Generator, size: int) -> np.ndarray:
    """(3, size, size) float32 in [0, 1] with a 1/f^a spectrum."""
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    falloff = np.hypot(fy, fx)
    falloff[0, 0] = 1 / size
    amplitude = falloff ** -rng.uniform(1.5, 2.5)
    shape = (3, *amplitude.shape)
    spectrum = amplitude * (rng.normal(size=shape) + 1j * rng.normal(size=shape))
    field = np.fft.irfft2(spectrum, s=(size, size))
    field = rng.uniform(-1, 1, (3, 3)) @ field.reshape(3, -1)  # correlated colours
    field = field.reshape(3, size, size) / (field.std() + 1e-6)
    return np.clip(0.5 + rng.uniform(0.1, 0.25) * field, 0, 1).astype(np.float32)
