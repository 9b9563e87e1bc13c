"""Codec and hub: pixels to latents and back, and where a pipeline lies."""

import shutil

import pytest
import torch

from ardrag_rl import hub
from ardrag_rl.codec import Codec
from ardrag_rl.control import Control
from ardrag_rl.flow import Schedule

SIZE = 32


@pytest.fixture(scope="module")
def codec(tiny_pipeline):
    return Codec.from_pretrained(tiny_pipeline)


@pytest.fixture(scope="module")
def wan(codec):
    """A causal video codec: Wan's VAE with random weights, spatial stride 8, temporal stride 4."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[0.5] * 4
    )
    return Codec(vae, codec.text_encoder, codec.tokenizer)


def video(frames, batch=2, seed=0):
    return torch.rand(batch, frames, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def controls(frames):
    drag = torch.rand(frames, 2, 3, generator=torch.Generator().manual_seed(0))
    image = torch.rand(3, SIZE, SIZE)
    return [Control(drag, "a red square", image), Control(torch.zeros(frames, 0, 3), "p", image)]


# --- image codec ---


def test_geometry(codec):
    assert (codec.latent_channels, codec.spatial_stride, codec.temporal_stride) == (4, 4, 1)
    assert codec.latent_shape(32, 48) == (4, 8, 12)
    assert [codec.pixel_frames(f) for f in (1, 5)] == [1, 5]
    assert [codec.latent_frames(t) for t in (1, 5)] == [1, 5]
    for size in ((30, 32), (32, 33), (0, 32)):
        with pytest.raises(ValueError, match=f"height={size[0]}, width={size[1]}.*multiples.*4"):
            codec.latent_shape(*size)


def test_encode_and_decode_shapes(codec):
    z = codec.encode(video(3))
    assert z.shape == (2, 3, 4, 8, 8) and z.dtype == torch.float32
    pixels = codec.decode(z)
    assert pixels.shape == (2, 3, 3, SIZE, SIZE) and pixels.dtype == torch.float32
    assert float(pixels.min()) >= 0 and float(pixels.max()) <= 1


def test_frames_are_coded_each_by_itself(codec):
    clip = video(3)
    torch.testing.assert_close(codec.encode(clip)[:, 1:2], codec.encode(clip[:, 1:2]))


def test_bad_videos(codec):
    with pytest.raises(ValueError, match=r"shape \(3, 32, 32\): expected \(B, T, 3, H, W\)"):
        codec.encode(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match=r"expected \(B, T, 3, H, W\)"):
        codec.encode(torch.zeros(1, 2, 4, 32, 32))
    with pytest.raises(ValueError, match="multiples"):
        codec.encode(torch.zeros(1, 2, 3, 30, 32))


def test_the_normalisation_is_undone(codec, tiny_pipeline):
    """A scale and a shift of the latents in the VAE's config change the latents, not the video they decode to."""
    other = Codec.from_pretrained(tiny_pipeline)
    inner = other.autoencoder
    inner.shift, inner.scale = inner.shift + 0.3, inner.scale * 1.7
    z, w = codec.encode(video(2)), other.encode(video(2))
    torch.testing.assert_close(w, (z - 0.3) * 1.7, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other.decode(w), codec.decode(z))


def test_nothing_of_it_is_trained(codec):
    modules = (codec.vae, codec.text_encoder)
    assert not any(p.requires_grad for m in modules for p in m.parameters())
    assert not any(m.training for m in modules)
    assert not codec.decode(torch.zeros(1, 1, 4, 8, 8, requires_grad=True)).requires_grad


# --- streaming ---


@pytest.mark.parametrize("name", ["codec", "wan"])
def test_streaming_is_the_whole_decode(name, request):
    codec = request.getfixturevalue(name)
    z = torch.randn(2, 4, *codec.latent_shape(SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    whole = codec.decode(z)
    stream = codec.decoder()
    parts = [stream.append(z[:, m]) for m in range(4)]
    assert [p.shape[1] for p in parts] == [1] + [codec.temporal_stride] * 3
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["codec", "wan"])
def test_select_gives_independent_copies(name, request):
    codec = request.getfixturevalue(name)
    shape = codec.latent_shape(SIZE, SIZE)
    z = torch.randn(3, 3, *shape, generator=torch.Generator().manual_seed(0))
    stream = codec.decoder()
    stream.append(z[:, 0])
    fork = stream.select([2, 0])
    stream.append(z[:, 1])  # must not move the fork
    torch.testing.assert_close(
        torch.cat([fork.append(z[[2, 0], 1]), fork.append(z[[2, 0], 2])], 1),
        codec.decode(z[[2, 0]])[:, 1:],
        atol=1e-5,
        rtol=0,
    )
    torch.testing.assert_close(stream.append(z[:, 2]), codec.decode(z)[:, -codec.temporal_stride :], atol=1e-5, rtol=0)


# --- video codec ---


def test_video_geometry(wan):
    assert (wan.latent_channels, wan.spatial_stride, wan.temporal_stride) == (4, 8, 4)
    assert [wan.pixel_frames(f) for f in (1, 2, 4)] == [1, 5, 13]
    assert [wan.latent_frames(t) for t in (1, 5, 13)] == [1, 2, 4]
    for frames in (0, 4, 6):
        with pytest.raises(ValueError, match=f"{frames} pixel frames: expected 1 \\+ k \\* 4"):
            wan.latent_frames(frames)


def test_video_encode_is_causal(wan):
    clip = video(9, batch=1)
    z = wan.encode(clip)
    assert z.shape == (1, 3, 4, 4, 4)
    torch.testing.assert_close(wan.encode(clip[:, :5]), z[:, :2], atol=1e-5, rtol=1e-5)
    later = clip.clone()
    later[:, 5:] = 0
    torch.testing.assert_close(wan.encode(later)[:, :2], z[:, :2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(wan.encode(later)[:, 2], z[:, 2])


def test_video_latents_are_normalised_per_channel(wan):
    raw = wan.vae.encode((2 * video(5, 1) - 1).transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    torch.testing.assert_close(wan.encode(video(5, 1)), (raw - 0.1) / 0.5)


# --- control and text ---


@pytest.mark.parametrize(("name", "frames"), [("codec", 3), ("wan", 5)])
def test_heat_maps_are_encoded_like_videos(name, frames, request):
    codec = request.getfixturevalue(name)
    drag, empty = controls(frames)
    z = codec.encode_heat_maps([drag, empty], SIZE, SIZE)
    assert z.shape == (2, codec.latent_frames(frames), *codec.latent_shape(SIZE, SIZE))
    pixels = drag.heat_maps(SIZE, SIZE) / 2 + 0.5
    torch.testing.assert_close(z[0], codec.encode(pixels[None])[0], atol=1e-5, rtol=1e-5)
    assert not z[1].any()  # no points: zero latents, not the encoding of an empty map


def test_text_is_zero_after_the_prompt(codec):
    assert codec.text_shape == (8, 16)
    z = codec.encode_text(["a red square moves", "circle"])
    assert z.shape == (2, 8, 16) and z.dtype == torch.float32
    assert z[0, :5].abs().sum(-1).gt(0).all() and not z[0, 5:].any()  # four words and the end of the text
    assert z[1, :2].abs().sum(-1).gt(0).all() and not z[1, 2:].any()
    torch.testing.assert_close(codec.encode_text(["circle"])[0], z[1])
    assert codec.encode_text(["the " * 40]).shape == (1, 8, 16)  # cut


def test_prompts_are_told_apart(codec):
    red, blue = codec.encode_text(["a red square", "a blue square"])
    assert not torch.allclose(red, blue)


# --- hub ---


def test_paths(tiny_pipeline, tmp_path):
    assert hub.pipeline_path(tiny_pipeline) == hub.pipeline_path(str(tiny_pipeline)) == tiny_pipeline
    with pytest.raises(
        ValueError, match=r"'nowhere' is unknown: expected an embedded one \(.*model_index.json.*owner/name"
    ):
        hub.pipeline_path("nowhere")
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        hub.pipeline_path(tmp_path)
    with pytest.raises(ValueError, match="is unknown"):
        hub.pipeline_path(tmp_path / "missing")


def test_embedded_names_are_listed(tiny_pipeline, tmp_path, monkeypatch):
    shutil.copytree(tiny_pipeline, tmp_path / "small")
    monkeypatch.setattr(hub, "ASSETS", tmp_path)
    assert hub.pipeline_path("small") == tmp_path / "small"
    with pytest.raises(ValueError, match=r"expected an embedded one \(small\)"):
        hub.pipeline_path("large")


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match="'owner/name' is neither a folder here nor could it be had from the hub"):
        hub.pipeline_path("owner/name")


def test_from_pretrained_says_what_is_wrong(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match="'nowhere' is unknown"):
        Codec.from_pretrained("nowhere")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json' could not be read as JSON"):
        Codec.from_pretrained(tmp_path)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "Pipeline"}')
    with pytest.raises(ValueError, match="names the class 'Pipeline': expected a diffusers autoencoder"):
        Codec.from_pretrained(tmp_path)


def test_schedule_and_index_round_trip(tmp_path):
    hub.save_schedule(tmp_path, Schedule((1000, 640.5)))
    assert hub.load_schedule(tmp_path) == Schedule((1000, 640.5))
    hub.write_json(tmp_path / "scheduler" / "scheduler_config.json", {"shift": 8})
    assert hub.load_schedule(tmp_path) == Schedule()
    hub.save_index(tmp_path, 48, 64)
    assert hub.pipeline_size(tmp_path) == (48, 64)
    assert hub.read_json(tmp_path / "model_index.json")["vae"] == ["diffusers", "AutoencoderDC"]
    hub.write_json(tmp_path / "model_index.json", {})
    with pytest.raises(ValueError, match="pass height= and width="):
        hub.pipeline_size(tmp_path)
    assert not list(tmp_path.rglob("*.partial"))


def test_diffusers_can_read_the_schedulers_config(tiny_pipeline):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_pipeline / "scheduler")
    assert scheduler.config.num_train_timesteps == 1000


def test_bad_json(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list: expected a JSON object"):
        hub.read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="could not be read as JSON"):
        hub.read_json(tmp_path / "a.json")
