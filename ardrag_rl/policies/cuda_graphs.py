"""CudaGraphs: a function of tensors recorded once for each shape, and played again in one launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

GRAPHS = 128  # that are kept; a chunk and a size take two for every length of history


class Recorded(NamedTuple):
    """A graph.

    Attributes:
        replay: plays it; inputs: what it reads, at fixed addresses; outputs: what it writes, of any structure.
    """

    replay: Callable[[], None]
    inputs: tuple[Tensor, ...]
    outputs: Any


class CudaGraphs:
    """Calls a function by CUDA graphs, without gradient.

    A pass of a transformer is a thousand kernels; launched one by one from Python they can take longer than a GPU needs
    for one frame's tokens. A graph launches them at once, but reads and writes at fixed addresses, and repeats what it
    was recorded from: parameters may change in place, nothing else may.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, Recorded] = {}
        self._contexts: dict[Hashable, tuple[Any, Any]] = {}  # by shape: where graphs read it; what it is
        self._stream: Any = None  # one for all, or they could not share memory
        self._pool: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaGraphs:
        return CudaGraphs()  # graphs are of the original's weights

    @torch.no_grad()
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
        kind = _kind(context)
        key = (key, _kind(inputs), kind)
        if kind not in self._contexts:
            self._contexts[kind] = _kept(context), context
        fixed, last = self._contexts[kind]
        if last is not context:
            for there, here in zip(_tensors(fixed), _tensors(context), strict=True):
                there.copy_(here)
            self._contexts[kind] = fixed, context
        if key not in self._graphs:
            while len(self._graphs) >= GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = self._record(lambda *given: function(*given, fixed), _kept(inputs))
        recorded = self._graphs[key]
        for there, here in zip(recorded.inputs, inputs, strict=True):
            there.copy_(here)
        recorded.replay()
        return recorded.outputs

    def _record(self, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Recorded:
        with torch.cuda.device(inputs[0].device):
            if self._stream is None:
                self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                function(*inputs)  # once before: libraries set themselves up, kernels are compiled
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                outputs = function(*inputs)
        return Recorded(graph.replay, inputs, outputs)


def _kept(structure: Any) -> Any:
    """A copy that may be written to in any mode."""
    with torch.inference_mode(False), torch.no_grad():
        return tree_map_only(Tensor, torch.clone, structure)


def _tensors(structure: Any) -> list[Tensor]:
    return [x for x in tree_leaves(structure) if isinstance(x, Tensor)]


def _kind(structure: Any) -> Hashable:
    return tuple((x.shape, x.dtype, x.device) for x in _tensors(structure))
