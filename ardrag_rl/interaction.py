"""A video made frame by frame, by a control that arrives while it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ardrag_rl.codec import Codec, CodecSettings, Stream
from ardrag_rl.control import Control
from ardrag_rl.envs.clips import frame_size, points_of
from ardrag_rl.envs.fit import Crop
from ardrag_rl.generation import open_pipeline, uncontrolled
from ardrag_rl.media import as_image
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.policies.cache import Cache
from ardrag_rl.policies.chunks import Chunk, chunk_slices
from ardrag_rl.policies.generate import denoise
from ardrag_rl.policies.strategies import Strategy
from ardrag_rl.rollout import Plan

T = TypeVar("T")


def interactive(
    pipeline: str | Path | VideoPolicy,
    image: Any,
    prompt: str = "",
    seed: int = 0,
    num_frames: int = 16,
    height: int | None = None,
    width: int | None = None,
    kernel: str = "ode",
    device: str | torch.device = "cpu",
    codec_settings: CodecSettings | Mapping[str, Any] | None = None,
    cache: Strategy | None = None,
) -> Interactive:
    """Begins a video that is steered while it is made.

        live = ardrag_rl.interactive("tiny", "photo.jpg", "a red square", seed=0)
        pixels = live.frame([[0.2, 0.5]])
        pixels = live.frame([[0.25, 0.5]])
        live.rewind(1)
        pixels = live.frame([[0.2, 0.6]])

    Args:
        pipeline, image, prompt, height, width, kernel, device, codec_settings, cache: as in `ardrag_rl.generate`.
        seed: of all noise; the video is the one that `generate_controlled` makes of the same seed, length and control.
        num_frames: latent frames that the video can have; their noise is drawn at once.

    Raises:
        ValueError: as `ardrag_rl.generate` does.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames}: expected at least 1 latent frame.")
    policy, codec, height, width = open_pipeline(pipeline, height, width, device, codec_settings)
    plan = Plan.all(kernel, policy.schedule.num_steps)
    control = Control(torch.zeros(1, 0, 3), prompt, as_image(image))
    return Interactive(policy, codec, control, seed, num_frames, (height, width), plan, cache)


class Interactive:
    """One video, a frame at a time.

    A frame is a latent frame, or as many as the transformer denoises together (`chunk_size`).

    Args:
        policy, codec: of one pipeline.
        control: image and prompt; its points do not matter.
        seed, num_frames: as in `interactive`.
        size: (height, width) of the video in pixels; the image is cropped about its centre and resized.
        plan: of every frame.
        cache: the caching strategy; None for the transformer's own.
    """

    def __init__(
        self,
        policy: VideoPolicy,
        codec: Codec,
        control: Control,
        seed: int,
        num_frames: int,
        size: tuple[int, int],
        plan: Plan,
        cache: Strategy | None = None,
    ) -> None:
        self.policy, self.codec, self.plan = policy, codec, plan
        self._drawn = control  # on the image as it is
        self._crop = Crop(frame_size(control.image), size)
        self._picture = self._crop.images(control.image).clamp(0, 1)
        self._points = torch.zeros(0, 0, 3)  # (T, K, 3) so far, on the cropped image
        self._given, (generator,) = uncontrolled(
            codec, self._picture[None], [control.prompt], num_frames, [seed], policy.device
        )
        self._chunks = tuple(chunk_slices(num_frames, policy.transformer.config["chunk_size"]))
        self._clean: list[Tensor] = []  # (1, c, C, h, w) of each frame made
        self._random = [generator.get_state()]  # before frame i, of what kernels draw
        self._strategy = cache
        self._caches: dict[int, Cache] = {}  # before frame i
        self._encoders, self._decoders = {0: codec.heat_map_encoder(*size)}, {0: codec.decoder()}
        self.switch(control.prompt)

    def __len__(self) -> int:
        """Frames made so far."""
        return len(self._clean)

    @torch.no_grad()
    def frame(self, points: Sequence[Any]) -> Tensor:
        """Makes the next frame.

        Args:
            points: for each point where it is, [x, y] or [x, y, intensity], in fractions of the width and height of
                the image as it was given; or a list of such positions, one for each of the frame's pixel frames, of
                which the last is held. An intensity left out is 1, and 0 is a point that is not touched. Every frame
                has the same points, in the same order; with none at all there is no control.

        Returns:
            its pixel frames, (t, 3, H, W) float32 in [0, 1] on the CPU.

        Raises:
            ValueError: the video is at its end, or the points are malformed or not those of the frames before.
        """
        i = len(self)
        if i == len(self._chunks):
            raise ValueError(f"the video has all its {i} frames: rewind, or begin one of a larger num_frames.")
        frames = self._chunks[i]
        so_far = self._continued(points, frames)
        encoder = self._at(self._encoders, i, self._encoded).select([0])
        for m in range(frames.start, frames.stop):
            self._given.trajectory[:, m] = encoder.append(so_far[None, self._pixels(slice(m, m + 1))])
        self._caches = {j: cache for j, cache in self._caches.items() if cache.current}
        cache, decoder = self._at(self._caches, i, self._remember), self._at(self._decoders, i, self._decoded)
        generator = torch.Generator()
        generator.set_state(self._random[i])
        clean = denoise(self._chunk(i, cache), self.plan, [generator])[:, :, -1]
        decoder = decoder.select([0])
        pixels = torch.cat([decoder.append(x) for x in clean.unbind(1)], 1)
        self._encoders[i + 1], self._decoders[i + 1] = encoder, decoder
        self._points = so_far
        self._clean.append(clean)
        self._random.append(generator.get_state())
        return pixels[0].cpu()

    def rewind(self, k: int = 1) -> None:
        """Takes back the last k frames: with the same points they come out the same.

        One or two cost nothing (with a static cache, one); more cost a clean pass (and a decoding) of every frame that
        stays, at the next `frame`.

        Raises:
            ValueError: k is not in 1..len(self).
        """
        if not 1 <= k <= len(self):
            raise ValueError(f"rewind({k}): expected 1 to {len(self)}, the number of frames made.")
        i = len(self) - k
        self._points = self._points[: self._pixels(self._chunks[i]).start]
        del self._clean[i:], self._random[i + 1 :]
        for kept in (self._caches, self._encoders, self._decoders):
            for j in [j for j in kept if j > i]:
                del kept[j]

    @torch.no_grad()
    def switch(self, prompt: str) -> None:
        """Another prompt for the frames from here on, and for those that a `rewind` takes back.

        The cache is recomputed under it, or the history would go on with the old one (LongLive's KV re-cache; of the
        whole history here, so that what comes next is what a session rebuilt from scratch gives).
        """
        text = self.codec.encode_text([prompt])
        self._given = replace(self._given, text=text)
        self._drawn = replace(self._drawn, prompt=prompt)
        self._context = self.policy.transformer.encode_context(text, self._given.image)
        self._caches = {0: self.policy.transformer.new_cache(self._strategy)}

    def _pixels(self, frames: slice) -> slice:
        """The pixel frames of latent ones."""
        return slice(self.codec.pixel_frames(frames.start) if frames.start else 0, self.codec.pixel_frames(frames.stop))

    def _continued(self, points: Sequence[Any], frames: slice) -> Tensor:
        """The points so far and these, (T, K, 3), on the cropped image."""
        pixels = self._pixels(frames)
        count = pixels.stop - pixels.start
        where = f"frame {len(self)}"
        points = points.tolist() if hasattr(points, "tolist") else points
        try:
            path = points_of([[p] if len(p) and not hasattr(p[0], "__len__") else p for p in points])
            path = Control(path, "", self._drawn.image).points  # refuses what is outside
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        if len(path) > count:
            raise ValueError(
                f"{where} has {len(path)} positions of a point: expected at most its {count} pixel frames."
            )
        if len(self) and path.shape[1] != self._points.shape[1]:
            raise ValueError(
                f"{where} has {path.shape[1]} points, those before it {self._points.shape[1]}: give every frame the "
                "same points; one that is not touched has the intensity 0."
            )
        path = path[torch.arange(count).clamp(max=len(path) - 1)]
        if self._crop.source != self._crop.target:
            path = self._crop.points(path)
        return torch.cat([self._points, path]) if len(self) else path

    def _chunk(self, i: int, cache: Cache) -> Chunk:
        return Chunk(self.policy, self._given, self._context, cache, self._chunks[i])

    def _remember(self, i: int, cache: Cache) -> Cache:
        return cache.append(self._chunk(i, cache).entries(self._clean[i]))

    def _encoded(self, i: int, encoder: Stream) -> Stream:
        encoder = encoder.select([0])
        for m in range(self._chunks[i].start, self._chunks[i].stop):
            encoder.append(self._points[None, self._pixels(slice(m, m + 1))])
        return encoder

    def _decoded(self, i: int, decoder: Stream) -> Stream:
        decoder = decoder.select([0])
        for x in self._clean[i].unbind(1):
            decoder.append(x)
        return decoder

    @staticmethod
    def _at(kept: dict[int, T], i: int, step: Callable[[int, T], T]) -> T:
        """What is there before frame i, from the latest that is kept; the first and the last two are."""
        last = max(j for j in kept if j <= i)
        value = kept[last]
        for j in range(last, i):
            value = step(j, value)
        kept[i] = value
        for j in [j for j in kept if 0 < j < i - 1]:
            del kept[j]
        return value
