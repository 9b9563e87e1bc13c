"""One image and a drag path in, a video out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ardrag_rl import hub
from ardrag_rl.codec import Codec, CodecSettings
from ardrag_rl.codec.side_stream import side_stream
from ardrag_rl.control import Control
from ardrag_rl.envs.fit import fit
from ardrag_rl.envs.tasks import image_task
from ardrag_rl.flow import randn
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.policies.chunks import Conditions
from ardrag_rl.policies.generate import generate_chunks
from ardrag_rl.policies.strategies import Strategy
from ardrag_rl.rollout import Plan


def generate(
    pipeline: str | Path | VideoPolicy,
    image: Any,
    drag: str | Path | Sequence[Any],
    prompt: str = "",
    seed: int = 0,
    num_frames: int = 16,
    height: int | None = None,
    width: int | None = None,
    kernel: str = "ode",
    device: str | torch.device = "cpu",
    codec_settings: CodecSettings | Mapping[str, Any] | None = None,
    cache: Strategy | None = None,
) -> Tensor:
    """Generates a video that follows a drag path.

    Args:
        pipeline: an embedded name, a folder, a hub id, or a policy that came from one.
        image: a file, a PIL image, an array (H, W, 3), or a tensor (3, H, W) in [0, 1]; scaled and
            centre-cropped to the pipeline's size.
        drag: a JSON file or points, as `envs.tasks.image_task` takes them; resampled to the length of the video.
        prompt: what the video shows.
        seed: of all noise; the same seed gives the same video.
        num_frames: latent frames.
        height, width: in pixels; None for the pipeline's own size.
        kernel: "ode", or "renoise" as Algorithm 1 samples.
        device: where policy and codec run.
        codec_settings: memory and speed of the codec by name; None is exact.
        cache: the caching strategy, a name such as "sink" or as `policies.strategies.make_cache` takes it; None for the
            pipeline's own.

    Returns:
        the video, (T, 3, H, W) float32 in [0, 1].

    Raises:
        ValueError: a file cannot be read, a point is malformed or outside the image, a size does not fit the codec.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames}: expected at least 1 latent frame.")
    policy, codec, height, width = open_pipeline(pipeline, height, width, device, codec_settings)
    frames = codec.pixel_frames(num_frames)
    control = fit(image_task(image, drag, prompt, frames), frames, height, width).control
    plan = Plan.all(kernel, policy.schedule.num_steps)
    return generate_controlled(policy, codec, [control], [seed], plan, cache)[0]


def open_pipeline(
    pipeline: str | Path | VideoPolicy,
    height: int | None,
    width: int | None,
    device: str | torch.device,
    codec_settings: CodecSettings | Mapping[str, Any] | None = None,
) -> tuple[VideoPolicy, Codec, int, int]:
    """Policy, codec, height and width of `generate`'s arguments.

    Raises:
        ValueError: the pipeline is unknown, or the size does not fit its codec.
    """
    policy = pipeline if isinstance(pipeline, VideoPolicy) else VideoPolicy.from_pretrained(pipeline, device)
    if policy.source is None:
        raise ValueError("the policy came from no pipeline folder, so its codec is unknown: pass the folder's name.")
    codec = Codec.from_pretrained(policy.source, policy.device, codec_settings)
    height, width = hub.pipeline_size(policy.source, height, width)
    codec.latent_shape(height, width)  # refuses a size that does not fit
    return policy, codec, height, width


def generate_controlled(
    policy: VideoPolicy,
    codec: Codec,
    controls: Sequence[Control],
    seeds: Sequence[int],
    plan: Plan,
    cache: Strategy | None = None,
) -> Tensor:
    """Videos (B, T, 3, H, W) float32 in [0, 1] on the CPU, of B controls of one size and length; a video depends on
    its own control and seed only. Control and video pass the codec frame by frame, as in `interactive`."""
    given, generators = conditions_of(codec, controls, seeds, policy.device)
    decoder, aside = codec.decoder(), side_stream(codec.device)

    def decode(latents: Tensor) -> Tensor:
        return torch.cat([decoder.append(x) for x in latents.unbind(1)], 1)

    chunks = generate_chunks(policy, plan, given, generators, cache)
    pixels = [aside(decode, states[:, :, -1]) for states in chunks]  # a chunk while the next one is denoised
    aside.join()
    return torch.cat(pixels, 1).cpu()  # which waits, so that no pixels are freed while they are read


def conditions_of(
    codec: Codec, controls: Sequence[Control], seeds: Sequence[int], device: torch.device
) -> tuple[Conditions, list[torch.Generator]]:
    """What B videos are generated from, and for each the generator of what its kernels draw."""
    num_frames = codec.latent_frames(controls[0].num_frames)
    images, prompts = torch.stack([c.image for c in controls]), [c.prompt for c in controls]
    height, width = images.shape[-2:]
    trajectory = codec.encode_heat_maps(controls, height, width, streaming=True)
    given, generators = uncontrolled(codec, images, prompts, num_frames, seeds, device)
    return replace(given, trajectory=trajectory), generators


def uncontrolled(
    codec: Codec,
    images: Tensor,
    prompts: Sequence[str],
    num_frames: int,
    seeds: Sequence[int],
    device: torch.device,
) -> tuple[Conditions, list[torch.Generator]]:
    """As `conditions_of`, before anything is known of the control: of images (B, 3, H, W), a trajectory of zeros."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (len(images), num_frames, *codec.latent_shape(*images.shape[-2:]))
    noise, reference = randn(shape, generators), randn(shape, generators)
    reference[:, :1] = codec.encode(images[:, None]).cpu()
    noise, reference = noise.to(device), reference.to(device)
    text, tokens = codec.encode_text(prompts), codec.encode_images(images)
    return Conditions(noise, torch.zeros_like(noise), reference, text, tokens), generators
