"""Published weights: diffusers folders, Wan's original files and `.pt` checkpoints of few-step students."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from ardrag_rl import hub
from ardrag_rl.policies.transformer import CausalWanTransformer3DModel

HEAD_DIM = 128  # of all Wan models; no shape tells it
ENTRIES = ("generator_ema", "generator", "model")  # of a .pt file, the first that is there
LORA_ENTRY = "generator_lora"
_WRAPPER = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_PREFIX = re.compile(r"^(?:base_model\.model\.)?(?:model\.)?(?:diffusion_model\.)?")
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_TELLING = {  # what the geometry is read from -> its number of dimensions
    "patch_embedding.weight": 5,
    "proj_out.weight": 2,
    "condition_embedder.text_embedder.linear_1.weight": 2,
    "condition_embedder.time_embedder.linear_1.weight": 2,
    "blocks.0.ffn.net.0.proj.weight": 2,
}


def load_transformer(
    source: str | Path,
    entry: str | None = None,
    lora: str | Path | None = None,
    lora_alpha: float | None = None,
    **settings: Any,
) -> CausalWanTransformer3DModel:
    """A published checkpoint as a causal transformer, in its own precision and with its own input channels.

    Args:
        source: a folder (or hub id) with safetensors, in `transformer/` or directly, under diffusers' names (Wan2.1,
            SkyReels-V2) or Wan's original ones (Wan2.1-Fun); or one such file; or a `.pt` of Self-Forcing, CausVid,
            Causal-Forcing or LongLive. A config.json beside the weights is believed; without one, shapes tell the rest.
        entry: of a `.pt` file, which weights; None for the first of generator_ema, generator, model.
        lora: a low-rank adapter, merged (LongLive's lora.pt).
        lora_alpha: its alpha; None for its rank, as LongLive has it.
        settings: of `CausalWanTransformer3DModel` that no checkpoint has: window, chunk_size.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is not of these formats, or keys are missing, unexpected or misshaped: all are listed.
    """
    path = Path(source).expanduser()
    path = path if path.exists() else hub.pipeline_path(source)
    if path.is_dir():
        path = path / "transformer" if (path / "transformer").is_dir() else path
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{str(path)!r} holds no .safetensors file: expected the weights of a transformer.")
    else:
        files = [path]
    parts = [hub.read_weights(file, ENTRIES if entry is None else (entry,), bare=entry is None) for file in files]
    state = _renamed({key: value for part in parts for key, value in part.items()})
    if len(state) < sum(map(len, parts)):
        raise ValueError(f"the files in {str(path)!r} share keys, so they hold more than one model: name one file.")
    if lora is not None:
        _merge(state, _renamed(hub.read_weights(lora, (LORA_ENTRY,))), lora_alpha, lora)
    beside = (path if path.is_dir() else path.parent) / "config.json"
    known = _known(hub.read_json(beside)) if beside.is_file() else {}
    config = known if "in_channels" in known else _geometry(state, repr(str(path))) | known
    return _build(state, config | settings, repr(str(path)))


def check_keys(what: str, missing: Iterable[str], unexpected: Iterable[str], misshaped: Iterable[str]) -> None:
    """One error for everything that does not fit; `what` begins it.

    Raises:
        ValueError: lists all keys.
    """
    kinds = {"missing": missing, "unexpected": unexpected, "misshaped": misshaped}
    found = [f"{kind}: {', '.join(keys)}" for kind, given in kinds.items() if (keys := sorted(given))]
    if found:
        raise ValueError(f"{what}; {'; '.join(found)}.")


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under diffusers' names, free of what wrapped the model."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    state = {_PREFIX.sub("", _WRAPPER.sub("", key)): value for key, value in weights.items()}
    done = any(key.startswith("condition_embedder.") or ".attn1." in key for key in state)
    return state if done else convert_wan_transformer_to_diffusers(state)


def _merge(state: dict[str, Tensor], adapter: dict[str, Tensor], alpha: float | None, file: str | Path) -> None:
    """Adds alpha / rank B A to each adapted weight."""
    factors: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, value in adapter.items():
        match = _LORA.fullmatch(key)
        if match and f"{match[1]}.weight" in state:
            factors.setdefault(f"{match[1]}.weight", {})[match[2]] = value
        else:
            strange.append(key)
    halves = [key for key, pair in factors.items() if len(pair) != 2]
    misshaped = [
        key
        for key, pair in factors.items()
        if len(pair) == 2 and (pair["B"].shape[0], pair["A"].shape[1]) != tuple(state[key].shape)
    ]
    check_keys(
        f"the adapter {str(file)!r} does not fit its base",
        [f"one factor of {key}" for key in halves],
        strange,
        misshaped,
    )
    for key, pair in factors.items():
        a, b = pair["A"].float(), pair["B"].float()
        scale = 1.0 if alpha is None else alpha / len(a)
        state[key] = (state[key].float() + scale * (b @ a)).to(state[key].dtype)


def _known(config: dict[str, Any]) -> dict[str, Any]:
    """What a config.json tells: diffusers' says everything, Wan's original what shapes do not."""
    if "num_attention_heads" in config:
        names = inspect.signature(CausalWanTransformer3DModel).parameters
        return {key: value for key, value in config.items() if key in names}
    said = {"num_heads": "num_attention_heads", "num_layers": "num_layers", "eps": "eps"}
    known = {ours: config[theirs] for theirs, ours in said.items() if theirs in config}
    if "num_heads" in config and "dim" in config:
        known["attention_head_dim"] = config["dim"] // config["num_heads"]
    return known


def _geometry(state: dict[str, Tensor], where: str) -> dict[str, Any]:
    """A model's geometry from its shapes."""
    misshaped = [key for key, ndim in _TELLING.items() if key in state and state[key].ndim != ndim]
    check_keys(f"{where} is no Wan transformer", _TELLING.keys() - state.keys(), (), misshaped)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    dim, in_channels, *patch = shapes["patch_embedding.weight"]
    image = "condition_embedder.image_embedder."
    blocks = [int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key)]
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": dim // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // math.prod(patch),
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": 1 + max(blocks),
        "cross_attn_norm": "blocks.0.norm2.weight" in state,
        "image_dim": shapes.get(f"{image}norm1.weight", (None,))[0],
        "added_kv_proj_dim": shapes.get("blocks.0.attn2.add_k_proj.weight", (None, None))[1],
        "pos_embed_seq_len": shapes.get(f"{image}pos_embed", (None, None))[1],
    }


def _build(state: dict[str, Tensor], config: dict[str, Any], where: str) -> CausalWanTransformer3DModel:
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = CausalWanTransformer3DModel(**config)
    want = {key: value.shape for key, value in model.state_dict().items()}
    ignored = model._keys_to_ignore_on_load_unexpected or []
    state = {key: value for key, value in state.items() if not any(re.search(pattern, key) for pattern in ignored)}
    misshaped = [
        f"{key} {tuple(state[key].shape)}, expected {tuple(shape)}"
        for key, shape in want.items()
        if key in state and state[key].shape != shape
    ]
    check_keys(
        f"{where} does not fit a Wan transformer of its geometry",
        want.keys() - state.keys(),
        state.keys() - want.keys(),
        misshaped,
    )
    model.load_state_dict(state, assign=True)
    return model
