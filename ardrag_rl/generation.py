"""One image and a drag path in, a video out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ardrag_rl import hub
from ardrag_rl.codec import Codec
from ardrag_rl.control import Control
from ardrag_rl.envs.fit import fit
from ardrag_rl.envs.tasks import image_task
from ardrag_rl.flow import randn
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.policies.chunks import Conditions
from ardrag_rl.policies.generate import generate_latents
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
        cache: the caching strategy, a name such as "sink" or as `policies.strategies.make_cache` takes it; None for the
            pipeline's own.

    Returns:
        the video, (T, 3, H, W) float32 in [0, 1].

    Raises:
        ValueError: a file cannot be read, a point is malformed or outside the image, a size does not fit the codec.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames}: expected at least 1 latent frame.")
    policy, codec, height, width = open_pipeline(pipeline, height, width, device)
    frames = codec.pixel_frames(num_frames)
    control = fit(image_task(image, drag, prompt, frames), frames, height, width).control
    plan = Plan.all(kernel, policy.schedule.num_steps)
    return generate_controlled(policy, codec, [control], [seed], plan, cache)[0]


def open_pipeline(
    pipeline: str | Path | VideoPolicy, height: int | None, width: int | None, device: str | torch.device
) -> tuple[VideoPolicy, Codec, int, int]:
    """Policy, codec, height and width of `generate`'s arguments.

    Raises:
        ValueError: the pipeline is unknown, or the size does not fit its codec.
    """
    policy = pipeline if isinstance(pipeline, VideoPolicy) else VideoPolicy.from_pretrained(pipeline, device)
    if policy.source is None:
        raise ValueError("the policy came from no pipeline folder, so its codec is unknown: pass the folder's name.")
    codec = Codec.from_pretrained(policy.source, policy.device)
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
    latents = generate_latents(policy, plan, given, generators, cache)[:, :, -1]
    decoder = codec.decoder()
    return torch.cat([decoder.append(x) for x in latents.unbind(1)], 1).cpu()


def conditions_of(
    codec: Codec, controls: Sequence[Control], seeds: Sequence[int], device: torch.device
) -> tuple[Conditions, list[torch.Generator]]:
    """What B videos are generated from, and for each the generator of what its kernels draw."""
    num_frames = codec.latent_frames(controls[0].num_frames)
    images, prompts = torch.stack([c.image for c in controls]), [c.prompt for c in controls]
    given, generators = uncontrolled(codec, images, prompts, num_frames, seeds, device)
    trajectory = torch.stack([encode_control(codec, controls, m) for m in range(num_frames)], 1)
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
    return Conditions(noise, torch.zeros_like(noise), reference, codec.encode_text(prompts)), generators


def encode_control(codec: Codec, controls: Sequence[Control], frame: int) -> Tensor:
    """The controls' heat maps in one latent frame, (B, C, h, w), from their points up to it: the numbers are the same
    whether or not later points are there."""
    stop = codec.pixel_frames(frame + 1)
    start = 0 if codec.video else stop - 1  # an image codec has no memory
    seen = [replace(c, points=c.points[start:stop], visible=c.visible[start:stop]) for c in controls]  # type: ignore[index]
    return codec.encode_heat_maps(seen, *controls[0].image.shape[-2:])[:, -1]
