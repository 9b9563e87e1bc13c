"""ImageEncoder: the tokens of a reference image, for image-to-video models that read them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ardrag_rl.codec.frozen import FrozenModel


class ImageEncoder:
    """A CLIP vision tower, as Wan's image-to-video pipelines use it: the tokens of its last hidden layer but one.

    Args:
        encoder: transformers' `CLIPVisionModel`.
        processor: its image processor, which resizes and normalises.
    """

    def __init__(self, encoder: FrozenModel, processor: Any) -> None:
        self.encoder, self.processor = encoder, processor

    @property
    def shape(self) -> tuple[int, int]:
        """(L', D') of one image: its patches and the class token."""
        config = self.encoder.config
        config = getattr(config, "vision_config", config)
        return (config.image_size // config.patch_size) ** 2 + 1, config.hidden_size

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, L', D') float32."""
        bytes_ = (255 * images).round().byte().cpu()  # what the processor takes; it has 8 bits for files too
        pixels = self.processor(images=list(bytes_), return_tensors="pt").pixel_values
        with self.encoder.on_device() as model:
            pixels = pixels.to(self.encoder.device, model.dtype)
            return model(pixels, output_hidden_states=True).hidden_states[-2].float()
