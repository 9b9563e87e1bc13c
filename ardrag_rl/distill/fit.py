"""fit: one resumable `transformers.Trainer` run of a module that returns its loss, with an average of its weights."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from timm.optim import muon as timm_muon
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import ConcatDataset, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from ardrag_rl.distill.buckets import BucketSampler
from ardrag_rl.policies import transformer
from ardrag_rl.training.checkpoints import last_checkpoint


def fit(
    model: nn.Module,
    data: Dataset[Any],
    args: TrainingArguments,
    optimizer: torch.optim.Optimizer | None = None,
    average: tuple[AveragedModel, nn.Module] | None = None,
    trainer_class: Callable[..., Trainer] | None = None,
) -> Trainer:
    """Trains, going on from the last checkpoint in `args.output_dir` where there is one.

    Args:
        model: its forward takes the data's entries and returns a dict with "loss".
        data: of dicts of tensors; of a `ConcatDataset`, every batch is of one of its datasets.
        args: settings of the run.
        optimizer: None is the Trainer's AdamW.
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
        optimizers=(optimizer, None),
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


def muon(parameters: Iterable[Any], rate: float) -> torch.optim.Optimizer:
    """timm's Muon (AdamW for vectors): a lower loss than AdamW's after the same number of clips."""
    timm_muon.zeropower_via_newtonschulz = _orthogonalise
    return timm_muon.Muon(parameters, lr=rate, weight_decay=0.01, nesterov=True)


_TIMMS = timm_muon.zeropower_via_newtonschulz
_EAGER = transformer._run_block


def _orthogonalise(*args: Any, **kwargs: Any) -> Tensor:
    """timm's, in float32: bfloat16 takes a hundred times longer on a CPU without such instructions."""
    return _TIMMS(*args, **{**kwargs, "dtype": torch.float32})


def compile_blocks() -> None:
    """torch.compile for passes with gradient that have no cache (2.5 times as fast on a CPU); a cache grows, and every
    length would be compiled anew."""
    eager = _EAGER
    compiled = torch.compile(eager, dynamic=False)

    def run(block: Any, x: Tensor, modulation: Tensor, rotary: Any, layout: Any, past: Any, *rest: Any) -> Any:
        chosen = compiled if past is None and torch.is_grad_enabled() else eager
        return chosen(block, x, modulation, rotary, layout, past, *rest)

    transformer._run_block = run  # type: ignore[assignment]


class _Epochs(TrainerCallback):
    """Tells a sampler its epoch: accelerate's wrappers do not pass it on after a resume."""

    def __init__(self, sampler: BucketSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._sampler.set_epoch(int(state.epoch or 0))


class BucketTrainer(Trainer):
    """A Trainer that keeps the datasets of a `ConcatDataset`, say of different resolutions, in batches of their own."""

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
