"""A folder of raw videos in, a dataset with drag paths out.

    python experiments/curate.py --videos path/to/raw --output_dir runs/curated
    python experiments/curate.py --videos path/to/raw --output_dir data/wan --num_frames 81 --fps 16 \\
        --sizes 480x368 400x400 368x480 640x368 368x640 --tracker cotracker --cotracker scaled_offline.pth

Videos are brought to about one frame rate, cut at shots and into clips, resized to the bucket of the nearest aspect;
key points are tracked, and clips that a drag path cannot control are rejected with the reason. The output folder holds

- manifest.jsonl, a task source: `--tasks runs/curated/manifest.jsonl` of grpo.py, distill.py and evaluate.py; where
  there are several sizes also one of each, such as manifest-480x368.jsonl;
- clips/, and tracks.parquet, which `datasets.load_dataset("parquet", data_files=...)` reads;
- index.html, a contact sheet with the tracks drawn. Strike out what should not be in the dataset, save what it says as
  rejected.txt (a name per line) in the same folder, and call the script again: it reads no video twice;
- negative_prompt.txt, which `distill.py --negative_prompt` takes the text of.

A prompt is the text of clip.txt beside clip.mp4, or else the file's name.
"""

from __future__ import annotations

import hashlib
import html
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from tqdm import tqdm
from trl import TrlParser

from ardrag_rl.control import Control
from ardrag_rl.distill.curation import NEGATIVE_PROMPT, Clip, Curator, Filters
from ardrag_rl.envs.fit import parse_size
from ardrag_rl.envs.render import draw_drag
from ardrag_rl.hub import write_json
from ardrag_rl.media import VIDEO_SUFFIXES, whole_rate, write_image, write_video


@dataclass
class CurateArguments:
    """What is curated, to what."""

    videos: str = field(metadata={"help": "Folder of raw videos, searched with its folders."})
    output_dir: str = field(default="runs/curated", metadata={"help": "Folder of the dataset."})
    num_frames: int = field(default=16, metadata={"help": "Pixel frames of a clip."})
    fps: float = field(default=12.0, metadata={"help": "Frames per second of the clips."})
    sizes: list[str] = field(default_factory=lambda: ["64x64"], metadata={"help": "Buckets, WIDTHxHEIGHT."})
    points: int = field(default=2, metadata={"help": "Control points of a clip, at most."})
    tracker: str = field(default="opencv", metadata={"help": "opencv, or cotracker."})
    cotracker: str | None = field(default=None, metadata={"help": "CoTracker3's weights."})
    brightness: float = field(default=Filters.brightness, metadata={"help": "Least mean brightness."})
    motion: float = field(default=Filters.motion, metadata={"help": "Least way of a point, in shorter sides."})
    jerk: float = field(default=Filters.jerk, metadata={"help": "Greatest mean second difference of a path."})
    followed: float = field(
        default=Filters.followed, metadata={"help": "Least share of frames a point is followed in."}
    )
    error: float = field(default=Filters.error, metadata={"help": "Greatest mean forward-backward error."})
    cut: float = field(default=Filters.cut, metadata={"help": "Difference of frames that may be a cut."})
    negative_prompt: str = field(default=NEGATIVE_PROMPT, metadata={"help": "Shared by all clips."})
    workers: int = field(default=2, metadata={"help": "Processes."})


def main() -> None:
    """Curate what is new, then write the dataset."""
    (args,) = TrlParser((CurateArguments,)).parse_args_and_config()
    folder, raw = Path(args.output_dir), Path(args.videos)
    if not raw.is_dir():
        raise SystemExit(f"--videos {raw}: there is no such folder.")
    files = sorted(p for p in raw.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
    if not files:
        raise SystemExit(f"--videos {raw}: holds no video ({', '.join(VIDEO_SUFFIXES)}).")
    curator = curator_of(args)
    for name in ("clips", "sheet", "records"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    settings = repr(curator)
    records = {file: folder / "records" / f"{key(file, raw, settings)}.json" for file in files}
    pending = [file for file in files if not records[file].is_file()]
    with tqdm(total=len(files), initial=len(files) - len(pending), desc="videos", unit="video") as bar:
        for file, clips in curate(pending, partial(curate_file, curator=curator, folder=folder, raw=raw), args.workers):
            write_json(records[file], {"file": str(file.relative_to(raw)), "clips": clips})
            bar.update()
    clips = [clip for file in files for clip in json.loads(records[file].read_text())["clips"]]
    kept = write_dataset(folder, clips, curator, args.negative_prompt)
    reasons: dict[str, int] = {}
    for clip in clips:
        if clip["reason"]:
            reason = clip["reason"].partition(":")[0]
            reasons[reason] = reasons.get(reason, 0) + 1
    print(f"{len(kept)} of {len(clips)} clips of {len(files)} videos are kept: {folder / 'manifest.jsonl'}")
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        print(f"  {count:4d} rejected, {reason}")
    print(f"Look at {folder / 'index.html'}.")


def curator_of(args: CurateArguments) -> Curator:
    """The settings, checked."""
    sizes = tuple(parse_size(text) for text in args.sizes)
    if args.num_frames < 3 or not args.fps > 0 or args.points < 1 or args.workers < 1:
        raise SystemExit("--num_frames must be 3 or more, --fps above 0, --points and --workers 1 or more.")
    if args.tracker not in ("opencv", "cotracker"):
        raise SystemExit(f"--tracker {args.tracker}: expected opencv or cotracker.")
    tracker = None
    if args.tracker == "cotracker":
        from ardrag_rl.rewards import CoTracker

        if args.cotracker is None or not Path(args.cotracker).is_file():
            raise SystemExit(f"--tracker cotracker needs --cotracker, a local file of weights; got {args.cotracker}.")
        tracker = CoTracker(args.cotracker)
    filters = Filters(**{f.name: getattr(args, f.name) for f in fields(Filters)})
    return Curator(args.num_frames, args.fps, sizes, filters, args.points, tracker)


def key(file: Path, raw: Path, settings: str) -> str:
    """Names the record of a raw video: another video or other settings have another."""
    stat = file.stat()
    sidecar = file.with_suffix(".txt")
    prompt = sidecar.read_bytes() if sidecar.is_file() else b""
    text = f"{file.relative_to(raw)}|{stat.st_size}|{stat.st_mtime_ns}|{settings}|{prompt!r}"
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def curate(files: list[Path], work: Any, workers: int) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """Files and their clips, as they are done. A file that takes its process down is tried once more, alone."""
    context = multiprocessing.get_context("spawn")
    left = set(files)
    try:
        with ProcessPoolExecutor(workers, context) as pool:
            running = {pool.submit(work, file): file for file in files}
            for done in as_completed(running):
                clips = done.result()
                left.discard(running[done])
                yield running[done], clips
    except BrokenProcessPool:
        for file in sorted(left):
            try:
                with ProcessPoolExecutor(1, context) as pool:
                    clips = pool.submit(work, file).result()
            except BrokenProcessPool:
                clips = [unusable(file, "the decoder crashed")]
            yield file, clips


def curate_file(file: Path, curator: Curator, folder: Path, raw: Path) -> list[dict[str, Any]]:
    """The records of a raw video's clips, whose files are written; of what cannot be used, the reason."""
    torch.set_num_threads(1)
    mark = key(file, raw, repr(curator))[:6]  # files of one name, or curated otherwise, stay apart
    records = []
    try:
        rate = whole_rate(file, curator.fps)
        for clip in curator.clips(file):
            records.append(write_clip(clip, f"{clip.name}-{mark}", rate, folder))
    except Exception as error:  # whatever a broken file does to a decoder: it is reported, and the others go on
        records.append(unusable(file, f"unreadable: {error}"))
    return records


def unusable(file: Path, reason: str) -> dict[str, Any]:
    """The record of a file that gave no clip."""
    return {"name": file.stem, "prompt": "", "reason": reason, "numbers": {}, "tracks": [], "size": None, "frames": 0}


def write_clip(clip: Clip, name: str, rate: float, folder: Path) -> dict[str, Any]:
    """A clip's video, if it is kept, its row of the contact sheet, and its record."""
    if not clip.reason:
        write_video(folder / "clips" / f"{name}.mp4", clip.frames, rate)
    picked = np.linspace(0, len(clip.frames) - 1, 5).round().astype(int)
    control = Control(clip.points, clip.prompt, clip.frames[0].float() / 255)
    drawn = np.concatenate([draw_drag(clip.frames[t].float() / 255, control, int(t), 160) for t in picked], 1)
    write_image(folder / "sheet" / f"{name}.jpg", torch.from_numpy(drawn).permute(2, 0, 1).float() / 255)
    tracks = [[[round(float(v), 5) for v in p] for p in path] for path in clip.points.transpose(0, 1)]
    return {
        "name": name,
        "prompt": clip.prompt,
        "reason": clip.reason,
        "numbers": clip.numbers,
        "tracks": tracks,
        "size": list(clip.frames.shape[-2:]),
        "frames": len(clip.frames),
    }


def write_dataset(
    folder: Path, clips: list[dict[str, Any]], curator: Curator, negative_prompt: str
) -> list[dict[str, Any]]:
    """Manifest, tracks and contact sheet of all clips but those that the filters or rejected.txt reject."""
    from datasets import Dataset

    file = folder / "rejected.txt"
    struck = {line.strip() for line in file.read_text().splitlines() if line.strip()} if file.is_file() else set()
    if unknown := sorted(struck - {clip["name"] for clip in clips}):
        raise SystemExit(
            f"{file} names {unknown[0]!r}, which is no clip of this dataset; see index.html for the names."
        )
    kept = [clip for clip in clips if not clip["reason"] and clip["name"] not in struck]
    for old in folder.glob("manifest*.jsonl"):
        old.unlink()
    write_manifest(folder / "manifest.jsonl", kept)
    for height, width in {tuple(c["size"]) for c in kept} if len(curator.sizes) > 1 else ():
        write_manifest(folder / f"manifest-{width}x{height}.jsonl", [c for c in kept if c["size"] == [height, width]])
    columns = ("name", "prompt", "tracks", "size", "frames")
    Dataset.from_list([{**{k: c[k] for k in columns}, **c["numbers"]} for c in kept]).to_parquet(
        str(folder / "tracks.parquet")
    )
    (folder / "negative_prompt.txt").write_text(negative_prompt + "\n")
    (folder / "index.html").write_text(contact_sheet(clips, struck, asdict(curator.filters)), encoding="utf-8")
    return kept


def write_manifest(file: Path, clips: list[dict[str, Any]]) -> None:
    """A task source, as a whole or not at all."""
    lines = [{"clip": f"clips/{c['name']}.mp4", "prompt": c["prompt"], "tracks": c["tracks"]} for c in clips]
    partial_file = file.with_suffix(".partial")
    partial_file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    partial_file.replace(file)


PAGE = """<!doctype html>
<meta charset="utf-8"><title>Curated clips</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }}
section {{ border-top: 1px solid #ddd; padding: .6rem 0 }}
section.rejected img, section.struck img {{ opacity: .45 }}
img {{ display: block; max-width: 100%; margin: .3rem 0 }}
.why {{ color: #b00 }} .numbers {{ color: #777 }}
textarea {{ width: 100%; height: 5rem }}
</style>
<h1>{kept} of {total} clips are kept</h1>
<p>Strike out what should not be in the dataset; save the names below as <code>rejected.txt</code> beside this page and
run <code>curate.py</code> again. Filters: {filters}</p>
<textarea id="names" readonly></textarea>
<p><a id="save" download="rejected.txt">Save rejected.txt</a></p>
{rows}
<script>
function update() {{
  const boxes = [...document.querySelectorAll("input[name=strike]")];
  const text = boxes.filter(b => b.checked).map(b => b.value + "\\n").join("");
  boxes.forEach(b => b.closest("section").classList.toggle("struck", b.checked));
  document.getElementById("names").value = text;
  document.getElementById("save").href = "data:text/plain;charset=utf-8," + encodeURIComponent(text);
}}
document.addEventListener("change", update);
update();
</script>
"""


def contact_sheet(clips: list[dict[str, Any]], struck: set[str], filters: dict[str, float]) -> str:
    """The page; everything that comes from files is escaped."""
    rows = []
    for clip in clips:
        name, why = html.escape(clip["name"], quote=True), html.escape(clip["reason"])
        numbers = html.escape(", ".join(f"{k} {v:.3g}" for k, v in clip["numbers"].items()))
        checked = " checked" if clip["name"] in struck else ""
        box = "" if why else f'<label><input type="checkbox" name="strike" value="{name}"{checked}> strike out</label> '
        image = f'<img loading="lazy" src="sheet/{quote(clip["name"])}.jpg" alt="{name}">' if clip["frames"] else ""
        rows.append(
            f'<section class="{"rejected" if why else "kept"}">{box}<b>{name}</b> {html.escape(clip["prompt"])} '
            f'<span class="why">{why}</span> <span class="numbers">{numbers}</span>{image}</section>'
        )
    kept = sum(not c["reason"] and c["name"] not in struck for c in clips)
    shown = html.escape(", ".join(f"{k} {v:g}" for k, v in filters.items()))
    return PAGE.format(kept=kept, total=len(clips), filters=shown, rows="\n".join(rows))


if __name__ == "__main__":
    main()
