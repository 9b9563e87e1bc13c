"""evaluate.py: pipelines, folders of videos and the true videos on the same tasks."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ardrag_rl.codec import Codec
from ardrag_rl.envs.sprites import Sprites
from ardrag_rl.generation import generate_controlled
from ardrag_rl.media import write_video
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.rollout import Plan

SCRIPT = Path(__file__).parent.parent / "experiments" / "evaluate.py"


def test_a_video_depends_on_its_own_control_and_seed_only(tiny_pipeline):
    policy, codec = VideoPolicy.from_pretrained(tiny_pipeline), Codec.from_pretrained(tiny_pipeline)
    source = Sprites("gentle", "heldout", 4, 32, 32)
    controls = [source[i].control for i in range(3)]
    plan = Plan.all("renoise", 3)
    together = generate_controlled(policy, codec, controls, [5, 6, 7], plan)
    for i in range(3):
        alone = generate_controlled(policy, codec, [controls[i]], [5 + i], plan)[0]
        torch.testing.assert_close(alone, together[i], atol=1e-4, rtol=0)


def evaluate(pipeline, folder, *more):
    command = [sys.executable, str(SCRIPT), "--codec", str(pipeline), "--output_dir", str(folder), "--size", "5"]
    command += ["--num_frames", "4", "--batch", "3", "--tasks", "sprites:heldout", "--resamples", "20", "--shown", "2"]
    return subprocess.run([*command, *more], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_table_of_pipelines_folders_and_the_truth(tiny_pipeline, tmp_path):
    source = Sprites("gentle", "heldout", 4, 32, 32)
    videos = tmp_path / "videos"
    videos.mkdir()
    for i in range(6):
        write_video(videos / f"{i:03d}.mp4", source.video(i))
    methods = [f"random={tiny_pipeline},{tiny_pipeline}", "codec=data", f"files={videos}"]
    out = tmp_path / "out"
    done = evaluate(tiny_pipeline, out, "--latency_repeats", "1", "--write_videos", "true", "--methods", *methods)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    rows = results["rows"]
    assert list(rows) == ["random", "codec", "files"] and list(results["scorers"]) == [
        "fid",
        "fvd",
        "aesthetic",
        "motion",
    ]
    assert [rows[m]["fid"]["n"] for m in rows] == [10, 5, 5]  # two runs are pooled
    for column in ("fid", "fvd", "motion_error"):
        assert rows["files"][column]["mean"] < rows["random"][column]["mean"], column
    assert len(results["latency"]["random"]) == 2 and results["latency"]["files"] == []
    lines = (out / "table.md").read_text().splitlines()
    assert len(lines) == 5 and lines[4].startswith("| files | 5 |") and lines[4].endswith("| - | - |")
    assert (out / "videos.gif").stat().st_size > 1000
    assert len(list((out / "videos").glob("*/00004.mp4"))) == 3

    # measured once; another call with one more method measures that one
    kept = {p: p.stat().st_mtime_ns for p in (out / "measured").iterdir()}
    again = evaluate(tiny_pipeline, out, "--write_videos", "true", "--methods", *methods[1:], f"new={videos}")
    assert again.returncode == 0, again.stderr
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert json.loads((out / "results.json").read_text())["rows"]["files"] == rows["files"]
    with np.load(next(iter(kept)), allow_pickle=False) as file:
        assert {"fid", "weights"}.isdisjoint(file.files) and "frame_features" in file.files

    write_video(videos / "004.mp4", source.video(5))  # another video of this name: measured anew
    changed = evaluate(tiny_pipeline, out, "--shown", "0", "--methods", f"files={videos}")
    assert changed.returncode == 0, changed.stderr
    assert json.loads((out / "results.json").read_text())["rows"]["files"]["fid"] != rows["files"]["fid"]

    (videos / "004.mp4").unlink()
    missing = evaluate(tiny_pipeline, tmp_path / "other", "--methods", f"files={videos}")
    assert missing.returncode and "lacks the videos of 1 of 5 tasks, the first of them 4" in missing.stderr


@pytest.mark.slow
def test_methods_without_a_source_are_refused(tiny_pipeline, tmp_path):
    done = evaluate(tiny_pipeline, tmp_path, "--methods", "tiny")
    assert done.returncode and "expected NAME=SOURCE" in done.stderr
