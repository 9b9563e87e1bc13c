"""Ours against Self-Forcing's own code, its `CausalWanModel` in its inference pipeline, on the same random weights.

    ARDRAG_SELF_FORCING=path/to/Self-Forcing pytest tests/test_self_forcing.py

where the path is a checkout of https://github.com/guandeh17/Self-Forcing; experiments/self_forcing.py imports it.
"""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
from acting import generator

from ardrag_rl.flow import Kernel
from ardrag_rl.policies.chunks import Conditions
from ardrag_rl.policies.generate import generate_latents
from ardrag_rl.rollout import Plan

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
CHECKOUT = os.environ.get("ARDRAG_SELF_FORCING", "")
BATCH, FRAMES, C, H, W, TEXT = 2, 9, 16, 4, 6, (8, 16)
GEOMETRY = dict(num_attention_heads=2, attention_head_dim=128, ffn_dim=64, freq_dim=32, num_layers=2, text_dim=16)


@pytest.fixture(scope="module")
def peer():
    sys.path.insert(0, str(EXPERIMENTS))
    yield importlib.import_module("self_forcing")
    sys.path.remove(str(EXPERIMENTS))


@pytest.fixture(scope="module")
def theirs(peer):
    if not peer.is_checkout(CHECKOUT):
        pytest.skip("ARDRAG_SELF_FORCING names no checkout of https://github.com/guandeh17/Self-Forcing")
    with peer.self_forcing(CHECKOUT) as modules:
        yield modules


@pytest.mark.parametrize(("chunk", "local"), [(1, -1), (3, -1), (1, 4), (3, 6)])  # all of the history; a rolling window
@pytest.mark.parametrize("cache", ["rolling", "static"])
def test_generation_is_self_forcings_own(peer, theirs, chunk, local, cache):
    """Its checkpoint converted: every frame of a video, with the same noise from reset to the last renoising."""
    g = generator()
    noise, reference = (
        torch.randn(BATCH, FRAMES, C, H, W, generator=g),
        torch.randn(BATCH, FRAMES, C, H, W, generator=g),
    )
    text = torch.randn(BATCH, *TEXT, generator=g)
    pipeline = peer.random_pipeline(theirs, GEOMETRY, text, H // 2 * (W // 2), chunk, local, FRAMES, scale=0.05)
    torch.manual_seed(1)
    with torch.no_grad():
        _, want = pipeline.inference(noise, ["", ""], return_latents=True)

    policy = peer.as_policy(pipeline, window=FRAMES if local == -1 else local - chunk, chunk=chunk)
    plan = Plan((Kernel("renoise"),) * 4)
    given = Conditions(noise, torch.zeros_like(noise), reference, text)
    got = generate_latents(policy, plan, given, generator(1), cache)[:, :, -1]
    difference = float((got - want).abs().max())
    print(f"chunk {chunk}, local_attn_size {local}: largest difference {difference:.1e} of {float(want.std()):.2f} std")
    assert difference < 1e-4
