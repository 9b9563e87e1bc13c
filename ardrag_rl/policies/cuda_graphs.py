"""CudaGraphs: a function of tensors recorded once for each shape, and played again without Python."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


class CudaGraphs:
    """Calls a function by CUDA graphs (`torch.cuda.make_graphed_callables`), without gradient.

    A pass of a transformer is a thousand kernels; launched one by one from Python they can take longer than a GPU needs
    for one frame's tokens. A graph launches them at once, but reads and writes at fixed addresses.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, Callable[..., Any]] = {}
        self._contexts: dict[
            Hashable, tuple[Any, Any]
        ] = {}  # by shape: where graphs read it, and what was copied there
        self._pool: Any = None  # of memory, shared by all

    def __call__(self, function: Callable[..., Any], inputs: tuple[Tensor, ...], context: Any, key: Hashable) -> Any:
        """function(*inputs, context).

        Args:
            function: of tensors alone, returns tensors; nothing in it may wait for the host. It may close over what
                `key` stands for.
            inputs: copied at every call.
            context: a structure of tensors, copied only where it is another object than at the last call.
            key: tells apart calls that differ in more than numbers and shapes.

        Returns:
            the outputs. The next call of the same key and shapes overwrites them.
        """
        key, kind = (key, _kind(inputs), _kind(context)), _kind(context)
        if kind not in self._contexts:
            self._contexts[kind] = tree_map_only(Tensor, torch.clone, context), context
        fixed, last = self._contexts[kind]
        if last is not context:
            for there, here in zip(_tensors(fixed), _tensors(context), strict=True):
                there.copy_(here)
            self._contexts[kind] = fixed, context
        if key not in self._graphs:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            samples = tuple(x.clone() for x in inputs)
            self._graphs[key] = torch.cuda.make_graphed_callables(
                lambda *given: function(*given, fixed), samples, pool=self._pool
            )
        return self._graphs[key](*inputs)


def _tensors(structure: Any) -> list[Tensor]:
    return [x for x in tree_leaves(structure) if isinstance(x, Tensor)]


def _kind(structure: Any) -> Hashable:
    return tuple((x.shape, x.dtype) for x in _tensors(structure))
