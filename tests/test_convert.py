"""Checkpoints in their published formats, made with random weights: converted, they give their source's output."""

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from acting import generator, masked_forward
from diffusers import SkyReelsV2Transformer3DModel, WanTransformer3DModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

import ardrag_rl
from ardrag_rl import hub
from ardrag_rl.codec import Codec
from ardrag_rl.flow import Kernel, Schedule
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.policies.chunks import Conditions
from ardrag_rl.policies.convert import convert
from ardrag_rl.policies.generate import generate_latents
from ardrag_rl.policies.weights import load_transformer
from ardrag_rl.policies.widen import widen
from ardrag_rl.rollout import Plan

BATCH, FRAMES, C = 2, 4, 16
CLOSE = dict(atol=1e-4, rtol=0)
GEOMETRY = dict(  # Wan2.1's channels, patches and heads, the rest small
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=128,
    out_channels=C,
    text_dim=16,
    freq_dim=32,
    ffn_dim=64,
    num_layers=2,
)
IMAGE = dict(image_dim=20, added_kv_proj_dim=256)
KINDS = {"text": dict(in_channels=16), "image": dict(in_channels=36, **IMAGE), "control": dict(in_channels=48, **IMAGE)}


def random_model(kind="text", seed=0, cls=WanTransformer3DModel):
    """A source whose every parameter is random, norms included."""
    torch.manual_seed(seed)
    model = cls(**GEOMETRY, **KINDS[kind]).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


ORIGINAL = {  # diffusers' names -> Wan's own
    "condition_embedder.time_embedder.linear_1.": "time_embedding.0.",
    "condition_embedder.time_embedder.linear_2.": "time_embedding.2.",
    "condition_embedder.time_proj.": "time_projection.1.",
    "condition_embedder.text_embedder.linear_1.": "text_embedding.0.",
    "condition_embedder.text_embedder.linear_2.": "text_embedding.2.",
    "condition_embedder.image_embedder.norm1.": "img_emb.proj.0.",
    "condition_embedder.image_embedder.ff.net.0.proj.": "img_emb.proj.1.",
    "condition_embedder.image_embedder.ff.net.2.": "img_emb.proj.3.",
    "condition_embedder.image_embedder.norm2.": "img_emb.proj.4.",
    "proj_out.": "head.head.",
    ".attn1.": ".self_attn.",
    ".attn2.": ".cross_attn.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".o.",
    ".add_k_proj.": ".k_img.",
    ".add_v_proj.": ".v_img.",
    ".norm_added_k.": ".norm_k_img.",
    ".norm2.": ".norm3.",
    ".ffn.net.0.proj.": ".ffn.0.",
    ".ffn.net.2.": ".ffn.2.",
    ".scale_shift_table": ".modulation",
}


def original(state, prefix=""):
    """A state under Wan's original names, as the published files have them."""
    renamed = {}
    for key, value in state.items():
        new = "head.modulation" if key == "scale_shift_table" else key
        for ours, theirs in ORIGINAL.items():
            if "image_embedder" in ours or "image_embedder" not in new:
                new = new.replace(ours, theirs)
        renamed[prefix + new] = value.clone()
    return renamed


def wrapped(state):
    """Under the names that FSDP gives the parameters of a wrapper around the model."""
    names = {
        key: key.replace("blocks.0.", "blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.") for key in state
    }
    return {f"model._fsdp_wrapped_module.{names[key]}": value for key, value in state.items()}


@pytest.fixture(scope="module")
def components(tmp_path_factory, tiny_pipeline):
    """A pipeline as diffusers has it, without its transformer: 16 latent channels, 32 px to 8."""
    from ardrag_rl.distill.codec_training import image_autoencoder

    path = tmp_path_factory.mktemp("components")
    torch.manual_seed(0)
    image_autoencoder(C, (8, 16, 16), blocks=1, shortcuts=True, head_dim=8).save_pretrained(path / "vae")
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(tiny_pipeline / name, path / name)
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"], "vae": ["diffusers"]}
    hub.write_json(path / "model_index.json", index)
    hub.write_json(path / "scheduler" / "scheduler_config.json", {"_class_name": "UniPCMultistepScheduler"})
    return path


def given(kind, frames=FRAMES, control=False, seed=0):
    g = generator(seed)
    noise, reference, trajectory = (torch.randn(BATCH, frames, C, 4, 6, generator=g) for _ in range(3))
    image = torch.randn(BATCH, 5, 20, generator=g) if kind != "text" else None
    text = torch.randn(BATCH, 512, 16, generator=g)
    return Conditions(noise, trajectory if control else torch.zeros_like(trajectory), reference, text, image)


def source_inputs(kind, x, given, frames):
    """What the source's own pipeline concatenates: diffusers' I2V, VideoX-Fun's Control."""
    reference, trajectory = given.reference[:, frames], given.trajectory[:, frames]
    mask = torch.zeros(BATCH, x.shape[1], 4, *x.shape[-2:])
    if frames.start == 0:
        mask[:, 0] = 1
    return torch.cat({"text": [x], "image": [x, mask, reference], "control": [x, trajectory, reference]}[kind], 2)


def source_video(model, kind, given, schedule, chunk, window, seed):
    """Few-step generation by the source: dense forwards, x0 prediction, renoising."""
    g, levels = generator(seed), schedule.levels
    clean = given.noise[:, :0]
    for a in range(0, FRAMES, chunk):
        x = given.noise[:, a : a + chunk]
        steps = torch.zeros(a + x.shape[1])
        for t, t_next in pairwise(levels):
            steps[a:] = 1000 * t
            frames = source_inputs(kind, torch.cat([clean, x], 1), given, slice(0, a + x.shape[1]))
            v = masked_forward(model, frames, steps, given.text, given.image, chunk, window)[:, a:]
            x0 = x - t * v
            x = (1 - t_next) * x0 + (t_next * torch.randn(x.shape, generator=g) if t_next else 0)
        clean = torch.cat([clean, x], 1)
    return clean


def same_forward(policy, model, kind="text", control=False):
    """The largest difference between one bidirectional pass of a converted model and its source's."""
    conditions, t = given(kind, control=control), torch.tensor([755.0, 522.0])
    transformer = policy.with_chunks(FRAMES).transformer
    inputs = policy.frame_inputs(conditions.noise, conditions.reference, conditions.trajectory)
    frames = source_inputs(kind, conditions.noise, conditions, slice(0, FRAMES))
    with torch.no_grad():
        context = transformer.encode_context(conditions.text, conditions.image)
        got = transformer(context, None, inputs[:, None], t[:, None, None])[0][:, 0]
        want = model(frames.transpose(1, 2), t, conditions.text, conditions.image).sample.transpose(1, 2)
    return float((got - want).abs().max())


# --- what is reproduced


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("chunk", "window"), [(1, 2), (2, 3), (FRAMES, 1)])  # causal, chunked, bidirectional
def test_a_converted_model_generates_what_its_source_generates(kind, chunk, window, components, tmp_path):
    """With the control absent: the same noise, prompt, condition and image tokens give the same video."""
    model = random_model(kind)
    file = tmp_path / "model.safetensors"
    save_file(original(model.state_dict()), file)
    steps = (1000, 937.5, 625)
    convert(file, tmp_path / "out", components, timesteps=steps, chunk_size=chunk, window=window)
    policy = VideoPolicy.from_pretrained(tmp_path / "out")
    assert policy.schedule == Schedule(steps) and policy.transformer.config.in_channels == 52
    conditions = given(kind)
    plan = Plan(tuple(Kernel("renoise") for _ in steps))
    got = generate_latents(policy, plan, conditions, generator(1))[:, :, -1]
    want = source_video(model, kind, conditions, policy.schedule, chunk, window, seed=1)
    torch.testing.assert_close(got, want, **CLOSE)
    assert float(want.std()) > 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_columns_go_where_the_same_thing_comes_in(kind):
    model = random_model(kind)
    wide = widen(load_random(model))
    weight = wide.patch_embedding.weight
    latent, mask, reference, trajectory = weight.split([16, 4, 16, 16], 1)
    theirs = model.patch_embedding.weight
    assert torch.equal(latent, theirs[:, :16]) and torch.equal(wide.patch_embedding.bias, model.patch_embedding.bias)
    zero = {"text": (mask, reference, trajectory), "image": (trajectory,), "control": (mask,)}[kind]
    assert not any(part.any() for part in zero)
    if kind == "image":
        assert torch.equal(mask, theirs[:, 16:20]) and torch.equal(reference, theirs[:, 20:])
    if kind == "control":
        assert torch.equal(trajectory, theirs[:, 16:32]) and torch.equal(reference, theirs[:, 32:])
    assert widen(wide) is wide and wide.patch_embedding.weight is weight
    # any control leaves the first two alone; the third takes it as its own
    assert same_forward(VideoPolicy(wide), model, kind, control=True) < 1e-4


def load_random(model):
    from ardrag_rl.policies import CausalWanTransformer3DModel

    config = {k: v for k, v in model.config.items() if not k.startswith("_")}
    causal = CausalWanTransformer3DModel(**config)
    causal.load_state_dict(model.state_dict())
    return causal


def test_other_numbers_of_channels_are_refused():
    torch.manual_seed(0)
    odd = load_random(WanTransformer3DModel(**GEOMETRY, in_channels=20))
    with pytest.raises(ValueError, match=r"in_channels=20 for 16 latent ones: expected 16 .* 48 \(Fun-Control\)"):
        widen(odd)


# --- formats


@pytest.mark.parametrize("kind", KINDS)
def test_original_names_and_back(kind, tmp_path):
    """A folder as Wan2.1-Fun publishes it: original names beside the original config."""
    model = random_model(kind)
    save_file(original(model.state_dict()), tmp_path / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "WanModel", "dim": 256, "num_heads": 2, "num_layers": 2, "eps": 1e-6, "in_dim": 36}
    (tmp_path / "config.json").write_text(json.dumps(config))
    got = load_transformer(tmp_path, window=3)
    state = model.state_dict()
    assert got.config.window == 3 and got.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in got.state_dict().items())
    assert {key: got.config[key] for key in model.config if key in got.config and key[0] != "_"} == {
        key: value for key, value in model.config.items() if key in got.config and key[0] != "_"
    }


def lora_of(model, alpha):
    """A random adapter on all linear layers of the blocks, in LongLive's format, and the model with it."""
    torch.manual_seed(3)
    targets = [n for n, m in model.named_modules() if n.startswith("blocks.") and isinstance(m, torch.nn.Linear)]
    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=alpha, target_modules=targets, init_lora_weights=False))
    return original(get_peft_model_state_dict(adapted)), adapted.eval()


PUBLISHED = {  # the file, by the weights that count and others
    "self-forcing": lambda w, o: {"generator": original(o, "model."), "critic": {}, "generator_ema": wrapped(w)},
    "self-forcing, other names": lambda w, o: {"generator_ema": original(w, "model."), "step": 600},
    "causvid": lambda w, o: {"generator": original(w, "model."), "critic": original(o, "model.")},
    "causal-forcing": lambda w, o: {"generator": wrapped(w)},
    "bare": lambda w, o: original(w),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_few_step_checkpoints(name, tmp_path):
    model, other = random_model(), random_model(seed=1)
    weights = original(model.state_dict()) if name in ("self-forcing", "causal-forcing") else model.state_dict()
    torch.save(PUBLISHED[name](weights, other.state_dict()), tmp_path / "model.pt")
    policy = VideoPolicy(widen(load_transformer(tmp_path / "model.pt")))
    assert same_forward(policy, model) < 1e-4 < same_forward(policy, other)
    if name == "self-forcing":
        policy = VideoPolicy(widen(load_transformer(tmp_path / "model.pt", entry="generator")))
        assert same_forward(policy, other) < 1e-4


@pytest.mark.parametrize("alpha", [None, 6])
def test_an_adapter_is_merged(alpha, tmp_path):
    model = random_model()
    torch.save({"generator": original(model.state_dict(), "model.")}, tmp_path / "longlive_base.pt")
    lora, adapted = lora_of(model, alpha or 3)
    assert all(key.startswith("base_model.model.blocks.") for key in lora)
    torch.save({"generator_lora": lora}, tmp_path / "lora.pt")
    save_file(lora, tmp_path / "lora.safetensors")
    for file in ("lora.pt", "lora.safetensors"):
        got = load_transformer(tmp_path / "longlive_base.pt", lora=tmp_path / file, lora_alpha=alpha)
        assert same_forward(VideoPolicy(widen(got)), adapted) < 1e-4
    with adapted.disable_adapter():
        assert same_forward(VideoPolicy(widen(got)), adapted) > 1e-2


@pytest.mark.parametrize(("cls", "kind"), [(WanTransformer3DModel, "text"), (SkyReelsV2Transformer3DModel, "image")])
def test_diffusers_pipelines_load_as_they_are(cls, kind, components, tmp_path):
    """In shards too; `gym.make` takes the folder, and what is saved again is a pipeline of ours."""
    model = random_model(kind, cls=cls)
    shutil.copytree(components, tmp_path / "pipeline")
    model.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="2MB")
    assert len(list((tmp_path / "pipeline" / "transformer").glob("*.safetensors"))) > 1
    policy = VideoPolicy.from_pretrained(tmp_path / "pipeline")
    assert same_forward(policy, model, kind) < 1e-4
    assert same_forward(VideoPolicy(widen(load_transformer(tmp_path / "pipeline"))), model, kind) < 1e-4
    policy.save_pretrained(tmp_path / "saved")
    index = hub.read_json(tmp_path / "saved" / "model_index.json")
    assert index["transformer"] == ["ardrag_rl.policies", "CausalWanTransformer3DModel"]
    again = VideoPolicy.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), policy.parameters(), strict=True))
    if kind == "text":
        env = gym.make("ARDrag-v0", pipeline=tmp_path / "pipeline", height=32, width=32, num_frames=2)
        obs, _ = env.reset(seed=0)
        step = policy.session(1).transition({key: value[None] for key, value in obs.items()}, Kernel("cps", 0.5))
        env.step(step.sample(generator())[0].numpy())


def test_precision_is_kept(components, tmp_path):
    model = random_model().to(torch.bfloat16)
    save_file(original(model.state_dict()), tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "out", components)
    assert {p.dtype for p in load_transformer(tmp_path / "out").parameters()} == {torch.bfloat16}


# --- the command and its errors


def test_the_command(components, tmp_path):
    torch.save({"generator_ema": original(random_model().state_dict(), "model.")}, tmp_path / "sf.pt")
    script = Path(__file__).parent.parent / "experiments" / "convert.py"
    flags = f"--source {tmp_path}/sf.pt --output {tmp_path}/a/b --components {components} --height 32 --width 32"
    more = "--timesteps 1000 937.5 833.3333 625 --chunk_size 1 --window 18"
    done = subprocess.run([sys.executable, script, *flags.split(), *more.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "52 input channels" in done.stdout
    policy = VideoPolicy.from_pretrained(tmp_path / "a" / "b")
    assert policy.schedule.num_steps == 4 and policy.transformer.config.window == 18
    assert Codec.from_pretrained(tmp_path / "a" / "b").latent_channels == C
    video = ardrag_rl.generate(tmp_path / "a" / "b", torch.rand(3, 32, 32), [[[0.2, 0.2], [0.6, 0.6]]], num_frames=2)
    assert video.shape[-2:] == (32, 32)
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"b"}  # nothing half-written beside it
    with pytest.raises(FileExistsError, match="is there already"):
        convert(tmp_path / "sf.pt", tmp_path / "a" / "b", components)


@pytest.mark.parametrize("config", [True, False])
def test_all_keys_that_do_not_fit_are_listed(config, tmp_path):
    model = random_model()
    state = original(model.state_dict())
    del state["blocks.1.self_attn.q.weight"], state["blocks.0.ffn.2.bias"]
    state["blocks.0.cross_attn.k.weight"] = torch.zeros(256, 3)
    state["head.head.bias"] = torch.zeros(7)
    state |= {"ref_conv.weight": torch.zeros(2), "fps_embedding.weight": torch.zeros(2)}
    save_file(state, tmp_path / "model.safetensors")
    if config:
        model.save_config(tmp_path)
    with pytest.raises(ValueError) as raised:
        load_transformer(tmp_path / "model.safetensors")
    said = str(raised.value)
    assert "missing: blocks.0.ffn.net.2.bias, blocks.1.attn1.to_q.weight;" in said
    assert "unexpected: fps_embedding.weight, ref_conv.weight;" in said
    assert "misshaped: blocks.0.attn2.to_k.weight (256, 3), expected (256, 256), proj_out.bias (7,)" in said


def test_a_pipeline_that_does_not_fit_lists_its_keys(components, tmp_path):
    shutil.copytree(components, tmp_path / "pipeline")
    model = random_model()
    state = {k: v for k, v in model.state_dict().items() if k != "blocks.1.attn1.to_q.weight"}
    state |= {"proj_out.bias": torch.zeros(7), "strange": torch.zeros(1)}
    model.save_config(tmp_path / "pipeline" / "transformer")
    save_file(state, tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError) as raised:
        VideoPolicy.from_pretrained(tmp_path / "pipeline")
    said = str(raised.value)
    assert "missing: blocks.1.attn1.to_q.weight; unexpected: strange; misshaped: proj_out.bias (7,)" in said


class Code:
    """What no weights file has."""


def test_files_that_are_no_weights_are_refused(components, tmp_path):
    model = random_model()
    torch.save({"generator": Code()}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="nothing but weights"):
        load_transformer(tmp_path / "code.pt")
    legacy = original(model.state_dict(), "model.")
    torch.save({"generator": legacy, "model": {}}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    found = hub.read_weights(
        tmp_path / "old.pt", ("model", "generator")
    )  # an entry that is there counts, empty ones not
    assert found.keys() == legacy.keys()
    torch.save({f"a{i}": 1 for i in range(99)}, tmp_path / "many.pt")
    with pytest.raises(ValueError, match=r"has the entries \['a0', .*\] and 94 more: expected tensors by name"):
        hub.read_weights(tmp_path / "many.pt")
    torch.save({"optimizer": {"lr": 1}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"has the entries \['optimizer'\]: expected generator_ema or generator"):
        load_transformer(tmp_path / "other.pt")
    torch.save({"generator": original(model.state_dict(), "model.")}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"has the entries \['generator'\]: expected generator_ema"):
        load_transformer(tmp_path / "model.pt", entry="generator_ema")
    with pytest.raises(ValueError, match=r"no Wan transformer; missing: .*patch_embedding\.weight"):
        save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
        load_transformer(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"no Wan transformer; misshaped: patch_embedding\.weight"):
        state = original(model.state_dict())
        save_file(state | {"patch_embedding.weight": torch.zeros(256, 16)}, tmp_path / "a.safetensors")
        load_transformer(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        load_transformer(components)
    with pytest.raises(ValueError, match="more than one model"):
        for name in "ab":
            save_file(original(model.state_dict()), tmp_path / f"{name}.safetensors")
        load_transformer(tmp_path)
    with pytest.raises(ValueError, match="'nothing-here' is unknown"):
        load_transformer("nothing-here")


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    model = random_model()
    torch.save({"generator": original(model.state_dict(), "model.")}, tmp_path / "model.pt")
    lora, _ = lora_of(model, 3)
    first = next(iter(lora))
    del lora[first]
    lora["base_model.model.nowhere.lora_A.weight"] = torch.zeros(3, 3)
    torch.save(lora, tmp_path / "lora.pt")
    with pytest.raises(
        ValueError, match=r"does not fit its base; missing: one factor of .*; unexpected: nowhere\.lora_A"
    ):
        load_transformer(tmp_path / "model.pt", lora=tmp_path / "lora.pt")
    with pytest.raises(FileNotFoundError, match=r"gone\.pt does not exist"):
        load_transformer(tmp_path / "model.pt", lora=tmp_path / "gone.pt")


def test_components_of_another_model_are_refused(components, tiny_pipeline, tmp_path):
    save_file(original(random_model().state_dict()), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"give \(latent channels, text width\) \(4, 16\).* takes \(16, 16\)"):
        convert(tmp_path / "model.safetensors", tmp_path / "out", tiny_pipeline)
    with pytest.raises(ValueError, match="no whole pipeline: give as components"):
        convert(tmp_path / "model.safetensors", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_other_formats_are_sent_to_the_converter(tmp_path):
    file = tmp_path / "self_forcing_dmd.pt"
    torch.save({}, file)
    for name in (file, tmp_path):
        with pytest.raises(ValueError, match=r"experiments/convert\.py makes one"):
            VideoPolicy.from_pretrained(name)
        with pytest.raises(ValueError, match=r"experiments/convert\.py makes one"):
            gym.make("ARDrag-v0", pipeline=name)
