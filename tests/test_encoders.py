"""Prompts and reference images: loaded when needed, kept on disk, and seen by policies that read them."""

import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from ardrag_rl import hub
from ardrag_rl.codec import Codec
from ardrag_rl.codec.text import PromptCache, identity_of
from ardrag_rl.distill.critic import Critic
from ardrag_rl.distill.distillation import Distillation, DistillSettings
from ardrag_rl.distill.flow_matching import FlowMatching, LatentClips, OwnHistory
from ardrag_rl.envs.sprites import Sprites
from ardrag_rl.flow import Kernel
from ardrag_rl.generation import generate
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.rollout import Plan
from ardrag_rl.training.collect import collect

PROMPTS = ["a red square moves", "", "circle"]


@pytest.fixture
def cached(tiny_pipeline, tmp_path):
    return lambda **more: Codec.from_pretrained(tiny_pipeline, settings={"text_cache": str(tmp_path), **more})


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


# --- text ---


def test_a_text_encoder_is_loaded_when_a_prompt_needs_it(tiny_pipeline):
    codec = Codec.from_pretrained(tiny_pipeline)
    assert codec.text_shape == (8, 16)
    codec.decode(codec.encode(torch.zeros(1, 1, 3, 32, 32)))
    assert codec.text.encoder._model is None
    codec.encode_text(["circle"])
    assert codec.text.encoder._model is codec.text_encoder


def test_cached_embeddings_are_the_encoders_bit_for_bit(cached, tiny_pipeline, tmp_path):
    plain = Codec.from_pretrained(tiny_pipeline)
    expected = torch.cat([plain.encode_text([p]) for p in PROMPTS])
    first, again = cached(), cached()
    assert torch.equal(first.encode_text(PROMPTS), expected)
    kept = files(tmp_path)
    assert len(kept) == len(PROMPTS) and {f.suffix for f in kept} == {".safetensors"}  # and nothing half-written
    assert torch.equal(again.encode_text(PROMPTS[::-1]), expected.flip(0))
    assert again.text.encoder._model is None  # no weights were needed
    assert files(tmp_path) == kept


def test_another_encoder_has_another_cache(cached, tiny_pipeline, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "other"
    shutil.copytree(tiny_pipeline, folder)
    settings = {"text_cache": str(tmp_path / "cache")}
    same = Codec.from_pretrained(folder, settings=settings)
    before = same.encode_text(["circle"])
    weights = folder / "text_encoder" / "model.safetensors"
    state = {k: v.clone() for k, v in load_file(weights).items()}
    state["shared.weight"] += 1
    save_file(state, weights, {"format": "pt"})
    changed = Codec.from_pretrained(folder, settings=settings)
    assert not torch.allclose(changed.encode_text(["circle"]), before)
    half = Codec.from_pretrained(folder, settings={**settings, "encoder_dtype": "bfloat16"})
    assert half.encode_text(["circle"]).dtype == torch.float32
    assert len(files(tmp_path / "cache")) == 3
    original = Codec.from_pretrained(tiny_pipeline, settings=settings)  # the same files in another place
    assert original.text.cache.folder == same.text.cache.folder


def test_a_large_file_is_known_by_samples_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("ardrag_rl.codec.text.BLOCK", 8)
    monkeypatch.setattr("ardrag_rl.codec.text.BLOCKS", 4)
    data = bytearray(range(256)) * 4
    (tmp_path / "a").write_bytes(data)
    before = identity_of([tmp_path])
    for at in (0, 256, 768):
        changed = bytearray(data)
        changed[at] += 1
        (tmp_path / "a").write_bytes(changed)
        assert identity_of([tmp_path]) != before
    (tmp_path / "a").write_bytes(data + b"x")
    assert identity_of([tmp_path]) != before
    (tmp_path / "a").write_bytes(data)
    assert identity_of([tmp_path]) == before != identity_of([tmp_path], "bfloat16")


@pytest.mark.parametrize("damage", ["empty", "cut", "other", "shape"])
def test_a_broken_file_is_reported_and_made_again(cached, tmp_path, damage, caplog):
    codec = cached()
    expected = codec.encode_text(["circle"])
    (file,) = files(tmp_path)
    if damage in ("empty", "cut"):
        file.write_bytes(file.read_bytes()[: 0 if damage == "empty" else -3])
    else:
        other = PromptCache(tmp_path, codec.text.cache.folder.name)
        other._file = lambda prompt: file
        other.put("square" if damage == "other" else "circle", torch.ones(2, 16 if damage == "other" else 3))
    assert torch.equal(cached().encode_text(["circle"]), expected)
    assert f"{file} is broken" in caplog.text
    caplog.clear()
    assert torch.equal(cached().encode_text(["circle"]), expected) and not caplog.text
    assert files(tmp_path) == [file]


def test_a_write_that_fails_leaves_nothing(cached, tmp_path, monkeypatch):
    codec = cached()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("ardrag_rl.codec.text.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        codec.encode_text(["circle"])
    assert files(tmp_path) == []


def test_a_cache_needs_to_know_the_encoder(tiny_pipeline, tmp_path):
    codec = Codec.from_pretrained(tiny_pipeline)
    with pytest.raises(ValueError, match="needs a text encoder that comes from a folder"):
        Codec(codec.vae, codec.text_encoder, codec.tokenizer, settings={"text_cache": str(tmp_path)})


def test_offloaded_encoders_wait_in_main_memory(tiny_pipeline):
    """Also after an error."""
    codec = Codec.from_pretrained(tiny_pipeline, settings={"offload": True})
    encoder, moves = codec.text.encoder, []
    move = codec.text_encoder.to
    codec.text_encoder.to = lambda device: moves.append(str(device)) or move(device)
    codec.encode_text(["circle"])
    assert moves == [str(encoder.device), "cpu"]
    with pytest.raises(RuntimeError, match="inside"), encoder.on_device():
        raise RuntimeError("inside")
    assert moves == [str(encoder.device), "cpu"] * 2


# --- image tokens ---


@pytest.fixture(scope="module")
def seeing(tiny_pipeline, tmp_path_factory):
    """A pipeline with an image encoder, whose transformer reads its tokens."""
    folder = tmp_path_factory.mktemp("i2v") / "pipeline"
    shutil.copytree(tiny_pipeline, folder, ignore=shutil.ignore_patterns("transformer"))
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=8
    )
    CLIPVisionModel(config).save_pretrained(folder / "image_encoder")
    sizes = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    CLIPImageProcessor(**sizes).save_pretrained(folder / "image_processor")
    from acting import small

    torch.manual_seed(0)
    VideoPolicy(small(image_dim=16, added_kv_proj_dim=24).transformer).save_pretrained(folder)
    return folder


def image():
    return torch.randint(0, 256, (3, 32, 48), generator=torch.Generator().manual_seed(0)) / 255


def test_image_tokens_are_those_of_wans_pipeline(seeing):
    codec = Codec.from_pretrained(seeing)
    tokens = codec.encode_images(image()[None])
    assert codec.image_shape == (10, 16) and tokens.shape == (1, 10, 16) and tokens.dtype == torch.float32
    encoder = CLIPVisionModel.from_pretrained(seeing / "image_encoder").eval()
    processor = CLIPImageProcessor.from_pretrained(seeing / "image_processor")
    pipeline = WanImageToVideoPipeline(None, None, None, None, processor, encoder)
    picture = Image.fromarray((255 * image()).round().byte().permute(1, 2, 0).numpy())
    with torch.no_grad():
        expected = pipeline.encode_image(picture, "cpu")
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


def test_a_pipeline_without_an_image_encoder_has_no_tokens(tiny_pipeline, seeing, tmp_path):
    codec = Codec.from_pretrained(tiny_pipeline)
    assert codec.image_shape is None and codec.encode_images(image()[None]) is None
    shutil.copytree(seeing, tmp_path / "half", ignore=shutil.ignore_patterns("image_processor"))
    with pytest.raises(ValueError, match="has no folder image_processor/"):
        Codec.from_pretrained(tmp_path / "half")


def test_environment_policy_and_learner_see_the_tokens(seeing):
    envs = gym.make_vec("ARDrag-v0", num_envs=2, pipeline=str(seeing), num_frames=2, rewards=["smoothness"])
    policy = VideoPolicy.from_pretrained(seeing)
    rollout = collect(envs, policy, Plan.selective(0, Kernel("cps", 0.6)), 0, tasks=[0])
    assert rollout.image.shape == (2, 10, 16)
    expected = envs.unwrapped.codec.encode_images(envs.unwrapped.tasks[0].control.image[None])
    torch.testing.assert_close(rollout.image[:1], expected)
    steps = policy(rollout)
    torch.testing.assert_close(steps.log_prob(rollout.actions), rollout.log_probs, atol=1e-4, rtol=0)
    video = generate(seeing, image(), [[[0.2, 0.2], [0.8, 0.8]]], num_frames=2)
    assert video.shape == (2, 3, 32, 32)


def test_distillation_sees_the_tokens(seeing, tmp_path):
    """Teacher, own history, student and critic: each loss depends on the tokens of the first frame, which are kept."""
    codec, policy = Codec.from_pretrained(seeing), VideoPolicy.from_pretrained(seeing)
    source = Sprites("gentle", "train", 3, 32, 32)
    clips = LatentClips(tmp_path, codec, source, 2)
    batch = {key: torch.stack([clips[i][key] for i in range(2)]) for key in clips[0]}
    wanted = codec.encode_images(torch.stack([source[i].control.image for i in range(2)]))
    torch.testing.assert_close(batch["image"], wanted, atol=2e-3, rtol=2e-3)  # kept in float16

    bidirectional = policy.with_chunks(3)
    losses = {
        "teacher": FlowMatching(bidirectional, 0.0),
        "own history": OwnHistory(policy, (Kernel("ode"),)),
        "student": Distillation(policy, bidirectional, Critic(policy.with_chunks(3)), DistillSettings(guidance=2.0)),
    }
    other = torch.randn(batch["image"].shape, generator=torch.Generator().manual_seed(0))
    for name, loss in losses.items():
        turn = {"student_turn": True} if name == "student" else {}
        said = []
        for image in (batch["image"], batch["image"], other):
            torch.manual_seed(0)
            said.append(float(loss(**{**batch, "image": image}, **turn)["loss"]))
        assert said[0] == said[1] != said[2], name
    with pytest.raises(ValueError, match="reads image tokens"):
        losses["teacher"](batch["latents"], batch["trajectory"], batch["text"])


def test_the_single_environment_has_them_too(seeing, tmp_path):
    env = gym.make("ARDrag-v0", pipeline=str(seeing), num_frames=2, rewards=["smoothness"]).unwrapped
    obs, _ = env.reset(seed=0)
    assert obs in env.observation_space and obs["image"].shape == (10, 16)
    state = env.snapshot()
    other, _ = env.reset(seed=0, options={"index": 5})
    assert not np.array_equal(obs["image"], other["image"])
    np.testing.assert_array_equal(env.restore(state)["image"], obs["image"])
    VideoPolicy.from_pretrained(seeing).save_pretrained(tmp_path / "saved")
    assert Codec.from_pretrained(tmp_path / "saved").image_shape == (10, 16)
    assert hub.pipeline_size(tmp_path / "saved") == (32, 32)
