"""What an update of GRPO costs, as ratios measured in one run: ours beside the way peers do it, and Ray's own share.

    python experiments/benchmark_update.py                                 about nine minutes on two cores
    python experiments/benchmark_update.py --only workers --repeats 9

- update: rollouts and gradient of one update, against the same update as peers make it: videos one by one, the old
  log-probabilities computed again, replay step by step. Both give the same gradient: it stops where they do not.
- workers: the same groups on two Ray actors against one, with a policy that sleeps in place of computing, so that
  scaling shows on a machine with few cores.
- phases: where the time of that update goes, and of one of a random-weight policy of `--width` and `--layers`.
- ray: the share of an update that Ray takes for itself, with that policy: the weights to an actor and into its policy,
  and the videos back, against that update's rollouts and gradient.

Sides take turns after a warm-up, and a ratio is one of medians. Writes benchmark_update.json and .md.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from benchmark import PLAN, gradient, replay_step_by_step
from measuring import MeasureArguments, Measured, Share, measure, profile, run
from trl import TrlParser

from ardrag_rl.flow import GaussianStep, Kernel
from ardrag_rl.policies import CausalWanTransformer3DModel, Session, VideoPolicy
from ardrag_rl.training.collect import collect
from ardrag_rl.training.lora import load_trainable_state, trainable_state
from ardrag_rl.training.ray_rollouts import RayRollouts, join_ray
from ardrag_rl.training.workers import EnvSpec, RolloutSettings, Unit

PARTS = ("update", "phases", "workers", "ray")


@dataclass
class UpdateArguments(MeasureArguments):
    """What is measured."""

    num_frames: int = field(default=16, metadata={"help": "Latent frames."})
    group: int = field(default=12, metadata={"help": "Videos of a group; the update has one."})
    units: int = field(default=4, metadata={"help": "Groups that the workers share."})
    sleep: float = field(default=0.1, metadata={"help": "Seconds that a transition of the sleeping policy takes."})
    width: int = field(default=640, metadata={"help": "Of the larger policy."})
    layers: int = field(default=10, metadata={"help": "Of the larger policy."})
    large_group: int = field(default=4, metadata={"help": "Videos of its group."})


class Bench:
    """The measurements."""

    def __init__(self, args: UpdateArguments) -> None:
        self.args, self.policy = args, VideoPolicy.from_pretrained(args.pipeline)
        self.where = str(self.policy.device)
        self.env = EnvSpec(args.pipeline, args.tasks, None, args.num_frames, None, None)

    def update(self) -> list[Measured]:
        """One group and its gradient, ours and as peers do it."""
        size, policy = self.args.group, self.policy
        group, single = self.env.make(size), self.env.make(1)
        made: dict[str, torch.Tensor] = {}
        step_by_step = partial(replay_step_by_step, policy)

        def ours() -> None:
            rollout = collect(group, policy, PLAN, 0, tasks=[0])
            made["ours"] = gradient(policy, rollout, policy)

        def peers() -> None:
            for _ in range(size):
                collect(single, policy, PLAN, 0, tasks=[0])
            parts = [self._rollout.select([i]) for i in range(size)]
            with torch.no_grad():
                for part in parts:
                    step_by_step(part)  # the old log-probabilities, which the rollout knew
            gradients = [gradient(policy, part, step_by_step) for part in parts]
            made["peers"] = torch.stack(gradients).mean(0)

        self._rollout = collect(group, policy, PLAN, 0, tasks=[0])
        what = f"an update as peers make it / ours (one group of {size} videos of {self.args.num_frames} frames)"
        ratio = measure(what, peers, ours, self.args.repeats, self.args.warmup, "at least 5")
        error = (made["ours"] - made["peers"]).norm() / made["ours"].norm()
        if not error < 1e-3:
            raise SystemExit(f"the two updates differ by {float(error):.1e} of the gradient.")
        return [ratio]

    def workers(self) -> list[Measured]:
        """Two actors against one."""
        settings = RolloutSettings(num_generations=2, threads=1)
        units = [Unit((0, 0), PLAN, (i,), (i,)) for i in range(self.args.units)]
        policy = SleepingPolicy(self.policy.transformer, self.policy.schedule, self.policy.source)  # type: ignore[arg-type]
        policy.seconds = self.args.sleep
        env = replace(self.env, rewards=["dynamic_degree"])
        pools = [RayRollouts(env, settings, policy, n) for n in (1, 2)]
        join_ray(3)
        try:
            one, two = (lambda pool=pool: pool.run(units, policy) for pool in pools)
            what = f"{len(units)} groups on one actor / on two, policy asleep for {self.args.sleep} s a transition"
            return [measure(what, one, two, self.args.repeats, max(1, self.args.warmup), "at least 1.9")]
        finally:
            for pool in pools:
                pool.close()

    def phases(self) -> list[Share]:
        """Where the time of an update goes, at both sizes."""
        return [self._phases(self.policy, self.args.group), self._phases(self._large, self.args.large_group)]

    def ray(self) -> list[Measured]:
        """Ray's own share of an update."""
        import ray

        policy, size = self._large, self.args.large_group
        envs = self.env.make(size)
        rollout = collect(envs, policy, PLAN, 0, tasks=[0])
        join_ray(3)
        actor = ray.remote(num_cpus=1)(Carrier).remote(policy)
        videos = {k: getattr(rollout, k).numpy() for k in ("latents", "trajectory", "reference", "text", "log_probs")}
        ray.get(actor.keep.remote(videos))

        def own() -> None:
            weights = {name: p.numpy() for name, p in trainable_state(policy).items()}
            ray.get(actor.load.remote(ray.put(weights)))
            for array in ray.get(actor.give.remote()).values():
                torch.from_numpy(array.copy())

        def update() -> None:
            gradient(policy, collect(envs, policy, PLAN, 0, tasks=[0]), policy)

        what = f"an update without Ray / Ray's weights and videos ({millions(policy)}, one group of {size})"
        try:
            return [measure(what, update, own, self.args.repeats, self.args.warmup, "above 20: less than 5 %")]
        finally:
            ray.kill(actor)

    @cached_property
    def _large(self) -> VideoPolicy:
        config = {k: v for k, v in self.policy.transformer.config.items() if not k.startswith("_")}  # type: ignore[attr-defined]
        heads = self.args.width // config["attention_head_dim"]
        config |= dict(num_attention_heads=heads, num_layers=self.args.layers, ffn_dim=3 * self.args.width)
        return VideoPolicy(CausalWanTransformer3DModel(**config), self.policy.schedule, self.policy.source)

    def _phases(self, policy: VideoPolicy, size: int) -> Share:
        envs, turns = self.env.make(size), []
        for i in range(self.args.warmup + self.args.repeats):
            with profile(policy, envs, lambda: None) as seconds:
                rollout = collect(envs, policy, PLAN, 1 + i, tasks=[1 + i])  # a new task each, as in training
            start = time.perf_counter()
            gradient(policy, rollout, policy)
            turns.append(seconds | {"gradient": time.perf_counter() - start})
        what = f"An update of one group of {size} videos ({millions(policy)})"
        return Share.of(what, turns[self.args.warmup :], inside=("transformer", "codec", "gradient"))


class SleepingPolicy(VideoPolicy):
    """Acts with noise after a nap."""

    seconds: float = 0.0

    def session(self, batch_size: int) -> Session:
        """One whose transitions sleep."""
        return SleepingSession(self, batch_size)


class SleepingSession(Session):
    """See there."""

    def transition(self, obs: Any, kernel: Kernel) -> GaussianStep:
        """The latent as it is, after a nap."""
        time.sleep(self.policy.seconds)  # type: ignore[arg-type]
        x = torch.as_tensor(obs["latents"])[torch.arange(self.batch_size), torch.as_tensor(obs["frame"]).flatten()]
        level, next_level = self.policy.schedule.levels[:2]
        return kernel.step(x, torch.zeros_like(x), level, next_level)


class Carrier:
    """An actor that takes weights and gives videos, as a rollout's does."""

    def __init__(self, policy: VideoPolicy) -> None:
        self._policy, self._videos = policy, dict[str, Any]()

    def keep(self, videos: dict[str, Any]) -> None:
        """What it gives."""
        self._videos = videos

    def load(self, weights: dict[str, Any]) -> None:
        """New weights."""
        load_trainable_state(self._policy, {name: torch.tensor(w) for name, w in weights.items()})

    def give(self) -> dict[str, Any]:
        """The videos."""
        return self._videos


def millions(policy: VideoPolicy) -> str:
    """How large it is."""
    return f"{sum(p.numel() for p in policy.parameters()) / 1e6:.0f} M parameters"


def main() -> None:
    """Measure, write, print."""
    (args,) = TrlParser((UpdateArguments,)).parse_args_and_config()  # type: ignore[arg-type]
    run(Bench, args, PARTS, "benchmark_update")


if __name__ == "__main__":
    main()
