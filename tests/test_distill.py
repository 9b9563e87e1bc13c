"""Training from nothing: the linear start, flow matching, own history."""

import pytest
import torch
import torch.nn.functional as F

from ardrag_rl.codec import Codec
from ardrag_rl.distill.codec_training import CodecImages, CodecLoss, image_autoencoder, start_linear
from ardrag_rl.distill.flow_matching import FlowMatching, LatentClips, OwnHistory
from ardrag_rl.envs.sprites import Sprites
from ardrag_rl.flow import Kernel
from ardrag_rl.policies import CausalWanTransformer3DModel, VideoPolicy


@pytest.fixture(scope="module")
def clips(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    source = Sprites("gentle", "train", 4, 32, 32)
    return LatentClips(folder, Codec.from_pretrained(tiny_pipeline), source, 6)


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


def test_interrupted_encoding_goes_on_where_it_was(clips, tiny_pipeline, tmp_path, monkeypatch):
    codec, source, seen = Codec.from_pretrained(tiny_pipeline), Sprites("gentle", "train", 4, 32, 32), []

    def video(index, real=source.video):
        seen.append(index)
        if seen == [0, 1, 2]:
            raise KeyboardInterrupt
        return real(index)

    monkeypatch.setattr(source, "video", video)
    monkeypatch.setattr("ardrag_rl.distill.flow_matching.BATCH_PIXELS", 2 * 4 * 32 * 32)  # two clips
    with pytest.raises(KeyboardInterrupt):
        LatentClips(tmp_path, codec, source, 6)
    resumed = LatentClips(tmp_path, codec, source, 6)
    assert seen == [0, 1, 2, 2, 3, 4, 5]
    for i in range(6):
        for key, value in clips[i].items():
            torch.testing.assert_close(resumed[i][key], value, atol=2e-3, rtol=2e-3)
    LatentClips(tmp_path, codec, source, 6)
    assert len(seen) == 7


def test_clips_of_other_settings_are_refused(clips, tiny_pipeline, tmp_path):
    codec, source = Codec.from_pretrained(tiny_pipeline), Sprites("gentle", "train", 4, 32, 32)
    LatentClips(tmp_path, codec, source, 2)
    with pytest.raises(ValueError, match=r"holds latents of shape \(2, 4, 4, 8, 8\), and \(3, 4, 4, 8, 8\) are asked"):
        LatentClips(tmp_path, codec, source, 3)
    with pytest.raises(ValueError, match="encoded with other settings"):
        LatentClips(tmp_path, codec, Sprites("gentle", "train", 3, 32, 32), 2)


def objective(kind, pipeline):
    policy = VideoPolicy.from_pretrained(pipeline)
    if kind == "teacher":
        model = CausalWanTransformer3DModel.from_config({**policy.transformer.config, "chunk_size": 4})
        teacher = VideoPolicy(model, policy.schedule, policy.source)
        return FlowMatching(teacher, control_dropout=0.2, schedule_share=0.0, lowest=0.0)
    return FlowMatching(policy) if kind == "causal" else OwnHistory(policy, (Kernel("ode"), Kernel("renoise")))


@pytest.mark.parametrize("kind", ["teacher", "causal", "own_history"])
def test_training_reaches_every_parameter_that_acts_and_lowers_the_loss(kind, clips, tiny_pipeline):
    torch.manual_seed(0)
    model = objective(kind, tiny_pipeline)
    data = batch(clips)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for step in range(25):
        torch.manual_seed(step % 5)
        loss = model(**data)["loss"]
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            silent = [n for n, p in model.policy.named_parameters() if p.grad is None or not p.grad.abs().sum()]
            assert not silent
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_a_chunk_has_one_noise_level(clips, tiny_pipeline, monkeypatch):
    """And the last chunk's clean frames, which nobody looks back on, are not run."""
    policy = VideoPolicy.from_pretrained(tiny_pipeline)
    seen = []

    def spy(context, clean, noisy, timestep):
        seen.append((0 if clean is None else clean.shape[1], timestep))
        return noisy[:, :, :, :4], ()

    for chunk in (1, 2, 3, 4):
        model = CausalWanTransformer3DModel.from_config({**policy.transformer.config, "chunk_size": chunk})
        monkeypatch.setattr(model, "forward", spy)
        FlowMatching(VideoPolicy(model), rows=2, schedule_share=0.5, lowest=0.1)(**batch(clips))
        clean, t = seen[-1]
        assert clean == 3 // chunk * chunk and t.shape == (4, 2, 4)
        for m in range(1, 4):
            assert (t[..., m] == t[..., m - 1]).all() == (m % chunk != 0)
