"""ClipScore: how well a frame fits its prompt, by a CLIP model; PickScore is one trained on people's choices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ardrag_rl.control import Control
from ardrag_rl.rewards.registry import register_reward
from ardrag_rl.rewards.reward import Reward


@register_reward("clip_score")
class ClipScore(Reward):
    """exp(logit_scale) cos(image, prompt) / divisor, of L2-normalised embeddings: CLIP's logit, as flow_grpo scales it.

    A trained CLIP has exp(logit_scale) = 100, so the score is about 0.5 to 1. Frames are rounded to 8 bits and
    prepared as the model's own processor prepares images. Models load in the first call; instances with the same
    files share one model in a process.

    Args:
        model: a folder, or a hub id that is downloaded once, of a transformers `CLIPModel`.
        processor: the same of its `CLIPProcessor`; None is where the model is.
        divisor: of the logit.
        device: where the model runs.
        batch_size: frames per forward pass.
        dtype: the model's; its embeddings are normalised and compared in float32.

    Raises:
        ValueError: at the first call, the model or processor cannot be had, or is not one of CLIP.
    """

    memory = 0  # a frame is rated by itself

    def __init__(
        self,
        model: str | Path = "openai/clip-vit-large-patch14",
        processor: str | Path | None = None,
        divisor: float = 30.0,
        device: str = "cpu",
        batch_size: int = 64,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.processor, self.divisor = str(model), str(processor or model), divisor
        self.device, self.batch_size, self.dtype = device, batch_size, dtype

    @torch.inference_mode()
    def __call__(self, video: Tensor, controls: Sequence[Control]) -> Tensor:
        """(B, T, 3, H, W) -> (B, T)."""
        model, processor = load_clip(self.model, self.processor, self.device, self.dtype)
        prompts = list(dict.fromkeys(control.prompt for control in controls))  # a group shares its prompt
        rows = [prompts.index(control.prompt) for control in controls]
        text = torch.cat([self._text(model, processor.tokenizer, part) for part in self._parts(prompts)])[rows]
        frames = [self._images(model, processor.image_processor, f) for f in video.flatten(0, 1).split(self.batch_size)]
        cosine = torch.einsum("btd,bd->bt", torch.cat(frames).unflatten(0, video.shape[:2]), text)
        return (model.logit_scale.float().exp() * cosine / self.divisor).cpu()

    def _images(self, model: Any, processor: Any, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, D)."""
        pixels = (255 * images.to(self.device)).round().clip(0, 255).byte()
        inputs = processor(images=pixels, return_tensors="pt", device=self.device)["pixel_values"]
        return F.normalize(model.get_image_features(pixel_values=inputs.to(self.dtype)).pooler_output.float(), dim=-1)

    def _text(self, model: Any, tokenizer: Any, prompts: list[str]) -> Tensor:
        """N prompts -> (N, D); one that is too long is cut."""
        length = model.config.text_config.max_position_embeddings
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return F.normalize(model.get_text_features(**tokens.to(self.device)).pooler_output.float(), dim=-1)

    def _parts(self, prompts: list[str]) -> list[list[str]]:
        return [prompts[i : i + self.batch_size] for i in range(0, len(prompts), self.batch_size)]


@register_reward("pickscore")
class PickScore(ClipScore):
    """`ClipScore` by PickScore (Kirstain et al., 2023), a ViT-H/14 trained on people's choices; flow_grpo's divisor."""

    def __init__(
        self,
        model: str | Path = "yuvalkirstain/PickScore_v1",
        processor: str | Path | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        divisor: float = 26.0,
        device: str = "cpu",
        batch_size: int = 64,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, processor, divisor, device, batch_size, dtype)


@lru_cache(maxsize=4)
def load_clip(model: str, processor: str, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model, frozen, and its processor; one per process and set of files."""
    from transformers import CLIPModel, CLIPProcessor  # slow to import

    try:
        loaded: Any = CLIPModel.from_pretrained(model, dtype=dtype, output_loading_info=True)
        prepare = CLIPProcessor.from_pretrained(processor)
    except Exception as error:
        raise ValueError(
            f"CLIP model {model!r} with processor {processor!r} could not be loaded: expected folders as "
            f"save_pretrained writes them, or hub ids ({error})."
        ) from error
    clip, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{model!r} is no whole CLIP model: {len(missing)} tensors are missing, first {missing[:3]}.")
    return clip.to(device).eval().requires_grad_(False), prepare
