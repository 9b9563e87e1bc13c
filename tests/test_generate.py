"""One image and a drag path in, a video out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ardrag_rl
from ardrag_rl.media import read_video, write_image

ROOT = Path(__file__).parent.parent
DRAG = [[[0.2, 0.5], [0.8, 0.5]]]


def test_the_same_seed_gives_the_same_video(tiny_pipeline):
    image = torch.rand(3, 48, 40, generator=torch.Generator().manual_seed(0))
    video = ardrag_rl.generate(tiny_pipeline, image, DRAG, "a red square", seed=1, num_frames=3)
    again = ardrag_rl.generate(tiny_pipeline, image, DRAG, "a red square", seed=1, num_frames=3)
    other = ardrag_rl.generate(tiny_pipeline, image, DRAG, "a red square", seed=2, num_frames=3)
    assert video.shape == (3, 3, 32, 32) and video.min() >= 0 and video.max() <= 1
    assert torch.equal(video, again) and not torch.equal(video, other)


def test_the_path_matters(tiny_pipeline):
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    right = ardrag_rl.generate(tiny_pipeline, image, DRAG, num_frames=2)
    left = ardrag_rl.generate(tiny_pipeline, image, [[[0.8, 0.5], [0.2, 0.5]]], num_frames=2)
    assert not torch.equal(right, left)


def test_what_cannot_be_generated_is_refused(tiny_pipeline, tmp_path):
    policy = ardrag_rl.VideoPolicy.from_pretrained(tiny_pipeline)
    policy.source = None
    with pytest.raises(ValueError, match="no pipeline folder"):
        ardrag_rl.generate(policy, torch.zeros(3, 32, 32), DRAG)
    with pytest.raises(ValueError, match="num_frames=0"):
        ardrag_rl.generate(tiny_pipeline, torch.zeros(3, 32, 32), DRAG, num_frames=0)
    with pytest.raises(ValueError, match="height=0"):
        ardrag_rl.generate(tiny_pipeline, torch.zeros(3, 32, 32), DRAG, height=0)
    drag = {"points": [[[10, 10], [40, 30]]], "units": "pixels"}
    (tmp_path / "drag.json").write_text(json.dumps(drag))
    with pytest.raises(ValueError, match=r"drag.json'.*touched at \[40.0, 30.0\] px, outside the image of 32 x 32"):
        ardrag_rl.generate(tiny_pipeline, torch.zeros(3, 32, 32), tmp_path / "drag.json")


@pytest.mark.slow
def test_the_script_writes_a_video(tiny_pipeline, tmp_path):
    write_image(tmp_path / "photo.png", torch.rand(3, 50, 60))
    (tmp_path / "drag.json").write_text(json.dumps({"points": [[[10, 10], [40, 30]]], "units": "pixels"}))
    command = [sys.executable, str(ROOT / "experiments/generate.py"), "--image", str(tmp_path / "photo.png")]
    command += ["--drag", str(tmp_path / "drag.json"), "--pipeline", str(tiny_pipeline), "--num_frames", "4"]
    command += ["--output", str(tmp_path / "video.mp4"), "--draw", "true"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert len(read_video(tmp_path / "video.mp4")) == 4


def test_a_gif_keeps_the_colour_of_small_things(tmp_path):
    from PIL import Image

    from ardrag_rl.media import write_gif

    video = 0.2 + 0.4 * torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    orange = torch.tensor([0.95, 0.58, 0.15])
    video[0, :, 60:63, 60:63] = orange[:, None, None]
    write_gif(tmp_path / "a.gif", video)
    seen = torch.tensor(Image.open(tmp_path / "a.gif").convert("RGB").getpixel((62, 62))) / 255
    assert (seen - orange).abs().max() < 0.1
