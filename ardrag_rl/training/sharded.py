"""Sharded: whole weights of modules that FSDP2 has cut into shards. All processes call these together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


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
