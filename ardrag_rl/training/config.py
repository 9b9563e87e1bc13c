"""GRPOConfig: TRL's GRPO settings under TRL's names, and what a video MDP adds."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import trl

from ardrag_rl.codec import CodecSettings
from ardrag_rl.flow import Kernel, Reduction
from ardrag_rl.rollout import Plan
from ardrag_rl.training.advantages import CREDITS, Credit, normalise_scale

CODEC_HELP = {"help": "Memory and speed of the codec by name, as JSON: see ardrag_rl.codec.CodecSettings."}

# TRL's and Trainer's settings that mean nothing to a policy over latents, and what to use in their place
_REFUSED = {
    "text generation": (
        "model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout cast_lm_head_to_fp32 "
        "max_completion_length temperature top_p top_k min_p generation_kwargs chat_template_kwargs repetition_penalty "
        "cache_implementation mask_truncated_completions top_entropy_quantile entropy_coef use_adaptive_entropy "
        "entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target max_tool_calling_iterations "
        "label_smoothing_factor neftune_noise_alpha use_liger_kernel",
        "a policy over latents has no tokens; how it explores is set by kernel, kernel_eta and exploration",
    ),
    "vLLM and other text engines": (
        "use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url "
        "vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization "
        "vllm_max_model_length vllm_tensor_parallel_size vllm_importance_sampling_correction "
        "vllm_importance_sampling_mode vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min "
        "vllm_importance_sampling_cap use_transformers_continuous_batching transformers_continuous_batching_config "
        "use_transformers_paged ds3_gather_for_generation",
        "rollouts run in process or, with rollout_workers > 0, on Ray actors",
    ),
    "compiling a whole model": (
        "torch_compile torch_compile_backend torch_compile_mode",
        "compile=True compiles the blocks of the transformer, for the learner's passes",
    ),
    "logging of texts": (
        "log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo",
        "the report draws videos",
    ),
    "losses for tokens": (
        "delta sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg "
        "importance_sampling_level off_policy_mask_threshold use_bias_correction_kl multi_objective_aggregation "
        "num_generations_eval",
        "losses are chosen by loss_type: grpo, reinforce, rloo or a registered one",
    ),
}


@dataclass
class GRPOConfig(trl.GRPOConfig):
    """Settings of `GRPOTrainer`: `trl.GRPOConfig` (and so `transformers.TrainingArguments`) with defaults that fit.

    A "generation" is a video. `per_device_train_batch_size` counts videos of a micro-batch; one optimisation step
    takes `gradient_accumulation_steps` of them, by default a whole generation batch: 8 tasks of 12 videos.

    Raises:
        ValueError: a setting of text generation is changed, a group size does not divide the batch, or a value is
            unknown.
    """

    # TRL's names, other defaults
    output_dir: str | None = field(default="runs/grpo", metadata={"help": "Where checkpoints and the pipeline go."})
    per_device_train_batch_size: int = field(default=12, metadata={"help": "Videos of a micro-batch per device."})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "Micro-batches of one optimisation step."})
    num_generations: int | None = field(default=12, metadata={"help": "G, videos of one group (one task)."})
    max_steps: int = field(default=10, metadata={"help": "Optimisation steps, 1 or more."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "As in transformers."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient norm above which it is clipped."})
    loss_type: str = field(default="grpo", metadata={"help": "grpo, reinforce, rloo, or a registered algorithm."})
    epsilon: float = field(
        default=1e-3,
        metadata={
            "help": "Lower clip range; of a mean log-probability's ratio, the D-th root of Eq. 14's, so about 1e-3."
        },
    )
    scale_rewards: str = field(
        default="group",
        metadata={"help": "What divides the centred rewards: the group's std (Eq. 13), the batch's, or none."},
    )
    bf16: bool | None = field(default=False, metadata={"help": "Mixed precision; kernels stay float32."})  # type: ignore[assignment]
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "Less memory, more compute."})  # type: ignore[assignment]
    logging_steps: float = field(default=1, metadata={"help": "Log every so many updates."})
    save_steps: float = field(default=5, metadata={"help": "Updates between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    report_to: None | str | list[str] = field(default="tensorboard", metadata={"help": "Where logs go."})  # noqa: RUF036
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "The loader carries indices only."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "As in transformers."})
    seed: int = field(default=0, metadata={"help": "Seeds tasks, initial noise and actions."})

    # Exploration
    kernel: str = field(default="cps", metadata={"help": "Of the stochastic step: cps, flow_sde, dance_sde, renoise."})
    kernel_eta: float = field(default=0.6, metadata={"help": "How much noise it adds."})
    other_kernel: str = field(default="ode", metadata={"help": "Of the other steps, never scored: ode, renoise."})
    exploration: str = field(
        default="selective", metadata={"help": "selective: one stochastic step per update; every: all but the last."}
    )
    stochastic_step: int | None = field(
        default=None, metadata={"help": "The selective step, 0..N-2; unset draws one per update, shared by all groups."}
    )
    share_noise: bool = field(default=True, metadata={"help": "Whether a group shares its initial noise."})

    # Credit and densities
    credit: Credit = field(default="frame", metadata={"help": "What judges a frame: frame, return_to_go, episode."})
    log_prob_reduction: Reduction = field(
        default="mean", metadata={"help": "Over a latent's values: mean, or sum (Eq. 14)."}
    )
    ratio_tolerance: float = field(
        default=1e-4,
        metadata={
            "help": "Largest |log p - recorded| before an update; above: an error, in mixed precision a warning."
        },
    )

    # Environment and rollouts
    num_frames: int | None = field(default=None, metadata={"help": "Latent frames; unset: the task source's."})
    height: int | None = field(default=None, metadata={"help": "Pixels; unset: the pipeline's."})
    width: int | None = field(default=None, metadata={"help": "Pixels; unset: the pipeline's."})
    codec_settings: dict[str, Any] | str | None = field(default=None, metadata=CODEC_HELP)
    rollout_workers: int = field(default=0, metadata={"help": "Ray actors that roll out; 0 is this process."})
    rollout_threads: int | None = field(
        default=None, metadata={"help": "torch threads of a rollout, part of its numbers; unset: as many as now."}
    )
    groups_per_batch: int | None = field(
        default=None,
        metadata={"help": "Groups rolled out in one batch, the unit of work; unset: the largest divisor up to 4."},
    )
    max_staleness: int = field(
        default=0, metadata={"help": "1: actors roll out the next generation during an update, one update behind."}
    )
    rollout_gpus: int = field(default=0, metadata={"help": "GPUs kept for them; 0: they share the learner's."})
    rollout_timeout: float | None = field(
        default=3600.0, metadata={"help": "Seconds after which an actor's batch of groups is run again elsewhere."}
    )
    rollout_attempts: int = field(
        default=3, metadata={"help": "Times a batch is tried on actors before it has failed."}
    )
    reward_timeout: float | None = field(
        default=900.0, metadata={"help": "Seconds that one call of a reward may take."}
    )
    reward_memory: float | None = field(
        default=8192.0,
        metadata={"help": "MiB that a reward may take and not give back: an error, or an actor started anew."},
    )
    on_group_error: str = field(
        default="raise",
        metadata={"help": "Of groups that fail: raise: save a checkpoint and stop; skip: go on without them."},
    )

    # Learner
    compile: bool = field(
        default=False, metadata={"help": "torch.compile the transformer's blocks for the learner's passes."}
    )

    # LoRA, under the names of TRL's ModelConfig
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters on the transformer's linear layers."})
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scale."})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "Module names; unset: all linears."})

    def __post_init__(self) -> None:
        self._refuse_text_settings()
        _choice("exploration", self.exploration, ("selective", "every"))
        _choice("credit", self.credit, CREDITS)
        _choice("log_prob_reduction", self.log_prob_reduction, ("mean", "sum"))
        _choice("on_group_error", self.on_group_error, ("raise", "skip"))
        _choice("other_kernel", self.other_kernel, ("ode", "renoise"))
        if self.kernel == "ode":
            raise ValueError("kernel='ode' has no density to train; choose one of cps, flow_sde, dance_sde, renoise.")
        Kernel(self.kernel, self.kernel_eta)  # raises on unknown names and a wrong eta
        if self.eval_strategy != "no":
            raise ValueError(
                f"eval_strategy={self.eval_strategy!r} means nothing here: call `evaluate` of "
                "ardrag_rl.training.evaluate on held-out tasks before and after, or from a callback."
            )
        if self.max_steps < 1:
            raise ValueError(
                f"max_steps={self.max_steps}: expected 1 or more; epochs of endless tasks are not counted."
            )
        for name in (
            "epsilon",
            "epsilon_high",
            "ratio_tolerance",
            "rollout_timeout",
            "reward_timeout",
            "reward_memory",
        ):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number above 0.")
        for name in ("beta", "learning_rate", "seed", "stochastic_step", "rollout_gpus"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 or more.")
        for name in ("num_iterations", "num_frames", "height", "width", "rollout_attempts"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more.")
        if self.max_staleness not in (0, 1) or (self.max_staleness and not self.rollout_workers):
            raise ValueError(
                f"max_staleness={self.max_staleness} with rollout_workers={self.rollout_workers}: expected 0, or 1 "
                "with workers that roll out beside the learner."
            )
        if self.rollout_gpus and not self.rollout_workers:
            raise ValueError(f"rollout_gpus={self.rollout_gpus}: they are for actors, and rollout_workers is 0.")
        if self.rollout_workers < 0 or (self.groups_per_batch is not None and self.groups_per_batch < 1):
            raise ValueError(
                f"rollout_workers={self.rollout_workers}, groups_per_batch={self.groups_per_batch}: expected 0 or "
                "more, and 1 or more."
            )
        self.codec_settings = json_object(self.codec_settings, "codec_settings", '{"slicing": true}')
        CodecSettings.of(self.codec_settings)  # refuses what is unknown
        if self.rollout_threads is None:
            self.rollout_threads = torch.get_num_threads()
        super().__post_init__()
        self.scale_rewards = normalise_scale(self.scale_rewards)  # type: ignore[arg-type]
        assert self.generation_batch_size is not None and self.num_generations is not None
        videos = self.generation_batch_size // self.world_size
        if videos % self.num_generations:
            raise ValueError(
                f"a process generates {videos} videos, which groups of num_generations={self.num_generations} do not "
                "fill: make per_device_train_batch_size * steps_per_generation a multiple of it."
            )
        groups = videos // self.num_generations
        if self.groups_per_batch is None:
            self.groups_per_batch = max(n for n in range(1, 5) if groups % n == 0)
        if groups % self.groups_per_batch:
            raise ValueError(
                f"groups_per_batch={self.groups_per_batch} does not divide the {groups} groups a process generates; "
                "choose a divisor."
            )

    @property
    def autocast_dtype(self) -> torch.dtype:
        """What rollouts and learner multiply in; float32 is no mixed precision."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    @property
    def video_size(self) -> tuple[int | None, int | None, int | None]:
        """num_frames, height and width, as an environment takes them."""
        return self.num_frames, self.height, self.width

    @property
    def groups_per_generation(self) -> int:
        """Tasks one process rolls out at a time."""
        assert self.generation_batch_size is not None and self.num_generations is not None
        return self.generation_batch_size // self.world_size // self.num_generations

    def plan(self, update: int, num_steps: int) -> Plan:
        """The kernels of an update's rollouts: its stochastic step depends on (seed, update) only."""
        kernel = Kernel(self.kernel, self.kernel_eta)
        if self.exploration == "every":
            return Plan.every(kernel, num_steps)
        step = self.stochastic_step
        if step is None:
            step = int(np.random.default_rng([self.seed, update]).integers(num_steps - 1))
        return Plan.selective(step, kernel, self.other_kernel, num_steps)

    def _refuse_text_settings(self) -> None:
        defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(trl.GRPOConfig)}
        for what, (names, instead) in _REFUSED.items():
            for name in names.split():
                if name in defaults and getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} is a setting of {what} and means nothing here: {instead}. "
                        "Leave it unset."
                    )


def reward_weights(flag: dict[str, float] | str | None) -> dict[str, float] | None:
    """Weights by name from a configuration file or, as JSON, from a command line; None for the defaults.

    Raises:
        ValueError: it is no JSON object.
    """
    return json_object(flag, "rewards", '{"motion": 1.0}', "weights")


def json_object(
    flag: dict[str, Any] | str | None, name: str, example: str, what: str = "values"
) -> dict[str, Any] | None:
    """Values by name, from a configuration file or, as JSON, from a command line.

    Raises:
        ValueError: it is no JSON object.
    """
    if not isinstance(flag, str):
        return flag
    try:
        values = json.loads(flag)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{name}={flag!r}: expected {what} by name as JSON, such as '{example}'.")
    return values


def reward_spec(rewards: Any, reward_weights: list[float] | None) -> Any:
    """The environment's `rewards` from the trainer's: a dict has its weights, a list takes `reward_weights`.

    Raises:
        ValueError: weights are given twice, or do not match the rewards.
    """
    if reward_weights is None:
        return rewards
    if rewards is None or isinstance(rewards, dict):
        raise ValueError(
            f"reward_weights={reward_weights} with rewards={rewards!r}: weights are given twice; a dict of rewards has "
            "its own, a list of names or rewards takes reward_weights."
        )
    if len(rewards) != len(reward_weights):
        raise ValueError(f"{len(reward_weights)} reward_weights for {len(rewards)} rewards: expected one for each.")
    from ardrag_rl.rewards import WeightedReward, make_rewards

    made = make_rewards(list(rewards))
    return [WeightedReward(term.reward, weight) for term, weight in zip(made, reward_weights, strict=True)]


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(known)}.")
