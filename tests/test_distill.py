"""Training from nothing: the linear start, flow matching, own history."""

import pytest
import torch
import torch.nn.functional as F

from ardrag_rl.codec import Codec
from ardrag_rl.distill.codec_training import CodecImages, CodecLoss, image_autoencoder, start_linear
from ardrag_rl.distill.flow_matching import FlowMatching, LatentClips, OwnHistory
from ardrag_rl.envs.sprites import Sprites
from ardrag_rl.flow import Kernel
from ardrag_rl.policies import VideoPolicy


@pytest.fixture(scope="module")
def clips(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    source = Sprites("gentle", "train", 4, 32, 32)
    return LatentClips(folder, Codec.from_pretrained(tiny_pipeline), source, 6, batch=4)


def batch(clips, count=4):
    items = [clips[i] for i in range(count)]
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def test_a_codec_starts_as_the_best_linear_one():
    torch.manual_seed(0)
    vae = image_autoencoder(6, (8, 24, 96), blocks=1, head_dim=8)
    data = CodecImages(20, 32, seed=1)
    images = torch.cat([data[i]["pixels"] for i in range(20)])
    start_linear(vae, images)
    x = 2 * images - 1
    with torch.no_grad():
        error = (vae.decode(vae.encode(x).latent).sample - x).square().mean()
    patches = F.pixel_unshuffle(x, 4).movedim(1, -1).reshape(-1, 48)
    energy = torch.linalg.svdvals(patches - patches.mean(0)).square()
    best = energy[6:].sum() / patches.numel()  # Eckart-Young: no linear codec of 6 numbers a patch does better
    assert best * 0.99 < error < best * 1.3


def test_codec_loss_falls():
    torch.manual_seed(0)
    vae = image_autoencoder(4, (8, 16, 16), blocks=1, shortcuts=True, head_dim=8)
    model = CodecLoss(vae)
    pixels = CodecImages(1, 32)[0]["pixels"][None]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        loss = model(pixels)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_encoded_clips_are_kept_and_equal_the_codecs(clips, tiny_pipeline):
    codec, source = Codec.from_pretrained(tiny_pipeline), Sprites("gentle", "train", 4, 32, 32)
    item = clips[5]
    assert item["latents"].shape == (4, 4, 8, 8) and len(clips) == 6
    torch.testing.assert_close(item["latents"], codec.encode(source.video(5)[None])[0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", ["flow_matching", "own_history"])
def test_training_reaches_every_parameter_that_acts_and_lowers_the_loss(kind, clips, tiny_pipeline):
    policy = VideoPolicy.from_pretrained(tiny_pipeline)
    model = FlowMatching(policy) if kind == "flow_matching" else OwnHistory(policy, (Kernel("ode"), Kernel("renoise")))
    data = batch(clips)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for step in range(25):
        torch.manual_seed(step % 5)
        loss = model(**data)["loss"]
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            silent = [n for n, p in policy.named_parameters() if p.grad is None or not p.grad.abs().sum()]
            assert not silent
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
