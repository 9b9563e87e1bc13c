"""Compares ways to explore, to give credit and to learn, on the same video MDP with the same budget of videos.

    python experiments/compare.py                                          all variants, three seeds: hours on a laptop
    python experiments/compare.py --variants ar-drag flow-grpo --seeds 0 1 --videos 960
    python experiments/compare.py --config experiments/configs/compare-quick.yaml       to see it run

A variant is a few flags of `GRPOConfig` on top of the flags given here: the same trainer and the same command with one
thing changed. A run is a variant and a seed. It leaves a JSON file in <output_dir>/runs/, and what is there is not run
again, so an interrupted comparison goes on where it stopped, and variants and seeds can be added later. In the end
<output_dir>/ holds compare.png (learning curves on held-out tasks), compare.md (a table) and compare.json.

What a reader should know:
- All variants see the same training tasks in the same order for a seed, and are judged on the same held-out tasks from
  the same noise with every step `ode`: exploration differs, so training rewards could not be compared.
- Lines are interquartile means over seeds and tasks of what a run gained since its start, task by task; bands are 95 %
  bootstrap intervals over seeds and tasks. Three seeds make coarse intervals.
- The unit of the budget is a video. `reuse` spends two updates on each batch of videos, the others one. With one update
  the ratio is 1 and clipping is idle, so there `reinforce` is `ar-drag` with another name: a check more than a rival.
- `noise-ppo` is another learner: Stable-Baselines3's PPO chooses the noise that the frozen policy starts each frame
  from, and is judged with the noise that its actor prefers (noise_ppo.py), from its own start: an untrained actor
  prefers almost no noise, which is another policy than the pipeline's. It needs `pip install "ardrag-rl[sb3]"`.
- `--seed` and `--max_steps` of the trainer follow from `--seeds` and `--videos`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from noise_ppo import ppo_class, train_ppo
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl import TrlParser

from ardrag_rl.hub import write_json
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.rewards import make_rewards
from ardrag_rl.training.aggregate import bootstrap_runs
from ardrag_rl.training.config import GRPOConfig, reward_spec, reward_weights
from ardrag_rl.training.evaluate import evaluate
from ardrag_rl.training.report import LOWER_IS_BETTER, Interval
from ardrag_rl.training.trainer import GRPOTrainer
from ardrag_rl.training.workers import EnvSpec


@dataclass(frozen=True)
class Variant:
    """What is changed, and what it stands for.

    Attributes:
        about: one line for the table.
        settings: fields of `GRPOConfig`; of SB3's PPO where `learner` is "ppo".
        learner: "grpo", or "ppo" on the frames' initial noise.
    """

    about: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    learner: str = "grpo"


VARIANTS = {
    "ar-drag": Variant("the default: one stochastic step per update, CPS kernel, credit per frame"),
    # how to explore
    "every-cps": Variant("CPS, every step but the last stochastic", {"exploration": "every"}),
    "flow-grpo": Variant(
        "Flow-GRPO: its SDE, every step but the last",
        {"exploration": "every", "kernel": "flow_sde", "kernel_eta": 0.7},
    ),
    "flow": Variant("Flow-GRPO's SDE on one step", {"kernel": "flow_sde", "kernel_eta": 0.7}),
    "dance": Variant("DanceGRPO's SDE on one step", {"kernel": "dance_sde", "kernel_eta": 0.3}),
    "renoise": Variant("one step renoised completely, as Self-Forcing samples", {"kernel": "renoise"}),
    # whom to credit
    "return-to-go": Variant("a frame answers for itself and all later frames", {"credit": "return_to_go"}),
    "episode": Variant("a frame answers for the whole video", {"credit": "episode"}),
    # how to learn
    "no-std": Variant("advantages centred, not divided by the group's spread", {"scale_rewards": "none"}),
    "reuse": Variant("two updates per batch of videos, where Eq. 14's clip acts", {"num_iterations": 2}),
    "reinforce": Variant("the plain policy gradient, no ratio, no clip", {"loss_type": "reinforce"}),
    "rloo": Variant("leave-one-out baseline, no ratio, no clip", {"loss_type": "rloo", "scale_rewards": "none"}),
    "noise-ppo": Variant(
        "SB3's PPO steers the frozen policy through its noise",
        {"n_epochs": 4, "learning_rate": 1e-4, "gamma": 0.9, "target_kl": 0.05},
        learner="ppo",
    ),
}


@dataclass
class CompareArguments:
    """What is compared, on what, and how it is judged."""

    variants: list[str] = field(default_factory=lambda: list(VARIANTS), metadata={"help": "Their names."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run of each variant per seed."})
    videos: int = field(default=2400, metadata={"help": "Videos a run may generate for training."})
    pipeline: str = field(default="tiny", metadata={"help": "An embedded pipeline, a folder, or a hub id."})
    tasks: str = field(default="sprites-hard", metadata={"help": "A name, a manifest, or a folder of clips."})
    heldout: str | None = field(default=None, metadata={"help": "Tasks of the evaluation; unset: '<tasks>:heldout'."})
    rewards: dict[str, float] | str | None = field(
        default=None, metadata={"help": "Weights by name, as JSON; unset: aesthetic and motion, 1 each."}
    )
    eval_size: int = field(default=128, metadata={"help": "Held-out tasks of an evaluation."})
    eval_batch: int = field(default=32, metadata={"help": "Videos generated at once in it."})
    eval_points: int = field(default=5, metadata={"help": "Evaluations along a run, besides the one before it."})
    eval_seed: int = field(default=0, metadata={"help": "Seed of the noise in evaluations, the same for all runs."})


def main() -> None:
    """Run what is missing, then compare."""
    script, _ = parse()
    check(script)
    logging.disable_progress_bar()  # of loading weights, once per run
    todo = [(name, seed) for seed in script.seeds for name in script.variants]
    results: dict[str, list[Result]] = {name: [] for name in script.variants}
    with tqdm(todo, unit="run") as bar:
        for name, seed in bar:
            bar.set_description(f"{name} {seed}")
            results[name].append(finished_run(name, seed))
    folder = Path(parse()[1].output_dir or ".")
    curves = {name: Curves.of(runs) for name, runs in results.items()}
    table = format_markdown(curves, script)
    (folder / "compare.md").write_text(table)
    write_json(folder / "compare.json", {name: asdict(c) for name, c in curves.items()})
    draw(folder / "compare.png", curves)
    print(f"\n{table}\n{folder}/: compare.png, compare.md, compare.json, runs/")


def parse(*flags: str) -> tuple[CompareArguments, GRPOConfig]:
    """The command's arguments, these flags last."""
    parser = TrlParser((CompareArguments, GRPOConfig))  # type: ignore[arg-type]
    parser.set_defaults(output_dir="runs/compare", report_to="none", save_strategy="no", disable_tqdm=True)
    script, args = parser.parse_args_and_config([*sys.argv[1:], *flags])
    script.rewards = reward_weights(script.rewards)
    return script, args


def check(script: CompareArguments) -> None:
    """Refuses before the first run what would fail in a later one."""
    unknown = [name for name in script.variants if name not in VARIANTS]
    if unknown or not script.variants or not script.seeds:
        raise SystemExit(f"--variants {' '.join(unknown)}: choose one or more of {', '.join(VARIANTS)}, and a seed.")
    if script.eval_points < 1 or script.eval_size < 1:
        raise SystemExit(f"--eval_points {script.eval_points}, --eval_size {script.eval_size}: expected 1 or more.")
    if any(VARIANTS[name].learner == "ppo" for name in script.variants):
        ppo_class()
    for name in script.variants:
        num_generations(script, parse(*flags_of(name, script.seeds[0]))[1])


# --- one run


@dataclass(frozen=True)
class Result:
    """What one run leaves behind.

    Attributes:
        variant, seed: which.
        setup: everything else that its numbers depend on.
        task_ids: n held-out tasks.
        videos: (P,) videos trained on at each evaluation, the first 0.
        scores: term -> (P, n), and "reward", their weighted sum; NaN where a task has nothing to score.
        seconds: of training, of evaluation.
    """

    variant: str
    seed: int
    setup: dict[str, Any]
    task_ids: tuple[str, ...]
    videos: tuple[int, ...]
    scores: dict[str, np.ndarray]
    seconds: dict[str, float]

    def save(self, path: Path) -> None:
        """As JSON, whole or not at all; NaN is null."""
        scores = {
            k: [[None if math.isnan(x) else round(x, 6) for x in row] for row in v.tolist()]
            for k, v in self.scores.items()
        }
        write_json(path, vars(self) | {"scores": scores})

    @classmethod
    def load(cls, path: Path) -> Result:
        """What `save` wrote."""
        content = json.loads(path.read_text())
        content["scores"] = {k: np.array(v, np.float64) for k, v in content["scores"].items()}
        return cls(**content | {"task_ids": tuple(content["task_ids"]), "videos": tuple(content["videos"])})


def finished_run(name: str, seed: int) -> Result:
    """The run of this variant and seed: from its file, or run now."""
    variant = VARIANTS[name]
    script, args = parse(*flags_of(name, seed))
    path = Path(args.output_dir or ".") / "runs" / f"{name}-{seed}.json"
    setup = setup_of(script, args, variant)
    if path.exists():
        result = Result.load(path)
        if result.setup != setup:
            odd = sorted(k for k in setup.keys() | result.setup.keys() if setup.get(k) != result.setup.get(k))
            raise SystemExit(
                f"{path} was run with other settings ({', '.join(odd)}): give another --output_dir, or delete it."
            )
        return result
    policy = VideoPolicy.from_pretrained(script.pipeline).to(args.device)
    terms = make_rewards(reward_spec(script.rewards, args.reward_weights))
    env = EnvSpec(script.pipeline, script.tasks, terms, *args.video_size, str(args.device), args.codec_settings)
    recorder = Recorder(env, script)
    measured = points(num_generations(script, args), script.eval_points)
    start = time.perf_counter()
    if variant.learner == "ppo":
        train_ppo(policy, env, args, variant.settings, measured, recorder.measure)
    else:
        train_grpo(policy, env, args, measured, recorder.measure)
    spent = time.perf_counter() - start - recorder.seconds
    result = Result(
        variant=name,
        seed=seed,
        setup=setup,
        task_ids=recorder.task_ids,
        videos=tuple(recorder.videos),
        scores={k: np.stack([row[k] for row in recorder.rows]) for k in recorder.rows[0]},
        seconds={"training": spent, "evaluation": recorder.seconds},
    )
    result.save(path)
    return result


def flags_of(name: str, seed: int) -> list[str]:
    """A variant's settings as command-line flags."""
    variant = VARIANTS[name]
    settings = dict(variant.settings) if variant.learner == "grpo" else {}
    return [word for key, value in (settings | {"seed": seed}).items() for word in (f"--{key}", str(value))]


def setup_of(script: CompareArguments, args: GRPOConfig, variant: Variant) -> dict[str, Any]:
    """What the numbers of a run depend on besides variant and seed; as JSON would give it back."""
    own = {k: v for k, v in vars(script).items() if k not in ("variants", "seeds")}
    elsewhere = {"seed", "output_dir", "logging_dir", "run_name", "max_steps", "rollout_workers"}
    for f in fields(GRPOConfig):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if f.init and f.name not in elsewhere and getattr(args, f.name) != default:
            own[f.name] = getattr(args, f.name)
    return json.loads(json.dumps(own | {"variant": dict(variant.settings)}, default=str))


def num_generations(script: CompareArguments, args: GRPOConfig) -> int:
    """How often a run may generate a batch of videos."""
    assert args.generation_batch_size is not None
    count = script.videos // args.generation_batch_size
    if count < 1 or script.videos % args.generation_batch_size:
        raise SystemExit(
            f"--videos {script.videos}: expected a multiple of the {args.generation_batch_size} videos of an update."
        )
    return count


class Recorder:
    """Evaluates at evenly spread points of a run, always on the same tasks and noise."""

    def __init__(self, env: EnvSpec, script: CompareArguments) -> None:
        self._envs = replace(env, tasks=script.heldout or f"{script.tasks}:heldout").make(script.eval_batch)
        self._tasks = range(min(script.eval_size, len(self._envs.source)))
        self._seed = script.eval_seed
        self.seconds = 0.0
        self.task_ids: tuple[str, ...] = ()
        self.videos: list[int] = []
        self.rows: list[dict[str, np.ndarray]] = []

    def measure(self, videos: int, policy: Any) -> None:
        """Records how the policy does after so many videos."""
        start = time.perf_counter()
        result = evaluate(self._envs, policy, self._tasks, seed=self._seed)
        weighted = [term.weight * result.terms[term.reward.name] for term in self._envs.rewards]
        self.task_ids = result.task_ids
        self.videos.append(videos)
        self.rows.append({"reward": np.sum(weighted, 0), **result.terms})
        self.seconds += time.perf_counter() - start


def points(count: int, wanted: int) -> list[int]:
    """Up to `wanted` evenly spread numbers of 1..count, the last of them count."""
    return sorted({max(1, round(count * k / wanted)) for k in range(1, wanted + 1)})


def train_grpo(
    policy: VideoPolicy,
    env: EnvSpec,
    args: GRPOConfig,
    measured: Sequence[int],
    measure: Callable[[int, VideoPolicy], None],
) -> None:
    """A run of our trainer; `measured` counts batches of videos."""
    assert args.steps_per_generation is not None and args.generation_batch_size is not None
    updates = args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps  # per generation
    args.max_steps = measured[-1] * updates
    due = {g * updates: g * args.generation_batch_size for g in measured}

    class Measure(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in due:
                measure(due[state.global_step], trainer.policy)

    terms = list(env.rewards)
    trainer = GRPOTrainer(policy, args, env.tasks, terms, pipeline=env.pipeline, callbacks=[Measure()])
    trainer.remove_callback(PrinterCallback)
    measure(0, trainer.policy)
    trainer.train()


# --- all runs


@dataclass(frozen=True)
class Curves:
    """A variant over its seeds; intervals of interquartile means.

    Attributes:
        runs: their number.
        videos: (P,).
        scores: term -> (P,) along training.
        gains: term -> (P,) scores less those at the start, task by task, so that hard and easy tasks do not blur them.
        seconds: of training, the mean over runs.
    """

    runs: int
    videos: tuple[int, ...]
    scores: dict[str, list[Interval]]
    gains: dict[str, list[Interval]]
    seconds: float

    @classmethod
    def of(cls, results: Sequence[Result]) -> Curves:
        """Over runs of one variant."""
        scores = {k: np.stack([r.scores[k] for r in results]) for k in results[0].scores}  # (runs, P, n)
        return cls(
            runs=len(results),
            videos=results[0].videos,
            scores={k: [bootstrap_runs(v[:, p]) for p in range(v.shape[1])] for k, v in scores.items()},
            gains={k: [bootstrap_runs(v[:, p] - v[:, 0]) for p in range(v.shape[1])] for k, v in scores.items()},
            seconds=float(np.mean([r.seconds["training"] for r in results])),
        )


def format_markdown(curves: Mapping[str, Curves], script: CompareArguments) -> str:
    """A row per variant, the largest gain in reward first."""
    terms = list(next(iter(curves.values())).scores)
    titles = [f"{t} gain{' (lower is better)' if t in LOWER_IS_BETTER else ''}" for t in terms]
    show: Callable[[Interval], str] = lambda i: f"{i.mean:+.3f} [{i.low:+.3f}, {i.high:+.3f}]"  # noqa: E731
    lines = [
        f"{script.videos} videos per run on {script.tasks}, judged on {script.eval_size} held-out tasks: interquartile "
        "means over seeds and tasks, 95 % bootstrap intervals.",
        "",
        "| "
        + " | ".join(["variant", "runs", "reward before", "after", *titles, "minutes", "what it stands for"])
        + " |",
        "|" + "---|" * (len(titles) + 6),
    ]
    for name, c in sorted(curves.items(), key=lambda item: -item[1].gains["reward"][-1].mean):
        first, last = c.scores["reward"][0], c.scores["reward"][-1]
        cells = [name, str(c.runs), f"{first.mean:.3f}", f"{last.mean:.3f} [{last.low:.3f}, {last.high:.3f}]"]
        cells += [show(c.gains[t][-1]) for t in terms]
        lines.append("| " + " | ".join([*cells, f"{c.seconds / 60:.1f}", VARIANTS[name].about]) + " |")
    return "\n".join(lines) + "\n"


def draw(path: Path, curves: Mapping[str, Curves]) -> None:
    """Held-out gains against videos, a panel for each term."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    terms = list(next(iter(curves.values())).scores)
    figure = Figure(figsize=(3.8 * len(terms), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for i, term in enumerate(terms):
        axes = figure.add_subplot(1, len(terms), i + 1)
        for j, (name, c) in enumerate(curves.items()):
            low, mean, high = ([getattr(p, k) for p in c.gains[term]] for k in ("low", "mean", "high"))
            colour = colormaps["tab20"](j % 20)
            axes.plot(c.videos, mean, color=colour, label=name, linewidth=1.8, marker=".")
            axes.fill_between(c.videos, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.set(title=term + (" (lower is better)" if term in LOWER_IS_BETTER else ""), xlabel="videos")
        axes.axhline(0, color="black", linewidth=0.6)
        axes.grid(alpha=0.3)
        if i == 0:
            axes.set(ylabel="gain on held-out tasks")
            handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(7, len(curves)), frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
