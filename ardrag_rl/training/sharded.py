"""Sharded: how models are sharded by FSDP2, and whole weights of what is. All processes call these together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def set_up_fsdp(accelerator: Accelerator) -> bool:
    """Makes FSDP fit models whose parts are called one by one; call it before anything is wrapped.

    The model is one unit, whose inputs and outputs stay float32 and whose checkpoints hold whole weights.

    Returns:
        whether there is FSDP.

    Raises:
        ValueError: it is FSDP1, or shards blocks as units of their own.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return False
    if plugin.fsdp_version != 2 or plugin.auto_wrap_policy is not None:
        raise ValueError(
            "FSDP shards a model as one unit here, as its parts are called one by one: start the script with "
            "accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy NO_WRAP."
        )
    if plugin.mixed_precision_policy is not None:  # noise is added and densities are taken in float32
        policy = plugin.mixed_precision_policy
        plugin.mixed_precision_policy = replace(policy, cast_forward_inputs=False, output_dtype=None)
    plugin.cpu_ram_efficient_loading = False  # it takes every buffer for a shard; each process has loaded its own
    plugin.set_state_dict_type("FULL_STATE_DICT")
    return True


def whole(value: Tensor) -> Tensor:
    """The tensor, detached and gathered from all processes where it is a shard."""
    return value.full_tensor().detach() if isinstance(value, DTensor) else value.detach()


def gathered(module: nn.Module) -> nn.Module:
    """The module, whole parameters in place of its shards, for good: it is not trained after."""
    for owner in module.modules():
        for name, value in list(owner.named_parameters(recurse=False)):
            if isinstance(value, DTensor):
                setattr(owner, name, nn.Parameter(whole(value), value.requires_grad))
    return module


@contextlib.contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """The module holds its whole parameters within, so that its parts can be called without its forward."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
