"""A policy and its files; generation by it."""

import json
import shutil

import pytest
import torch
from acting import BATCH, CLOSE, SHAPE, SMALL, WINDOW, act, conditions, generator, small
from diffusers import WanTransformer3DModel

from ardrag_rl.codec import Codec
from ardrag_rl.flow import Kernel, Schedule
from ardrag_rl.policies import CausalWanTransformer3DModel, VideoPolicy
from ardrag_rl.policies.chunks import Conditions
from ardrag_rl.policies.generate import generate_latents
from ardrag_rl.rollout import Plan


@pytest.fixture(scope="module")
def policy(tiny_pipeline):
    return VideoPolicy.from_pretrained(tiny_pipeline)


# --- the policy and its files ---


def test_frame_inputs_mark_the_reference_image(policy):
    x = torch.randn(2, 3, *SHAPE)
    first, later = policy.frame_inputs(x, x + 1, x + 2), policy.frame_inputs(x, x + 1, x + 2, first=3)
    assert first.shape == (2, 3, 13, 8, 8)
    assert (
        torch.equal(first[:, :, :4], x) and torch.equal(first[:, :, 5:9], x + 1) and torch.equal(first[:, :, 9:], x + 2)
    )
    assert (first[:, 0, 4] == 1).all() and (first[:, 1:, 4] == 0).all() and (later[:, :, 4] == 0).all()
    stacked = policy.frame_inputs(x[:, None], x[:, None], x[:, None])  # any leading dimensions
    assert (stacked[:, :, 0, 4] == 1).all() and (stacked[:, :, 1:, 4] == 0).all()


def test_a_saved_policy_is_a_whole_pipeline(policy, tmp_path):
    folder = tmp_path / "new" / "pipeline"
    schedule = Schedule((1000.0, 600.0, 300.0))
    VideoPolicy(policy.transformer, schedule, policy.source).save_pretrained(folder)
    loaded = VideoPolicy.from_pretrained(folder)
    assert loaded.schedule == schedule and loaded.source == folder and loaded.latent_channels == 4
    assert loaded.transformer.config.window == WINDOW
    given = conditions(frames=2)
    same = VideoPolicy(loaded.transformer, policy.schedule)
    assert torch.equal(act(same, Plan.every("cps"), given).latents, act(policy, Plan.every("cps"), given).latents)
    a, b = Codec.from_pretrained(folder), Codec.from_pretrained(policy.source)
    assert torch.equal(a.encode_text(["a red square"]), b.encode_text(["a red square"]))
    assert not list(folder.rglob("*.bin")) and list(folder.glob("transformer/*.safetensors"))
    loaded.save_pretrained(folder)  # onto itself
    Codec.from_pretrained(folder)
    assert not any(str(tmp_path) in file.read_text() for file in folder.rglob("*.json"))  # no path of this machine


def test_saving_without_a_source_writes_what_there_is(policy, tmp_path):
    VideoPolicy(policy.transformer).save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"transformer", "scheduler"}


def test_loading_says_what_is_wrong(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match="'nowhere' is unknown"):
        VideoPolicy.from_pretrained("nowhere")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="transformer"):
        VideoPolicy.from_pretrained(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_pipeline, broken)
    config = broken / "transformer" / "config.json"
    for layers in (1, 3):
        config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": layers}))
        with pytest.raises(ValueError, match=r"not fit its config\.json"):
            VideoPolicy.from_pretrained(broken)
    shutil.rmtree(broken / "tokenizer")
    with pytest.raises(ValueError, match="has no folder tokenizer/"):
        Codec.from_pretrained(broken)


def test_a_bare_diffusers_transformer_loads(tmp_path):
    """Parameters have diffusers' names, so published Wan weights fit; the window is ours and has a default."""
    torch.manual_seed(0)
    plain = WanTransformer3DModel(**SMALL)
    plain.save_pretrained(tmp_path)
    causal = CausalWanTransformer3DModel.from_pretrained(tmp_path)
    assert causal.config.window == 7
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), causal.parameters(), strict=True))


def test_bad_models_and_calls(policy):
    with pytest.raises(ValueError, match="temporal patch of 1"):
        small(patch_size=(2, 4, 4))
    with pytest.raises(ValueError, match="window=0"):
        small(window=0)
    with pytest.raises(ValueError, match="in_channels=4: expected more than 12"):
        small(in_channels=4)
    with pytest.raises(ValueError, match=r"expected a batch, .* value\[None\]"):
        policy.session(1).transition({"latents": torch.zeros(2, 4, 8, 8), "frame": [0], "step": [0]}, Kernel("ode"))
    model = policy.transformer
    context = model.encode_context(torch.zeros(1, 8, 16))
    with pytest.raises(ValueError, match="image tokens"):
        small(image_dim=8, added_kv_proj_dim=24).transformer.encode_context(torch.zeros(1, 8, 16))
    frames = torch.zeros(1, 4, 13, 8, 8)
    with pytest.raises(ValueError, match="both are None"):
        model(context)
    with pytest.raises(ValueError, match="4 noisy frames need 3 clean ones before them, got 2"):
        model(context, frames[:, :2], frames[:, None])
    short = small(rope_max_seq_len=3).transformer
    with pytest.raises(ValueError, match="frame 3 is beyond rope_max_seq_len=3"):
        short(short.encode_context(torch.zeros(1, 8, 16)), frames)


# --- generate ---


def test_generate_is_a_session_acting(policy):
    given = conditions(frames=4)
    plan = Plan.every("cps")
    a, b = (generate_latents(policy, plan, Conditions(**given), generator=generator(1)) for _ in range(2))
    assert a.shape == (BATCH, 4, 4, *SHAPE)
    assert torch.equal(a, b) and torch.equal(a[:, :, 0], given["noise"])
    assert torch.equal(a, act(policy, plan, given, seed=1).latents)
    assert not torch.equal(a, generate_latents(policy, plan, Conditions(**given), generator=generator(2)))


def test_generate_with_a_generator_for_each_video(policy):
    given = conditions(frames=3)
    both = generate_latents(policy, Plan.every("cps"), Conditions(**given), generator=[generator(1), generator(2)])
    for i in range(BATCH):
        alone = {k: v[i : i + 1] for k, v in given.items()}
        one = generate_latents(policy, Plan.every("cps"), Conditions(**alone), generator=[generator(i + 1)])
        torch.testing.assert_close(both[i : i + 1], one, **CLOSE)
