"""What the design buys, as ratios measured in one run: two ways to the same result, side by side on the same machine.

    python experiments/benchmark.py                                 about two minutes on two cores
    python experiments/benchmark.py --pipeline path/to/pipeline --only replay --repeats 9
    python experiments/benchmark.py --gpu true                      a real model's size instead: see benchmark_gpu.py

- cache: a video denoised with the KV cache, against recomputing all earlier frames at every step.
- replay: forward and backward through every scored transition of a rollout in one block-causal pass, against going
  frame by frame as the rollout did, the graph kept through the cache. For one group, and for a micro-batch of the
  default configuration. Both sides give the same gradient: the benchmark stops where they do not.
- group: a group of videos rolled out in one batch, against one after another; and the environment alone.
- outside: the share of a rollout's time that is neither transformer nor codec, and what it is spent on.
- growth: the time of frame 64 against frame 8, in one long rollout with a rolling cache.

The two sides of a ratio take turns, after a warm-up, and a ratio is one of medians; beside it stand the quartiles of
the ratios of the turns. Absolute times say something about the machine only. Writes benchmark.json and benchmark.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from benchmark_gpu import PARTS as GPU_PARTS
from benchmark_gpu import GpuArguments, GpuBench
from measuring import Measured, Share, measure, profile, ratio, run
from trl import TrlParser

from ardrag_rl.envs import ARDragEnv, ARDragVectorEnv
from ardrag_rl.flow import GaussianStep, Kernel
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.policies.chunks import Chunk, Conditions, chunk_slices
from ardrag_rl.policies.generate import generate_latents
from ardrag_rl.rollout import Plan, Rollout
from ardrag_rl.training.collect import collect
from ardrag_rl.training.config import GRPOConfig

PLAN = Plan.selective(0, Kernel("cps", 0.6))
PARTS = ("cache", "replay", "group", "outside", "growth")


@dataclass
class BenchmarkArguments(GpuArguments):
    """What is measured."""

    num_frames: int | None = field(default=None, metadata={"help": "Latent frames; unset: the task source's."})
    group: int = field(default=8, metadata={"help": "Videos of a group in the rollouts."})
    near: int = field(default=8, metadata={"help": "The earlier frame of `growth`."})
    far: int = field(default=64, metadata={"help": "The later frame of `growth`."})


class Bench:
    """A policy, its environments with the default rewards, and the measurements."""

    def __init__(self, args: BenchmarkArguments) -> None:
        self.args = args
        self.policy = VideoPolicy.from_pretrained(args.pipeline, args.device or "cpu")
        self.where = str(self.policy.device)
        self.group_envs = self._envs(args.group)
        self._group_rollout = collect(self.group_envs, self.policy, PLAN, 0, tasks=[0])

    def cache(self) -> list[Measured]:
        """KV cache against recomputation."""
        r = self._group_rollout.to(self.policy.device)
        given = Conditions(r.latents[:, :, 0], r.trajectory, r.reference, r.text, r.image)
        plan = Plan.all("ode", self.policy.schedule.num_steps)

        def cached() -> None:
            generate_latents(self.policy, plan, given)

        def recomputed() -> None:
            without_cache(self.policy, plan, given)

        # every step has two passes, [history] and [frame]; a joint one would save little
        what = f"recomputing the history at every step / KV cache ({len(r)} videos of {r.num_frames} frames)"
        return [self._ratio(what, recomputed, cached)]

    def replay(self) -> list[Measured]:
        """One-pass replay against frame by frame, forward and backward."""
        config = GRPOConfig(use_cpu=True, report_to="none")
        assert config.num_generations is not None
        sizes = {
            "one group": (config.num_generations, "at least 3"),
            "a micro-batch of the default": (config.per_device_train_batch_size, ""),
        }
        ratios, step_by_step = [], partial(replay_step_by_step, self.policy)
        for name, (size, target) in sizes.items():
            rows = [i % len(self._group_rollout) for i in range(size)]
            rollout = self._group_rollout.select(rows).to(self.policy.device)
            one, many = gradient(self.policy, rollout, self.policy), gradient(self.policy, rollout, step_by_step)
            error = (one - many).norm() / one.norm()
            if not error < 1e-3:
                raise SystemExit(f"one-pass and step-by-step replay differ by {float(error):.1e} of the gradient.")
            what = f"step-by-step replay / one pass, forward and backward ({name}: {size} videos)"
            many_pass, one_pass = (
                lambda rollout=rollout: gradient(self.policy, rollout, step_by_step),
                lambda rollout=rollout: gradient(self.policy, rollout, self.policy),
            )
            ratios.append(self._ratio(what, many_pass, one_pass, target))
        self.policy.zero_grad()
        return ratios

    def group(self) -> list[Measured]:
        """A batched group against a loop."""
        size, single = self.args.group, self._envs(1)
        env = ARDragEnv(self.args.pipeline, self.args.tasks, num_frames=self.args.num_frames, device=self.where)
        actions = self._group_rollout.latents.numpy()  # (B, F, N+1, C, h, w)
        frames, steps = actions.shape[1], actions.shape[2] - 1

        def batched() -> None:
            collect(self.group_envs, self.policy, PLAN, 0, tasks=[0])

        def loop() -> None:
            for _ in range(size):
                collect(single, self.policy, PLAN, 0, tasks=[0])

        def act(env: Any, rows: Any) -> None:
            env.reset(seed=0, options={"index": 0})
            for m in range(frames):
                for n in range(steps):
                    env.step(actions[rows, m, n + 1])

        def act_loop() -> None:
            for i in range(size):
                act(env, i)

        return [
            self._ratio(f"rollouts one by one / a batched group of {size}", loop, batched, "at least 3"),
            self._ratio(
                f"environment alone: {size} single ones / one of {size}",
                act_loop,
                lambda: act(self.group_envs, slice(None)),
            ),
        ]

    def outside(self) -> list[Share]:
        """Where the time of a group's rollout goes."""
        turns = []
        for i in range(self.args.warmup + self.args.repeats):
            with profile(self.policy, self.group_envs, self._wait) as seconds:
                collect(self.group_envs, self.policy, PLAN, 1 + i, tasks=[1 + i])  # a new task each, as in training
            turns.append(seconds)
        return [Share.of("A group's rollout", turns[self.args.warmup :], target="at most 25 %")]

    def growth(self) -> list[Measured]:
        """Seconds of a late frame against an early one, both in the same rollout."""
        near, far = self.args.near, self.args.far
        envs = self._envs(1, far + 1)
        spent: list[np.ndarray] = []  # per rollout (far + 1, 2): policy, environment
        for i in range(self.args.warmup + self.args.repeats):
            session = self.policy.session(1)
            obs, _ = envs.reset(seed=i, options={"index": i})
            seconds = np.zeros((far + 1, 2))
            for m in range(far + 1):
                for kernel in PLAN.kernels:
                    start = self._now()
                    action = session.transition(obs, kernel).mean.cpu().numpy()
                    middle = self._now()
                    obs, *_ = envs.step(action)
                    seconds[m] += (middle - start, self._now() - middle)
            spent.append(seconds)
        turns = np.stack(spent[self.args.warmup :])

        def late_over_early(what: str, seconds: np.ndarray, target: str = "") -> Measured:
            # four frames each, since one is a few milliseconds
            late, early = (np.median(seconds[:, m - 3 : m + 1], 1) for m in (far, near + 3))
            return ratio(what, late, early, target)

        window = self.policy.transformer.config["window"]  # type: ignore[attr-defined]
        where = f"frames {far - 3} to {far} / {near} to {near + 3}, window of {window}"
        return [
            late_over_early(f"{where}: all of it", turns.sum(2), "at most 1.1"),
            late_over_early(f"{where}: policy", turns[..., 0]),
        ]

    def _envs(self, size: int, num_frames: int | None = None) -> ARDragVectorEnv:
        a = self.args
        return ARDragVectorEnv(size, a.pipeline, a.tasks, num_frames=num_frames or a.num_frames, device=self.where)

    def _ratio(self, what: str, slow: Callable[[], object], fast: Callable[[], object], target: str = "") -> Measured:
        return measure(what, slow, fast, self.args.repeats, self.args.warmup, target, self._now)

    def _now(self) -> float:
        self._wait()
        return time.perf_counter()

    def _wait(self) -> None:
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize(self.policy.device)


def gradient(policy: VideoPolicy, rollout: Rollout, replay: Callable[[Rollout], GaussianStep]) -> torch.Tensor:
    """The policy gradient with advantages of 1, as one vector."""
    policy.zero_grad()
    replay(rollout).log_prob(rollout.actions).mean().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def replay_step_by_step(policy: VideoPolicy, rollout: Rollout) -> GaussianStep:
    """What `policy(rollout)` gives, by the rollout's passes: each scored step, then the clean frame's entry."""
    levels = rollout.schedule.levels
    transformer: Any = policy.transformer  # its base class has no types
    context, cache = transformer.encode_context(rollout.text, rollout.image), transformer.new_cache()
    means: list[torch.Tensor] = []
    for m in range(rollout.num_frames):
        conditions = rollout.reference[:, m : m + 1], rollout.trajectory[:, m : m + 1]
        steps = []
        for n in rollout.plan.scored:
            x = rollout.latents[:, m, n]
            inputs = policy.frame_inputs(x[:, None], *conditions, first=m)
            velocity, _ = transformer(context, None, inputs[:, None], 1000 * levels[n], cache)
            steps.append(rollout.plan.kernels[n].step(x, velocity[:, 0, 0], levels[n], levels[n + 1]))
        means.append(torch.stack([s.mean for s in steps], 1))
        if m < rollout.num_frames - 1:
            clean = policy.frame_inputs(rollout.clean[:, m : m + 1], *conditions, first=m)
            cache = cache.append(transformer(context, clean, cache=cache)[1])
    std = torch.stack([torch.as_tensor(s.std, device=policy.device) for s in steps])
    return GaussianStep(torch.stack(means, 1), std[:, None, None, None])


@torch.no_grad()
def without_cache(policy: VideoPolicy, plan: Plan, given: Conditions) -> torch.Tensor:
    """The clean frames of `generate_latents`, (B, F, C, h, w), where every step runs all earlier frames again."""
    model, levels = policy.transformer, policy.schedule.levels
    context, clean = model.encode_context(given.text, given.image), given.noise[:, :0]
    for frames in chunk_slices(given.noise.shape[1], model.config["chunk_size"]):
        x = given.noise[:, frames]
        for n, kernel in enumerate(plan.kernels):
            cache = model.new_cache()
            if frames.start:
                cache = cache.append(Chunk(policy, given, context, cache, slice(0, frames.start)).entries(clean))
            v = Chunk(policy, given, context, cache, frames).velocity(x, n)
            x = kernel.step(x, v, levels[n], levels[n + 1]).sample()
        clean = torch.cat([clean, x], 1)
    return clean


def main() -> None:
    """Measure, write, print."""
    (args,) = TrlParser((BenchmarkArguments,)).parse_args_and_config()  # type: ignore[arg-type]
    if args.gpu:
        run(GpuBench, args, GPU_PARTS, "benchmark_gpu")
    else:
        run(Bench, args, PARTS, "benchmark")


if __name__ == "__main__":
    main()
