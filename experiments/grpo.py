"""GRPO on the video MDP: AR-Drag's second training step, from a pipeline to a better one, with the numbers to show it.

    python experiments/grpo.py                                            the embedded tiny pipeline, on a laptop
    python experiments/grpo.py --config experiments/configs/grpo-quick.yaml       two updates, to see it run
    python experiments/grpo.py --dry_run true                             what an update takes, and no more
    python experiments/grpo.py --config experiments/configs/wan2.1-1.3b.yaml --dry_run true
    accelerate launch experiments/grpo.py --config experiments/configs/wan2.1-1.3b.yaml --pipeline path/to/yours

Rolls out groups of videos that share a drag path, a prompt and their initial noise, scores every frame, and pushes the
policy towards what scored above its group. A run ends with its folder holding the pipeline
(`VideoPolicy.from_pretrained(folder)`), TensorBoard logs, report.json, curves.png (the paper's Fig. 6) and
before_after.gif (Fig. 5). Settings are those of `GRPOConfig` (TRL's names) and of `ScriptArguments` below.

How it departs from the textbook, and why we say "GRPO":
- A frame answers for its own reward, not for the video's (`--credit return_to_go | episode` for that).
- With one update per generation the ratio is 1 and nothing is clipped: it is REINFORCE with a group baseline until
  `--num_iterations` exceeds 1. Log-probabilities are means over the latent, so `--epsilon` is about 1e-3.
- There is no penalty to a reference policy unless `--beta` is above 0, as in TRL.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from accelerate import PartialState
from tqdm import tqdm
from trl import TrlParser

from ardrag_rl.codec import Codec
from ardrag_rl.envs.tasks import make_tasks
from ardrag_rl.hub import pipeline_path, pipeline_size
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.rollout import Plan
from ardrag_rl.training.checkpoints import last_checkpoint
from ardrag_rl.training.config import GRPOConfig, reward_weights
from ardrag_rl.training.estimate import Estimate, estimate
from ardrag_rl.training.evaluate import Evaluation, evaluate
from ardrag_rl.training.heldout import HeldOut
from ardrag_rl.training.lora import add_lora
from ardrag_rl.training.report import format_table, write_report
from ardrag_rl.training.sharded import unsharded
from ardrag_rl.training.trainer import GRPOTrainer


@dataclass
class ScriptArguments:
    """What to train, on what, and how it is judged."""

    pipeline: str = field(default="tiny", metadata={"help": "An embedded pipeline, a folder, or a hub id."})
    tasks: str = field(default="sprites-hard", metadata={"help": "A name, a manifest, or a folder of clips."})
    heldout: str | None = field(default=None, metadata={"help": "Tasks of the evaluation; unset: '<tasks>:heldout'."})
    rewards: dict[str, float] | str | None = field(
        default=None, metadata={"help": "Weights by name, as JSON; unset: aesthetic and motion, 1 each."}
    )
    eval_size: int = field(default=256, metadata={"help": "Held-out tasks of the evaluation; all-renoise: a quarter."})
    eval_batch: int = field(default=32, metadata={"help": "Videos generated at once in it."})
    eval_videos: int = field(default=6, metadata={"help": "Videos of before_after.gif."})
    watch_every: int = field(
        default=0, metadata={"help": "Updates between looks at a batch of held-out tasks, logged; 0: no looks."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint of output_dir."})
    overwrite: bool = field(default=False, metadata={"help": "Delete the run that output_dir holds."})
    dry_run: bool = field(default=False, metadata={"help": "Print what an update takes, and stop."})


def main() -> None:
    """Evaluate, train, evaluate, report."""
    script, args = TrlParser((ScriptArguments, GRPOConfig)).parse_args_and_config()
    folder = Path(args.output_dir)
    if script.dry_run:
        print(dry_run(script, args))
        return
    if args.should_save:
        prepare(folder, script)
    PartialState().wait_for_everyone()
    checkpoint = last_checkpoint(folder) if script.resume else None  # of all processes
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "logs"))
    policy = VideoPolicy.from_pretrained(script.pipeline)
    trainer = GRPOTrainer(policy, args, script.tasks, reward_weights(script.rewards), pipeline=script.pipeline)
    judge = Judge(trainer, script)
    if script.overwrite and args.should_save:
        clear(folder)  # only now, when all that can be wrong with the settings is known
    if script.watch_every:
        look = partial(judge, "held-out", tasks=script.eval_batch)
        trainer.add_callback(HeldOut(trainer, look, script.watch_every, folder / "heldout"))
    start = time.perf_counter()
    before, before_renoise = judge("before"), judge("before, renoise", "renoise")
    trained = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    done = time.perf_counter()
    trainer.save_model()
    after, after_renoise = judge("after"), judge("after, renoise", "renoise")
    if trainer.is_world_process_zero():
        facts = {
            "command": " ".join(sys.argv),
            "updates": trainer.state.global_step,
            "videos": trainer.state.global_step * args.generation_batch_size // args.num_iterations,
            "seconds": {"evaluation": trained - start + time.perf_counter() - done, "training": done - trained},
            "script": vars(script),
            "settings": args.to_dict(),
        }
        others = {"before_renoise": before_renoise, "after_renoise": after_renoise}
        table = format_table(write_report(folder, before, after, others, trainer.state.log_history, facts))
        print(f"\n{table}\n\n{folder}/: the pipeline, report.json, curves.png, before_after.gif, logs/")
    trainer.accelerator.end_training()  # a process group that is not taken down can abort at exit


def dry_run(script: ScriptArguments, args: GRPOConfig) -> Estimate:
    """What an update takes; nothing is trained or written, and no weights are read."""
    policy, codec = (kind.from_pretrained(script.pipeline, "meta") for kind in (VideoPolicy, Codec))
    if args.use_peft:
        add_lora(policy, args.lora_r, args.lora_alpha, args.lora_target_modules)
    size = pipeline_size(pipeline_path(script.pipeline), args.height, args.width)
    frames = args.num_frames or make_tasks(script.tasks, None, *size).num_frames
    return estimate(policy, args, frames, codec.latent_shape(*size), codec.text_shape, codec.image_shape)


class Judge:
    """The same held-out tasks with the same noise, every time it is asked; a quarter of them for another kernel."""

    def __init__(self, trainer: GRPOTrainer, script: ScriptArguments) -> None:
        self._policy, self._seed, self._videos = trainer.policy, trainer.args.seed, script.eval_videos
        tasks = script.heldout or f"{script.tasks}:heldout"
        self._envs = replace(trainer.env, tasks=tasks).make(script.eval_batch)
        self._tasks = range(min(script.eval_size, len(self._envs.source)))

    def __call__(self, label: str, kernel: str = "ode", tasks: int | None = None) -> Evaluation:
        """Of the first so many tasks; unset: all, or a quarter where the kernel is not ode."""
        plan = Plan.all(kernel, self._policy.schedule.num_steps)
        count = len(self._tasks) if kernel == "ode" else max(1, len(self._tasks) // 4)
        chosen = self._tasks[: tasks or count]
        with unsharded(self._policy), tqdm(total=len(chosen), desc=label, unit="video") as bar:
            return evaluate(
                self._envs, self._policy, chosen, plan, self._seed, self._videos,
                progress=lambda done: bar.update(done - bar.n),
            )  # fmt: skip


RUN_FILES = ("report.json", "checkpoint-*", "logs")  # what tells a run's folder from another


def clear(folder: Path) -> None:
    """Empties a run's folder."""
    shutil.rmtree(folder)
    folder.mkdir()


def prepare(folder: Path, script: ScriptArguments) -> None:
    """Sees that the folder and the settings are usable; a run without a checkpoint is resumed from its start."""
    if script.resume and script.overwrite:
        raise SystemExit("--resume and --overwrite exclude each other.")
    if folder.exists() and any(folder.iterdir()):
        if script.overwrite:
            if not any(any(folder.glob(mark)) for mark in RUN_FILES):
                raise SystemExit(f"--overwrite: {folder} holds no run ({', '.join(RUN_FILES)}) and is left as it is.")
        elif not script.resume:
            raise SystemExit(
                f"{folder} is not empty: pass --resume to go on from its last checkpoint, --overwrite to delete it, or "
                "another --output_dir."
            )
    if script.eval_size < 1 or script.eval_batch < 1:
        raise SystemExit(f"--eval_size {script.eval_size} --eval_batch {script.eval_batch}: expected 1 or more.")
    folder.mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    main()
