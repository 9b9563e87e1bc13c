"""How good videos are: the columns of the paper's tables, for pipelines and for videos that any other system made.

    python experiments/evaluate.py --methods "AR-Drag=runs/grpo" base=tiny
    python experiments/evaluate.py --methods "w/o RL=runs/s0,runs/s1,runs/s2" "true videos=data" other=path/to/videos

A method is a name and, after "=", one or more pipelines (runs of it, say of other seeds, separated by commas), or
folders of videos. Pipelines make the same held-out tasks with the same noise. A folder holds a video for each task,
named by its number: 0.mp4, 00001.mp4 (`--write_videos true` writes such folders). `data` are the true videos, through
the codec.

FID and FVD compare with the true videos of the same tasks, by the embedded networks or, with `--inception` and `--i3d`,
by those of the literature; only distances by the same networks compare. Intervals are 95 % bootstraps over runs and
tasks; a distance is to the true videos of the tasks drawn. What was measured is kept in `output_dir`, and a second call
measures only what is new.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from trl import TrlParser

from ardrag_rl import hub
from ardrag_rl.codec import Codec
from ardrag_rl.control import Control
from ardrag_rl.envs import draw_drag
from ardrag_rl.envs.fit import Crop, fit
from ardrag_rl.envs.tasks import make_tasks
from ardrag_rl.generation import generate_controlled
from ardrag_rl.media import VIDEO_SUFFIXES, read_video, write_gif, write_video
from ardrag_rl.metrics import (
    Distance,
    Latency,
    Mean,
    Scorer,
    Scores,
    bootstrap_interval,
    load_features,
    measure_latency,
)
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.rewards import Aesthetic, CoTracker, Motion
from ardrag_rl.rollout import Plan
from ardrag_rl.training.config import CODEC_HELP, json_object
from ardrag_rl.training.report import Interval

DATA = "data"  # the method whose videos are the true ones
COLUMNS = {  # name -> heading, decimals
    "fid": ("FID ↓", 3),
    "fvd": ("FVD ↓", 3),
    "aesthetic": ("aesthetic ↑", 2),
    "smoothness": ("smoothness ↑", 3),
    "consistency": ("motion consistency ↑", 2),
    "motion_error": ("motion error, px ↓", 2),
    "dynamic_degree": ("dynamic degree", 4),
}


@dataclass
class EvaluateArguments:
    """What is evaluated, on what."""

    methods: list[str] = field(
        metadata={"help": 'NAME=SOURCE[,SOURCE...]; a source is a pipeline, a folder, or "data".'}
    )
    tasks: str = field(default="sprites-hard:heldout", metadata={"help": "A name, a manifest, or a folder of clips."})
    size: int = field(default=256, metadata={"help": "Tasks, at most as many as there are."})
    batch: int = field(default=32, metadata={"help": "Videos generated at once."})
    num_frames: int = field(default=16, metadata={"help": "Latent frames."})
    height: int | None = field(default=None, metadata={"help": "Pixels; unset: the pipeline's own."})
    width: int | None = field(default=None, metadata={"help": "Pixels; unset: the pipeline's own."})
    codec: str = field(default="tiny", metadata={"help": 'Pipeline whose codec "data" goes through, and whose size.'})
    kernel: str = field(default="ode", metadata={"help": "Of all steps: ode, or renoise as Algorithm 1 samples."})
    seed: int = field(default=0, metadata={"help": "Of all noise."})
    inception: str | None = field(default=None, metadata={"help": "InceptionV3's weights, for FID."})
    i3d: str | None = field(default=None, metadata={"help": "I3D's torchscript, for FVD."})
    tower: str | None = field(default=None, metadata={"help": "Of the aesthetic score, as ViT-L-14-quickgelu."})
    tower_weights: str | None = field(default=None, metadata={"help": "The tower's file."})
    head: str | None = field(default=None, metadata={"help": "LAION's head."})
    cotracker: str | None = field(default=None, metadata={"help": "CoTracker3's weights, for motion."})
    codec_settings: dict[str, Any] | str | None = field(default=None, metadata=CODEC_HELP)
    resamples: int = field(default=200, metadata={"help": "Of the bootstrap."})
    latency_repeats: int = field(default=5, metadata={"help": "Of the latency; 0: not measured."})
    shown: int = field(default=5, metadata={"help": "Tasks shown in videos.gif."})
    write_videos: bool = field(default=False, metadata={"help": "Write every video below output_dir."})
    device: str = field(default="cpu", metadata={"help": "Where pipelines run."})
    output_dir: str = field(default="runs/evaluate", metadata={"help": "Folder of the results."})

    def __post_init__(self) -> None:
        self.codec_settings = json_object(self.codec_settings, "codec_settings", '{"slicing": true}')


@dataclass(frozen=True)
class Result:
    """Of one source: its scores, how fast it is (None for videos), and the first few videos (k, T, 3, H, W)."""

    scores: Scores
    latency: Latency | None
    videos: Tensor


class Evaluator:
    """The same tasks for every source."""

    def __init__(self, args: EvaluateArguments) -> None:
        self.args, self.folder = args, Path(args.output_dir)
        self.codec = Codec.from_pretrained(args.codec, args.device, args.codec_settings)
        self.size = hub.pipeline_size(hub.pipeline_path(args.codec), args.height, args.width)
        self.num_pixel_frames = self.codec.pixel_frames(args.num_frames)
        self.source = make_tasks(args.tasks, self.num_pixel_frames, *self.size)
        if not hasattr(self.source, "video"):
            raise SystemExit(f"--tasks {args.tasks}: there are no true videos of these tasks to compare with.")
        self.count = min(args.size, len(self.source))
        networks = load_features("frame", args.inception, args.device), load_features("clip", args.i3d, args.device)
        aesthetic = Aesthetic(args.tower, args.tower_weights, args.head, args.device) if args.tower else None
        motion = Motion(CoTracker(args.cotracker, args.device)) if args.cotracker else None
        self.scorer = Scorer(*networks, aesthetic, motion)
        self.scorers = {
            "fid": self.scorer.frame.name,
            "fvd": self.scorer.clip.name,
            "aesthetic": f"{self.scorer.aesthetic.tower} {self.scorer.aesthetic.head or ''}".strip(),
            "motion": repr(self.scorer.motion.tracker),
        }
        self.reference = self._measure("reference", self._true_videos())

    def __call__(self, source: str) -> Result:
        """Measured, or what was measured before."""
        if source == DATA:
            return self._measure(source, self._reconstructions(), stamp(hub.pipeline_path(self.args.codec)))
        folder = Path(source)
        if folder.is_dir() and not (folder / "model_index.json").is_file():
            return self._measure(source, self._files(folder), stamp(folder))
        key = [stamp(hub.pipeline_path(source)), self.args.kernel, self.args.seed, self.args.latency_repeats]
        key += [f.name for f in fields(Latency)]
        return self._measure(source, None, key)

    def _measure(
        self, source: str, videos: Iterator[tuple[Tensor, list[Control]]] | None, own: object = None
    ) -> Result:
        key = {
            "source": source,
            "tasks": [self.args.tasks, stamp(Path(self.args.tasks.rpartition(":")[0] or self.args.tasks))],
            "count": self.count,
            "frames": self.num_pixel_frames,
            "size": self.size,
            "scorers": self.scorers,
            "codec_settings": self.args.codec_settings,
            "shown": self.args.shown,
            "written": self.args.write_videos,
            "own": own,
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        file = self.folder / "measured" / f"{name}.npz"
        if file.is_file():
            with np.load(file, allow_pickle=False) as kept:
                scores = Scores(**{f.name: kept[f.name] for f in fields(Scores)})
                latency = Latency(*kept["latency"].tolist()) if len(kept["latency"]) else None
                return Result(scores, latency, torch.from_numpy(kept["videos"]).float() / 255)
        latency = None
        if videos is None:
            policy = VideoPolicy.from_pretrained(source, self.args.device)
            codec = Codec.from_pretrained(source, self.args.device, self.args.codec_settings)
            if self.args.latency_repeats:
                latency = measure_latency(policy, codec, self._controls(range(1))[0], self.args.latency_repeats)
            videos = self._generated(policy, codec)
        parts, shown, done = [], [], 0
        with tqdm(total=self.count, desc=source, unit="video") as bar:
            for video, controls in videos:
                parts.append(self.scorer(video, controls))
                shown.append(video[: max(0, self.args.shown - done)])
                if self.args.write_videos and source != "reference":
                    self._write(source, video, done)
                done += len(video)
                bar.update(len(video))
        result = Result(Scores.concatenate(parts), latency, torch.cat(shown))
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial.npz")
        np.savez(
            partial,
            **{f.name: getattr(result.scores, f.name) for f in fields(Scores)},
            latency=np.array([] if latency is None else list(asdict(latency).values())),
            videos=(255 * result.videos).round().byte().numpy(),
        )
        partial.replace(file)
        return result

    def _batches(self) -> Iterator[range]:
        return (range(a, min(a + self.args.batch, self.count)) for a in range(0, self.count, self.args.batch))

    def _controls(self, rows: range) -> list[Control]:
        return [fit(self.source[i], self.num_pixel_frames, *self.size).control for i in rows]

    def _true_videos(self) -> Iterator[tuple[Tensor, list[Control]]]:
        for rows in self._batches():
            yield torch.stack([self.source.video(i) for i in rows]), self._controls(rows)

    def _reconstructions(self) -> Iterator[tuple[Tensor, list[Control]]]:
        for video, controls in self._true_videos():
            yield self.codec.decode(self.codec.encode(video)).cpu(), controls

    def _generated(self, policy: VideoPolicy, codec: Codec) -> Iterator[tuple[Tensor, list[Control]]]:
        plan = Plan.all(self.args.kernel, policy.schedule.num_steps)
        for rows in self._batches():
            controls = self._controls(rows)
            seeds = [int(np.random.SeedSequence([self.args.seed, i]).generate_state(1)[0]) for i in rows]
            yield generate_controlled(policy, codec, controls, seeds, plan), controls

    def _files(self, folder: Path) -> Iterator[tuple[Tensor, list[Control]]]:
        files = {int(p.stem): p for p in folder.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES and p.stem.isdigit()}
        missing = [i for i in range(self.count) if i not in files]
        if missing:
            raise SystemExit(
                f"{folder} lacks the videos of {len(missing)} of {self.count} tasks, the first of them {missing[0]}: "
                "expected files such as 0.mp4 or 00001.mp4, or a smaller --size."
            )
        for rows in self._batches():
            videos = [read_video(files[i], 0, self.num_pixel_frames) for i in rows]
            yield torch.stack([Crop(v.shape[-2:], self.size).images(v) for v in videos]), self._controls(rows)

    def _write(self, source: str, videos: Tensor, first: int) -> None:
        folder = self.folder / "videos" / source.strip("/").replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        for i, video in enumerate(videos, first):
            write_video(folder / f"{i:05d}.mp4", video)

    def draw(self, path: Path, methods: dict[str, list[Result]]) -> None:
        """A row for each method, its first run; the true videos on top."""
        controls = self._controls(range(min(self.args.shown, self.count)))
        rows = [self.reference.videos, *(runs[0].videos for runs in methods.values())]

        def picture(t: int) -> np.ndarray:
            tiles = [[draw_drag(v[t], c, t, size=128) for v, c in zip(row, controls, strict=True)] for row in rows]
            return np.concatenate([np.concatenate(line, 1) for line in tiles], 0)

        write_gif(path, np.stack([picture(t) for t in range(self.num_pixel_frames)]), 8)


def stamp(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of the files of a folder, or of one file: what was measured of others does not count."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] * path.is_file()
    return [(str(p.relative_to(path.parent)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def summarise(runs: list[Result], reference: Scores, resamples: int) -> dict[str, Interval]:
    """Column -> interval; a column without values is left out."""
    columns = {
        "fid": [Distance(reference.frame_features, r.scores.frame_features) for r in runs],
        "fvd": [Distance(reference.clip_features, r.scores.clip_features) for r in runs],
        **{name: [Mean(getattr(r.scores, name)) for r in runs] for name in list(COLUMNS)[2:]},
    }
    intervals = {k: bootstrap_interval(v, len(reference), resamples=resamples) for k, v in columns.items()}
    for name in list(COLUMNS)[2:]:  # of the tasks that have a score
        count = int(sum(np.isfinite(getattr(r.scores, name)).sum() for r in runs))
        intervals[name] = replace(intervals[name], n=count)
    return {name: interval for name, interval in intervals.items() if np.isfinite(interval.mean)}


def table(rows: dict[str, dict[str, Interval]], latencies: dict[str, list[Latency]]) -> str:
    """Markdown."""
    head = ["method", "videos", *(heading for heading, _ in COLUMNS.values()), "first frame, s ↓", "frames/s ↑"]
    lines = [head, ["---"] * len(head)]
    for name, row in rows.items():
        cells = [name, str(row["aesthetic"].n)]
        for column, (_, digits) in COLUMNS.items():
            x = row.get(column)
            cells.append("-" if x is None else f"{x.mean:.{digits}f} [{x.low:.{digits}f}, {x.high:.{digits}f}]")
        some = latencies[name]
        cells += (
            [f"{np.mean([x.first_frame for x in some]):.3f}", f"{np.mean([x.fps for x in some]):.1f}"]
            if some
            else ["-"] * 2
        )
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Measure, and write table.md, results.json and videos.gif."""
    (args,) = TrlParser((EvaluateArguments,)).parse_args_and_config()
    if bad := [m for m in args.methods if "=" not in m]:
        raise SystemExit(f"--methods {bad[0]}: expected NAME=SOURCE, with commas between several sources.")
    evaluator = Evaluator(args)
    methods = {}
    for method in args.methods:
        name, _, sources = method.partition("=")
        methods[name] = [evaluator(source) for source in sources.split(",")]
    rows = {name: summarise(runs, evaluator.reference.scores, args.resamples) for name, runs in methods.items()}
    latencies = {name: [r.latency for r in runs if r.latency is not None] for name, runs in methods.items()}
    text = table(rows, latencies)
    evaluator.folder.mkdir(parents=True, exist_ok=True)
    (evaluator.folder / "table.md").write_text(text + "\n")
    hub.write_json(
        evaluator.folder / "results.json",
        {
            "settings": vars(args),
            "scorers": evaluator.scorers,
            "rows": {name: {k: asdict(v) for k, v in row.items()} for name, row in rows.items()},
            "latency": {name: [asdict(x) for x in some] for name, some in latencies.items()},
        },
    )
    if args.shown:
        evaluator.draw(evaluator.folder / "videos.gif", methods)
    print(f"\n{text}\n\n{evaluator.folder}/: table.md, results.json, videos.gif, measured/")


if __name__ == "__main__":
    main()
