"""Features: the networks whose activations Frechet distances compare, of frames (FID) or of clips (FVD)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from ardrag_rl.hub import local_file, read_weights

ASSETS = Path(__file__).parent.parent / "assets" / "features"


class Features(Protocol):
    """Videos to feature vectors. `name` says of which network, for a distance means nothing without it."""

    name: str

    def __call__(self, video: Tensor) -> np.ndarray:
        """(B, T, 3, H, W) in [0, 1] -> (B, k, D) float32: of each video a vector for each frame, or one of the clip."""
        ...


class SpriteFeatures(nn.Module, PyTorchModelHubMixin):
    """A small network that has learned what sprite videos show: shapes, colours, places, and how blurred or noisy a
    picture is; with `clips` also how it moves (`experiments/pretrain_features.py`).

    Args:
        clips: one vector for a clip, of convolutions over time on maps of the frames; else one for each frame, the mean
            over its last map.
        width: channels of the first layer.
        num_features: D.
        num_targets: numbers it was trained to tell.
        size: pixels to a side that frames are resized to.
    """

    def __init__(
        self, clips: bool, width: int = 24, num_features: int = 64, num_targets: int = 1, size: int = 64
    ) -> None:
        super().__init__()
        self.clips, self.size = clips, size
        widths, reduced = [3, width, 2 * width, 4 * width, num_features], 12
        self.trunk = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, side, 2, side // 2), nn.GroupNorm(4, after), nn.ReLU())
            for before, after, side in zip(widths, widths[1:], (5, 3, 3, 3), strict=False)
        )
        if clips:
            self.reduce = nn.Conv2d(4 * width, reduced, 1)
            self.time = nn.Sequential(
                nn.Conv1d(reduced * (size // 8) ** 2, 128, 3, padding=1),
                nn.GroupNorm(8, 128),
                nn.ReLU(),
                nn.Conv1d(128, num_features, 3, padding=1),
                nn.ReLU(),
            )
        self.head = nn.Linear(num_features, num_targets)

    def features(self, video: Tensor) -> Tensor:
        """(B, T, 3, H, W) in [0, 1] -> (B, D) of clips, (B, T, D) of frames."""
        shape, side = video.shape[:2], (self.size, self.size)
        x = video.flatten(0, 1).float()
        if tuple(x.shape[-2:]) != side:
            x = F.interpolate(x, side, mode="bilinear", antialias=True)
        x = 4 * (x - 0.5)
        for layer in self.trunk[:3]:
            x = layer(x)
        if self.clips:
            maps = self.reduce(x).flatten(1).unflatten(0, shape).transpose(1, 2)  # (B, C h w, T)
            return self.time(maps).mean(-1)
        return self.trunk[3](x).mean((-2, -1)).unflatten(0, shape)

    def forward(self, video: Tensor) -> Tensor:
        """What it was trained to tell: (B, [T,] num_targets)."""
        return self.head(self.features(video))


class Embedded:
    """A `SpriteFeatures` network as `Features`.

    Args:
        kind: "frame" or "clip", the networks that come with the package.
        folder: where they lie.
        device: where it runs.
    """

    def __init__(self, kind: str, folder: Path = ASSETS, device: str = "cpu") -> None:
        self._net = SpriteFeatures.from_pretrained(folder / kind).eval().to(device)
        self._device, self.name = device, f"embedded {kind} network {digest(folder / kind / 'model.safetensors')}"

    @torch.inference_mode()
    def __call__(self, video: Tensor) -> np.ndarray:
        """(B, T, 3, H, W) in [0, 1] -> (B, T, D) of frames, (B, 1, D) of a clip."""
        features = self._net.features(video.to(self._device))
        return features.reshape(len(video), -1, features.shape[-1]).cpu().numpy()


class Inception:
    """InceptionV3's pool3 (2048), the network of FID, from torch-fidelity's port of TensorFlow's weights.

    Args:
        weights: pt_inception-2015-12-05-6726825d.pth or a copy; read with weights_only. Nothing is downloaded.
        device: where it runs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds more than weights.
        ImportError: torch-fidelity is not installed; the message says how.
    """

    def __init__(self, weights: str | Path, device: str = "cpu") -> None:
        read_weights(weights)  # refuses what is more than weights
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError('FID with Inception needs torch-fidelity: pip install "ardrag-rl[metrics]"') from error
        self._model = FeatureExtractorInceptionV3("inception", ["2048"], str(weights)).to(device).eval()
        self._device, self.name = device, f"InceptionV3 pool3 {digest(weights)}"

    @torch.inference_mode()
    def __call__(self, video: Tensor) -> np.ndarray:
        """(B, T, 3, H, W) in [0, 1] -> (B, T, 2048)."""
        pixels = (255 * video.flatten(0, 1)).round().clip(0, 255).byte().to(self._device)
        (features,) = self._model(pixels)
        return features.cpu().numpy().reshape(*video.shape[:2], -1)


class I3D:
    """I3D on Kinetics-400, 400 logits, the network of FVD, as the torchscript that StyleGAN-V's authors published.

    Args:
        script: i3d_torchscript.pt or a copy. A torchscript is a program: take it from whom you trust.
        device: where it runs.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def __init__(self, script: str | Path, device: str = "cpu") -> None:
        local_file(script)
        self._model = torch.jit.load(str(script), map_location=device).eval()
        self._device, self.name = device, f"I3D {digest(script)}"

    @torch.inference_mode()
    def __call__(self, video: Tensor) -> np.ndarray:
        """(B, T, 3, H, W) in [0, 1] -> (B, 1, 400); I3D needs 10 frames."""
        if video.shape[1] < 10:
            raise ValueError(f"clips of {video.shape[1]} frames: I3D needs at least 10.")
        clips = (255 * video).transpose(1, 2).to(self._device)  # (B, 3, T, H, W), 0 to 255
        return self._model(clips, rescale=True, resize=True, return_features=True)[:, None].cpu().numpy()


def load_features(kind: str, file: str | Path | None = None, device: str = "cpu") -> Features:
    """The network of a kind, "frame" or "clip": Inception or I3D from a file, or the embedded one."""
    if file is None:
        return Embedded(kind, device=device)
    makers: dict[str, Callable[..., Features]] = {"frame": Inception, "clip": I3D}
    return makers[kind](file, device)


def digest(file: str | Path) -> str:
    """The first digits of a file's SHA-256."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:8]
