"""Ours against Self-Forcing's own code, its `CausalWanModel` in its inference pipeline, on the same random weights.

    ARDRAG_SELF_FORCING=path/to/Self-Forcing pytest tests/test_self_forcing.py

where the path is a checkout of https://github.com/guandeh17/Self-Forcing. That code asks for CUDA and flash attention.
In their place: its own `attention`, which falls back on PyTorch's, in float32; an answer to
`torch.cuda.current_device()` while it is imported; and an `einops`, where there is none, that it only imports. Caches,
rotary positions, blocks, scheduler and the loop over chunks and steps are its own.
"""

import importlib
import os
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from acting import generator

from ardrag_rl.flow import Kernel, Schedule
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.policies.chunks import Conditions
from ardrag_rl.policies.generate import generate_latents
from ardrag_rl.policies.weights import load_transformer
from ardrag_rl.policies.widen import widen
from ardrag_rl.rollout import Plan

CHECKOUT = os.environ.get("ARDRAG_SELF_FORCING", "")
pytestmark = pytest.mark.skipif(
    not (Path(CHECKOUT) / "wan" / "modules" / "causal_model.py").is_file(),
    reason="ARDRAG_SELF_FORCING names no checkout of https://github.com/guandeh17/Self-Forcing",
)
BATCH, FRAMES, C, H, W, TEXT = 2, 9, 16, 4, 6, (8, 16)
TOKENS, HEADS, LAYERS = H // 2 * (W // 2), 2, 2
OWN = ("wan", "utils", "pipeline", "demo_utils")  # its top-level packages


@pytest.fixture(scope="module")
def theirs():
    """Its modules, imported without what runs on GPUs only."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in OWN}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(CHECKOUT).resolve()))
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        if importlib.util.find_spec("einops") is None:
            patch.setitem(sys.modules, "einops", SimpleNamespace(repeat=None, rearrange=None))
        for name in before:
            del sys.modules[name]
        for package in ("wan", "wan.modules", "pipeline"):  # their __init__ files import everything
            module = ModuleType(package)
            module.__path__ = [str(Path(CHECKOUT).resolve() / package.replace(".", "/"))]
            sys.modules[package] = module
        attention = partial(importlib.import_module("wan.modules.attention").attention, dtype=torch.float32)
        patch.setattr(importlib.import_module("wan.modules.model"), "flash_attention", attention)
        patch.setattr(importlib.import_module("wan.modules.causal_model"), "attention", attention)
        yield SimpleNamespace(
            model=sys.modules["wan.modules.causal_model"].CausalWanModel,
            wrapper=importlib.import_module("utils.wan_wrapper").WanDiffusionWrapper,
            pipeline=importlib.import_module("pipeline.causal_inference").CausalInferencePipeline,
        )
        for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
            del sys.modules[name]
        sys.modules.update(before)


def pipeline_of(theirs, chunk, local, text, monkeypatch):
    """Its inference pipeline around a small random model: what it hard-codes of the 1.3B model is set anew."""
    torch.manual_seed(0)
    model = theirs.model(
        text_len=TEXT[0],
        text_dim=TEXT[1],
        dim=128 * HEADS,
        num_heads=HEADS,
        ffn_dim=64,
        freq_dim=32,
        num_layers=LAYERS,
        local_attn_size=local,
    ).eval()
    with torch.no_grad():
        for p in model.parameters():  # its last layer begins with zeros
            p.add_(0.05 * torch.randn_like(p))
    monkeypatch.setattr(theirs.model, "from_pretrained", lambda *_, **__: model)
    settings = SimpleNamespace(
        denoising_step_list=[1000, 750, 500, 250],
        warp_denoising_step=True,
        num_frame_per_block=chunk,
        independent_first_frame=False,
        context_noise=0,
    )
    pipeline = theirs.pipeline(
        settings,
        "cpu",
        generator=theirs.wrapper(timestep_shift=5.0, is_causal=True),
        text_encoder=lambda text_prompts: {"prompt_embeds": text},
        vae=SimpleNamespace(decode_to_pixel=lambda latents, use_cache: latents),
    )
    pipeline.frame_seq_length, pipeline.num_transformer_blocks = TOKENS, LAYERS
    size = (BATCH, (FRAMES if local == -1 else local) * TOKENS, HEADS, 128)
    pipeline.kv_cache1 = [{"k": torch.zeros(size), "v": torch.zeros(size)} for _ in range(LAYERS)]
    pipeline.crossattn_cache = [{} for _ in range(LAYERS)]
    return pipeline


@pytest.mark.parametrize(("chunk", "local"), [(1, -1), (3, -1), (1, 4), (3, 6)])  # all of the history; a rolling window
def test_generation_is_self_forcings_own(theirs, chunk, local, monkeypatch, tmp_path):
    """Its checkpoint converted: every frame of a video, with the same noise from reset to the last renoising."""
    g = generator()
    noise, reference = (
        torch.randn(BATCH, FRAMES, C, H, W, generator=g),
        torch.randn(BATCH, FRAMES, C, H, W, generator=g),
    )
    text = torch.randn(BATCH, *TEXT, generator=g)
    pipeline = pipeline_of(theirs, chunk, local, text, monkeypatch)
    torch.manual_seed(1)
    with torch.no_grad():
        _, want = pipeline.inference(noise, ["", ""], return_latents=True)

    torch.save({"generator_ema": pipeline.generator.state_dict()}, tmp_path / "self_forcing_dmd.pt")
    window = FRAMES if local == -1 else local - chunk
    transformer = load_transformer(tmp_path / "self_forcing_dmd.pt", window=window, chunk_size=chunk)
    policy = VideoPolicy(widen(transformer), Schedule(tuple(pipeline.denoising_step_list.tolist())))
    plan = Plan((Kernel("renoise"),) * 4)
    given = Conditions(noise, torch.zeros_like(noise), reference, text)
    got = generate_latents(policy, plan, given, generator(1))[:, :, -1]
    difference = float((got - want).abs().max())
    print(f"chunk {chunk}, local_attn_size {local}: largest difference {difference:.1e} of {float(want.std()):.2f} std")
    assert difference < 1e-4
