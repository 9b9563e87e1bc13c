"""fit: one resumable `transformers.Trainer` run of a module that returns its loss, with an average of its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from ardrag_rl.distill.trainers import BucketTrainer
from ardrag_rl.training.checkpoints import last_checkpoint


def fit(
    model: nn.Module,
    data: Dataset[Any],
    args: TrainingArguments,
    optimizer: Callable[[], torch.optim.Optimizer] | None = None,
    average: tuple[AveragedModel, nn.Module] | None = None,
    trainer_class: Callable[..., BucketTrainer] | None = None,
) -> BucketTrainer:
    """Trains, going on from the last checkpoint in `args.output_dir` where there is one.

    Args:
        model: its forward takes the data's entries and returns a dict with "loss".
        data: of dicts of tensors; of a `ConcatDataset`, every batch is of one of its datasets.
        args: settings of the run.
        optimizer: makes it, when the Trainer has the weights where they are trained; None is the Trainer's AdamW.
        average: and the module whose weights it follows; both are parts of `model`, so that checkpoints hold them.
        trainer_class: makes a `BucketTrainer` that calls the model otherwise.

    Returns:
        the Trainer, after its last update.
    """
    last = last_checkpoint(str(args.output_dir))
    callbacks: list[TrainerCallback] = [] if average is None else [_Averaging(*average)]
    trainer = (trainer_class or BucketTrainer)(
        model=model,
        args=args,
        train_dataset=data,
        make_optimizer=optimizer,
        callbacks=callbacks,  # type: ignore[arg-type]
    )
    if args.process_index:  # the Trainer seeds all processes alike, and they would draw the same noise
        torch.manual_seed(args.seed + args.process_index)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    model.eval()
    return trainer


def settings(
    given: TrainingArguments, folder: Path, max_steps: int, batch: int, rate: float, **changes: Any
) -> TrainingArguments:
    """A stage's own settings within those of a whole run."""
    args = copy.copy(given)
    args.output_dir, args.max_steps, args.learning_rate = str(folder), max_steps, rate
    args.per_device_train_batch_size, args.remove_unused_columns = batch, False
    for name, value in changes.items():
        setattr(args, name, value)
    return args


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a module's weights; over the first updates it forgets faster."""

    def follow(old: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
        n = float(count)
        return old.lerp(new, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(model, avg_fn=follow).requires_grad_(False)


class _Averaging(TrainerCallback):
    """Moves an average towards its source after every update."""

    def __init__(self, average: AveragedModel, source: nn.Module) -> None:
        self._average, self._source = average, source

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._average.update_parameters(self._source)
