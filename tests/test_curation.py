"""Curation: cuts, filters and reasons on synthetic videos, and the script's dataset."""

import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from ardrag_rl.distill.curation import Curator, _movement
from ardrag_rl.distill.flow_matching import LatentClips
from ardrag_rl.envs.points import PointTracks, follow
from ardrag_rl.envs.tasks import make_tasks
from ardrag_rl.media import MediaError, frames_at, whole_rate, write_video
from ardrag_rl.rewards import TemplateTracker

SCRIPT = Path(__file__).parent.parent / "experiments" / "curate.py"
FRAMES = 8
NAME = re.compile(r"-[0-9a-f]{6}(?=\.mp4)")  # what tells files of one name apart


def scene(seed, frames=24, step=(2.0, 1.0), size=(96, 128), shake=0.0):
    """A textured picture seen through a window that moves by `step` pixels a frame; (T, 3, H, W) in [0, 1]."""
    rng = np.random.default_rng(seed)
    noise = torch.from_numpy(rng.random((1, 3, 16, 20))).float()
    picture = torch.nn.functional.interpolate(noise, (size[0] + 80, size[1] + 80), mode="bicubic").clip(0, 1)[0]
    views = []
    for t in range(frames):
        jump = rng.normal(0, shake, 2) if shake else (0, 0)
        x, y = (round(float(10 + t * s + j)) for s, j in zip(step, jump, strict=True))
        x, y = min(max(x, 0), 79), min(max(y, 0), 79)
        views.append(picture[:, y : y + size[0], x : x + size[1]])
    return torch.stack(views)


@pytest.fixture
def curator():
    return Curator(FRAMES, 12.0, ((64, 64), (48, 96)))


def clips_of(curator, path, video, fps=12):
    write_video(path, video, fps)
    return list(curator.clips(path))


def test_a_moving_scene_is_kept_and_its_tracks_move_with_it(curator, tmp_path):
    clips = clips_of(curator, tmp_path / "pan.mp4", scene(0))
    assert [c.name for c in clips] == ["pan-00000", "pan-00008", "pan-00016"]
    assert all(c.reason == "" and c.prompt == "pan" for c in clips)
    for clip in clips:
        assert clip.frames.shape == (FRAMES, 3, 64, 64) and clip.points.shape[0] == FRAMES
        moved = clip.points[-1, :, :2] - clip.points[0, :, :2]
        # the crop is 96 pixels to a side: 7 steps of (-2, -1)
        torch.testing.assert_close(moved, torch.tensor([-14.0, -7.0]).expand_as(moved) / 96, atol=0.01, rtol=0)
        assert clip.numbers["motion"] == pytest.approx(7 * 5**0.5 / 96, rel=0.1)


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        (scene(0, FRAMES, (0, 0)), "near static"),
        (0.1 * scene(0, FRAMES), "near black"),
        (torch.full((FRAMES, 3, 96, 128), 0.5), "no key point"),
        (0.5 * scene(0, FRAMES, (3, 0), shake=2.5), "jerky"),
        (torch.stack([scene(t, 1, (0, 0))[0] * 0.2 + 0.4 for t in range(FRAMES)]), "points are lost"),
        (scene(0, FRAMES - 3), "too short: 5 of 8 frames"),
    ],
)
def test_what_cannot_be_controlled_is_rejected_with_the_reason(curator, tmp_path, video, reason):
    (clip,) = clips_of(curator, tmp_path / "a.mp4", video)
    assert clip.reason == reason


def test_a_point_that_leaves_is_kept_for_as_long_as_it_is_seen():
    """Its error counts while it is followed, not where the tracker finds nothing any more."""
    xy = np.stack([np.full((16, 1), 50.0), 10 + 5.0 * np.arange(16)[:, None]], -1).astype(np.float32)  # (T, 1, 2)
    followed = (np.arange(16) < 14)[:, None]
    error = np.where(followed[1:], 0.02, 30.0).astype(np.float32)
    movement = _movement(PointTracks(xy, followed, error, (100, 100)), 0)
    assert movement["error"] == pytest.approx(0.0002) and movement["motion"] == pytest.approx(13 * 0.05)
    assert movement["jerk"] == pytest.approx(0, abs=1e-6)


def test_a_further_point_that_jumps_is_dropped(curator, tmp_path, monkeypatch):
    real = follow

    def shaken(frames, points):
        tracks = real(frames, points)
        left = tracks.xy[0, :, 0] < 48
        tracks.xy[1::2, left] += 6.0
        return tracks

    monkeypatch.setattr("ardrag_rl.distill.curation.follow", shaken)
    monkeypatch.setattr("ardrag_rl.distill.curation.choose", lambda tracks, most: best(tracks))

    def best(tracks):
        left = tracks.xy[0, :, 0] < 48
        return np.array([np.flatnonzero(left)[0], np.flatnonzero(~left)[0]])

    (clip,) = clips_of(curator, tmp_path / "pan.mp4", scene(0, FRAMES))
    assert clip.reason == "" and clip.points.shape[1] == 1 and clip.points[0, 0, 0] > 0.4


def test_clips_end_at_cuts(curator, tmp_path):
    video = torch.cat([scene(0, 10), 1 - scene(1, 4), scene(2, 9)])
    clips = clips_of(curator, tmp_path / "cuts.mp4", video)
    assert [(c.name, c.reason) for c in clips] == [
        ("cuts-00000", ""),
        ("cuts-00010", "cut: 4 of 8 frames"),
        ("cuts-00014", ""),
    ]


def test_a_clip_goes_to_the_bucket_of_its_aspect(curator, tmp_path):
    wide = clips_of(curator, tmp_path / "wide.mp4", scene(0, FRAMES, size=(70, 141)))  # odd, too
    tall = clips_of(curator, tmp_path / "tall.mp4", scene(0, FRAMES, size=(150, 90)))
    assert wide[0].frames.shape[-2:] == (48, 96) and tall[0].frames.shape[-2:] == (64, 64)


def test_other_trackers_fit(tmp_path):
    curator = Curator(FRAMES, 12.0, ((64, 64),), tracker=TemplateTracker())
    (clip,) = clips_of(curator, tmp_path / "pan.mp4", scene(0, FRAMES))
    assert clip.reason == "" and clip.numbers["error"] == 0
    moved = clip.points[-1, 0, :2] - clip.points[0, 0, :2]
    torch.testing.assert_close(moved, torch.tensor([-14.0, -7.0]) / 96, atol=0.02, rtol=0)


# --- frame rates


def write_at(path, video, times):
    """A video whose frames are shown at these milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000)
        stream.height, stream.width, stream.pix_fmt = video.shape[2], video.shape[3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for image, time in zip(video, times, strict=True):
            frame = av.VideoFrame.from_ndarray((255 * image).byte().permute(1, 2, 0).contiguous().numpy(), "rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_a_variable_frame_rate_is_sampled_in_time(tmp_path):
    grey = torch.arange(12)[:, None, None, None].expand(12, 3, 16, 16) / 12
    times = [0, 10, 20, 100, 110, 200, 300, 305, 310, 400, 480, 500]
    write_at(tmp_path / "vfr.mp4", grey, times)
    seen = [round(float(f.float().mean()) / 255 * 12) for f in frames_at(tmp_path / "vfr.mp4", 10)]
    assert seen == [0, 3, 5, 6, 9, 11]
    write_at(tmp_path / "gap.mp4", grey[:7], [0, 100, 200, 300, 1300, 1400, 1500])
    seen = [round(float(f.float().mean()) / 255 * 12) for f in frames_at(tmp_path / "gap.mp4", 10)]
    assert seen == [0, 1, 2, *[3] * 10, 4, 5, 6]


def test_every_kth_frame_of_a_steady_video(tmp_path):
    grey = torch.arange(12)[:, None, None, None].expand(12, 3, 16, 16) / 12
    write_video(tmp_path / "a.mp4", grey, 30)
    assert whole_rate(tmp_path / "a.mp4", 12) == 15 and whole_rate(tmp_path / "a.mp4", 60) == 30
    seen = [round(float(f.float().mean()) / 255 * 12) for f in frames_at(tmp_path / "a.mp4", 15)]
    assert seen == [0, 2, 4, 6, 8, 10]
    with pytest.raises(ValueError, match="fps=0"):
        list(frames_at(tmp_path / "a.mp4", 0))


def test_unreadable_files_say_so(curator, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(MediaError, match=r"a\.mp4"):
        list(curator.clips(tmp_path / "a.mp4"))


# --- the script


def curate(raw, out, *more):
    command = [sys.executable, str(SCRIPT), "--videos", str(raw), "--output_dir", str(out), "--num_frames", str(FRAMES)]
    return subprocess.run([*command, "--workers", "1", *more], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_folder_becomes_a_dataset(tmp_path, tiny_pipeline):
    from datasets import load_dataset

    from ardrag_rl.codec import Codec

    raw, out = tmp_path / "raw", tmp_path / "out"
    (raw / "more").mkdir(parents=True)
    write_video(raw / "pan.mp4", scene(0), 12)
    (raw / "pan.txt").write_text("a <b>picture</b> moves\n")
    write_video(raw / "more" / "pan.mp4", scene(1, FRAMES).mean(1, keepdim=True).expand(-1, 3, -1, -1), 12)  # grey
    write_video(raw / "still.mp4", scene(2, FRAMES, (0, 0)), 12)
    whole = (raw / "pan.mp4").read_bytes()
    (raw / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (raw / "empty.mp4").write_bytes(b"")
    (raw / "notes.md").write_text("no video")
    first = curate(raw, out)
    assert first.returncode == 0, first.stderr
    assert "4 of 7 clips of 5 videos are kept" in first.stdout
    assert "1 rejected, near static" in first.stdout and "2 rejected, unreadable" in first.stdout
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [NAME.sub("", x["clip"]) for x in lines] == [
        f"clips/{n}.mp4" for n in ("pan-00000", "pan-00000", "pan-00008", "pan-00016")
    ]
    assert lines[1]["prompt"] == "a <b>picture</b> moves"
    table = load_dataset(
        "parquet", data_files=str(out / "tracks.parquet"), split="train", cache_dir=str(tmp_path / "c")
    )
    assert table["name"] == [Path(x["clip"]).stem for x in lines] and table["tracks"] == [x["tracks"] for x in lines]
    page = (out / "index.html").read_text()
    assert "a &lt;b&gt;picture&lt;/b&gt; moves" in page and "<b>picture" not in page
    assert page.count("<section") == 7 and page.count("<input type=") == 4 and "empty.mp4" in page

    # a task source, and what the teacher is trained on
    source = make_tasks(f"{out / 'manifest.jsonl'}:all", FRAMES, 32, 32)
    assert len(source) == 4 and source.video(0).shape == (FRAMES, 3, 32, 32)
    assert (source.video(1)[0] - source[1].control.image).abs().mean() < 0.02
    data = LatentClips(tmp_path / "latents", Codec.from_pretrained(tiny_pipeline), source, 4)
    assert data[3]["latents"].shape == (FRAMES, 4, 8, 8) and data[3]["trajectory"].abs().sum() > 0

    # struck out by hand; no video is read again, even if it is gone
    name = Path(lines[2]["clip"]).stem
    (out / "rejected.txt").write_text(f"{name}\n")
    records = {p: p.stat().st_mtime_ns for p in (out / "records").iterdir()}
    again = curate(raw, out)
    assert "3 of 7 clips" in again.stdout and {p: p.stat().st_mtime_ns for p in records} == records
    assert name not in (out / "manifest.jsonl").read_text()
    assert f'{name}" checked' in (out / "index.html").read_text()
    (out / "rejected.txt").write_text("nobody\n")
    assert "names 'nobody', which is no clip" in curate(raw, out).stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sizes", "64"), "expected WIDTHxHEIGHT"),
        (("--tracker", "cotracker"), "needs --cotracker, a local file"),
        (("--tracker", "raft"), "expected opencv or cotracker"),
    ],
)
@pytest.mark.slow
def test_bad_settings_are_refused(tmp_path, flags, message):
    write_video(tmp_path / "a.mp4", scene(0, FRAMES), 12)
    done = curate(tmp_path, tmp_path / "out", *flags)
    assert done.returncode and message in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_folder_without_videos_is_refused(tmp_path):
    assert "holds no video" in curate(tmp_path, tmp_path / "out").stderr
    assert "there is no such folder" in curate(tmp_path / "none", tmp_path / "out").stderr
