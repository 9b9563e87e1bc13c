"""WanAutoencoder: Wan's video autoencoder latent by latent, with its own causal caches as the state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from torch import Tensor, nn

from ardrag_rl.codec.autoencoders import VideoAutoencoder
from ardrag_rl.codec.stream import State

Size = tuple[int, int]  # (height, width)
Run = Callable[[Tensor, list[Any]], Tensor]  # one tile, and the caches it reads and replaces


@dataclass(frozen=True)
class Tiles:
    """Overlapping tiles, as diffusers cuts them.

    Attributes:
        size, stride: of what goes in.
        kept, blended: of what comes out, how much of a tile stays and over how much it fades into its neighbours.
    """

    size: Size
    stride: Size
    kept: Size
    blended: Size = (0, 0)


class WanAutoencoder(VideoAutoencoder):
    """`AutoencoderKLWan` (Wan2.1 and 2.2), a latent frame at a time at constant cost.

    Its convolutions are causal in time and keep the last two frames of their input, for each tile where it tiles.
    These caches are the state, so the frames one by one are the whole clip.
    """

    def encode_next(self, pixels: Tensor, state: State | None) -> tuple[Tensor, State]:
        """See `ImageAutoencoder.encode_next`."""
        vae, size = self.vae, _pair(pixels)  # diffusers tiles what is patchified, but asks the size before that
        out = size[0] // self.spatial_stride, size[1] // self.spatial_stride
        x = patchify(pixels.transpose(1, 2).to(vae.dtype), self._patch)

        def run(tile: Tensor, cache: list[Any]) -> Tensor:
            return vae.quant_conv(vae.encoder(tile, feat_cache=cache, feat_idx=[0]))

        tiles = self._tiles(size, 1, self.spatial_stride // self._patch) or Tiles(_pair(x), _pair(x), out)
        moments, state = self._rows(vae.encoder, run, x, state, tiles)
        mean = moments[..., : out[0], : out[1]].chunk(2, 1)[0]
        return self._normalise(mean.transpose(1, 2)), state

    def decode_next(self, latents: Tensor, state: State | None) -> tuple[Tensor, State]:
        """See `ImageAutoencoder.decode_next`."""
        vae, size, stride = self.vae, _pair(latents), self.spatial_stride
        out = size[0] * stride // self._patch, size[1] * stride // self._patch
        first = state is None

        def run(tile: Tensor, cache: list[Any]) -> Tensor:
            return vae.decoder(vae.post_quant_conv(tile), feat_cache=cache, feat_idx=[0], first_chunk=first)

        z = self._denormalise(latents).transpose(1, 2)
        tiles = self._tiles(size, stride, self._patch) or Tiles(size, size, out)
        pixels, state = self._rows(vae.decoder, run, z, state, tiles)
        return unpatchify(pixels[..., : out[0], : out[1]], self._patch).transpose(1, 2), state

    @property
    def _patch(self) -> int:
        return self.vae.config["patch_size"] or 1

    def _tiles(self, size: Size, inside: int, outside: int) -> Tiles | None:
        """Of frames of `size`, where what goes in and comes out is so many times smaller than diffusers' tile sizes.

        None where a frame is not to be tiled.
        """
        vae = self.vae
        least = vae.tile_sample_min_height, vae.tile_sample_min_width
        stride = vae.tile_sample_stride_height, vae.tile_sample_stride_width
        if not vae.use_tiling or all(s <= n // inside for s, n in zip(size, least, strict=True)):
            return None
        kept = stride[0] // outside, stride[1] // outside
        return Tiles(
            size=(least[0] // inside, least[1] // inside),
            stride=(stride[0] // inside, stride[1] // inside),
            kept=kept,
            blended=(least[0] // outside - kept[0], least[1] // outside - kept[1]),
        )

    def _rows(self, network: nn.Module, run: Run, x: Tensor, state: State | None, tiles: Tiles) -> tuple[Tensor, State]:
        """Codes a frame of all rows, one row at a time where the autoencoder slices."""
        if not self.vae.use_slicing or len(x) == 1:
            return self._frame(network, run, x, state, tiles)
        states = [None if state is None else state.select([i]) for i in range(len(x))]
        coded = [self._frame(network, run, row, before, tiles) for row, before in zip(x.split(1), states, strict=True)]
        return torch.cat([y for y, _ in coded]), State.cat([after for _, after in coded])

    def _frame(
        self, network: nn.Module, run: Run, x: Tensor, state: State | None, tiles: Tiles
    ) -> tuple[Tensor, State]:
        """Codes a frame tile by tile; (B, C, t, H, W) in and out."""
        number = sum(isinstance(m, nn.Conv3d) for m in network.modules())  # each convolution has at most one cache
        rows: list[list[Tensor]] = []
        caches: list[Any] = []
        for top in range(0, x.shape[-2], tiles.stride[0]):
            rows.append([])
            for left in range(0, x.shape[-1], tiles.stride[1]):
                done = len(caches)
                cache = [None] * number if state is None else list(state.features[done : done + number])
                tile = x[..., top : top + tiles.size[0], left : left + tiles.size[1]]
                rows[-1].append(run(tile, cache))
                caches += cache
        return self._joined(rows, tiles), State(1 if state is None else state.frames + 1, tuple(caches))

    def _joined(self, rows: list[list[Tensor]], tiles: Tiles) -> Tensor:
        """The picture that overlapping tiles make."""
        height, width = tiles.blended
        strips = []
        for i, row in enumerate(rows):
            for j in range(len(row)):
                if i:
                    row[j] = self.vae.blend_v(rows[i - 1][j], row[j], height)
                if j:
                    row[j] = self.vae.blend_h(row[j - 1], row[j], width)
            strips.append(torch.cat([tile[..., : tiles.kept[0], : tiles.kept[1]] for tile in row], -1))
        return torch.cat(strips, -2)


def _pair(x: Tensor) -> Size:
    return x.shape[-2], x.shape[-1]
