"""Collecting, learning, reporting: the identities of a GRPO run, on a two-layer pipeline."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from ardrag_rl.envs import ARDragVectorEnv
from ardrag_rl.flow import Kernel
from ardrag_rl.media import write_image
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.policies.compiled import eager_blocks
from ardrag_rl.rewards import Reward, RewardError
from ardrag_rl.rollout import Plan
from ardrag_rl.training.checkpoints import last_checkpoint
from ardrag_rl.training.collect import collect
from ardrag_rl.training.config import GRPOConfig, reward_spec
from ardrag_rl.training.evaluate import evaluate
from ardrag_rl.training.lora import add_lora, has_lora, lora_disabled, merged
from ardrag_rl.training.order import task_indices
from ardrag_rl.training.report import bootstrap, compare, draw_curves, smooth
from ardrag_rl.training.trainer import GRPOTrainer

FRAMES = 3


class Brightness(Reward):
    """The mean of a frame: cheap, and something a policy can move."""

    def __call__(self, video, controls):
        return video.mean((2, 3, 4))


class Failing(Reward):
    """Raises, or returns NaN, from its second video batch on where a predicate says so."""

    def __init__(self, fails, with_nan=False):
        self.fails, self.with_nan, self.calls = fails, with_nan, 0

    def __deepcopy__(self, memo):
        return self

    def start(self, controls):
        self.calls += 1
        return super().start(controls)

    def __call__(self, video, controls):
        if self.fails(self.calls):
            if self.with_nan:
                return torch.full(video.shape[:2], float("nan"))
            raise OSError("the scorer's file is gone")
        return video.mean((2, 3, 4))


class OnStep(TrainerCallback):
    def __init__(self, call):
        self.call = call

    def on_step_end(self, args, state, control, **kwargs):
        self.call(state.global_step)


def config(folder, **changes):
    defaults = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=4,
        num_frames=FRAMES,
        max_steps=2,
        learning_rate=1e-3,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        rollout_threads=1,
        stochastic_step=0,
    )
    return GRPOConfig(**(defaults | changes))


def trainer_of(pipeline, folder, rewards=None, tasks="sprites", **changes):
    rewards = [Brightness()] if rewards is None else rewards
    return GRPOTrainer(str(pipeline), config(folder, **changes), tasks=tasks, rewards=rewards)


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


@pytest.fixture(scope="module")
def envs(tiny_pipeline):
    return ARDragVectorEnv(4, str(tiny_pipeline), "sprites", [Brightness()], num_frames=FRAMES)


@pytest.fixture(scope="module")
def policy(tiny_pipeline):
    return VideoPolicy.from_pretrained(tiny_pipeline)


# --- configuration


def test_default_config_works_on_a_cpu_and_fills_its_groups():
    args = GRPOConfig(use_cpu=True)
    assert args.generation_batch_size == 96 and args.groups_per_generation == 8
    assert args.loss_type == "grpo" and not args.bf16 and not args.gradient_checkpointing and args.beta == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"eval_strategy": "steps"}, "eval_strategy='steps'"),
        ({"use_vllm": True}, "use_vllm=True.*rollout_workers"),
        ({"temperature": 0.7}, "temperature=0.7.*kernel_eta"),
        ({"max_completion_length": 64}, "means nothing here"),
        ({"num_generations": 7}, "divisible by num_generations"),
        ({"groups_per_batch": 3}, "groups_per_batch=3 does not divide the 8 groups"),
        ({"kernel": "ode"}, "no density"),
        ({"kernel": "euler"}, "choose one of"),
        ({"kernel_eta": -1.0}, "eta=-1.0"),
        ({"credit": "gae"}, "credit='gae'"),
        ({"exploration": "some"}, "selective, every"),
        ({"scale_rewards": "global"}, "group, batch, none"),
        ({"on_group_error": "ignore"}, "raise, skip"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"max_steps": -1}, "max_steps=-1"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"epsilon_high": -1.0}, "epsilon_high=-1.0"),
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"num_frames": 0}, "num_frames=0"),
        ({"seed": -1}, "seed=-1"),
        ({"codec_settings": "slicing"}, "codec_settings='slicing': expected values by name as JSON"),
        ({"codec_settings": {"tile": True}}, r"\['tile'\] are unknown: expected some of tiling"),
    ],
)
def test_config_refuses(setting, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(use_cpu=True, **setting)


def test_codec_settings_reach_the_environments(tiny_pipeline, tmp_path):
    """From JSON, as a command line gives them."""
    trainer = trainer_of(tiny_pipeline, tmp_path, codec_settings='{"slicing": true}')
    assert trainer.env.make(1).codec.settings.slicing


def test_scale_rewards_takes_trl_s_booleans():
    assert GRPOConfig(use_cpu=True, scale_rewards=True).scale_rewards == "group"
    assert GRPOConfig(use_cpu=True, scale_rewards=False).scale_rewards == "none"


def test_stochastic_step_is_drawn_per_update_from_all_but_the_last():
    args = GRPOConfig(use_cpu=True, seed=3)
    plans = [args.plan(update, 3) for update in range(50)]
    assert {p.scored for p in plans} == {(0,), (1,)}
    assert plans == [GRPOConfig(use_cpu=True, seed=3).plan(update, 3) for update in range(50)]
    assert all(p.kernels[2].name == "ode" for p in plans)
    assert GRPOConfig(use_cpu=True, exploration="every").plan(0, 3).scored == (0, 1)


def test_rewards_are_weighted_once():
    weighted = reward_spec([Brightness()], [0.5])
    assert [w.weight for w in weighted] == [0.5]
    with pytest.raises(ValueError, match="given twice"):
        reward_spec({"motion": 1.0}, [0.5])
    with pytest.raises(ValueError, match="2 reward_weights for 1"):
        reward_spec([Brightness()], [0.5, 1.0])


def test_task_order_deals_small_sources_completely_and_needs_no_state():
    dealt = task_indices(5, 0, range(15))
    assert all(sorted(dealt[i : i + 5]) == list(range(5)) for i in (0, 5, 10))
    assert task_indices(5, 0, (7, 8, 9, 10)) == dealt[7:11]
    long = task_indices(2**31 - 1, 0, range(6))
    assert long[2:] == task_indices(2**31 - 1, 0, range(2, 6)) and len(set(long)) == 6


# --- collect


def test_collect_is_a_function_of_its_seed(envs, policy):
    plan = Plan.selective(1, "cps")
    first, again = (collect(envs, policy, plan, seed=5, tasks=[7]) for _ in range(2))
    other = collect(envs, policy, plan, seed=6, tasks=[7])
    assert torch.equal(first.latents, again.latents) and torch.equal(first.log_probs, again.log_probs)
    assert torch.equal(first.rewards, again.rewards)
    assert not torch.equal(first.latents, other.latents)
    assert first.latents.shape[:3] == (4, FRAMES, 4) and first.log_probs.shape == (4, FRAMES, 1)
    assert set(first.reward_terms) == {"brightness"}
    assert torch.allclose(first.rewards, first.reward_terms["brightness"])


def test_a_group_shares_noise_and_splits_at_the_stochastic_step(envs, policy):
    rollout = collect(envs, policy, Plan.selective(1, "cps"), seed=0, tasks=[0])
    noise, ode, split = (rollout.latents[:, 0, n] for n in range(3))
    assert torch.equal(noise[0], noise[1]) and torch.allclose(ode[0], ode[1], atol=1e-5)
    assert (split[0] - split[1]).abs().max() > 1e-2
    assert len(set(rollout.task_ids)) == 1
    alone = collect(envs, policy, Plan.selective(1, "cps"), seed=0, tasks=[0], share_noise=False)
    assert not torch.equal(alone.latents[0, :, 0], alone.latents[1, :, 0])


def test_a_group_does_not_depend_on_the_others(envs, policy):
    plan = Plan.selective(0, "cps")
    a = collect(envs, policy, plan, seed=0, tasks=[3, 4], group_ids=[0, 1])
    b = collect(envs, policy, plan, seed=0, tasks=[9, 4], group_ids=[8, 1])
    assert torch.equal(a.latents[2:], b.latents[2:]) and not torch.equal(a.latents[:2], b.latents[:2])
    assert a.groups.tolist() == [0, 0, 1, 1] and b.groups.tolist() == [8, 8, 1, 1]


def test_collect_refuses_what_does_not_fit(envs, policy):
    with pytest.raises(ValueError, match="4 environments, 3 tasks"):
        collect(envs, policy, Plan.selective(0, "cps"), 0, tasks=[0, 1, 2])
    with pytest.raises(ValueError, match=r"4 steps.*3"):
        collect(envs, policy, Plan.selective(0, "cps", num_steps=4), 0)


@pytest.mark.parametrize("name", ["cps", "flow_sde", "dance_sde", "renoise"])
@pytest.mark.parametrize("every", [False, True])
def test_ratio_is_one_before_the_update(envs, policy, name, every):
    kernel = Kernel(name, 0.6)
    plan = Plan.every(kernel) if every else Plan.selective(1, kernel, others="renoise")
    rollout = collect(envs, policy, plan, seed=1, tasks=[2])
    with torch.no_grad():
        ratio = (policy(rollout).log_prob(rollout.actions) - rollout.log_probs).exp()
    assert ratio.shape == (4, FRAMES, len(plan.scored))
    assert (ratio - 1).abs().max() < 1e-4


# --- the trainer


def test_two_updates_move_the_policy_and_save_a_pipeline(tiny_pipeline, tmp_path):
    trainer = trainer_of(tiny_pipeline, tmp_path)
    before = weights(trainer.policy)
    trainer.train()
    assert not torch.equal(before, weights(trainer.policy))
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logs) == 2
    for name in (
        "rewards/brightness/mean",
        "rewards/brightness/std",
        "dynamic_degree",
        "before_update/ratio",
        "before_update/drift_max",
        "clip_low",
        "clip_high",
        "approx_kl",
        "frac_reward_zero_std",
        "seconds/policy",
        "seconds/env",
        "seconds/micro_batch",
        "videos_per_second",
        "memory/peak_gib",
        "staleness",
        "stochastic_step",
    ):
        assert name in logs[0], name
    assert abs(logs[1]["before_update/ratio"] - 1) < 1e-4
    trainer.save_model()
    loaded = VideoPolicy.from_pretrained(tmp_path)
    assert torch.equal(weights(loaded), weights(trainer.policy))
    ARDragVectorEnv(2, str(tmp_path), "sprites", [Brightness()], num_frames=FRAMES)  # a whole pipeline


def test_update_raises_the_reward(tiny_pipeline, tmp_path):
    """Videos get brighter: after - before on the same noise."""
    trainer = trainer_of(tiny_pipeline, tmp_path, max_steps=8, learning_rate=2e-3, kernel_eta=0.8)
    envs = ARDragVectorEnv(8, str(tiny_pipeline), "sprites", [Brightness()], num_frames=FRAMES)
    before = evaluate(envs, trainer.policy, range(8)).mean("brightness")
    trainer.train()
    assert evaluate(envs, trainer.policy, range(8)).mean("brightness") > before + 1e-4


def test_micro_batches_and_checkpointing_do_not_change_the_update(tiny_pipeline, tmp_path):
    after = []
    for per_device, accumulation, checkpointing in ((8, 1, None), (2, 4, None), (4, 2, True)):
        trainer = trainer_of(
            tiny_pipeline,
            tmp_path / str(per_device),
            activation_checkpointing=checkpointing,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=1.0,
        )
        trainer.train()
        after.append(weights(trainer.policy))
    start = weights(VideoPolicy.from_pretrained(tiny_pipeline))
    moved = [w - start for w in after]
    assert moved[0].norm() > 0
    assert (moved[0] - moved[1]).norm() < 1e-3 * moved[0].norm()
    assert (moved[0] - moved[2]).norm() < 1e-3 * moved[0].norm()


def test_second_iteration_is_off_policy(tiny_pipeline, tmp_path):
    trainer = trainer_of(tiny_pipeline, tmp_path, num_iterations=2, max_steps=2, epsilon=1e-9)
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "ratio_mean" in entry)
    assert "reward" in first and "reward" not in second  # one generation, two updates
    assert first["approx_kl"] < 1e-8 < second["approx_kl"]
    assert second["clip_low"] + second["clip_high"] > 0.1


def test_resumed_run_equals_an_uninterrupted_one(tiny_pipeline, tmp_path):
    whole = trainer_of(tiny_pipeline, tmp_path / "whole", max_steps=4, stochastic_step=None)
    whole.train()
    settings = dict(save_strategy="steps", save_steps=2, stochastic_step=None)
    trainer_of(tiny_pipeline, tmp_path / "parts", max_steps=2, **settings).train()
    resumed = trainer_of(tiny_pipeline, tmp_path / "parts", max_steps=4, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert torch.equal(weights(whole.policy), weights(resumed.policy))


def test_a_full_disk_is_an_error_before_anything_is_trained_or_written(tiny_pipeline, tmp_path, monkeypatch):
    def left(free):
        monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free))

    trainer = trainer_of(tiny_pipeline, tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
    left(2**20)
    with pytest.raises(OSError, match="disk has 1 MiB left: nothing was written"):
        trainer.train()
    left(2**30)
    trainer.add_callback(OnStep(lambda step: left(2**20 if step == 3 else 2**30)))
    with pytest.raises(OSError, match="earlier checkpoints are whole"):
        trainer.train()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert len(list(tmp_path.iterdir())) == 2


def test_compiled_blocks_make_the_same_update(tiny_pipeline, tmp_path):
    after = []
    for compiled in (False, True):
        settings = dict(compile=compiled, max_steps=1, optim="sgd", max_grad_norm=0.0, learning_rate=1.0)
        trainer = trainer_of(tiny_pipeline, tmp_path, **settings)
        try:
            trainer.train()
        finally:
            eager_blocks()
        after.append(weights(trainer.policy))
    moved = [w - weights(VideoPolicy.from_pretrained(tiny_pipeline)) for w in after]
    assert not torch.equal(*moved) and (moved[0] - moved[1]).norm() < 1e-3 * moved[0].norm()


def test_reference_kl(tiny_pipeline, tmp_path):
    trainer = trainer_of(tiny_pipeline, tmp_path, beta=0.1)
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "kl" in entry)
    assert first["kl"] < 1e-8 < second["kl"]


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_lora_trains_adapters_and_saves_them_merged(tiny_pipeline, tmp_path, beta):
    trainer = trainer_of(
        tiny_pipeline, tmp_path, use_peft=True, lora_r=2, lora_alpha=4, beta=beta, save_strategy="steps", save_steps=2
    )
    trainable = [name for name, p in trainer.policy.named_parameters() if p.requires_grad]
    assert trainable and all("lora" in name for name in trainable)
    trainer.train()
    assert (tmp_path / "checkpoint-2/model.safetensors").stat().st_size < 200_000
    trainer.save_model()
    loaded = VideoPolicy.from_pretrained(tmp_path)
    assert not has_lora(loaded) and has_lora(trainer.policy)
    original = VideoPolicy.from_pretrained(tiny_pipeline)
    assert not torch.equal(weights(loaded), weights(original))
    resumed = trainer_of(tiny_pipeline, tmp_path, use_peft=True, lora_r=2, lora_alpha=4, beta=beta, max_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3


def test_lora_off_is_the_base_and_merged_is_the_sum(tiny_pipeline, envs):
    base, adapted = (VideoPolicy.from_pretrained(tiny_pipeline) for _ in range(2))
    add_lora(adapted, 2, 4)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora" in name:
                p.normal_(std=0.1)
    rollout = collect(envs, base, Plan.selective(0, "cps"), 0, tasks=[0])
    with torch.no_grad():
        with lora_disabled(adapted):
            off = adapted(rollout).mean
        assert torch.allclose(off, base(rollout).mean, atol=1e-6)
        on = adapted(rollout).mean
        assert (on - off).abs().max() > 1e-3
        assert torch.allclose(merged(adapted)(rollout).mean, on, atol=1e-4)


def test_gate_stops_a_replay_that_is_not_the_policy_that_acted(tiny_pipeline, tmp_path):
    trainer = trainer_of(tiny_pipeline, tmp_path)
    generate = trainer._generate
    trainer._generate = lambda n: [replace(r, log_probs=r.log_probs + 1e-3) for r in generate(n)]
    before = weights(trainer.policy)
    with pytest.raises(RuntimeError, match="ratio_tolerance=1e-04"):
        trainer.train()
    assert torch.equal(before, weights(trainer.policy))


@pytest.mark.parametrize(("with_nan", "said"), [(False, "file is gone"), (True, "nan")])
def test_failing_reward_is_named_and_its_checkpoint_kept(tiny_pipeline, tmp_path, with_nan, said):
    # both groups share a batch, which starts a session per update: the third is in the third update
    reward = Failing(lambda calls: calls >= 3, with_nan)
    trainer = trainer_of(tiny_pipeline, tmp_path, [reward], max_steps=4)
    with pytest.raises(RewardError, match=f"failing.*{said}") as caught:
        trainer.train()
    assert "checkpoint-2" in caught.value.__notes__[0]
    resumed = trainer_of(tiny_pipeline, tmp_path, [Failing(lambda calls: False)], max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


@pytest.mark.parametrize("groups_per_batch", [1, 2])
def test_failing_group_is_skipped_where_configured(tiny_pipeline, tmp_path, groups_per_batch):
    # in a batch of two: the batch fails, then its first group alone
    reward = Failing(lambda calls: calls == 1 or (groups_per_batch == 2 and calls == 2))
    trainer = trainer_of(
        tiny_pipeline, tmp_path, [reward], on_group_error="skip", groups_per_batch=groups_per_batch, max_steps=2
    )
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "reward" in entry)
    assert first["failed_groups"] == 1 and second["failed_groups"] == 0
    everything = trainer_of(tiny_pipeline, tmp_path, [Failing(lambda calls: True)], on_group_error="skip")
    with pytest.raises(RewardError, match="every group of update 0 failed"):
        everything.train()


def test_trainer_refuses_unknown_names(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match="loss_type='ppo'"):
        trainer_of(tiny_pipeline, tmp_path, loss_type="ppo")
    with pytest.raises(ValueError, match="sync_ref_model"):
        trainer_of(tiny_pipeline, tmp_path, sync_ref_model=True)
    with pytest.raises(ValueError, match="stochastic step 2: expected 0 <= step < 2"):
        trainer_of(tiny_pipeline, tmp_path, stochastic_step=2)
    with pytest.raises(ValueError, match="tasks='spr' is unknown"):
        trainer_of(tiny_pipeline, tmp_path, tasks="spr")


def test_an_unreadable_task_keeps_the_run(tiny_pipeline, tmp_path):
    lines = []
    for i in range(8):
        write_image(tmp_path / f"{i}.png", torch.rand(3, 32, 32))
        lines.append(json.dumps({"image": f"{i}.png", "tracks": [[[0.5, 0.5]]]}))
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    (tmp_path / "5.png").write_text("no image")
    trainer = trainer_of(tiny_pipeline, tmp_path / "run", max_steps=8, tasks=f"{tmp_path / 'm.jsonl'}:all")
    with pytest.raises(ValueError, match=r"line 6.*cannot be read as an image") as caught:
        trainer.train()
    assert "checkpoint-2" in caught.value.__notes__[0] and (tmp_path / "run" / "checkpoint-2").is_dir()


# --- evaluation and report


def test_evaluation_is_paired_and_does_not_depend_on_its_batch(tiny_pipeline, envs, policy):
    first = evaluate(envs, policy, range(6), num_videos=5)
    threes = ARDragVectorEnv(3, str(tiny_pipeline), "sprites", [Brightness()], num_frames=FRAMES)
    again = evaluate(threes, policy, range(6))
    assert first.task_ids == again.task_ids and len(set(first.task_ids)) == 6
    assert np.allclose(first.terms["brightness"], again.terms["brightness"], atol=1e-5)
    assert first.videos.shape[0] == 5 == len(first.controls)
    assert np.allclose(first.videos.mean((1, 2, 3, 4)), first.terms["brightness"][:5], atol=1e-5)
    assert compare(first, first)["brightness"].difference.high == 0
    still = replace(first, terms={**first.terms, "motion_error": np.full(6, np.nan)})  # tasks without a control
    assert "motion_error" not in compare(still, still)


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        interval = bootstrap(rng.gamma(2.0, 1.0, 60), seed=trial, resamples=1000)
        hits += interval.low <= 2.0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99
    with_gaps = bootstrap(np.array([1.0, np.nan, 3.0]))
    assert (with_gaps.mean, with_gaps.n) == (2.0, 2)
    assert bootstrap(np.arange(9.0), seed=1) == bootstrap(np.arange(9.0), seed=1)
    with pytest.raises(ValueError, match="no values"):
        bootstrap(np.array([np.nan]))


def test_curves(tmp_path):
    assert np.allclose(smooth(np.array([1.0, 2.0, 6.0]), 3), [1.5, 3.0, 4.0])
    draw_curves(tmp_path / "curves.png", [{"step": i, "reward": 1.0, "rewards/motion/mean": i} for i in range(5)])
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_script_runs_to_its_report(tiny_pipeline, tmp_path):
    root = Path(__file__).parent.parent
    run = tmp_path / "run"
    command = [
        *(sys.executable, str(root / "experiments/grpo.py")),
        *("--config", str(root / "experiments/configs/grpo-quick.yaml")),
        *("--pipeline", str(tiny_pipeline), "--tasks", "sprites", "--output_dir", str(run), "--use_cpu", "True"),
        *("--rewards", '{"motion": 1.0, "smoothness": 0.1}', "--watch_every", "1"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((run / "report.json").read_text())
    assert report["tasks"] == 8 and {"motion", "smoothness", "dynamic_degree", "motion_error"} == set(report["terms"])
    assert set(report["terms"]["motion"]["difference"]) == {"mean", "low", "high", "n"}
    assert {"before_renoise", "after_renoise"} == set(report["others"])
    assert sorted(p.name for p in (run / "heldout").iterdir()) == ["000001.gif", "000002.gif"]
    events = EventAccumulator(str(next((run / "logs").rglob("events*")).parent)).Reload()
    assert len(events.Scalars("train/heldout/motion")) == 2 and len(events.Images("heldout")) == 2
    assert (run / "curves.png").exists() and (run / "before_after.gif").exists() and list((run / "logs").iterdir())
    VideoPolicy.from_pretrained(run)
    for flags, says in (
        ((), "not empty"),
        (("--overwrite", "True", "--tasks", "spr"), "tasks='spr' is unknown"),
        (("--overwrite", "True", "--output_dir", str(tmp_path)), "holds no run"),
        (("--overwrite", "True", "--rewards", "motion"), "expected weights by name as JSON"),
    ):
        refused = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=tmp_path)
        assert refused.returncode != 0 and says in refused.stderr, refused.stderr[-2000:]
        assert (run / "report.json").exists()
