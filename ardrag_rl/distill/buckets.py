"""Buckets: batches of one resolution from datasets of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class BucketSampler(Sampler[int]):
    """Indices into concatenated datasets, of which every `batch` consecutive ones are of the same dataset.

    Datasets are shuffled, and so is the order of batches; what does not fill a batch is left out until the next epoch.

    Args:
        lengths: of the datasets, in order.
        batch: indices of a batch.
        seed: of the order, with the epoch.

    Raises:
        ValueError: a dataset is smaller than a batch.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int = 0) -> None:
        for i, length in enumerate(lengths):
            if length < batch:
                raise ValueError(f"bucket {i} has {length} clips, fewer than a batch of {batch}: it gives no batch.")
        self.lengths, self.batch, self.seed, self.epoch = tuple(lengths), batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Another epoch has another order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(length // self.batch * self.batch for length in self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) % 2**63)
        batches, first = [], 0
        for length in self.lengths:
            order = first + torch.randperm(length, generator=generator)
            batches += order[: length // self.batch * self.batch].view(-1, self.batch).tolist()
            first += length
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[i]
