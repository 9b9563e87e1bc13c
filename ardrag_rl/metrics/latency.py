"""Latency: seconds until the first frame, and frames per second, of one video at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ardrag_rl.codec import Codec
from ardrag_rl.control import Control
from ardrag_rl.generation import conditions_of, generate_controlled
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.policies.generate import generate_latents
from ardrag_rl.rollout import Plan


@dataclass(frozen=True)
class Latency:
    """Medians over repeats.

    Attributes:
        first_frame: seconds from image, prompt and drag path to the pixels of the first frame; a model that denoises
            several frames together gives none before all of them.
        fps: pixel frames per second of a whole video, with encoding and decoding.
        transformer_first, transformer_fps: the same of the transformer alone.
        peak_memory: GiB of the GPU, reserved while this was measured; NaN on a CPU.
    """

    first_frame: float
    fps: float
    transformer_first: float
    transformer_fps: float
    peak_memory: float


def measure_latency(policy: VideoPolicy, codec: Codec, control: Control, repeats: int = 5) -> Latency:
    """Of one video, with all steps `ode`.

    Args:
        policy, codec: of one pipeline.
        control: fitted to a size and length the pipeline can make.
        repeats: of each measurement, after one that is not counted.
    """
    plan = Plan.all("ode", policy.schedule.num_steps)
    num_frames = codec.latent_frames(control.num_frames)
    chunk = min(policy.transformer.config["chunk_size"], num_frames)
    assert control.visible is not None
    frames = slice(0, codec.pixel_frames(chunk))
    begin = replace(control, points=control.points[frames], visible=control.visible[frames])
    if policy.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(policy.device)
    given, generators = conditions_of(codec, [control], [0], policy.device)
    start = replace(given, **{k: getattr(given, k)[:, :chunk] for k in ("noise", "trajectory", "reference")})
    first, total, first_alone, alone = (
        median_seconds(call, policy.device, repeats)
        for call in (
            lambda: generate_controlled(policy, codec, [begin], [0], plan),
            lambda: generate_controlled(policy, codec, [control], [0], plan),
            lambda: generate_latents(policy, plan, start, generators),
            lambda: generate_latents(policy, plan, given, generators),
        )
    )
    gpu = policy.device.type == "cuda"
    peak = torch.cuda.max_memory_reserved(policy.device) / 2**30 if gpu else float("nan")
    return Latency(first, control.num_frames / total, first_alone, control.num_frames / alone, peak)


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of that many calls, after one that is not counted."""
    return statistics.median([timed(call, device) for _ in range(repeats + 1)][1:])


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call; on a GPU until all that it asked for is done."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
