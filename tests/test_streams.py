"""Streaming: a video coded latent by latent is the whole clip, at constant cost, from a state that can be shared."""

import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKLHunyuanVideo, AutoencoderKLWan

from ardrag_rl.codec import Codec
from ardrag_rl.codec.stream import State
from ardrag_rl.control import Control
from ardrag_rl.rewards import Reward

SIZE, FRAMES = 32, 4
CLOSE = dict(atol=1e-5, rtol=0)
WAN = dict(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[0.5] * 4)
WAN_22 = {
    **WAN,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "is_residual": True,
}


@pytest.fixture(scope="module")
def images(tiny_pipeline):
    return Codec.from_pretrained(tiny_pipeline)


def wan_codec(images, **config):
    """Wan's autoencoder with random weights, large enough that frames look back."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**{**WAN, **config})
    return Codec(vae, images.text_encoder, images.tokenizer)


@pytest.fixture(scope="module")
def wan(images):
    return wan_codec(images)


def tiled(codec):
    """Tiles of 16 px that overlap by 8, so that a frame has many."""
    codec.vae.enable_tiling(16, 16, 8, 8)
    return codec


def sliced(codec):
    codec.vae.enable_slicing()
    return codec


CODECS = {
    "image": lambda images: images,
    "wan 2.1": wan_codec,
    "wan 2.2": lambda images: wan_codec(images, **WAN_22),
    "wan 2.1, of several widths": lambda images: wan_codec(images, dim_mult=[1, 2, 4, 4], num_res_blocks=2),
    "tiled": lambda images: tiled(wan_codec(images)),
    "sliced": lambda images: sliced(wan_codec(images)),
    "tiled and sliced": lambda images: sliced(tiled(wan_codec(images))),
}


@pytest.fixture(params=CODECS)
def codec(request, images):
    return CODECS[request.param](images)


def pixels(codec, frames=FRAMES, batch=2):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, codec.pixel_frames(frames), 3, SIZE, SIZE, generator=generator)


def latents(codec, frames=FRAMES, batch=2):
    shape = codec.latent_shape(SIZE, SIZE)
    return torch.randn(batch, frames, *shape, generator=torch.Generator().manual_seed(1))


def pieces(codec, video):
    """The pixel frames of each latent frame."""
    return video.split([1] + [codec.temporal_stride] * (FRAMES - 1), 1)


def test_decoding_latent_by_latent_is_the_whole_clip(codec):
    z, stream = latents(codec), codec.decoder()
    parts = [stream.append(z[:, m]) for m in range(FRAMES)]
    assert [p.shape[1] for p in parts] == [1] + [codec.temporal_stride] * (FRAMES - 1)
    torch.testing.assert_close(torch.cat(parts, 1), codec.decode(z), **CLOSE)


def test_encoding_latent_by_latent_is_the_whole_clip(codec):
    video, stream = pixels(codec), codec.encoder()
    parts = [stream.append(piece) for piece in pieces(codec, video)]
    torch.testing.assert_close(torch.stack(parts, 1), codec.encode(video), **CLOSE)


def test_frames_of_the_video_codecs_under_test_look_back(wan):
    """Otherwise the identities above would hold without a state."""
    z = latents(wan)
    assert not torch.allclose(wan.decode_next(z[:, 1])[0][:, -1], wan.decode(z)[:, 4], atol=1e-3)
    alone = wan.encode_next(pixels(wan)[:, 1:2])[0]
    assert not torch.allclose(alone, wan.encode(pixels(wan))[:, 1], atol=1e-3)


@pytest.mark.parametrize("name", ["decode_next", "encode_next"])
def test_a_state_is_never_changed(wan, name):
    """Two futures of one past, and the first of them again."""
    frames = latents(wan).unbind(1) if name == "decode_next" else pieces(wan, pixels(wan))
    code = getattr(wan, name)
    _, start = code(frames[0])
    _, state = code(frames[1], start)
    kept = [f.clone() if isinstance(f, torch.Tensor) else f for f in state.features]
    first, _ = code(frames[2], state)
    other, _ = code(frames[3], state)
    again, _ = code(frames[2], state)
    assert torch.equal(first, again) and not torch.equal(first, other)
    for before, after in zip(kept, state.features, strict=True):
        assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before is after
    assert state.frames == 2 and start.frames == 1


def test_the_cost_of_a_frame_does_not_grow(wan, monkeypatch):
    """One pass of the decoder over one latent frame each time, and a state of constant size."""
    seen, sizes = [], []
    forward = wan.vae.decoder.forward
    monkeypatch.setattr(wan.vae.decoder, "forward", lambda x, **kw: seen.append(x.shape[2]) or forward(x, **kw))
    state, z = None, latents(wan, frames=6)
    for m in range(6):
        _, state = wan.decode_next(z[:, m], state)
        sizes.append(sum(f.numel() for f in state.features if isinstance(f, torch.Tensor)))
    assert seen == [1] * 6 and len(set(sizes[2:])) == 1


def test_rows_go_their_own_way(codec):
    z, stream = latents(codec, batch=3), codec.decoder()
    stream.append(z[:, 0])
    fork = stream.select([2, 0])
    stream.append(z[:, 1])  # must not move the fork
    got = torch.cat([fork.append(z[[2, 0], m]) for m in (1, 2)], 1)
    whole = codec.decode(z)
    r = codec.temporal_stride
    torch.testing.assert_close(got, whole[[2, 0], 1 : 1 + 2 * r], **CLOSE)
    torch.testing.assert_close(stream.append(z[:, 2]), whole[:, 1 + r : 1 + 2 * r], **CLOSE)


def test_a_copy_of_all_rows_shares_its_memory(wan):
    _, state = wan.decode_next(latents(wan)[:, 0])
    assert state.select([0, 1]) is state
    assert state.select([1]).features[0].shape[0] == 1
    assert torch.equal(State.cat([state.select([1]), state.select([0])]).features[0], state.features[0][[1, 0]])


def test_a_frame_has_its_number_of_pixel_frames(wan):
    video = pixels(wan)
    with pytest.raises(ValueError, match="latent frame 0 is of 1 pixel frames, got 4"):
        wan.encoder().append(video[:, :4])
    _, state = wan.encode_next(video[:, :1])
    with pytest.raises(ValueError, match="latent frame 1 is of 4 pixel frames, got 1"):
        wan.encode_next(video[:, :1], state)


@pytest.mark.parametrize("points", [2, 0])
def test_a_control_that_arrives_frame_by_frame_is_the_whole_control(codec, points):
    drag = torch.rand(codec.pixel_frames(FRAMES), points, 3, generator=torch.Generator().manual_seed(0))
    whole = codec.encode_heat_maps([Control(drag, "", torch.zeros(3, SIZE, SIZE))], SIZE, SIZE)
    stream = codec.heat_map_encoder(SIZE, SIZE)
    parts = [stream.append(piece) for piece in pieces(codec, drag[None])]
    torch.testing.assert_close(torch.stack(parts, 1), whole, **CLOSE)
    assert bool(whole.any()) == (points > 0)


# --- other video autoencoders ---


@pytest.fixture(scope="module")
def hunyuan(images):
    torch.manual_seed(0)
    blocks = dict(block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=4)
    kinds = {
        "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
        "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
        "mid_block_add_attention": False,
    }
    return Codec(AutoencoderKLHunyuanVideo(**blocks, **kinds), images.text_encoder, images.tokenizer)


def test_another_video_autoencoder_codes_its_past_again_and_says_so(hunyuan, caplog):
    assert (hunyuan.temporal_stride, hunyuan.spatial_stride, hunyuan.latent_channels) == (4, 8, 4)
    z, video = latents(hunyuan), pixels(hunyuan)
    decoder, encoder = hunyuan.decoder(), hunyuan.encoder()
    for m, piece in enumerate(pieces(hunyuan, video)):
        frame, end = decoder.append(z[:, m]), hunyuan.pixel_frames(m + 1)
        torch.testing.assert_close(frame, hunyuan.decode(z[:, : m + 1])[:, -len(piece[0]) :], **CLOSE)
        torch.testing.assert_close(encoder.append(piece), hunyuan.encode(video[:, :end])[:, -1], **CLOSE)
    assert [r.message for r in caplog.records if "AutoencoderKLHunyuanVideo cannot go on" in r.message] != []
    assert sum("cannot go on" in r.message for r in caplog.records) == 1


def test_what_an_autoencoder_cannot_do_is_refused(tiny_pipeline, images):
    vae = AsymmetricAutoencoderKL(down_block_out_channels=(32,), up_block_out_channels=(32,))
    with pytest.raises(ValueError, match="tiling=True: AsymmetricAutoencoderKL cannot do that"):
        Codec(vae, images.text_encoder, images.tokenizer, settings={"tiling": True})
    with pytest.raises(ValueError, match=r"\['tile'\] are unknown: expected some of tiling, slicing"):
        Codec.from_pretrained(tiny_pipeline, settings={"tile": True})
    with pytest.raises(ValueError, match="dtype 'fp8' is unknown; expected one of float32"):
        Codec.from_pretrained(tiny_pipeline, settings={"dtype": "fp8"})


def test_settings_reach_the_autoencoder(tiny_pipeline):
    settings = {"tiling": True, "slicing": True, "dtype": "bfloat16"}
    codec = Codec.from_pretrained(tiny_pipeline, settings=settings)
    assert codec.vae.use_tiling and codec.vae.use_slicing and codec.vae.dtype == torch.bfloat16
    z = codec.encode(pixels(codec))
    assert z.dtype == codec.decode(z).dtype == torch.float32


# --- the environment with a codec of temporal stride 4 ---


class Brightness(Reward):
    """The mean of a frame."""

    def __call__(self, video, controls):
        return video.mean((2, 3, 4))


@pytest.fixture(scope="module")
def wan_pipeline(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "pipeline"
    shutil.copytree(tiny_pipeline, folder, ignore=shutil.ignore_patterns("vae"))
    torch.manual_seed(0)
    AutoencoderKLWan(**WAN).save_pretrained(folder / "vae")
    return str(folder)


def settings(pipeline):
    return dict(pipeline=pipeline, tasks="sprites-hard", rewards=[Brightness()], num_frames=FRAMES)


def plan(env, shape=()):
    count = FRAMES * env.unwrapped.num_steps
    space = env.unwrapped.mdp.action_space.shape
    return np.random.default_rng(0).normal(size=(count, *shape, *space)).astype(np.float32)


def test_an_environment_decodes_what_the_whole_clip_gives(wan_pipeline):
    env = gym.make("ARDrag-v0", **settings(wan_pipeline)).unwrapped
    env.reset(seed=0)
    seen = []
    for action in plan(env):
        obs, *_, info = env.step(action)
        if "reward_terms" in info:
            seen.append(env._episodes.pixels)
    torch.testing.assert_close(torch.cat(seen, 1), env.codec.decode(torch.from_numpy(obs["latents"])[None]), **CLOSE)


def test_a_snapshot_in_the_middle_of_a_video_can_be_restored_again_and_again(wan_pipeline):
    env = gym.make("ARDrag-v0", **settings(wan_pipeline)).unwrapped
    actions = plan(env)
    env.reset(seed=0)
    for action in actions[:7]:  # in the third frame
        env.step(action)
    state = env.snapshot()
    straight = [env.step(a)[1] for a in actions[7:]]
    env.restore(state)
    other = [env.step(a)[1] for a in -actions[7:]]
    env.restore(state)
    assert [env.step(a)[1] for a in actions[7:]] == straight != other
    fresh = gym.make("ARDrag-v0", **settings(wan_pipeline)).unwrapped
    fresh.restore(state)
    assert [fresh.step(a)[1] for a in actions[7:]] == straight


def test_a_batch_is_its_rows(wan_pipeline):
    envs = gym.make_vec("ARDrag-v0", num_envs=3, autoreset_mode="Disabled", **settings(wan_pipeline))
    singles = [gym.make("ARDrag-v0", **settings(wan_pipeline)) for _ in range(3)]
    actions = plan(envs, (3,))
    envs.reset(seed=[0, 1, 2])
    for i, env in enumerate(singles):
        env.reset(seed=i)
    for k, action in enumerate(actions):
        if k == 4:  # row 1 starts anew: the others' decoder goes on with two rows
            envs.reset(seed=[0, 9, 0], options={"reset_mask": np.array([False, True, False])})
            singles[1].reset(seed=9)
        _, rewards, *_ = envs.step(action)
        alone = [env.step(action[i])[1] for i, env in enumerate(singles)]
        np.testing.assert_allclose(rewards, alone, atol=1e-5)
