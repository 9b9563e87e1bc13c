"""Aesthetic: how good a frame looks, after LAION's predictor (paper Eq. 15)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ardrag_rl.control import Control
from ardrag_rl.hub import local_file, read_weights
from ardrag_rl.rewards.registry import register_reward
from ardrag_rl.rewards.reward import Reward
from ardrag_rl.rewards.weights import load_weights

TINY = Path(__file__).parent.parent / "assets" / "aesthetic"
_MLP_WIDTHS = (1024, 128, 64, 16, 1)
_MLP_INDICES = (0, 2, 4, 6, 7)  # the published keys `layers.i`; the gaps are dropouts


@register_reward("aesthetic")
class Aesthetic(Reward):
    """An open_clip image tower and a head on its L2-normalised embeddings, Eq. 15.

    The head gives the raw score s in [1, 10], and the reward is 1 + 4 (s - 1) / 9, the paper's 1 to 5.
    The default is the embedded tiny model, which rates how degraded a 64x64 sprite frame is. LAION's predictor is the
    same class with files that the user brings::

        Aesthetic("ViT-L-14-quickgelu", weights="ViT-L-14.safetensors", head="sa_0_4_vit_l_14_linear.pth")

    Models load in the first call; instances with the same files share one model in a process.

    Args:
        tower: a folder in open_clip's layout (open_clip_config.json and weights), or the name of an open_clip
            architecture. OpenAI's weights need the names that end in "-quickgelu".
        weights: a file for a named architecture (.safetensors, or a state dict saved by torch); never downloaded.
        head: a file (.safetensors, or .pth read with weights_only) with the keys `weight`, `bias` (linear) or
            `layers.{0,2,4,6,7}.weight`, `.bias` (LAION's MLP without activations). None: the folder's head.safetensors.
        device: where the tower runs.
        batch_size: frames per forward pass.
        dtype: the tower's; its embeddings are normalised and scored in float32.

    Raises:
        FileNotFoundError: at the first call, a file is missing.
        ValueError: at the first call, the tower is unknown, or a file does not fit it.
    """

    memory = 0  # a frame is rated by itself

    def __init__(
        self,
        tower: str | Path = TINY,
        weights: str | Path | None = None,
        head: str | Path | None = None,
        device: str = "cpu",
        batch_size: int = 256,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.tower, self.weights, self.head = str(tower), weights and str(weights), head and str(head)
        self.device, self.batch_size, self.dtype = device, batch_size, dtype

    def __call__(self, video: Tensor, controls: Sequence[Control]) -> Tensor:
        """(B, T, 3, H, W) -> (B, T) in [1, 5]."""
        return 1 + 4 * (self.rate(video.flatten(0, 1)) - 1).reshape(video.shape[:2]) / 9

    @torch.inference_mode()
    def rate(self, images: Tensor) -> Tensor:
        """The raw scores s of images (N, 3, H, W) in [0, 1], (N,) clipped to [1, 10]."""
        model = load_predictor(self.tower, self.weights, self.head, self.device, self.dtype)
        scores = [model(chunk.float().to(self.device)).cpu() for chunk in images.split(self.batch_size)]
        return torch.cat(scores).clip(1, 10).clone()

    @staticmethod
    def raw(reward: Tensor) -> Tensor:
        """The raw score s in [1, 10] of a reward in [1, 5]: s = 1 + 9 (r - 1) / 4."""
        return 1 + 9 * (reward - 1) / 4


class Predictor(nn.Module):
    """Images (N, 3, H, W) in [0, 1] -> raw scores (N,), not clipped."""

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.tower, self.head = tower, head
        config = tower.preprocess_cfg
        assert isinstance(config, dict)
        self.size = _pair(config["size"])
        self.squash = config["resize_mode"] == "squash"
        self.register_buffer("mean", torch.tensor(config["mean"])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(config["std"])[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = ((self._resize(images) - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        embeddings = self.tower(x.to(next(self.tower.parameters()).dtype)).float()
        return self.head(F.normalize(embeddings, dim=-1)).squeeze(-1)

    def _resize(self, images: Tensor) -> Tensor:
        """To the tower's input: the shorter side fits and the middle is taken, as CLIP does; or squashed.

        Sizes are rounded as torchvision rounds them for CLIP: one pixel beside shows in the score.
        """
        have, size = images.shape[-2:], self.size
        if not self.squash:
            (h, w), (height, width) = have, self.size
            size = (height, int(height * w / h)) if height * w >= width * h else (int(width * h / w), width)
        if size != tuple(have):
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clip(0, 1)
        top, left = (round((made - wanted) / 2) for made, wanted in zip(size, self.size, strict=True))
        return images[..., top : top + self.size[0], left : left + self.size[1]]


@lru_cache(maxsize=4)
def load_predictor(
    tower: str, weights: str | None, head: str | None, device: str, dtype: torch.dtype = torch.float32
) -> Predictor:
    """The model of `Aesthetic`, frozen; one per process and set of files."""
    import open_clip  # slow to import

    folder = Path(tower)
    if folder.is_dir():
        if weights is not None:
            raise ValueError(f"tower {tower} is a folder with its own weights; leave out weights={weights!r}.")
        clip = open_clip.create_model(f"local-dir:{folder}", device=device)
        head = head or str(folder / "head.safetensors")
    else:
        if tower not in open_clip.list_models():
            raise ValueError(f"tower {tower!r} is neither a folder nor an open_clip architecture such as 'ViT-L-14'.")
        if weights is None or head is None:
            raise ValueError(f"tower {tower!r} needs weights= and head=, two local files; nothing is downloaded.")
        local_file(weights)
        try:
            clip = open_clip.create_model(tower, pretrained=weights, device=device)
        except Exception as error:
            raise ValueError(f"weights {weights} do not load as {tower}: {error}") from error
    module = load_head(head)
    made, taken = clip.visual.output_dim, next(module.parameters()).shape[1]
    if made != taken:
        raise ValueError(f"head {head} takes embeddings of {taken} numbers, but tower {tower} makes {made}.")
    model = Predictor(clip.visual.to(dtype), module).to(device).eval()
    return model.requires_grad_(False).to(memory_format=torch.channels_last)  # faster convolutions on a CPU


def load_head(file: str | Path) -> nn.Module:
    """LAION's linear head or MLP, or any of that form, (N, D) -> (N, 1).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its keys or shapes are of neither form.
    """
    state = read_weights(file, ("model",))
    if set(state) == {"weight", "bias"}:
        linear = nn.Linear(state["weight"].shape[-1], 1)
        load_weights(linear, file, state)
        return linear
    expected = {f"layers.{i}.{kind}" for i in _MLP_INDICES for kind in ("weight", "bias")}
    if set(state) != expected:
        raise ValueError(
            f"head {file} has the keys {', '.join(sorted(state))}: expected weight and bias, or "
            f"{', '.join(sorted(expected))}."
        )
    mlp = nn.Sequential()
    width = state["layers.0.weight"].shape[-1]
    for i, out in zip(_MLP_INDICES, _MLP_WIDTHS, strict=True):
        mlp.add_module(str(i), nn.Linear(width, out))
        width = out
    load_weights(mlp, file, {key.removeprefix("layers."): value for key, value in state.items()})
    return mlp


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
