"""GRPOTrainer: GRPO on the video MDP, as a `transformers.Trainer`.

What departs from the textbook (and from TRL):
- advantages are per frame (Eq. 13);
- only one denoising step per update is stochastic (AR-Drag's selective stochasticity), so only its transitions train;
- the old log-probabilities are those recorded while acting; that the learner's one-pass replay agrees with them is
  measured before every update and is an error where it does not.
"""

from __future__ import annotations

import copy
import errno
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.utils import logging
from trl.trainer.callbacks import SyncRefModelCallback

from ardrag_rl.envs.tasks import make_tasks
from ardrag_rl.flow import GaussianStep
from ardrag_rl.hub import pipeline_path, pipeline_size
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.policies.compiled import compile_blocks
from ardrag_rl.rewards import Limits, RewardError, make_rewards
from ardrag_rl.rollout import Rollout
from ardrag_rl.training.advantages import compute_advantages
from ardrag_rl.training.ahead import Ahead
from ardrag_rl.training.algorithms import get_algorithm
from ardrag_rl.training.checkpoints import check_room
from ardrag_rl.training.config import GRPOConfig, reward_spec
from ardrag_rl.training.estimate import peak_memory
from ardrag_rl.training.lora import add_lora, has_lora, lora_disabled, merged, trainable_state
from ardrag_rl.training.progress import RewardProgress
from ardrag_rl.training.ray_rollouts import RayRollouts
from ardrag_rl.training.recorder import Recorder
from ardrag_rl.training.sharded import set_up_fsdp, whole
from ardrag_rl.training.stats import loss_stats
from ardrag_rl.training.workers import (
    EnvSpec,
    LocalRollouts,
    Rollouts,
    RolloutSettings,
    Unit,
    UnitResult,
    join_results,
)

logger = logging.get_logger(__name__)

REFERENCE = "reference.safetensors"  # of a checkpoint, where the reference policy moves
BEHIND = "behind.safetensors"  # of a checkpoint, where the next generation is rolled out with older weights


class GRPOTrainer(Trainer):
    """Trains a policy on tasks against rewards.

    Args:
        policy: a `VideoPolicy`, or the name, folder or hub id of its pipeline.
        args: `GRPOConfig()` by default.
        tasks: a name, a manifest, a folder of clips, or a task source.
        rewards: weights by name, or a list of names and `Reward` objects (weighted by `args.reward_weights`); None is
            aesthetic and motion.
        pipeline: of the environment; the policy's own by default.
        callbacks, optimizers: as in `transformers.Trainer`.

    Raises:
        ValueError: an unknown loss, task, reward or pipeline; rewards weighted twice; a cache that cannot be replayed.
    """

    args: GRPOConfig
    loss_is_scaled_for_ga = False  # compute_loss is the mean of a micro-batch; Trainer divides by their number

    def __init__(
        self,
        policy: VideoPolicy | str | Path,
        args: GRPOConfig | None = None,
        tasks: Any = "sprites-hard",
        rewards: Any = None,
        pipeline: str | Path | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ) -> None:
        args = args if args is not None else GRPOConfig()
        self._algorithm = get_algorithm(args.loss_type)
        if not isinstance(policy, VideoPolicy):
            pipeline = policy if pipeline is None else pipeline
            policy = VideoPolicy.from_pretrained(policy)
        if policy.transformer.new_cache().band is None:
            raise ValueError(
                f"cache={policy.transformer.config['cache']!r} is for inference: no replay in one pass gives the same "
                "numbers, so the ratio would not be 1. Train with 'rolling', 'sink' or 'relative' (without a sink)."
            )
        pipeline = pipeline if pipeline is not None else policy.source
        if pipeline is None:
            raise ValueError("the policy does not say which pipeline it is of; pass pipeline= for the environment.")
        terms = make_rewards(reward_spec(rewards, args.reward_weights))
        args.plan(0, policy.schedule.num_steps)  # refuses a stochastic step that the schedule lacks
        size = pipeline_size(pipeline_path(pipeline), args.height, args.width)
        make_tasks(tasks, args.num_frames, *size)  # refuses what is unknown
        self.env = EnvSpec(pipeline, tasks, terms, *args.video_size, str(args.device), args.codec_settings)
        if args.gradient_checkpointing:  # diffusers' own; Trainer knows transformers' only
            policy.transformer.enable_gradient_checkpointing()  # type: ignore[attr-defined]
            args.gradient_checkpointing = args.activation_checkpointing = False
        if args.compile:
            compile_blocks()
        if args.use_peft:
            add_lora(policy, args.lora_r, args.lora_alpha, args.lora_target_modules)
        self._reference: VideoPolicy | None = None
        if args.beta and not has_lora(policy):
            self._reference = copy.deepcopy(policy).requires_grad_(False).eval()
        args._n_gpu = min(1, args.n_gpu)  # one process has one: no DataParallel, which would take the actors' too
        super().__init__(
            model=policy,
            args=args,
            data_collator=lambda videos: {"video": torch.tensor(videos)},
            train_dataset=_Videos(args),
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # what FSDP shards can neither be copied nor saved as it is
        self._skeleton = copy.deepcopy(policy).to("meta") if set_up_fsdp(self.accelerator) else None
        policy.to(args.device)  # FSDP puts it there when training starts, and it may be asked before
        if self._reference is not None:
            self._reference.to(args.device)
        if args.sync_ref_model:
            if self._skeleton is not None:
                raise ValueError("sync_ref_model=True under FSDP: shards do not mix into a whole reference; use DDP.")
            if self._reference is None:
                raise ValueError("sync_ref_model=True needs a reference of its own: beta > 0 and use_peft=False.")
            self.add_callback(SyncRefModelCallback(self._reference, self.accelerator))
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(RewardProgress())
        assert args.num_generations is not None and args.rollout_threads is not None
        settings = RolloutSettings(
            num_generations=args.num_generations,
            share_noise=args.share_noise,
            log_prob_reduction=args.log_prob_reduction,
            threads=args.rollout_threads,
            dtype=args.autocast_dtype,
            skip_failures=args.on_group_error == "skip",
            limits=Limits(args.reward_timeout, args.reward_memory),
            timeout=args.rollout_timeout,
            attempts=args.rollout_attempts,
        )
        self.rollouts: Rollouts = (
            RayRollouts(self.env, settings, policy, args.rollout_workers, args.rollout_gpus)
            if args.rollout_workers
            else LocalRollouts(self.env, settings)
        )
        self._record = Recorder(terms)
        self._ahead: Ahead | None = None
        self._behind: dict[str, Tensor] = {}  # weights of the generation that a checkpoint was saved in the middle of
        self._age = 0  # updates since the policy of the present generation
        self._step: int | None = None  # micro-batches so far, over all updates
        self._buffer: list[Rollout] = []

    @property
    def policy(self) -> VideoPolicy:
        """The policy being trained, without what data parallelism wraps around it."""
        return self.accelerator.unwrap_model(self.model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`. Where a reward, a task's file or anything else fails, a run of one process
        saves a checkpoint; one of several would wait for the others, and their last checkpoint counts.

        A resumed run equals an uninterrupted one where the checkpoint fell between two generations, as it always does
        while num_iterations is 1 and steps_per_generation is gradient_accumulation_steps.
        """
        self._step, self._buffer, self._behind = None, [], {}
        if isinstance(self.rollouts, RayRollouts) and self.args.max_staleness:
            last = (self.args.max_steps * self.args.gradient_accumulation_steps - 1) // self._generate_every
            self._ahead = Ahead(self.rollouts, self._units, last)
        if self.args.save_strategy != "no":
            self._check_room()
        try:
            return super().train(*args, **kwargs)
        except Exception as error:
            alone = self.accelerator.num_processes == 1  # others would wait for this one while it saves
            if self._step is None or not alone or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
                raise
            self._save_checkpoint(self.model_wrapped, trial=None)
            folder = Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}"
            error.add_note(f"The run stopped; its checkpoint is saved in {folder}. To go on: resume_from_checkpoint.")
            raise
        finally:
            self.rollouts.close()

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch forward and backward."""
        if self._step is None:
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
        start = time.perf_counter()
        before = self._record.total("seconds/generation")
        loss = super().training_step(model, inputs, num_items_in_batch)
        spent = time.perf_counter() - start - (self._record.total("seconds/generation") - before)
        self._record.note("seconds/micro_batch", spent)
        self._step += 1
        return loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        """The next micro-batch of the buffer, which is refilled every steps_per_generation * num_iterations."""
        assert self._step is not None
        generation, step = divmod(self._step, self._generate_every)
        if step == 0 or not self._buffer:
            start = time.perf_counter()
            self._buffer = self._generate(generation)
            self._record.note("seconds/generation", time.perf_counter() - start)
        return self._buffer[step % len(self._buffer)].to(self.args.device)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The algorithm's loss on one micro-batch; `model(...)` is called, so that gradients sync."""
        rollout: Rollout = inputs
        steps: GaussianStep = model(rollout)
        stats = loss_stats(steps, rollout, self.args)
        assert self._step is not None
        fresh = self._step % self._generate_every < self.args.gradient_accumulation_steps and not self._age
        if fresh:  # the policy that acted
            self._gate(float(stats.drift_max))
        self._record.loss(stats, fresh)
        loss = self._algorithm(steps, rollout, self.args)
        return (loss, steps) if return_outputs else loss

    def note(self, name: str, value: float) -> None:
        """A number for the next log."""
        self._record.note(name, value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of what was measured since the last log."""
        means = self._record.means(self.accelerator)
        if means:
            means["memory/peak_gib"] = peak_memory(self.args.device)
        super().log({**logs, **means}, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A whole pipeline, adapters merged, that `VideoPolicy.from_pretrained` loads.

        Checkpoints (internal calls) hold only what training changes; they belong to the pipeline they began with.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        policy = self.policy
        if self._skeleton is not None:
            state = {name: whole(value) for name, value in policy.state_dict().items()}
            policy = copy.deepcopy(self._skeleton)
            policy.load_state_dict(state, assign=True)
        if self.args.should_save:
            merged(policy).save_pretrained(output_dir or self.args.output_dir or ".")

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._check_room()
        super()._save_checkpoint(*args, **kwargs)

    def _check_room(self) -> None:
        if self.args.should_save and self.args.output_dir:
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            parameters = list(self.policy.parameters())
            trained = sum(p.numel() * p.itemsize for p in parameters if p.requires_grad)
            size = 3 * trained + sum(p.nbytes for p in self._synced_reference().values())  # AdamW has two averages
            size += trained if self._ahead is not None else 0
            size += sum(p.numel() * p.itemsize for p in parameters) if self._skeleton is not None else 0
            check_room(self.args.output_dir, size + 2**20)

    def _synced_reference(self) -> dict[str, Tensor]:
        """Weights of the reference where training moves it, else none."""
        if self._reference is None or not self.args.sync_ref_model:
            return {}
        return {name: p.detach() for name, p in self._reference.named_parameters()}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if reference := self._synced_reference():
            saved = safetensors.torch.load_file(Path(resume_from_checkpoint) / REFERENCE)
            for name, value in reference.items():
                value.copy_(saved[name])
        if self._ahead is not None and (Path(resume_from_checkpoint) / BEHIND).is_file():
            self._behind = safetensors.torch.load_file(Path(resume_from_checkpoint) / BEHIND)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            folder.mkdir(parents=True, exist_ok=True)
            trained = {name for name, p in self.policy.named_parameters() if p.requires_grad}
            state = trainable_state(self.policy) if state_dict is None else state_dict
            state = {name: value for name, value in state.items() if name in trained}
            tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
            safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            behind = {} if self._ahead is None else self._ahead.weights
            for extra, name in ((self._synced_reference(), REFERENCE), (behind, BEHIND)):
                if extra:
                    safetensors.torch.save_file({k: v.cpu().contiguous() for k, v in extra.items()}, folder / name)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if load_result.unexpected_keys:
            raise ValueError(
                f"the checkpoint has weights the policy lacks, {load_result.unexpected_keys[0]!r} the first: resume "
                "with the pipeline and LoRA settings it was made with."
            )

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(_Videos(self.args))

    @property
    def _generate_every(self) -> int:
        assert self.args.steps_per_generation is not None
        return self.args.steps_per_generation * self.args.num_iterations

    def _gate(self, drift: float) -> None:
        """Before the update the ratio is 1: the replay must give the log-probabilities that were recorded."""
        if drift <= self.args.ratio_tolerance:
            return
        message = (
            f"before the update |log p - recorded| is {drift:.2e}, above ratio_tolerance="
            f"{self.args.ratio_tolerance:.0e}: the learner's replay is not the policy that acted, and clipping would "
            "clip its error."
        )
        if {self.args.autocast_dtype, next(self.policy.parameters()).dtype} == {torch.float32}:
            raise RuntimeError(message + " Look for dropout, another dtype, or weights that changed in between.")
        logger.warning_once(message + " In low precision this is expected; keep epsilon well above it.")

    def _generate(self, generation: int) -> list[Rollout]:
        """Rolls out this process's groups and returns them as scored micro-batches."""
        args = self.args
        assert args.steps_per_generation and args.num_generations
        results, self._age = self._roll_out(generation)
        self._record.note("staleness", self._age)
        result = join_results(results)
        self._record.note("failed_groups", len(result.failures))
        if result.rollout is None:
            raise RewardError(f"every group of update {generation} failed; the first said: {result.failures[0]}")
        rollout = result.rollout
        advantages = compute_advantages(rollout.rewards, rollout.groups, args.scale_rewards, args.credit)  # type: ignore[arg-type]
        self._record.generation(result, advantages)
        size = args.groups_per_generation * args.num_generations
        rollout = replace(rollout, advantages=advantages).filled(size)
        order = np.random.default_rng([args.seed, generation]).permutation(len(rollout))
        parts = [rollout.select(part.tolist()) for part in np.array_split(order, args.steps_per_generation)]
        return [replace(part, ref_steps=self._reference_steps(part)) for part in parts] if args.beta else parts

    def _roll_out(self, generation: int) -> tuple[list[UnitResult], int]:
        """The results of a generation, and how many updates ago their policy was this one."""
        if self._ahead is None:
            return self.rollouts.run(self._units(generation), self.policy), 0
        if self._behind:  # resumed: it was under way when the checkpoint was saved
            self._ahead.begin(generation, self.policy, self._behind)
            self._behind = {}
        return self._ahead.take(generation, self.policy)

    def _units(self, generation: int) -> list[Unit]:
        """What this process rolls out of a generation."""
        args, count = self.args, self.args.groups_per_generation
        assert args.groups_per_batch
        first, n = args.process_index * count, args.groups_per_batch
        plan = args.plan(generation, self.policy.schedule.num_steps)
        start = generation * count * args.world_size
        parts = (tuple(range(g, g + n)) for g in range(first, first + count, n))
        return [Unit((args.seed, generation), plan, part, tuple(start + g for g in part)) for part in parts]

    @torch.no_grad()
    def _reference_steps(self, rollout: Rollout) -> GaussianStep:
        with self.accelerator.autocast():
            if self._reference is not None:
                steps = self._reference(rollout)
            else:
                with lora_disabled(self.policy):
                    steps = self.policy(rollout)
        return GaussianStep(steps.mean.cpu(), torch.as_tensor(steps.std).cpu())


class _Videos(Dataset[int]):
    """As many entries as the run takes videos: Trainer counts its steps by it, nothing reads it."""

    def __init__(self, args: GRPOConfig) -> None:
        videos = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._length = args.max_steps * videos

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        return index
