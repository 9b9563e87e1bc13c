"""Trains the embedded aesthetic model from nothing: how degraded is a sprite frame, from 10 (clean) to 1?

Departs from LAION's predictor in what it learned: no person rated anything. Clean frames are degraded by known
strengths d_i in [0, 1] of several kinds, and the score is 10 - 9 (1 - prod(1 - d_i)). Tower (open_clip's
ResNet, 64x64) and linear head train together; the result is a folder that `Aesthetic` reads like LAION's files.

    python experiments/pretrain_aesthetic.py                       # add --threads 2: 9 minutes
    python experiments/pretrain_aesthetic.py --steps 50 --output runs/try --batch_size 32

A run that was stopped goes on from `<run>/checkpoint.pt` when it is started again; give another --run to start anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ardrag_rl.envs.sprites import Sprites
from ardrag_rl.rewards.aesthetic import TINY, Predictor, load_predictor

SIDE = 64
CONFIG = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {
            # a list of layers is CLIP's ResNet: a ViT of this cost, with 8x8 patches, is slow to notice blur
            "image_size": SIDE,
            "layers": [1, 1, 1, 1],
            "width": 12,
            "head_width": 64,
        },
        # open_clip builds both towers; only the image tower is used
        "text_cfg": {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1},
    },
    "preprocess_cfg": {"size": SIDE, "mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "shortest"},
}


@dataclass
class Arguments:
    output: str = field(default=str(TINY), metadata={"help": "Folder that the finished model is written to."})
    run: str = field(default="runs/pretrain_aesthetic", metadata={"help": "Folder of the checkpoint and the log."})
    steps: int = field(default=2200, metadata={"help": "Optimiser steps."})
    batch_size: int = field(default=128, metadata={"help": "Frames per step."})
    clips: int = field(default=800, metadata={"help": "Clips per level to take frames from."})
    learning_rate: float = field(
        default=2e-3, metadata={"help": "Peak rate of AdamW; warms up, then falls as a cosine."}
    )
    save_every: int = field(default=300, metadata={"help": "Steps between checkpoints."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})
    bf16: bool = field(default=False, metadata={"help": "bfloat16 autocast; for CPUs that multiply in it."})
    seed: int = field(default=0, metadata={"help": "Of everything random."})


# --- degradations: an image (H, W, 3) in [0, 1] and a strength d in [0, 1] ------------------------------------------


@dataclass(frozen=True)
class Frame:
    """A clean frame, another of its clip, and where the sprite is."""

    image: np.ndarray  # (H, W, 3) float32
    other: np.ndarray  # (H, W, 3) float32
    centre: np.ndarray  # (2,) x, y in pixels


def blur(frame: Frame, x: np.ndarray, d: float, rng: np.random.Generator) -> np.ndarray:
    """A Gaussian, or down and up again, as a soft decoder does."""
    if rng.random() < 0.5:
        return cv2.GaussianBlur(x, (0, 0), 0.25 + 3.0 * d)
    small = max(round(SIDE / (1 + 4 * d)), 8)
    up = cv2.resize(cv2.resize(x, (small, small), interpolation=cv2.INTER_AREA), (SIDE, SIDE))
    return up


def noise(frame: Frame, x: np.ndarray, d: float, rng: np.random.Generator) -> np.ndarray:
    """White, in every channel."""
    return x + 0.25 * d * rng.standard_normal(x.shape, dtype=np.float32)


def ghost(frame: Frame, x: np.ndarray, d: float, rng: np.random.Generator) -> np.ndarray:
    """A second exposure: another frame of the clip where the sprite has moved, or a shifted copy."""
    other = frame.other
    if rng.random() < 0.5 or np.abs(other - frame.image).mean() < 0.02:
        angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(3, 9)
        shift = np.array([[1, 0, length * np.cos(angle)], [0, 1, length * np.sin(angle)]], np.float32)
        other = cv2.warpAffine(x, shift, (SIDE, SIDE), borderMode=cv2.BORDER_REFLECT)
    return x + 0.5 * d * (other - x)


def saturation(frame: Frame, x: np.ndarray, d: float, rng: np.random.Generator) -> np.ndarray:
    """Too much colour and contrast, or washed out."""
    grey, mean = x.mean(-1, keepdims=True), x.mean((0, 1), keepdims=True)
    colour, contrast = (1 + 2.0 * d, 1 + 1.0 * d) if rng.random() < 0.6 else (1 - 0.7 * d, 1 - 0.7 * d)
    return mean + contrast * (grey + colour * (x - grey) - mean)


def blocks(frame: Frame, x: np.ndarray, d: float, rng: np.random.Generator) -> np.ndarray:
    """Coarse pixels, or a JPEG of low quality."""
    if rng.random() < 0.5:
        small = cv2.resize(x, (SIDE // 4, SIDE // 4), interpolation=cv2.INTER_AREA)
        return x + d * (cv2.resize(small, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST) - x)
    quality = round(3 + 77 * (1 - d) ** 2)
    data = cv2.imencode(".jpg", (255 * x.clip(0, 1)).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(data, cv2.IMREAD_COLOR).astype(np.float32) / 255


def drift(frame: Frame, x: np.ndarray, d: float, rng: np.random.Generator) -> np.ndarray:
    """The colour balance moves."""
    offset = rng.standard_normal(3).astype(np.float32)
    return x + 0.3 * d * offset / np.linalg.norm(offset)


def smear(frame: Frame, x: np.ndarray, d: float, rng: np.random.Generator) -> np.ndarray:
    """The sprite melts: a soft disc around it is mixed with a wide blur."""
    cx, cy = frame.centre + rng.normal(0, 3, 2)
    yy, xx = np.mgrid[:SIDE, :SIDE].astype(np.float32) + 0.5
    mask = 1 / (1 + np.exp((np.hypot(xx - cx, yy - cy) - rng.uniform(8, 16)) / 1.5))
    wide = cv2.GaussianBlur(x, (0, 0), rng.uniform(4, 9), sigmaY=rng.uniform(4, 9))
    return x + d * mask[..., None].astype(np.float32) * (wide - x)


def blotches(frame: Frame, x: np.ndarray, d: float, rng: np.random.Generator) -> np.ndarray:
    """Coloured stains of 4 to 16 px."""
    n = int(rng.integers(4, 17))
    field_ = rng.standard_normal((n, n, 3), dtype=np.float32)
    return x + 0.2 * d * cv2.resize(field_, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)


def grid(frame: Frame, x: np.ndarray, d: float, rng: np.random.Generator) -> np.ndarray:
    """A faint pattern that repeats every 2 to 16 px, as a model that paints patch by patch leaves it."""
    period = int(rng.choice([2, 4, 8, 8, 16]))
    tile = rng.standard_normal((period, period, 1 if rng.random() < 0.5 else 3), dtype=np.float32)
    tile = cv2.GaussianBlur(np.tile(tile, (3, 3, 1)), (0, 0), rng.uniform(0.3, 0.2 * period + 0.3))
    tile = tile.reshape(3 * period, 3 * period, -1)[period : 2 * period, period : 2 * period]
    tile = (tile - tile.mean((0, 1))) / (tile.std() + 1e-6)
    return x + 0.08 * d * np.tile(tile, (SIDE // period, SIDE // period, 1))


def sharpen(frame: Frame, x: np.ndarray, d: float, rng: np.random.Generator) -> np.ndarray:
    """Halos: the difference to a blurred copy, added."""
    return x + 2.5 * d * (x - cv2.GaussianBlur(x, (0, 0), rng.uniform(0.8, 3.0)))


Degradation = Callable[[Frame, np.ndarray, float, np.random.Generator], np.ndarray]
KINDS: tuple[Degradation, ...] = (blur, noise, ghost, saturation, blocks, drift, smear, blotches, grid, sharpen)


def degrade(frame: Frame, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """A frame degraded by none to three kinds, (H, W, 3) uint8, and its score 10 - 9 (1 - prod(1 - d_i))."""
    count = int(rng.choice(4, p=[0.08, 0.52, 0.25, 0.15]))
    if count == 0:
        return _uint8(frame.image), 10.0
    # half of the frames are only a little degraded: that is where a policy works
    severity = rng.uniform(0, 0.99) if rng.random() < 0.5 else rng.uniform(0, 0.4)
    shares = rng.dirichlet(np.ones(count)) * -math.log(1 - severity)
    x = frame.image
    for kind, share in zip(rng.choice(len(KINDS), count, replace=False), shares, strict=True):
        x = KINDS[kind](frame, x, 1 - math.exp(-share), rng).clip(0, 1)
    return _uint8(x), 10 - 9 * severity


def _uint8(x: np.ndarray) -> np.ndarray:
    return (255 * x.clip(0, 1) + 0.5).astype(np.uint8)


# --- data ------------------------------------------------------------------------------------------------------------


class Frames:
    """Clean frames of gentle and hard clips, kept as 8 bit."""

    def __init__(self, split: str, clips: int, seed: int) -> None:
        self.videos: list[np.ndarray] = []  # (T, H, W, 3)
        self.centres: list[np.ndarray] = []  # (T, 2)
        for level in ("gentle", "hard"):
            source = Sprites(level, split, seed=seed)
            for i in tqdm(range(clips), desc=f"{level} {split}", leave=False):
                self.videos.append(_uint8(source.video(i).permute(0, 2, 3, 1).numpy()))
                self.centres.append(source.scene(i).path)

    def draw(self, rng: np.random.Generator) -> Frame:
        """A random frame, mirrored or turned at random."""
        clip = int(rng.integers(len(self.videos)))
        video = self.videos[clip]
        t = int(rng.integers(len(video)))
        far = t - 3 if t >= 3 else t + 3
        image, other = (video[i].astype(np.float32) / 255 for i in (t, far))
        return Frame(image, other, self.centres[clip][t])

    def batch(self, size: int, key: list[int]) -> tuple[Tensor, Tensor]:
        """Images (size, 3, H, W) in [0, 1] and scores (size,); `key` decides everything."""
        rng = np.random.default_rng(key)
        pairs = [degrade(self.draw(rng), rng) for _ in range(size)]
        images = torch.from_numpy(np.stack([image for image, _ in pairs])).permute(0, 3, 1, 2).float() / 255
        if rng.random() < 0.5:
            images = images.flip(-1)
        images = torch.rot90(images, int(rng.integers(4)), (-2, -1))
        return images, torch.tensor([score for _, score in pairs])


# --- the model -------------------------------------------------------------------------------------------------------


def build(seed: int) -> tuple[nn.Module, Predictor]:
    """A new open_clip model and the predictor on its image tower."""
    torch.manual_seed(seed)
    clip = open_clip.model.CLIP(**json.loads(json.dumps(CONFIG["model_cfg"])))
    open_clip.model.set_model_preprocess_cfg(clip, CONFIG["preprocess_cfg"])
    head = nn.Linear(CONFIG["model_cfg"]["embed_dim"], 1)
    # unit embeddings: the weight's norm is the reach of the score around the bias
    nn.init.normal_(head.weight, std=6 / math.sqrt(head.in_features))
    nn.init.constant_(head.bias, 5.5)
    return clip, Predictor(clip.visual, head)


def save(clip: nn.Module, model: Predictor, folder: Path) -> None:
    """As a folder that `Aesthetic` and open_clip read."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, folder / "open_clip_model.safetensors")
    save_file(model.head.state_dict(), folder / "head.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


@torch.inference_mode()
def evaluate(model: nn.Module, held_out: Frames, seed: int) -> dict[str, object]:
    """Rank correlation and error on held-out frames, and the mean score of each kind by strength."""
    model.eval()
    images, scores = held_out.batch(2048, [seed, 2])
    rated = torch.cat([model(chunk) for chunk in images.split(256)])
    report: dict[str, object] = {
        "spearman": round(spearman(rated, scores), 4),
        "mean_absolute_error": round(float((rated - scores).abs().mean()), 3),
    }
    curves: dict[str, list[float]] = {}
    for kind in KINDS:
        curves[kind.__name__] = []
        for d in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0):
            rng = np.random.default_rng([seed, 3])
            frames = [held_out.draw(rng) for _ in range(128)]
            shown = [_uint8(kind(f, f.image, d, rng) if d else f.image) for f in frames]
            batch = torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2).float() / 255
            curves[kind.__name__].append(round(float(model(batch).mean()), 2))
    report["mean_score_at_strength_0_.1_.25_.5_.75_1"] = curves
    model.train()
    return report


def spearman(a: Tensor, b: Tensor) -> float:
    """Correlation of ranks."""
    ranks = torch.stack([x.argsort().argsort().float() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def main(args: Arguments) -> None:
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    run = Path(args.run)
    run.mkdir(parents=True, exist_ok=True)
    train, held_out = Frames("train", args.clips, args.seed), Frames("heldout", 100, args.seed)
    clip, model = build(args.seed)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.02)

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / 50)
        return warm * (0.01 + 0.99 * (1 + math.cos(math.pi * min(step / args.steps, 1))) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    checkpoint, start = run / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        clip.load_state_dict(state["clip"])
        model.head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]

    bar = tqdm(range(start, args.steps), initial=start, total=args.steps)
    for step in bar:
        images, scores = train.batch(args.batch_size, [args.seed, 1, step])
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            rated = model(images).float()
        loss = nn.functional.smooth_l1_loss(rated, scores)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            report = {"step": step + 1, **evaluate(model, held_out, args.seed)}
            with (run / "log.jsonl").open("a") as log:
                log.write(json.dumps(report) + "\n")
            tqdm.write(json.dumps(report))
            state = {"clip": clip.state_dict(), "head": model.head.state_dict(), "step": step + 1}
            state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    save(clip, model, Path(args.output))
    # what was written is what was measured
    written = load_predictor(args.output, None, None, "cpu")
    print(json.dumps(evaluate(written, held_out, args.seed), indent=2))


if __name__ == "__main__":
    from trl import TrlParser

    (arguments,) = TrlParser(Arguments).parse_args_and_config()
    main(arguments)
