"""TinyDecoder: TAEHV's decoder, a small causal network that decodes a large video autoencoder's latents."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ardrag_rl.codec.stream import State
from ardrag_rl.hub import read_weights

PREFIX = "decoder."


class TinyDecoder(nn.Module):
    """The decoder of Boer Bohan's TAEHV (github.com/madebyollin/taehv), streaming; its blocks are read off its weights.

    It reads latents as the diffusion model writes them, and decodes each with one remembered frame per block. Its first
    r - 1 frames are of no pixel frame and are dropped.

    Args:
        weights: those of a published file; only `decoder.*` is used.

    Raises:
        ValueError: these are not the weights of such a decoder.

    Attributes:
        latent_channels: C.
        temporal_stride, spatial_stride: pixel frames per latent one, and the ratio of sides.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        own = {key.removeprefix(PREFIX): value for key, value in weights.items() if key.startswith(PREFIX)}
        shapes: dict[int, dict[str, torch.Size]] = defaultdict(dict)
        for key, value in own.items():
            index, _, name = key.partition(".")
            if not index.isdigit():
                raise ValueError(f"a TAEHV file has no key {PREFIX}{key}: expected {PREFIX}1.weight and so on.")
            shapes[int(index)][name] = value.shape
        if not {"weight", "bias"} <= set(shapes[1]):
            raise ValueError(
                f"it has no {PREFIX}1.weight and .bias, but {', '.join(sorted(weights)[:4])}, ...: expected a TAEHV "
                "file, and of its kinds not the wider 'super' one."
            )
        last = max(shapes)
        self.layers = nn.Sequential(*(_layer(i, shapes) for i in range(last + 1)))
        self.layers.load_state_dict(own)
        grows = [layer for layer in self.layers if isinstance(layer, Grow)]
        self._patch = round((shapes[last]["weight"][0] / 3) ** 0.5)
        self.latent_channels = int(shapes[1]["weight"][1])
        self.temporal_stride = math.prod(grow.stride for grow in grows)
        self.spatial_stride = self._patch * 2 ** len(grows)

    @classmethod
    def from_file(cls, file: str | Path) -> TinyDecoder:
        """Loads a published `.pth` or `.safetensors` file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no such decoder.
        """
        weights = read_weights(file)
        try:
            return cls(weights)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"the decoder {str(file)!r} could not be read: {error}") from error

    def decode(self, latents: Tensor) -> Tensor:
        """(B, F, C, h, w) -> pixels (B, T, 3, H, W), about [-1, 1]."""
        return self.decode_next(latents, None)[0]

    @torch.no_grad()
    def decode_next(self, latents: Tensor, state: State | None) -> tuple[Tensor, State]:
        """The next latent frames (B, f, C, h, w) -> their pixels (B, t, 3, H, W)."""
        rows = len(latents)
        before = iter(state.features) if state is not None else None
        kept: list[Tensor | str | None] = []
        x = latents.to(next(self.parameters()).dtype)
        for layer in self.layers:
            if isinstance(layer, Remember):
                memory = torch.zeros_like(x[:, :1]) if before is None else next(before)
                assert isinstance(memory, Tensor)
                past = torch.cat([memory, x[:, :-1]], 1)
                kept.append(x[:, -1:].clone())
                x = layer(x.flatten(0, 1), past.flatten(0, 1)).unflatten(0, (rows, -1))
            else:
                x = layer(x.flatten(0, 1)).unflatten(0, (rows, -1))
        pixels = 2 * F.pixel_shuffle(x, self._patch) - 1
        if state is None:
            return pixels[:, self.temporal_stride - 1 :], State(latents.shape[1], tuple(kept))
        return pixels, State(state.frames + latents.shape[1], tuple(kept))


class Remember(nn.Module):
    """A residual block that sees each frame beside the one before it."""

    def __init__(self, width: int, inputs: int, skip: bool) -> None:
        super().__init__()
        convs = [nn.Conv2d(n, width, 3, padding=1) for n in (2 * inputs, width, width)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
        self.skip = nn.Conv2d(inputs, width, 1, bias=False) if skip else nn.Identity()

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """Frames (N, C, h, w) and the frames before them."""
        return F.relu(self.conv(torch.cat([x, past], 1)) + self.skip(x))


class Grow(nn.Module):
    """A frame becomes `stride` frames."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N stride, C, h, w)."""
        return self.conv(x).unflatten(1, (self.stride, -1)).flatten(0, 1)


class SoftClamp(nn.Module):
    """To (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return 3 * torch.tanh(x / 3)


def _layer(index: int, shapes: Mapping[int, Mapping[str, torch.Size]]) -> nn.Module:
    """What stands at this place, by the names of its parameters and of its neighbour's."""
    here, after = shapes.get(index, {}), shapes.get(index + 1, {})
    if not here:
        if index == 0:
            return SoftClamp()
        return nn.Upsample(scale_factor=2) if set(after) == {"conv.weight"} else nn.ReLU()
    if "conv.0.weight" in here:
        width, doubled = here["conv.0.weight"][:2]
        return Remember(width, doubled // 2, "skip.weight" in here)
    if "conv.weight" in here:
        out, width = here["conv.weight"][:2]
        return Grow(width, out // width)
    if "weight" in here:
        return nn.Conv2d(here["weight"][1], here["weight"][0], 3, padding=1, bias="bias" in here)
    raise ValueError(f"layer {index} has {', '.join(sorted(here))}: expected a convolution, a memory or a growth.")
