"""A GRPO run of four updates that kills its own process where it is told, once: python chaos.py PIPELINE FOLDER WHERE.

WHERE is rollout (while a reward scores), update (between two micro-batches), checkpoint (half of a file is written),
between (after an update, before its checkpoint), or nothing. Of several processes the first that comes there
dies. A run that is started again goes on.
"""

import os
import signal
import sys
from pathlib import Path

import safetensors.torch
import torch
from transformers import TrainerCallback

from ardrag_rl.rewards import Reward
from ardrag_rl.training.checkpoints import last_checkpoint
from ardrag_rl.training.config import GRPOConfig
from ardrag_rl.training.trainer import GRPOTrainer

torch.set_num_threads(1)
pipeline, folder, where = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
mark = folder / f"died-{where}"


def die(place, step, count=1):
    """Where this is the place, at the count-th time."""
    counts[place] = counts.get(place, 0) + (trainer.state.global_step == step)
    if place == where and counts[place] == count and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


class Brightness(Reward):
    def __call__(self, video, controls):
        die("rollout", 1, 3)
        return video.mean((2, 3, 4))


class Between(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        die("between", 3)


class Trainer(GRPOTrainer):
    def compute_loss(self, *args, **kwargs):
        die("update", 2, 2)
        return super().compute_loss(*args, **kwargs)


def half(value, file, save=torch.save, **kwargs):
    """torch.save of a disk that fills up, or of a process that ends."""
    save(value, file, **kwargs)
    if trainer.state.global_step == 3 and "optimizer" in str(file):
        if where == "checkpoint" and not mark.exists():
            os.truncate(file, os.path.getsize(file) // 2)
        die("checkpoint", 3)


torch.save = half
args = GRPOConfig(
    str(folder),
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    num_generations=4,
    num_frames=3,
    max_steps=4,
    save_steps=1,
    learning_rate=1e-3,
    beta=0.01,
    sync_ref_model=True,
    ref_model_sync_steps=2,
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
    rollout_threads=1,
)
counts = {}
trainer = Trainer(pipeline, args, tasks="sprites", rewards=[Brightness()], callbacks=[Between()])
last = last_checkpoint(folder)
trainer.train(resume_from_checkpoint=None if last is None else str(last))
if args.should_save:
    safetensors.torch.save_file({k: v.contiguous() for k, v in trainer.policy.state_dict().items()}, folder / "end")
trainer.accelerator.end_training()
