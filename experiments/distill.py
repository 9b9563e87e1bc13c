"""AR-Drag's first training step: a bidirectional teacher, and a causal few-step student distilled from it.

    python experiments/distill.py --config experiments/configs/distill-tiny.yaml       the embedded size
    accelerate launch experiments/distill.py --config experiments/configs/distill-wan2.1-1.3b.yaml

Stages, each a pipeline in a folder of `output_dir` and each resumable from any interruption:
- `teacher`: flow matching with drag paths (Eq. 6-7), all frames of a video at once, from the weights of `--init`.
- `start`: the teacher's weights with block-causal attention, after flow matching behind clean history at the few-step
  schedule. (The alternative, regression on the teacher's ODE, needs a dataset of its trajectories first; flow matching
  needs the data only, and DMD corrects the distribution afterwards either way.) With `--start_history own` and
  `--start_from` another start, it goes on behind frames that it made itself, which undoes drift before DMD does.
- `student`: Self-Rollout with DMD and an adversarial loss (Algorithm 1); `--rollout self_forcing` and
  `--rollout teacher_forcing` are the baselines. Runs from one `start` with other settings, such as `--chunk_size`
  and `--window`, go to other `--student` folders.

How it departs from the paper: critic and student share one rollout in the updates where both learn. Averages of the
weights (EMA) are what is saved.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import ConcatDataset, Dataset
from transformers import TrainingArguments
from trl import TrlParser

from ardrag_rl import hub
from ardrag_rl.codec import Codec
from ardrag_rl.distill.critic import Critic
from ardrag_rl.distill.distillation import Distillation, DistillSettings
from ardrag_rl.distill.fit import averaged, fit, settings
from ardrag_rl.distill.flow_matching import FlowMatching, LatentClips, OwnHistory
from ardrag_rl.distill.muon import muon
from ardrag_rl.distill.trainers import DistillTrainer
from ardrag_rl.envs.fit import parse_size
from ardrag_rl.envs.tasks import make_tasks
from ardrag_rl.flow import Kernel, Schedule
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.policies.compiled import compile_blocks
from ardrag_rl.training.config import CODEC_HELP, json_object
from ardrag_rl.training.lora import add_lora, merged
from ardrag_rl.training.sharded import gathered

SAMPLERS = (Kernel("ode"), Kernel("cps", 0.6), Kernel("renoise"))  # what a start with own history meets
STAGES = ("teacher", "start", "student")
COMMON = ("init", "tasks", "sizes", "clips", "num_frames", "ema", "lora_rank")
OF_STAGE = {  # what the settings that a stage depends on begin with
    "teacher": (*COMMON, "teacher_", "muon", "text_dropout", "control_dropout"),
    "start": (*COMMON, "start_", "teacher", "muon", "text_dropout", "chunk_size", "window"),
    "student": (
        *(*COMMON, "student_", "critic_", "teacher", "start", "rollout", "step_per_frame", "chunk_size", "window"),
        *("dmd", "adversarial", "discriminator", "guidance", "shift", "negative_prompt"),
    ),
}


@dataclass
class DistillArguments:
    """What to distil, from what, on what."""

    init: str = field(default="tiny", metadata={"help": "Pipeline whose weights the teacher starts from."})
    tasks: list[str] = field(
        default_factory=lambda: ["sprites"],
        metadata={"help": "Names, curated manifests or folders, one for each size."},
    )
    sizes: list[str] | None = field(
        default=None, metadata={"help": "WIDTHxHEIGHT of each of the tasks; unset: the pipeline's own."}
    )
    clips: int = field(default=5000, metadata={"help": "Clips of each that are encoded, at most all."})
    num_frames: int = field(default=16, metadata={"help": "Latent frames of a clip, all of them the teacher's chunk."})
    stages: list[str] = field(default_factory=lambda: list(STAGES), metadata={"help": "Stages to run, in order."})
    teacher: str = field(
        default="teacher", metadata={"help": "Folder of the teacher, below output_dir; or a pipeline that is one."}
    )
    start: str = field(
        default="start", metadata={"help": "Folder of the causal start, below output_dir; or a pipeline that is one."}
    )
    student: str = field(default="student", metadata={"help": "Folder of the student, below output_dir."})
    ema: float = field(default=0.99, metadata={"help": "Decay of the averages of the weights."})
    lora_rank: int = field(default=0, metadata={"help": "Train adapters of this rank; 0: all weights."})
    muon: bool = field(default=False, metadata={"help": "Muon for flow matching, in place of AdamW."})
    compile: bool = field(default=False, metadata={"help": "torch.compile the transformer's blocks."})
    codec_settings: dict[str, Any] | str | None = field(default=None, metadata=CODEC_HELP)

    teacher_updates: int = field(default=4000, metadata={"help": "Updates of the teacher."})
    teacher_batch: int = field(default=8, metadata={"help": "Clips per device and update."})
    teacher_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    teacher_steps: int = field(default=24, metadata={"help": "Denoising steps when it generates."})
    text_dropout: float = field(default=0.1, metadata={"help": "Share of clips without a prompt, for guidance."})
    control_dropout: float = field(default=0.1, metadata={"help": "Share of clips without a drag path, for guidance."})

    start_updates: int = field(default=1000, metadata={"help": "Updates of the causal start."})
    start_batch: int = field(default=8, metadata={"help": "Clips per device and update."})
    start_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    start_rows: int = field(default=2, metadata={"help": "Noisy versions of a clip that share its clean history."})
    start_from: str | None = field(
        default=None, metadata={"help": "Folder, as these, of its first weights; unset: the teacher's."}
    )
    start_history: str = field(default="clean", metadata={"help": "True frames, or own: what the start itself made."})

    chunk_size: int = field(default=1, metadata={"help": "Frames the student denoises together; environments need 1."})
    window: int | None = field(
        default=None, metadata={"help": "Clean frames the student looks back on; unset: as before."}
    )
    student_updates: int = field(default=1000, metadata={"help": "Updates of the critic."})
    student_batch: int = field(default=4, metadata={"help": "Clips per device and update."})
    student_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the student."})
    critic_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the critic."})
    student_every: int = field(default=5, metadata={"help": "Updates of the critic for each of the student."})
    rollout: str = field(default="self_rollout", metadata={"help": "Or self_forcing, or teacher_forcing."})
    step_per_frame: bool = field(default=False, metadata={"help": "Draw the step with gradient for every frame."})
    dmd: float = field(default=1.0, metadata={"help": "Weight of distribution matching."})
    adversarial: float = field(default=0.1, metadata={"help": "Weight of the student's adversarial loss."})
    discriminator: float = field(default=0.05, metadata={"help": "Weight of the discriminator's loss."})
    guidance: float = field(default=1.0, metadata={"help": "Of the teacher in DMD; 1 is none."})
    negative_prompt: str = field(default="", metadata={"help": "What guidance leads away from."})
    shift: float = field(default=1.0, metadata={"help": "Of the noise levels in DMD."})

    def __post_init__(self) -> None:
        self.codec_settings = json_object(self.codec_settings, "codec_settings", '{"slicing": true}')
        for name in ("tasks", "sizes", "stages"):  # a YAML file may give one as it is
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])


class Run:
    """The stages of one `output_dir`."""

    def __init__(self, args: DistillArguments, training: TrainingArguments) -> None:
        self.args, self.training, self.folder = args, training, Path(training.output_dir)
        self.checkpointing = training.gradient_checkpointing  # diffusers' own; Trainer knows transformers' only
        training.gradient_checkpointing = training.activation_checkpointing = False
        if training.n_gpu > 1:
            raise SystemExit(f"{training.n_gpu} GPUs and one process: start it with accelerate launch.")
        self.init = hub.pipeline_path(args.init)
        texts = args.sizes or ["{1}x{0}".format(*hub.pipeline_size(self.init))] * len(args.tasks)
        if len(texts) != len(args.tasks):
            raise SystemExit(f"--sizes {' '.join(texts)}: expected one for each of {len(args.tasks)} --tasks.")
        self.sizes = [parse_size(text) for text in texts]
        if args.compile:
            compile_blocks()

    def made(self, name: str) -> Path:
        """What a stage made, or is to make, below output_dir; else the embedded pipeline of this name."""
        embedded = hub.ASSETS / name / "model_index.json"
        return hub.pipeline_path(name) if embedded.is_file() else self.folder / name

    def agree(self, stage: str) -> None:
        """Writes a stage's settings down; what was begun with others is not gone on with."""
        file = self.folder / "settings" / f"{getattr(self.args, stage)}.json"
        own = {k: v for k, v in vars(self.args).items() if k.startswith(OF_STAGE[stage]) and not k.endswith("_updates")}
        own["seed"] = self.training.seed
        if file.is_file():
            before = hub.read_json(file)
            for name in own:
                if own[name] != before.get(name):
                    raise SystemExit(
                        f"--{name} {own[name]}: {file.stem} in {self.folder} was begun with {before.get(name)}. Give "
                        f"another --{stage} or --output_dir, or delete it."
                    )
        elif self.training.should_save:
            hub.write_json(file, own)
        PartialState().wait_for_everyone()

    def teacher(self) -> None:
        """Bidirectional flow matching."""
        args = self.args
        grid = Schedule(tuple(np.linspace(1000, 0, args.teacher_steps, endpoint=False).tolist()))
        policy = VideoPolicy.from_pretrained(self.init).with_chunks(args.num_frames, grid)
        loss = FlowMatching(policy, 0.0, args.text_dropout, args.control_dropout, schedule_share=0.0, lowest=0.0)
        self._flow_matching(args.teacher, loss, args.teacher_updates, args.teacher_batch, args.teacher_rate)

    def start(self) -> None:
        """Block-causal flow matching."""
        args = self.args
        schedule = hub.load_schedule(self.init)
        before = VideoPolicy.from_pretrained(self.made(args.start_from or args.teacher))
        policy = before.with_chunks(args.chunk_size, schedule, args.window)
        loss = FlowMatching(policy, text_dropout=args.text_dropout, rows=args.start_rows)
        if args.start_history == "own":
            loss = OwnHistory(policy, SAMPLERS, args.text_dropout, args.start_rows)
        self._flow_matching(args.start, loss, args.start_updates, args.start_batch, args.start_rate)

    def student(self) -> None:
        """Self-Rollout with DMD and an adversarial loss."""
        args, negative = self.args, None
        if args.negative_prompt:  # before there are models beside it
            negative = self._codec().encode_text([args.negative_prompt]).cpu()
        teacher = VideoPolicy.from_pretrained(self.made(args.teacher), self.training.device)
        start = VideoPolicy.from_pretrained(self.made(args.start), self.training.device)
        student = self._trainable(start.with_chunks(args.chunk_size, window=args.window), args.lora_rank)
        critic = self._trainable(VideoPolicy.from_pretrained(self.made(args.teacher)))
        names = DistillSettings.__dataclass_fields__.keys() & vars(args).keys()
        model = Distillation(
            student,
            teacher,
            Critic(critic),
            DistillSettings(**{name: getattr(args, name) for name in names}),
            negative,
        )
        model.average = averaged(student.transformer, args.ema)

        def optimizer() -> torch.optim.Optimizer:
            return torch.optim.AdamW(
                [
                    {"params": [p for p in student.parameters() if p.requires_grad], "lr": args.student_rate},
                    {"params": list(model.critic.parameters()), "lr": args.critic_rate},
                ],
                betas=(0.0, 0.999),  # as Self-Forcing's: two networks that chase each other
                weight_decay=self.training.weight_decay,
            )

        own = settings(
            self.training,
            self.folder / "checkpoints" / args.student,
            args.student_updates,
            args.student_batch,
            args.student_rate,
            ddp_find_unused_parameters=True,  # the student, where it is not its turn
        )
        average = (model.average, student.transformer)
        fit(model, self._data(), own, optimizer, average, partial(DistillTrainer, student_every=args.student_every))
        self._save(args.student, student, model.average.module)

    def _flow_matching(self, name: str, loss: FlowMatching, updates: int, batch: int, rate: float) -> None:
        policy = self._trainable(loss.policy, self.args.lora_rank)
        loss.average = averaged(policy.transformer, self.args.ema)

        def optimizer() -> torch.optim.Optimizer:
            return muon((p for p in policy.parameters() if p.requires_grad), rate)

        own = settings(self.training, self.folder / "checkpoints" / name, updates, batch, rate)
        fit(loss, self._data(), own, optimizer if self.args.muon else None, (loss.average, policy.transformer))
        self._save(name, policy, loss.average.module)

    def _trainable(self, policy: VideoPolicy, rank: int = 0) -> VideoPolicy:
        if rank:
            add_lora(policy, rank, rank)
            policy.transformer.patch_embedding.requires_grad_(True)  # where the drag path comes in
        if self.checkpointing:
            policy.transformer.enable_gradient_checkpointing()
        return policy

    def _codec(self) -> Codec:
        return Codec.from_pretrained(self.init, self.training.device, self.args.codec_settings)

    def _data(self) -> Dataset:
        args = self.args
        with PartialState().main_process_first():
            codec = self._codec()
            buckets = []
            for i, (tasks, size) in enumerate(zip(args.tasks, self.sizes, strict=True)):
                source = make_tasks(tasks, codec.pixel_frames(args.num_frames), *size)
                folder = self.folder / ("clips" if i == 0 else f"clips-{i}")
                buckets.append(LatentClips(folder, codec, source, min(args.clips, len(source))))
            return ConcatDataset(buckets) if len(buckets) > 1 else buckets[0]

    def _save(self, name: str, policy: VideoPolicy, weights: torch.nn.Module) -> None:
        """A pipeline folder that is there as a whole or not at all."""
        gathered(weights)
        if self.training.should_save:
            partial_folder = self.folder / f"{name}.partial"
            merged(VideoPolicy(weights, policy.schedule, policy.source)).save_pretrained(partial_folder)
            partial_folder.rename(self.folder / name)
        PartialState().wait_for_everyone()  # the next stage reads it


def main() -> None:
    """Run the stages that are not done."""
    args, training = TrlParser((DistillArguments, TrainingArguments)).parse_args_and_config()
    if args.start_history not in ("clean", "own"):
        raise SystemExit(f"--start_history {args.start_history}: choose clean or own.")
    if unknown := set(args.stages) - set(STAGES):
        raise SystemExit(f"--stages {' '.join(sorted(unknown))}: choose from {', '.join(STAGES)}.")
    run = Run(args, training)
    for stage in args.stages:
        folder = run.made(getattr(args, stage))
        if folder.is_relative_to(run.folder):
            run.agree(stage)
        if (folder / "model_index.json").is_file():
            PartialState().print(f"{stage}: {folder} is there and is left as it is.")
            continue
        torch.manual_seed(training.seed)
        getattr(run, stage)()
        PartialState().print(f"{stage}: wrote {folder}.")
    PartialState().destroy_process_group()  # one that is not taken down can abort at exit


if __name__ == "__main__":
    main()
