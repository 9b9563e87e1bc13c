"""Codec: pixels, heat maps and prompts to latents and back, whole or frame by frame. Never trained by RL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ardrag_rl.codec.autoencoders import ImageAutoencoder, VideoAutoencoder, temporal_stride
from ardrag_rl.codec.frozen import FrozenModel
from ardrag_rl.codec.image_encoder import ImageEncoder
from ardrag_rl.codec.settings import DTYPES, CodecSettings
from ardrag_rl.codec.stream import State, Stream
from ardrag_rl.codec.taehv import TinyDecoder
from ardrag_rl.codec.text import PromptCache, TextEncoder, identity_of
from ardrag_rl.control import Control, draw_heat_maps
from ardrag_rl.hub import check_weights, pipeline_path, read_json


class Codec:
    """A diffusers autoencoder and transformers' encoders of texts and images behind one small interface.

    "Frame" is a latent frame; `temporal_stride` r makes T = 1 + (F-1) r pixel frames of F latent ones. Frame by frame,
    the first has one pixel frame and each later one r; `decode_next` and `encode_next` are functions of the frame and
    of an immutable state, `decoder` and `encoder` give streams that carry it along.

    Args:
        vae: a diffusers autoencoder for images (AutoencoderDC, AutoencoderKL, AutoencoderTiny: r = 1) or a causal
            one for videos (AutoencoderKLWan).
        text_encoder: a transformers encoder with `last_hidden_state` (B, L, D), or its folder: it is loaded when a
            prompt first needs it.
        tokenizer: its tokenizer; `model_max_length` is L.
        device: where all run.
        settings: memory and speed; a model that is given, not its folder, keeps its dtype.
        image_encoder: a CLIP vision tower or its folder, and its processor, for models that read image tokens.

    Raises:
        ValueError: the autoencoder cannot tile or slice, or the tiny decoder does not fit it.
    """

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        device: str | torch.device = "cpu",
        settings: CodecSettings | Mapping[str, Any] | None = None,
        image_encoder: tuple[Any, Any] | None = None,
    ) -> None:
        from transformers import AutoModelForTextEncoding, CLIPVisionModel

        self.device, self.settings = torch.device(device), CodecSettings.of(settings)
        s = self.settings
        vae = vae.eval().requires_grad_(False).to(self.device)
        self.vae, self.autoencoder = vae, _wrapped(vae, s)
        self._decoder: ImageAutoencoder | TinyDecoder = self.autoencoder
        if s.decoder is not None:
            self._decoder = _tiny_decoder(s.decoder, self.autoencoder).to(self.device, vae.dtype)
        self.temporal_stride, self.spatial_stride = self.autoencoder.temporal_stride, self.autoencoder.spatial_stride
        self.latent_channels = self.autoencoder.latent_channels
        dtype = DTYPES[s.encoder_dtype]
        text = FrozenModel(text_encoder, AutoModelForTextEncoding.from_pretrained, self.device, dtype, s.offload)
        cache = None
        if s.text_cache is not None:
            if text.folder is None:
                raise ValueError(f"text_cache={s.text_cache!r} needs a text encoder that comes from a folder.")
            folders = [text.folder, Path(tokenizer.name_or_path)]
            cache = PromptCache(s.text_cache, identity_of(folders, s.encoder_dtype))
        self.text = TextEncoder(text, tokenizer, cache)
        self.images = None
        if image_encoder is not None:
            tower = FrozenModel(image_encoder[0], CLIPVisionModel.from_pretrained, self.device, dtype, s.offload)
            self.images = ImageEncoder(tower, image_encoder[1])

    @classmethod
    def from_pretrained(
        cls,
        pipeline: str | Path,
        device: str | torch.device = "cpu",
        settings: CodecSettings | Mapping[str, Any] | None = None,
    ) -> Codec:
        """Loads what a pipeline (name, folder or hub id) has beside its transformer.

        On the device "meta" no weights are read, and shapes are all that it tells.

        Raises:
            ValueError: the pipeline is unknown or lacks something, or a setting does not fit it.
        """
        import diffusers
        from transformers import AutoImageProcessor, AutoTokenizer

        settings = CodecSettings.of(settings)
        path = pipeline_path(pipeline)
        name = read_json(path / "vae" / "config.json").get("_class_name", "")
        vae_class = getattr(diffusers, name, None) if str(name).startswith("Autoencoder") else None
        if vae_class is None:
            raise ValueError(
                f"vae/config.json of {str(path)!r} names the class {name!r}: expected a diffusers autoencoder."
            )
        images = (path / "image_encoder").is_dir()
        # a missing one is otherwise looked for on the hub
        for part in ("text_encoder", "tokenizer", *(("image_processor",) if images else ())):
            if not (path / part).is_dir():
                raise ValueError(f"pipeline {str(path)!r} has no folder {part}/.")
        if torch.device(device).type == "meta":
            with torch.device("meta"):
                vae = vae_class.from_config(vae_class.load_config(path / "vae"))
        else:
            check_weights(path / "vae")
            vae = vae_class.from_pretrained(path / "vae", torch_dtype=DTYPES[settings.dtype], use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(path / "tokenizer")
        image_encoder = None
        if images:
            image_encoder = path / "image_encoder", AutoImageProcessor.from_pretrained(path / "image_processor")
        return cls(vae, path / "text_encoder", tokenizer, device, settings, image_encoder)

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
        return self.text.shape

    @property
    def image_shape(self) -> tuple[int, int] | None:
        """(L', D') of one reference image's tokens; None without an image encoder."""
        return None if self.images is None else self.images.shape

    @property
    def text_encoder(self) -> Any:
        """transformers' module, loaded now if it was not before."""
        return self.text.encoder.model

    @property
    def tokenizer(self) -> Any:
        """Of the text encoder."""
        return self.text.tokenizer

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """(B, T, 3, H, W) in [0, 1] -> (B, F, C, h, w) float32, about unit variance."""
        self._check(video)
        self.latent_frames(video.shape[1])
        return self.autoencoder.encode(self._pixels(video))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, F, C, h, w) -> (B, T, 3, H, W) float32 in [0, 1]."""
        return _unit(self._decoder.decode(latents.to(self.device, torch.float32)))

    @torch.no_grad()
    def encode_next(self, video: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The pixel frames of the next latent frame, (B, t, 3, H, W) in [0, 1] -> (B, C, h, w), and the next state.

        Raises:
            ValueError: a wrong shape, or t is not 1 at first and r later.
        """
        self._check(video)
        expected = 1 if state is None else self.temporal_stride
        if video.shape[1] != expected:
            frame = 0 if state is None else state.frames
            raise ValueError(f"latent frame {frame} is of {expected} pixel frames, got {video.shape[1]}.")
        z, state = self.autoencoder.encode_next(self._pixels(video), state)
        return z[:, 0], state

    @torch.no_grad()
    def decode_next(self, latents: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The next latent frame (B, C, h, w) -> its (B, t, 3, H, W) pixel frames in [0, 1], and the next state."""
        pixels, state = self._decoder.decode_next(latents[:, None].to(self.device, torch.float32), state)
        return _unit(pixels), state

    def decoder(self) -> Stream:
        """A stream that decodes videos frame by frame: `append` is `decode_next`."""
        return Stream(self.decode_next)

    def encoder(self) -> Stream:
        """A stream that encodes videos frame by frame: `append` is `encode_next`."""
        return Stream(self.encode_next)

    def heat_map_encoder(self, height: int, width: int) -> Stream:
        """A stream that encodes a control as it is given (Eq. 6).

        `append` takes the points (B, t, K, 3) of the next latent frame's pixel frames and gives (B, C, h, w), as
        `encode_heat_maps` does for whole controls.
        """
        return Stream(partial(self._next_heat_maps, height, width))

    def encode_heat_maps(self, controls: Sequence[Control], height: int, width: int, streaming: bool = False) -> Tensor:
        """Eq. 6: controls drawn as videos and encoded like them.

        Args:
            controls: of one length.
            height, width: in pixels.
            streaming: frame by frame, which gives the very numbers of a control that is given as it is drawn.

        Returns:
            (B, F, C, h, w); zeros where a control has no points.
        """
        maps = torch.stack([c.heat_maps(height, width) for c in controls]) / 2 + 0.5  # (B, T, 3, H, W)
        if streaming:
            stream, later = self.encoder(), self.latent_frames(maps.shape[1]) - 1
            z = torch.stack([stream.append(part) for part in maps.split([1] + later * [self.temporal_stride], 1)], 1)
        else:
            z = self.encode(maps)
        empty = torch.tensor([c.points.shape[1] == 0 for c in controls], device=z.device)
        return torch.where(empty[:, None, None, None, None], 0.0, z)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> (B, L, D) float32, zeros after a prompt's end (as Wan's pipelines do)."""
        return self.text(prompts)

    def encode_images(self, images: Tensor) -> Tensor | None:
        """Reference images (B, 3, H, W) in [0, 1] -> tokens (B, L', D') float32; None without an image encoder."""
        return None if self.images is None else self.images(images)

    def _next_heat_maps(self, height: int, width: int, points: Tensor, state: State | None) -> tuple[Tensor, State]:
        z, state = self.encode_next(draw_heat_maps(points, height, width) / 2 + 0.5, state)
        return (z if points.shape[-2] else torch.zeros_like(z)), state

    def _check(self, video: Tensor) -> None:
        if video.ndim != 5 or video.shape[2] != 3:
            raise ValueError(f"video has shape {tuple(video.shape)}: expected (B, T, 3, H, W).")
        self.latent_shape(*video.shape[-2:])

    def _pixels(self, video: Tensor) -> Tensor:
        return (2 * video - 1).to(self.device)


def _unit(pixels: Tensor) -> Tensor:
    """From [-1, 1] to float32 in [0, 1]."""
    return (pixels.float() / 2 + 0.5).clamp(0, 1)


def _wrapped(vae: Any, settings: CodecSettings) -> ImageAutoencoder:
    """The autoencoder as Wan's, another one for videos, or one for images."""
    from diffusers import AutoencoderKLWan

    for asked, enable in ((settings.tiling, "enable_tiling"), (settings.slicing, "enable_slicing")):
        try:
            if asked:
                getattr(vae, enable)()
        except (AttributeError, NotImplementedError) as error:
            raise ValueError(f"{enable[7:]}=True: {type(vae).__name__} cannot do that; leave it out.") from error
    if isinstance(vae, AutoencoderKLWan):
        from ardrag_rl.codec.wan import WanAutoencoder

        return WanAutoencoder(vae)
    if temporal_stride(vae) > 1:
        return VideoAutoencoder(vae)
    return ImageAutoencoder(vae.to(memory_format=torch.channels_last))  # 2.5 times as fast for small images on a CPU


def _tiny_decoder(file: str, autoencoder: ImageAutoencoder) -> TinyDecoder:
    """The decoder in a file, if it decodes what this autoencoder encodes."""
    decoder = TinyDecoder.from_file(file).eval().requires_grad_(False)
    names = ("latent_channels", "temporal_stride", "spatial_stride")
    have, need = ({n: getattr(x, n) for n in names} for x in (decoder, autoencoder))
    if have != need:
        raise ValueError(
            f"the decoder {file!r} is of another autoencoder: it has {have}, "
            f"{type(autoencoder.vae).__name__} has {need}."
        )
    return decoder
