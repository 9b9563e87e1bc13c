"""Self-Forcing's own code, from a checkout of https://github.com/guandeh17/Self-Forcing, to be held against ours.

Nothing of it is here: its modules are imported from where the user has them. That code asks for CUDA and flash
attention. Where these are not, in their place: its own `attention`, which falls back on PyTorch's; an answer to
`torch.cuda.current_device()` while it is imported; and an `einops`, where there is none, that it only imports. Caches,
rotary positions, blocks, scheduler and the loop over chunks and steps are its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ardrag_rl.flow import Schedule
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.policies.weights import load_transformer
from ardrag_rl.policies.widen import widen

OWN = ("wan", "utils", "pipeline", "demo_utils")  # its top-level packages
STEPS = [1000, 750, 500, 250]  # before its shift of 5


def is_checkout(folder: str | None) -> bool:
    """Whether its code is there."""
    return bool(folder) and (Path(folder) / "wan" / "modules" / "causal_model.py").is_file()


@contextmanager
def self_forcing(folder: str, dtype: torch.dtype = torch.float32) -> Iterator[SimpleNamespace]:
    """Its classes `model`, `wrapper` and `pipeline`, while it is open.

    Args:
        folder: the checkout.
        dtype: that its `attention` computes in where flash attention is not installed.
    """
    root = Path(folder).resolve()
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in OWN}
    sys.path.insert(0, str(root))
    try:
        for name in before:
            del sys.modules[name]
        for package in ("wan", "wan.modules", "pipeline"):  # their __init__ files import everything
            module = ModuleType(package)
            module.__path__ = [str(root / package.replace(".", "/"))]
            sys.modules[package] = module
        with ExitStack() as stack:
            if not torch.cuda.is_available():
                stack.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: 0))
            if importlib.util.find_spec("einops") is None:
                sys.modules["einops"] = SimpleNamespace(repeat=None, rearrange=None)  # type: ignore[assignment]
                stack.callback(sys.modules.pop, "einops")
            theirs = importlib.import_module("wan.modules.attention")
            if not theirs.FLASH_ATTN_2_AVAILABLE:
                attention = partial(theirs.attention, dtype=dtype)
                for name, module in (("flash_attention", "model"), ("attention", "causal_model")):
                    target = importlib.import_module(f"wan.modules.{module}")
                    stack.enter_context(mock.patch.object(target, name, attention))
            yield SimpleNamespace(
                model=importlib.import_module("wan.modules.causal_model").CausalWanModel,
                wrapper=importlib.import_module("utils.wan_wrapper").WanDiffusionWrapper,
                pipeline=importlib.import_module("pipeline.causal_inference").CausalInferencePipeline,
            )
    finally:
        sys.path.remove(str(root))
        for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
            del sys.modules[name]
        sys.modules.update(before)


def random_pipeline(
    theirs: SimpleNamespace,
    geometry: dict[str, Any],
    text: Tensor,
    tokens: int,
    chunk: int,
    local: int,
    frames: int,
    scale: float = 0.02,
) -> Any:
    """Its inference pipeline around a model of random weights; what it hard-codes of the 1.3B model is set anew.

    Args:
        theirs: of `self_forcing`.
        geometry: `num_attention_heads`, `attention_head_dim`, `ffn_dim`, `freq_dim`, `num_layers`, `text_dim`.
        text: (B, L, D) prompt embeddings, whose device and dtype the pipeline has.
        tokens: of a frame.
        chunk, local: its `num_frame_per_block` and `local_attn_size`, -1 for all of the history.
        frames: of the longest video.
        scale: of what is added to its initial weights.
    """
    heads, width = geometry["num_attention_heads"], geometry["attention_head_dim"]
    torch.manual_seed(0)
    with torch.device(text.device):
        model = theirs.model(
            text_len=text.shape[1],
            text_dim=geometry["text_dim"],
            dim=width * heads,
            num_heads=heads,
            ffn_dim=geometry["ffn_dim"],
            freq_dim=geometry["freq_dim"],
            num_layers=geometry["num_layers"],
            local_attn_size=local,
        ).eval()
    model.freqs = model.freqs.to(text.device)
    with torch.no_grad():
        for p in model.parameters():  # its last layer begins with zeros
            p.add_(scale * torch.randn_like(p))
    settings = SimpleNamespace(
        denoising_step_list=STEPS,
        warp_denoising_step=True,
        num_frame_per_block=chunk,
        independent_first_frame=False,
        context_noise=0,
    )
    with mock.patch.object(theirs.model, "from_pretrained", lambda *_, **__: model.to(text.dtype)):
        pipeline = theirs.pipeline(
            settings,
            text.device,
            generator=theirs.wrapper(timestep_shift=5.0, is_causal=True),
            text_encoder=lambda text_prompts: {"prompt_embeds": text},
            vae=SimpleNamespace(decode_to_pixel=lambda latents, use_cache: latents),
        )
    pipeline.frame_seq_length, pipeline.num_transformer_blocks = tokens, geometry["num_layers"]
    size = (len(text), (frames if local == -1 else local) * tokens, heads, width)
    pipeline.kv_cache1 = [{k: text.new_zeros(size) for k in "kv"} for _ in range(geometry["num_layers"])]
    pipeline.crossattn_cache = [{} for _ in range(geometry["num_layers"])]
    return pipeline


def as_policy(pipeline: Any, window: int, chunk: int) -> VideoPolicy:
    """Our policy of its weights, by way of the file it publishes; on the CPU."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "self_forcing_dmd.pt"
        torch.save({"generator_ema": pipeline.generator.state_dict()}, file)
        transformer = load_transformer(file, window=window, chunk_size=chunk)
    return VideoPolicy(widen(transformer), Schedule(tuple(pipeline.denoising_step_list.tolist())))
