"""The TAEHV decoder: published keys load, frame by frame is the whole clip, and the environment decodes with it."""

import copy
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file

from ardrag_rl.codec import Codec
from ardrag_rl.codec.taehv import TinyDecoder

WIDTHS, CHANNELS = (8, 8, 4, 4), 4


def published(patch=1, time=(1, 2, 2), channels=CHANNELS):
    """Random weights with the keys and, but for narrower layers, the shapes of taew2_1."""
    generator = torch.Generator().manual_seed(0)
    weights = {}

    def conv(key, out, inputs, kernel=3, bias=True):
        weights[f"{key}.weight"] = (
            torch.randn(out, inputs, kernel, kernel, generator=generator) * (2 / (inputs * kernel**2)) ** 0.5
        )
        if bias:
            weights[f"{key}.bias"] = 0.1 * torch.randn(out, generator=generator)

    conv("encoder.0", 4, 3)  # files have an encoder too, which is not used
    conv("decoder.1", WIDTHS[0], channels)
    for stage, width in enumerate(WIDTHS[:3]):
        at = 3 + 6 * stage
        for block in range(at, at + 3):
            for i, inputs in zip((0, 2, 4), (2 * width, width, width), strict=True):
                conv(f"decoder.{block}.conv.{i}", width, inputs)
        conv(f"decoder.{at + 4}.conv", width * time[stage], width, 1, bias=False)
        conv(f"decoder.{at + 5}", WIDTHS[stage + 1], width, bias=False)
    conv("decoder.22", 3 * patch**2, WIDTHS[3])
    weights["decoder.22.weight"] *= 0.01  # to pixels: a random network's numbers are large
    weights["decoder.22.bias"] += 0.5
    return weights


def by_hand(weights, latents, patch=1, time=(1, 2, 2)):
    """One video (F, C, h, w), frame by frame and block by block, as TAEHV's page describes it -> (T, 3, H, W)."""

    def conv(key, x, padding=1):
        return F.conv2d(x, weights[f"decoder.{key}.weight"], weights.get(f"decoder.{key}.bias"), padding=padding)

    frames = [F.relu(conv(1, 3 * torch.tanh(z[None] / 3))) for z in latents]
    for stage in range(3):
        at = 3 + 6 * stage
        for block in range(at, at + 3):
            past, after = torch.zeros_like(frames[0]), []
            for x in frames:
                y = F.relu(conv(f"{block}.conv.0", torch.cat([x, past], 1)))
                after.append(F.relu(conv(f"{block}.conv.4", F.relu(conv(f"{block}.conv.2", y))) + x))
                past = x
            frames = after
        grown = []
        for x in frames:
            x = F.interpolate(x, scale_factor=2)
            grown += conv(f"{at + 4}.conv", x, padding=0).chunk(time[stage], 1)
        frames = [conv(at + 5, x) for x in grown]
    video = torch.cat([F.pixel_shuffle(conv(22, F.relu(x)), patch) for x in frames])
    return video[int(np.prod(time)) - 1 :].clamp(0, 1)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("taehv") / "taew2_1.safetensors"
    save_file(published(), path)
    return path


@pytest.fixture(scope="module")
def codec(tiny_pipeline, file):
    images = Codec.from_pretrained(tiny_pipeline)
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[0.5] * 4
    )
    return Codec(vae, images.text_encoder, images.tokenizer, settings={"decoder": str(file)})


def latents(frames=4, batch=2, channels=CHANNELS):
    return torch.randn(batch, frames, channels, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("patch", "time"), [(1, (1, 2, 2)), (2, (1, 2, 2)), (2, (2, 2, 2))])
def test_it_is_taehvs_decoder(patch, time):
    """Wan2.1's, Wan2.2's and LTX's geometry."""
    weights = published(patch, time)
    decoder = TinyDecoder(weights)
    r = int(np.prod(time))
    assert (decoder.temporal_stride, decoder.spatial_stride, decoder.latent_channels) == (r, 8 * patch, 4)
    z = latents()
    video = (decoder.decode(z) / 2 + 0.5).clamp(0, 1)
    assert video.shape == (2, 1 + 3 * r, 3, 32 * patch, 32 * patch)
    for row in range(2):
        torch.testing.assert_close(video[row], by_hand(weights, z[row], patch, time), atol=1e-5, rtol=0)


def test_it_equals_the_published_code():
    taehv = pytest.importorskip("taehv", reason="github.com/madebyollin/taehv is not installed")
    torch.manual_seed(0)
    theirs = taehv.TAEHV(checkpoint_path=None)
    z = torch.randn(1, 3, 16, 4, 4)
    with torch.no_grad():
        expected = theirs.decode_video(z, show_progress_bar=False)
    ours = (TinyDecoder(theirs.state_dict()).decode(z) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_frame_by_frame_is_the_whole_clip(codec):
    z, stream = latents(), codec.decoder()
    parts = [stream.append(z[:, m]) for m in range(4)]
    whole = codec.decode(z)
    assert [p.shape[1] for p in parts] == [1, 4, 4, 4] and whole.min() >= 0 and whole.max() <= 1
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-6, rtol=0)
    alone = codec.decoder().append(z[:, 3])
    assert not torch.allclose(alone[:, -1], whole[:, -1], atol=1e-3)  # it does look back


def test_a_fork_keeps_its_past(codec):
    z = latents(batch=3)
    stream = codec.decoder()
    stream.append(z[:, 0])
    fork = stream.select([2, 0])
    stream.append(z[:, 1])
    torch.testing.assert_close(fork.append(z[[2, 0], 3]), codec.decode(z[[2, 0]][:, [0, 3]])[:, 1:], atol=1e-6, rtol=0)


def test_it_is_an_option_and_the_autoencoder_still_encodes(codec):
    exact = Codec(codec.vae, codec.text_encoder, codec.tokenizer)
    assert exact.settings.decoder is None
    assert not torch.allclose(exact.decode(latents()), codec.decode(latents()), atol=1e-2)
    video = torch.rand(1, 5, 3, 32, 32)
    assert torch.equal(exact.encode(video), codec.encode(video))
    assert not any(p.requires_grad for p in codec._decoder.parameters())


def test_pth_files_load_as_weights_only(tmp_path):
    torch.save(published(), tmp_path / "taew2_1.pth")
    got = TinyDecoder.from_file(tmp_path / "taew2_1.pth").decode(latents())
    assert torch.equal(got, TinyDecoder(published()).decode(latents()))
    torch.save({"decoder.1.weight": copy.copy}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="nothing but weights"):
        TinyDecoder.from_file(tmp_path / "code.pth")


def test_what_does_not_fit_is_named(codec, file, tmp_path, tiny_pipeline):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TinyDecoder.from_file("nowhere.pth")
    with pytest.raises(ValueError, match=r"is of another autoencoder: it has .*4.* AutoencoderDC has .*1"):
        Codec.from_pretrained(tiny_pipeline, settings={"decoder": str(file)})
    for change, message in {
        "missing": r"(?s)Missing key.*3\.conv\.2\.bias",
        "other": "expected a TAEHV file",
        "super": "expected a TAEHV file, .*'super'",
        "unknown": r"layer 5 has .*norm\.weight",
    }.items():
        weights = published()
        if change == "missing":
            del weights["decoder.3.conv.2.bias"]
        elif change == "other":
            weights = {"layers.0.weight": torch.zeros(1)}
        elif change == "super":
            weights = {"decoder.0.weight": torch.zeros(8, 4, 1, 1), "decoder.1.conv.0.weight": torch.zeros(16, 1, 7, 7)}
        else:
            weights = {k: v for k, v in weights.items() if not k.startswith("decoder.5.")}
            weights["decoder.5.norm.weight"] = torch.zeros(8)
        save_file(weights, tmp_path / f"{change}.safetensors")
        with pytest.raises(ValueError, match=message):
            TinyDecoder.from_file(tmp_path / f"{change}.safetensors")


def test_an_environment_decodes_with_it(tiny_pipeline, codec, file, tmp_path):
    folder = tmp_path / "wan"
    shutil.copytree(tiny_pipeline, folder, ignore=shutil.ignore_patterns("vae"))
    codec.vae.save_pretrained(folder / "vae")
    env = gym.make(
        "ARDrag-v0", pipeline=str(folder), num_frames=2, rewards=["smoothness"], codec_settings={"decoder": str(file)}
    ).unwrapped
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(6):
        obs, *_ = env.step(rng.normal(size=env.action_space.shape).astype(np.float32))
    expected = codec.decode(torch.from_numpy(obs["latents"])[None])
    torch.testing.assert_close(env._episodes.pixels, expected[:, 1:], atol=1e-6, rtol=0)
