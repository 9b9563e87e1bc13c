"""LoRA on the policy's transformer through peft: add, switch off for the reference, merge for saving."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ardrag_rl.policies import VideoPolicy
from ardrag_rl.training.sharded import whole


def add_lora(policy: VideoPolicy, r: int, alpha: int, target_modules: Sequence[str] | None = None) -> None:
    """Freezes the policy and adds trainable adapters to its linear layers, in place.

    Args:
        r, alpha: rank and scale.
        target_modules: ends of module names; None is every linear layer of the transformer's blocks.
    """
    from peft import LoraConfig, inject_adapter_in_model

    policy.requires_grad_(False)
    transformer: Any = policy.transformer  # its base class has no types
    modules = transformer.named_modules()
    linear = [name for name, m in modules if isinstance(m, nn.Linear) and name.startswith("blocks.")]
    targets = list(target_modules) if target_modules else linear
    # no dropout: the replay must see the network that acted
    inject_adapter_in_model(LoraConfig(r=r, lora_alpha=alpha, target_modules=targets), transformer)


def has_lora(policy: nn.Module) -> bool:
    """Whether the policy carries adapters."""
    return any(True for _ in _lora_layers(policy))


@contextmanager
def lora_disabled(policy: nn.Module) -> Iterator[None]:
    """The base model, without its adapters: the reference policy of a LoRA run."""
    layers = [layer for _, layer in _lora_layers(policy)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(policy: VideoPolicy) -> VideoPolicy:
    """A copy with its adapters merged into the weights; the policy itself where it has none."""
    if not has_lora(policy):
        return policy
    copied = copy.deepcopy(policy)
    for name, layer in list(_lora_layers(copied)):
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(copied.get_submodule(parent), child, layer.get_base_layer())
    return copied


def trainable_state(policy: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes, by name, detached, whole."""
    return {name: whole(p) for name, p in policy.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trainable_state(policy: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies parameters of `trainable_state` into a policy of the same make.

    Raises:
        ValueError: the names differ.
    """
    own = trainable_state(policy)
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())
        raise ValueError(f"the weights do not fit the policy: {len(odd)} names differ, {odd[0]!r} the first.")
    for name, value in own.items():
        value.copy_(state[name])


def _lora_layers(policy: nn.Module) -> Iterator[tuple[str, Any]]:
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return
    for name, module in policy.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module
