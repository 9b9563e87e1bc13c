"""Trains the embedded feature networks, by which FID and FVD are measured at the tiny size, from nothing.

    python experiments/pretrain_features.py --kind frame     # ten minutes each on one core
    python experiments/pretrain_features.py --kind clip      # on maps of the frame network, which stays as it is

Inception and I3D learned to name what photographs and videos show; these learn to tell what sprite videos show: shape,
colour, texture, place, background, movement, and the strength of blur, noise and contrast that half of them are given.
They know nothing of any pipeline's videos, and no reward is computed from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF
from transformers import TrainingArguments
from trl import TrlParser

from ardrag_rl.distill.fit import fit
from ardrag_rl.envs.sprites import BACKGROUNDS, COLOURS, SHAPES, TEXTURES, Sprites
from ardrag_rl.metrics.features import ASSETS, SpriteFeatures

CLASSES = (len(SHAPES), len(COLOURS), len(TEXTURES), len(BACKGROUNDS), len(BACKGROUNDS))


@dataclass
class FeatureArguments:
    """Which network, and how long."""

    kind: str = field(metadata={"help": "frame or clip."})
    output_dir: str = field(default="runs/features", metadata={"help": "Folder of the checkpoints."})
    assets: str = field(default=str(ASSETS), metadata={"help": "Folder that the finished network is written to."})
    updates: int = field(default=1500, metadata={"help": "Updates."})
    batch: int = field(default=16, metadata={"help": "Clips per update; of each the frame network sees 4 frames."})
    rate: float = field(default=3e-3, metadata={"help": "Peak learning rate."})
    seed: int = field(default=0, metadata={"help": "Of everything random."})


class Shown(Dataset[dict[str, Tensor]]):
    """Sprite clips of both levels and what they show."""

    def __init__(self, clips: bool, count: int, seed: int, split: str = "train") -> None:
        self.clips, self.count = clips, count
        self.sources = [Sprites(level, split, 16, seed=seed + 1000) for level in ("gentle", "hard")]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """video (T, 3, H, W), classes (5,) and numbers (n,) of a clip, (4, n) of frames."""
        source, rng = self.sources[index % 2], np.random.default_rng(index)
        scene, video = source.scene(index), source.video(index)
        path = torch.from_numpy(scene.path).float() / 32 - 1  # (T, 2)
        steps = path.diff(dim=0)
        if self.clips and rng.random() < 0.3:  # as no sprite moves: frames out of order, or frozen
            order = rng.permutation(16) if rng.random() < 0.5 else np.minimum(np.arange(16), rng.integers(16))
            video, path = video[order], path[order]
            steps = path.diff(dim=0)
        strength = torch.from_numpy(rng.random(3) * (rng.random(3) < 0.4)).float()  # blur, noise, contrast
        if strength[0]:
            video = TF.gaussian_blur(video, [9, 9], [0.3 + 2 * float(strength[0])])
        video = video + 0.15 * strength[1] * torch.randn(video.shape, generator=torch.Generator().manual_seed(index))
        video = video.mean() + (1 - 0.6 * strength[2]) * (video - video.mean())
        classes = [scene.sprite.shape, scene.sprite.colour, scene.sprite.texture, *scene.background]
        size = torch.tensor([scene.sprite.radius / 5 - 2, scene.ripple[2] * 10, float(scene.bar is not None)])
        still = torch.cat([size, torch.tensor([float(scene.distractor is not None)]), strength])
        if self.clips:
            speed = 8 * steps.norm(dim=1)
            turn = 8 * steps.diff(dim=0).norm(dim=1)
            moved = torch.stack([speed.mean(), speed.max(), speed.std(), turn.mean(), (speed < 0.05).float().mean()])
            numbers = torch.cat([path.mean(0), path.std(0), path[-1] - path[0], 8 * steps.abs().mean(0), moved, still])
        else:
            chosen = torch.from_numpy(rng.choice(16, 4, replace=False))
            video = video[chosen]
            numbers = torch.cat([path[chosen], still.expand(4, -1)], 1)
        return {"video": video.clip(0, 1), "classes": torch.tensor(classes), "numbers": numbers}


class Telling(nn.Module):
    """Cross-entropy of the classes and squared error of the numbers."""

    def __init__(self, net: SpriteFeatures) -> None:
        super().__init__()
        self.net = net

    def forward(self, video: Tensor, classes: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """video (B, T, 3, H, W), classes (B, 5), numbers (B, [T,] n)."""
        told = self.net(video)
        *logits, values = told.split([*CLASSES, numbers.shape[-1]], -1)
        loss = 3 * (values - numbers).square().mean()
        for i, x in enumerate(logits):
            each = classes[:, i].repeat_interleave(x[0, ..., 0].numel())  # of every frame
            loss = loss + 0.2 * F.cross_entropy(x.flatten(0, -2), each)
        return {"loss": loss}


def main() -> None:
    """Train, save, and say how well it tells held-out clips."""
    (args,) = TrlParser((FeatureArguments,)).parse_args_and_config()
    if args.kind not in ("frame", "clip"):
        raise SystemExit(f"--kind {args.kind}: expected frame or clip.")
    clips = args.kind == "clip"
    data = Shown(clips, args.updates * args.batch, args.seed)
    torch.manual_seed(args.seed)
    net = SpriteFeatures(clips, num_targets=sum(CLASSES) + data[0]["numbers"].shape[-1])
    if clips:
        net.trunk.load_state_dict(SpriteFeatures.from_pretrained(Path(args.assets) / "frame").trunk.state_dict())
        net.trunk.requires_grad_(False)
    model = Telling(net)
    settings = TrainingArguments(
        output_dir=str(Path(args.output_dir) / args.kind),
        max_steps=args.updates,
        per_device_train_batch_size=args.batch,
        learning_rate=args.rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, args.updates // 10),
        weight_decay=0.01,
        use_cpu=not torch.cuda.is_available(),
        seed=args.seed,
        logging_steps=50,
        save_steps=250,
        save_total_limit=1,
        report_to="none",
        remove_unused_columns=False,
        dataloader_num_workers=1,
    )
    fit(model, data, settings)
    net.train(False).save_pretrained(Path(args.assets) / args.kind)
    held = [Shown(clips, 200, args.seed, "heldout")[i] for i in range(200)]
    with torch.no_grad():
        told = net.head(net.features(torch.stack([x["video"] for x in held])))
    parts = told.split([*CLASSES, told.shape[-1] - sum(CLASSES)], -1)
    for i, (name, logits) in enumerate(zip(("shape", "colour", "texture"), parts, strict=False)):
        truth = torch.stack([x["classes"][i] for x in held])
        right = logits.argmax(-1) == (truth if clips else truth[:, None])
        print(f"held-out {name}: {right.float().mean():.2f} right of {1 / CLASSES[i]:.2f} by chance")


if __name__ == "__main__":
    main()
