"""Estimate: what an update will take, from the model's own code run on tensors without data."""

from __future__ import annotations

import copy
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ardrag_rl.flow import Schedule
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.policies.chunks import Conditions
from ardrag_rl.policies.generate import generate_latents
from ardrag_rl.rollout import Plan, Rollout
from ardrag_rl.training.config import GRPOConfig


@dataclass(frozen=True)
class Estimate:
    """Of one update of one learner process, before FSDP divides what it shards.

    Attributes:
        groups, videos: rolled out; actions: taken in all of them; scored: of these, what is trained on.
        parameters, trainable: numbers of the policy.
        rollout_flops, learner_flops: of the transformer alone.
        rollout_seconds, learner_seconds: these at the speed of a large matrix product, which is a lower bound.
        model_bytes: weights, their gradients, AdamW's two averages, and the reference policy's weights.
        activation_bytes: what a micro-batch keeps for its backward pass.
        rollout_bytes: KV cache of the videos rolled out together.
    """

    groups: int
    videos: int
    actions: int
    scored: int
    parameters: int
    trainable: int
    rollout_flops: float
    learner_flops: float
    rollout_seconds: float
    learner_seconds: float
    model_bytes: int
    activation_bytes: int
    rollout_bytes: int

    def __str__(self) -> str:
        gib = 2**30
        return "\n".join(
            (
                f"an update of one process: {self.groups} groups, {self.videos} videos, {self.actions} actions, of "
                f"which {self.scored} are trained on",
                f"parameters: {self.parameters:,}, trainable {self.trainable:,}",
                f"compute, transformer only: rollout {self.rollout_flops / 1e12:.2f} TFLOP, learner "
                f"{self.learner_flops / 1e12:.2f} TFLOP",
                f"time at this device's matrix product, at least: rollout {self.rollout_seconds:.1f} s, learner "
                f"{self.learner_seconds:.1f} s; codec and rewards come on top",
                f"memory of the learner: model {self.model_bytes / gib:.2f} GiB, activations of a micro-batch "
                f"{self.activation_bytes / gib:.2f} GiB",
                f"memory of a rollout: KV cache {self.rollout_bytes / gib:.2f} GiB; codec and rewards come on top",
            )
        )


def estimate(
    policy: VideoPolicy,
    args: GRPOConfig,
    num_frames: int,
    latent_shape: tuple[int, ...],
    text_shape: tuple[int, ...],
    image_shape: tuple[int, ...] | None = None,
) -> Estimate:
    """What an update takes.

    Args:
        policy: with its adapters, where it is to have any; its parameters count, nothing is computed with them,
            and they may be on the device "meta".
        args: of the run.
        num_frames: F, latent frames.
        latent_shape: (C, h, w); text_shape: (L, D); image_shape: (L', D') where the policy reads image tokens.
    """
    assert args.num_generations and args.groups_per_batch
    plan, dtype = args.plan(0, policy.schedule.num_steps), args.autocast_dtype
    groups = args.groups_per_generation
    videos, together = groups * args.num_generations, args.groups_per_batch * args.num_generations
    micro, fake = args.per_device_train_batch_size, copy.deepcopy(policy)
    saving = args.activation_checkpointing or args.gradient_checkpointing or fake.transformer.is_gradient_checkpointing
    layers, costs = len(policy.transformer.blocks), []
    for depth in (2, 1):  # all layers cost the same, and hundreds of passes through thirty of them take minutes
        fake.transformer.blocks = fake.transformer.blocks[:depth]
        with FakeTensorMode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            _drop_data(fake)
            given, part = (_conditions(n, num_frames, latent_shape, text_shape, image_shape) for n in (together, micro))
            costs.append(_cost(fake, plan, given, rollout_of(plan, policy.schedule, part)))
    two, one = costs
    acted, learned, activations, outside, entry = (a + (layers - 1) * (b - a) for a, b in zip(one, two, strict=True))
    passes = 2 if args.use_peft else 3  # forward; gradients of what flows through, and of weights that learn
    if saving:  # what is outside of blocks, all that they are given included, and one block that is computed again
        activations, passes = outside + (activations - outside) // layers, passes + 1
    parameters = list(policy.parameters())
    size = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    weights = sum(p.numel() * p.itemsize for p in parameters)
    reference = weights if args.beta and not args.use_peft else 0
    window = min(policy.transformer.config["window"], num_frames - 1)
    rate = matmul_rate(args.device, dtype)
    rollout_flops = acted * videos / together
    passes = passes * args.num_iterations + (args.beta > 0)
    learner_flops = learned * passes * videos / micro
    return Estimate(
        groups=groups,
        videos=videos,
        actions=videos * num_frames * plan.num_steps,
        scored=videos * num_frames * len(plan.scored),
        parameters=size,
        trainable=trainable,
        rollout_flops=rollout_flops,
        learner_flops=learner_flops,
        rollout_seconds=rollout_flops / rate,
        learner_seconds=learner_flops / rate,
        model_bytes=weights + reference + 12 * trainable,
        activation_bytes=activations,
        rollout_bytes=window * entry,
    )


class _Cost(NamedTuple):
    """FLOP of acting in all videos of a batch and of a forward pass over a micro-batch; bytes that this keeps for its
    backward pass, and where blocks are checkpointed; and bytes of a frame's cache entry."""

    acted: int
    learned: int
    activations: int
    outside: int
    entry: int


def _cost(policy: VideoPolicy, plan: Plan, given: Conditions, rollout: Rollout) -> _Cost:
    """Of a policy without data, in a FakeTensorMode."""
    model = policy.transformer
    with _counter() as acted:
        generate_latents(policy, plan, given)
    entry = model(model.encode_context(given.text, given.image), _inputs(policy, given))[1][0]
    own = {p.untyped_storage()._cdata for p in policy.parameters()}

    def forward(checkpointed: bool) -> int:
        """Bytes that are kept, of blocks only what they are given where they are checkpointed."""
        kept: dict[int, int] = {}
        alive: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            alive.append(x)  # an address is not given out twice
            return x

        def run_block(run: Any, *args: Any) -> Any:
            for x in tree_leaves(args):
                if isinstance(x, Tensor):
                    keep(x)
            return checkpoint(run, *args, use_reentrant=False)

        model.disable_gradient_checkpointing()
        if checkpointed:
            model.enable_gradient_checkpointing(run_block)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            policy(rollout)
        return sum(kept.values())

    with _counter() as learned:
        activations = forward(checkpointed=False)
    outside = forward(checkpointed=True)
    size = sum(k.nbytes + v.nbytes for k, v in entry.layers)
    return _Cost(acted.get_total_flops(), learned.get_total_flops(), activations, outside, size)


def _counter() -> FlopCounterMode:
    """Counts attention on a CPU too, of which torch's counter knows nothing."""

    def attention(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any) -> int:
        batch, heads, queries, width = q
        return 2 * batch * heads * queries * k[-2] * (width + v[-1])

    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={operator: attention})


def _drop_data(module: nn.Module) -> None:
    """Replaces all tensors by those without data of the FakeTensorMode that is on."""
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad))
        for name, x in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(x.shape, dtype=x.dtype))


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 2048, seconds: float = 0.5) -> float:
    """Measured FLOP/s of a product of two size x size matrices."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = a.clone()

    def timed(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once = max(timed(2) / 2, 1e-6)
    count = max(1, int(seconds / once))
    return 2 * size**3 * count / timed(count)


def peak_memory(device: torch.device) -> float:
    """GiB that this process has held at most so far: on the GPU, or of resident memory where it runs on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:  # this program's own: getrusage begins with what its parent held
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # what the kernel counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _conditions(
    batch: int,
    frames: int,
    latent_shape: tuple[int, ...],
    text_shape: tuple[int, ...],
    image_shape: tuple[int, ...] | None,
) -> Conditions:
    noise = torch.zeros(batch, frames, *latent_shape)
    image = None if image_shape is None else torch.zeros(batch, *image_shape)
    return Conditions(noise, noise, noise, torch.zeros(batch, *text_shape), image)


def _inputs(policy: VideoPolicy, given: Conditions) -> Tensor:
    return policy.frame_inputs(given.noise, given.reference, given.trajectory)[:, :1]


def rollout_of(plan: Plan, schedule: Schedule, given: Conditions) -> Rollout:
    """One whose numbers mean nothing, for measuring."""
    batch, frames = given.noise.shape[:2]
    per_frame = torch.zeros(batch, frames)
    return Rollout(
        trajectory=given.trajectory,
        reference=given.reference,
        text=given.text,
        image=given.image,
        latents=given.noise[:, :, None].expand(-1, -1, plan.num_steps + 1, *(-1,) * 3),
        plan=plan,
        schedule=schedule,
        log_probs=torch.zeros(batch, frames, len(plan.scored)),
        rewards=per_frame,
        reward_terms={},
        task_ids=("",) * batch,
        groups=torch.zeros(batch, dtype=torch.long),
    )
