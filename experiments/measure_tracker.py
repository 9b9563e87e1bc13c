"""How well does the default tracker follow? Prints JSON.

On sprites against ground truth, in pixels at a side of 64, on frames where the task says that the point is visible.
On real clips (`--clips folder`), where there is no truth, by forward-backward consistency: corners of frame 0 are
followed to the last frame and, from where they ended, back through the reversed clip; the distance from the start is
the error.

    python experiments/measure_tracker.py --clips path/to/videos
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from torch import Tensor

from ardrag_rl.envs.sprites import LEVELS, Sprites
from ardrag_rl.rewards.tracker import TemplateTracker, first_touches


@dataclass
class Arguments:
    videos: int = field(default=200, metadata={"help": "Held-out sprite clips per level."})
    clips: str | None = field(default=None, metadata={"help": "Folder of real clips."})
    frames: int = field(default=16, metadata={"help": "Frames of a real clip."})
    corners: int = field(default=12, metadata={"help": "Points of a real clip."})


def on_sprites(level: str, videos: int, soft: bool) -> dict[str, float]:
    """Errors on held-out clips; soft ones are shrunk to 40 px and back and a little noisy, as a decoder's are."""
    source = Sprites(level, "heldout")
    video = torch.stack([source.video(i) for i in range(videos)])  # (B, T, 3, H, W)
    if soft:
        small = torch.nn.functional.interpolate(video.flatten(0, 1), (40, 40), mode="bilinear", antialias=True)
        video = torch.nn.functional.interpolate(small, video.shape[-2:], mode="bilinear").view_as(video)
        noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
        video = (video + 0.02 * noise).clip(0, 1)
    controls = [source[i].control for i in range(videos)]
    session = TemplateTracker().start(first_touches(controls))
    start = time.process_time()
    tracks = session.append(video)
    seconds = time.process_time() - start
    points = torch.stack([c.points for c in controls])
    scored = torch.stack([c.scored for c in controls])
    errors = 64 * (tracks.positions - points[..., :2]).norm(dim=-1)[scored]
    return {
        "points": int(scored.sum()),
        "median_px": round(float(errors.median()), 3),
        "p95_px": round(float(errors.quantile(0.95)), 3),
        "max_px": round(float(errors.max()), 2),
        "visible": round(float(tracks.visible[scored].float().mean()), 4),
        "ms_per_frame": round(1000 * seconds / (video.shape[0] * video.shape[1]), 3),
    }


def on_clip(video: Tensor, corners: int) -> dict[str, float]:
    """Forward-backward error of the points seen to the end, in fractions of the shorter side times 64."""
    height, width = video.shape[-2:]
    grey = (255 * video[0].mean(0)).byte().numpy()
    found = cv2.goodFeaturesToTrack(grey, corners, 0.01, min(height, width) / 12)
    xy = torch.from_numpy(found[:, 0] + 0.5) / torch.tensor([width, height])
    start = torch.cat([torch.zeros(len(xy), 1), xy], dim=-1)[None]  # (1, K, 3)
    began = time.process_time()
    there = TemplateTracker().start(start).append(video[None])
    seconds = time.process_time() - began
    end = torch.cat([torch.zeros(len(xy), 1), there.positions[0, -1]], dim=-1)[None]
    back = TemplateTracker().start(end).append(video.flip(0)[None])
    seen = there.visible[0, -1] & back.visible[0, -1]
    pixels = torch.tensor([width, height]) * (64 / min(height, width))
    errors = ((back.positions[0, -1] - xy) * pixels).norm(dim=-1)
    report = {"points": len(xy), "seen_to_the_end": round(float(there.visible[0, -1].float().mean()), 2)}
    if seen.any():
        report |= {
            "median_px_of_64": round(float(errors[seen].median()), 3),
            "p95_px_of_64": round(float(errors[seen].quantile(0.95)), 3),
            "within_3_px": round(float((errors[seen] <= 3).float().mean()), 3),
        }
    return report | {"ms_per_frame_and_point": round(1000 * seconds / len(video) / len(xy), 3)}


def decode(file: Path, frames: int, side: int) -> Tensor:
    """The first frames of a clip, (T, 3, H, W) in [0, 1], shrunk to the shorter side."""
    images = []
    with av.open(str(file)) as container:
        for frame in container.decode(video=0):
            image = frame.to_ndarray(format="rgb24")
            scale = side / min(image.shape[:2])
            size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
            images.append(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
            if len(images) == frames:
                break
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def main(args: Arguments) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    report: dict[str, object] = {}
    for level in LEVELS:
        for soft in (False, True):
            report[f"sprites-{level}{' soft' if soft else ''}"] = on_sprites(level, args.videos, soft)
    if args.clips:
        for file in sorted(Path(args.clips).glob("*.mp4")):
            for side in (64, 256):
                report[f"{file.stem} {side}"] = on_clip(decode(file, args.frames, side), args.corners)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    from trl import TrlParser

    (arguments,) = TrlParser(Arguments).parse_args_and_config()
    main(arguments)
