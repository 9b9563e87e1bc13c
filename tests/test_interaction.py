"""A video steered while it is made."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image

import ardrag_rl
from ardrag_rl import Codec, Control, Plan, VideoPolicy
from ardrag_rl.generation import generate_controlled
from ardrag_rl.interaction import Interactive

FRAMES, SIZE, SEED = 6, 32, 3
IMAGE = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
PATH = [[0.2 + 0.1 * t, 0.5] for t in range(FRAMES)]  # beyond the window of 3


@pytest.fixture(scope="module")
def policy(tiny_pipeline):
    return VideoPolicy.from_pretrained(tiny_pipeline)


@pytest.fixture(scope="module")
def codec(tiny_pipeline):
    return Codec.from_pretrained(tiny_pipeline)


def begin(policy, **options):
    return ardrag_rl.interactive(policy, IMAGE, "a red square", SEED, FRAMES, **options)


def drive(live, path=PATH):
    return torch.cat([live.frame([p]) for p in path])


def batch(policy, codec, path=PATH, kernel="ode", cache=None):
    points = torch.tensor([[[*p, 1.0]] for p in path])
    control = Control(points, "a red square", IMAGE)
    return generate_controlled(policy, codec, [control], [SEED], Plan.all(kernel, 3), cache)[0]


@pytest.mark.parametrize("kernel", ["ode", "renoise"])
def test_live_is_batch(policy, codec, kernel):
    """Bit for bit: control, noise of the kernels, cache and codec pass frame by frame in both."""
    assert torch.equal(drive(begin(policy, kernel=kernel)), batch(policy, codec, kernel=kernel))


@pytest.mark.parametrize("cache", ["sink", {"name": "relative", "sink": 1}, "ema", "deep", "tether", "int8", "static"])
def test_live_is_batch_with_any_cache(policy, codec, cache):
    video = drive(begin(policy, cache=cache))
    assert torch.equal(video, batch(policy, codec, cache=cache))
    assert not torch.equal(video, drive(begin(policy)))


def test_live_is_batch_in_chunks(policy, codec):
    """With 4 chunked in 2 and a rest: points are given for all pixel frames of a chunk, or held."""
    chunked = policy.with_chunks(4)
    live = begin(chunked)
    got = torch.cat([live.frame([PATH[:4]]), live.frame([PATH[4:]])])
    assert torch.equal(got, batch(chunked, codec)) and len(live) == 2
    live.rewind(2)
    held = torch.cat([live.frame([PATH[0]]), live.frame([PATH[4]])])
    assert torch.equal(held, batch(chunked, codec, [PATH[0]] * 4 + [PATH[4]] * 2))


def test_a_codec_with_a_memory(policy, codec):
    """Wan's autoencoder, four pixel frames to a latent one: heat maps and pixels stream."""
    torch.manual_seed(0)
    c = policy.latent_channels
    vae = AutoencoderKLWan(4, None, c, [1, 1, 1, 1], 1, latents_mean=[0.1] * c, latents_std=[0.5] * c)
    codec = Codec(vae, codec.text_encoder, codec.tokenizer)
    path = [[0.1 + 0.1 * t, 0.5] for t in range(9)]
    frames = [[path[0]], path[1:5], path[5:9]]
    live = Interactive(
        policy, codec, Control(torch.zeros(1, 0, 3), "a red square", IMAGE), SEED, 3, (SIZE, SIZE), Plan.all("ode", 3)
    )
    want = batch(policy, codec, path)
    assert torch.equal(torch.cat([live.frame([p]) for p in frames]), want)
    live.rewind(3)
    live.frame([frames[0]]), live.frame([[[0.9, 0.9]]])
    live.rewind(1)
    assert torch.equal(torch.cat([live.frame([p]) for p in frames[1:]]), want[1:])


@pytest.mark.parametrize("cache", ["rolling", "static"])
def test_taking_back_one_frame_costs_no_history(policy, cache):
    live = begin(policy, cache=cache)
    for _ in range(4):
        live.frame([[0.5, 0.5]])
    passes, plain = [], policy.transformer.forward
    policy.transformer.forward = lambda *args, **more: passes.append(1) or plain(*args, **more)
    try:
        live.rewind()
        live.frame([[0.4, 0.5]])
    finally:
        del policy.transformer.forward
    assert len(passes) == policy.schedule.num_steps  # three denoising ones; nothing is written again


@pytest.mark.parametrize("k", range(1, FRAMES + 1))
@pytest.mark.parametrize("cache", ["rolling", "tether", "static"])
def test_a_rewind_with_the_same_points_gives_the_same_frames(policy, k, cache):
    live = begin(policy, kernel="renoise", cache=cache)
    video = drive(live)
    live.rewind(k)
    assert len(live) == FRAMES - k
    assert torch.equal(drive(live, PATH[FRAMES - k :]), video[FRAMES - k :])


def test_a_rewind_with_other_points_is_the_other_video(policy, codec):
    """It differs from there on, and nothing of what was taken back is left."""
    live = begin(policy)
    video = drive(live)
    path = PATH
    for k, point in ((4, [0.2, 0.9]), (1, [0.9, 0.9]), (2, [0.5, 0.1]), (3, [0.7, 0.3])):  # also what was made anew
        path = path[: FRAMES - k] + [point] * k
        live.rewind(k)
        got, want = drive(live, path[FRAMES - k :]), batch(policy, codec, path)
        assert torch.equal(got, want[FRAMES - k :]) and torch.equal(want[: FRAMES - k], video[: FRAMES - k])
        assert all(not torch.equal(a, b) for a, b in zip(got, video[FRAMES - k :], strict=True))
        video = want


def test_another_prompt_is_a_rebuild_under_it(policy, codec):
    """LongLive's re-cache: what comes next is what a fresh session says whose prompt was the new one all along."""
    live = begin(policy)
    before = drive(live, PATH[:4])
    live.switch("a blue circle")
    after = live.frame([PATH[4]])
    given = live._given
    latents = torch.cat([*live._clean[:4], given.noise[:, 4:]], 1)
    assert torch.equal(given.text, codec.encode_text(["a blue circle"]))
    obs = {"trajectory": given.trajectory, "reference": given.reference, "text": given.text}
    session = policy.session(1)
    for n in range(3):
        obs |= {"latents": latents, "frame": torch.tensor([[4]]), "step": torch.tensor([[n]])}
        latents[:, 4] = session.transition(obs, ardrag_rl.flow.Kernel("ode")).mean
    torch.testing.assert_close(after, codec.decode(latents[:, 4:5])[0], atol=1e-4, rtol=0)
    live.rewind(1)
    live.switch("a red square")
    assert torch.equal(live.frame([PATH[4]]), drive(begin(policy), PATH[:5])[4:]) and len(before) == 4


def test_points_are_fractions_of_the_image_as_it_was_given(policy, codec):
    """A wide image is cropped to its middle, and a point outside that is not touched."""
    wide = Image.new("RGB", (128, 64), "green")
    points = [[[0.5, 0.25]], [[0.75, 0.5]], [[0.1, 0.5]]]
    live = ardrag_rl.interactive(policy, wide, num_frames=3)
    got = torch.cat([live.frame(p) for p in points])
    torch.testing.assert_close(got, ardrag_rl.generate(policy, wide, [[p[0] for p in points]], num_frames=3))
    torch.testing.assert_close(live._points[:, 0], torch.tensor([[0.5, 0.25, 1], [1, 0.5, 1], [-0.3, 0.5, 0]]))


def test_no_points_are_no_control(policy):
    live = begin(policy)
    got = torch.cat([live.frame([]) for _ in range(3)])
    assert torch.equal(live._given.trajectory, torch.zeros_like(live._given.trajectory))
    assert not torch.equal(got, drive(begin(policy), PATH[:3]))


def test_what_cannot_be_a_frame_is_refused_and_changes_nothing(policy):
    live = begin(policy)
    video = drive(live, PATH[:3])
    for points, error in {
        ((0.5, 1.5),): r"frame 3: .*coordinate 1.5, outside \[0, 1\]",
        ((0.5, 0.5, 2.0),): r"frame 3: an intensity of 2.0",
        ((0.5,),): r"frame 3: point 0: expected a list of \[x, y\]",
        ((float("nan"), 0.5),): r"frame 3: points hold NaN",
        ((0.1, 0.1), (0.2, 0.2)): r"frame 3 has 2 points, those before it 1: .*intensity 0",
        (): "frame 3 has 0 points",
        (((0.1, 0.1), (0.2, 0.2)),): "frame 3 has 2 positions of a point: expected at most its 1 pixel frames",
        None: "frame 3: .*not iterable",
    }.items():
        with pytest.raises(ValueError, match=error):
            live.frame(points)
    for k in (0, 4, -1):
        with pytest.raises(ValueError, match=rf"rewind\({k}\): expected 1 to 3"):
            live.rewind(k)
    assert torch.equal(torch.cat([video, drive(live, PATH[3:])]), drive(begin(policy)))
    with pytest.raises(ValueError, match="has all its 6 frames: rewind"):
        live.frame([PATH[0]])
    with pytest.raises(ValueError, match="num_frames=0"):
        ardrag_rl.interactive(policy, IMAGE, num_frames=0)
    with pytest.raises(ValueError, match="cache='mystery' is unknown"):
        begin(policy, cache="mystery")
