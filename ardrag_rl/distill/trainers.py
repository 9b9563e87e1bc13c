"""Trainers: batches of one resolution, and a critic and a student that take turns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset
from transformers import Trainer, TrainerCallback

from ardrag_rl.distill.buckets import BucketSampler
from ardrag_rl.training.sharded import set_up_fsdp


class _Epochs(TrainerCallback):
    """Tells a sampler its epoch: accelerate's wrappers do not pass it on after a resume."""

    def __init__(self, sampler: BucketSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._sampler.set_epoch(int(state.epoch or 0))


class BucketTrainer(Trainer):
    """A Trainer that keeps the datasets of a `ConcatDataset`, say of different resolutions, in batches of their own.

    Args:
        make_optimizer: called before training, as FSDP takes no ready one; None is the Trainer's own.
        others: the Trainer's.

    Raises:
        ValueError: FSDP is set up otherwise than as one unit of FSDP2.
    """

    def __init__(
        self, *args: Any, make_optimizer: Callable[[], torch.optim.Optimizer] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._make_optimizer = make_optimizer
        set_up_fsdp(self.accelerator)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The one that `make_optimizer` makes, once."""
        if self.optimizer is None and self._make_optimizer is not None:
            self.optimizer = self._make_optimizer()
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(data, ConcatDataset):
            return super()._get_train_sampler(data)
        batch = self.args.per_device_train_batch_size
        sampler = BucketSampler([len(d) for d in data.datasets], batch, self.args.seed)  # type: ignore[arg-type]
        self.add_callback(_Epochs(sampler))
        return sampler


class DistillTrainer(BucketTrainer):
    """Trainer of a `Distillation`: the critic learns at every update, the student at every k-th, the first included.

    Args:
        student_every: k.
        others: the Trainer's.
    """

    def __init__(self, *args: Any, student_every: int = 5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._student_every = student_every
        self._parts: dict[str, list[Tensor]] = defaultdict(list)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of this update, whose parts are logged."""
        outputs = model(**inputs, student_turn=self.state.global_step % self._student_every == 0)
        for name, value in outputs.items():
            if name != "loss":
                self._parts[name].append(value)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the mean of each part since the last log."""
        parts = {name: float(torch.stack(values).mean()) for name, values in self._parts.items()}
        self._parts.clear()
        super().log({**logs, **parts}, start_time)
