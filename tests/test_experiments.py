"""compare.py, benchmark.py and pretrain.py: the statistics, the variants, and the scripts on small pipelines."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from ardrag_rl.envs import ARDragEnv, ARDragVectorEnv, NoiseAction
from ardrag_rl.flow import Kernel
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.training.aggregate import bootstrap_runs, interquartile_mean
from ardrag_rl.training.collect import collect
from ardrag_rl.training.config import GRPOConfig
from ardrag_rl.training.order import task_indices

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
FRAMES = 3


@pytest.fixture(scope="module")
def script():
    """An experiment as a module."""
    sys.path.insert(0, str(EXPERIMENTS))
    yield importlib.import_module
    sys.path.remove(str(EXPERIMENTS))


# --- statistics


def test_interquartile_mean_ignores_the_outer_quarters():
    assert interquartile_mean(np.array([-1e9, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 1e9])) == 3.5
    assert interquartile_mean(np.array([7.0])) == 7.0
    rows = np.random.default_rng(0).normal(size=(3, 40))
    assert np.allclose(interquartile_mean(rows), [interquartile_mean(row) for row in rows])
    assert np.allclose(interquartile_mean(rows.T, axis=0), interquartile_mean(rows))


def test_bootstrap_resamples_whole_runs():
    """Runs that differ and tasks that do not: the interval is that of the runs' means, however many the tasks."""
    scores = np.repeat(np.array([[0.0], [1.0], [2.0], [3.0]]), 200, 1)
    interval = bootstrap_runs(scores)
    assert interval.mean == 1.5 and interval.n == 800
    assert interval.low <= 0.5 and interval.high >= 2.5
    one = bootstrap_runs(np.zeros((3, 50)))
    assert (one.low, one.mean, one.high) == (0, 0, 0)


def test_bootstrap_of_runs_covers_the_mean_and_leaves_out_what_is_missing():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        scores = rng.normal(size=(10, 1)) + rng.normal(size=(10, 30))  # symmetric: the mean is the interquartile mean
        interval = bootstrap_runs(scores, seed=trial, resamples=300)
        hits += interval.low <= 0 <= interval.high
    assert 0.8 <= hits / 100 <= 1
    gaps = np.array([[1.0, np.nan, 3.0], [1.0, 2.0, 3.0]])
    assert bootstrap_runs(gaps).n == 4 and bootstrap_runs(gaps) == bootstrap_runs(gaps)
    with pytest.raises(ValueError, match="no task"):
        bootstrap_runs(np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match="expected \\(runs, tasks\\)"):
        bootstrap_runs(np.zeros(3))


# --- compare


def test_variants_are_settings_of_the_trainer(script):
    compare = script("compare")
    for variant in compare.VARIANTS.values():
        if variant.learner == "grpo":
            GRPOConfig(use_cpu=True, **variant.settings)
    flags = compare.flags_of("flow-grpo", 3)
    assert flags == ["--exploration", "every", "--kernel", "flow_sde", "--kernel_eta", "0.7", "--seed", "3"]
    assert (
        compare.points(25, 5) == [5, 10, 15, 20, 25] and compare.points(2, 5) == [1, 2] and compare.points(7, 1) == [7]
    )


def test_steered_policy_is_noise_action_in_a_batch(script, tiny_pipeline):
    """What `evaluate` sees of an actor is what its environment does to it."""
    noise_ppo = script("noise_ppo")
    policy = VideoPolicy.from_pretrained(tiny_pipeline)

    class Actor:
        def predict(self, seen, deterministic):
            assert deterministic
            return np.tanh(seen).reshape(len(seen), 4, *shape)[:, 0], None

    def environment(kind, *size):
        return kind(*size, str(tiny_pipeline), "sprites", ["dynamic_degree"], num_frames=FRAMES)

    envs, core = environment(ARDragVectorEnv, 2), environment(ARDragEnv)
    shape = core.action_space.shape
    plan = importlib.import_module("ardrag_rl.rollout").Plan.all("ode")
    rollout = collect(envs, noise_ppo.Steered(policy, Actor()), plan, 0, tasks=[5, 6])
    env = NoiseAction(core, policy)
    obs, _ = env.reset(seed=0, options={"index": 6})
    # the same noise in the frames that are not chosen: they are seen by the actor
    obs = core.restore(replace_noise(core.snapshot(), rollout, 1))
    rewards = []
    for _ in range(FRAMES):
        action, _ = Actor().predict(noise_ppo.current_frame({k: v[None] for k, v in obs.items()}), True)
        obs, reward, *_ = env.step(action[0])
        rewards.append(reward)
    assert np.allclose(obs["latents"], rollout.clean[1].numpy(), atol=1e-5)
    assert np.allclose(rewards, rollout.rewards[1].numpy(), atol=1e-5)


def replace_noise(snapshot, rollout, row):
    """The snapshot of a fresh episode, starting from a rollout's noise."""
    ((rows, episodes),) = snapshot.cohorts
    started = replace(
        episodes, latents=rollout.latents[row : row + 1, :, 0].clone(), reference=rollout.reference[row : row + 1]
    )
    return replace(snapshot, cohorts=((rows, started),))


def test_same_tasks_deals_each_task_to_a_whole_group(script, tiny_pipeline):
    core = ARDragEnv(str(tiny_pipeline), "sprites", ["dynamic_degree"], num_frames=2)
    env = script("noise_ppo").SameTasks(core, seed=4, repeats=2)
    seen = [env.reset()[1]["task"] for _ in range(6)]
    order = [core.source[i].id for i in task_indices(len(core.source), 4, range(3))]
    assert seen == [task for task in order for _ in range(2)]


@pytest.mark.slow
def test_compare_runs_resumes_and_grows(script, monkeypatch, tiny_pipeline, tmp_path):
    pytest.importorskip("stable_baselines3")
    compare = script("compare")

    def run(*flags):
        common = [
            *("--config", str(EXPERIMENTS / "configs/compare-quick.yaml"), "--pipeline", str(tiny_pipeline)),
            *("--tasks", "sprites", "--rewards", '{"motion": 1.0, "smoothness": 0.5}', "--use_cpu", "True"),
            *("--output_dir", str(tmp_path), "--eval_size", "4", "--eval_batch", "4", "--num_frames", "3"),
        ]
        monkeypatch.setattr(sys, "argv", ["compare.py", *common, *flags])
        compare.main()

    run("--variants", "ar-drag", "noise-ppo")
    files = sorted(tmp_path.glob("runs/*"))
    assert [f.name for f in files] == ["ar-drag-0.json", "noise-ppo-0.json"]
    record = json.loads(files[0].read_text())
    assert record["videos"] == [0, 8, 16] and len(record["task_ids"]) == 4
    for scores in record["scores"].values():
        assert np.shape(scores) == (3, 4)
    motion, smoothness, total = (np.array(record["scores"][k], float) for k in ("motion", "smoothness", "reward"))
    assert np.allclose(motion + 0.5 * smoothness, total, atol=1e-4, equal_nan=True)
    curves = json.loads((tmp_path / "compare.json").read_text())
    assert curves["ar-drag"]["runs"] == 1 and len(curves["noise-ppo"]["scores"]["motion"]) == 3
    assert "| noise-ppo | 1 |" in (tmp_path / "compare.md").read_text()
    assert (tmp_path / "compare.png").stat().st_size > 5000

    before = [f.read_bytes() for f in files]
    run("--variants", "ar-drag", "reuse", "--seeds", "0", "1")
    assert [f.read_bytes() for f in files] == before  # seconds and all: nothing was run again
    curves = json.loads((tmp_path / "compare.json").read_text())
    assert curves["ar-drag"]["runs"] == 2 and curves["reuse"]["videos"] == [0, 8, 16]

    with pytest.raises(SystemExit, match=r"other settings \(learning_rate\)"):
        run("--variants", "ar-drag", "--learning_rate", "1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--variants", "ppo"), "--variants ppo: choose one or more of ar-drag"),
        (("--videos", "100"), "--videos 100: expected a multiple of the 96"),
        (("--eval_points", "0"), "--eval_points 0"),
    ],
)
def test_compare_refuses(script, monkeypatch, flags, message):
    compare = script("compare")
    monkeypatch.setattr(sys, "argv", ["compare.py", "--variants", "ar-drag", "--use_cpu", "True", *flags])
    with pytest.raises(SystemExit, match=message):
        compare.main()


def test_noise_ppo_without_sb3_says_what_to_install(script, monkeypatch):
    compare = script("compare")
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    monkeypatch.setattr(sys, "argv", ["compare.py", "--use_cpu", "True"])
    with pytest.raises(SystemExit, match=r"pip install \"ardrag-rl\[sb3\]\""):
        compare.main()


# --- benchmark


@pytest.fixture(scope="module")
def bench(script, tiny_pipeline):
    benchmark = script("benchmark")
    args = benchmark.BenchmarkArguments(
        pipeline=str(tiny_pipeline),
        tasks="sprites",
        num_frames=5,
        group=2,
        near=1,
        far=6,
        repeats=1,
        warmup=0,
        threads=1,
    )
    return benchmark.Bench(args)


def test_benchmark_compares_equal_things(bench, script):
    """Both replays give the same steps and gradient, and recomputing gives the cached video."""
    rollout, step_by_step = bench._group_rollout, partial(script("benchmark").replay_step_by_step, bench.policy)
    with torch.no_grad():
        one, many = bench.policy(rollout), step_by_step(rollout)
    assert one.mean.shape == many.mean.shape and (one.mean - many.mean).abs().max() < 1e-5
    assert torch.equal(one.std, many.std)
    gradients = [script("benchmark").gradient(bench.policy, rollout, f) for f in (bench.policy, step_by_step)]
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()
    benchmark, r = script("benchmark"), rollout
    given, plan = benchmark.Conditions(r.latents[:, :, 0], r.trajectory, r.reference, r.text), benchmark.Plan.all("ode")
    cached = benchmark.generate_latents(bench.policy, plan, given)[:, :, -1]
    assert (cached - benchmark.without_cache(bench.policy, plan, given)).abs().max() < 1e-5


def test_profile_accounts_for_all_time_and_leaves_nothing_behind(bench):
    before = bench.group_envs.codec.decode
    (share,) = bench.outside()
    assert sum(share.parts.values()) == pytest.approx(1)
    for name in ("transformer", "codec", "session", "observations", "tasks", "reward motion", "reward aesthetic"):
        assert 0 < share.parts[name] < 1, name
    assert 0 < share.outside < 1 and bench.group_envs.codec.decode == before
    assert "forward" not in vars(bench.policy.transformer)


@pytest.mark.slow
def test_benchmark_writes_its_tables(tiny_pipeline, tmp_path):
    flags = ["--pipeline", str(tiny_pipeline), "--tasks", "sprites", "--num_frames", "4", "--group", "2"]
    flags += ["--repeats", "1", "--warmup", "0", "--threads", "1", "--far", "6", "--near", "1"]
    command = [sys.executable, str(EXPERIMENTS / "benchmark.py"), *flags, "--output_dir", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "out/benchmark.json").read_text())
    assert len(record["ratios"]) == 7 and all(r["ratio"] > 0 for r in record["ratios"])
    assert record["shares"][0]["total"] > 0
    text = (tmp_path / "out/benchmark.md").read_text()
    assert text in done.stdout and "at least 3" in text and "outside transformer and codec" in text


@pytest.mark.slow
def test_benchmark_of_updates_writes_its_table(tiny_pipeline, tmp_path):
    flags = [
        "--pipeline",
        str(tiny_pipeline),
        "--tasks",
        "sprites",
        "--num_frames",
        "3",
        "--group",
        "2",
        "--units",
        "2",
    ]
    flags += ["--repeats", "1", "--warmup", "0", "--threads", "1", "--sleep", "0.01", "--width", "48", "--layers", "2"]
    flags += ["--large_group", "2"]
    command = [sys.executable, str(EXPERIMENTS / "benchmark_update.py"), *flags, "--output_dir", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "out/benchmark_update.json").read_text())
    ratios, shares = record["ratios"], record["shares"]
    assert ["peers" in ratios[0]["what"], "on two" in ratios[1]["what"], "Ray" in ratios[2]["what"]] == [True] * 3
    assert len(shares) == 2 and all(share["parts"]["gradient"] > 0 for share in shares)


@pytest.mark.slow
def test_benchmark_of_a_real_size_writes_its_tables(tiny_pipeline, tmp_path):
    flags = ["--gpu", "true", "--model", str(tiny_pipeline), "--sizes", "32x32", "--length", "4", "--layers", "1"]
    flags += ["--repeats", "1", "--threads", "1", "--chunks", "1", "2", "--compile", "false", "--only", "inference"]
    flags += ["--self_forcing", ""]
    command = [sys.executable, str(EXPERIMENTS / "benchmark.py"), *flags, "--output_dir", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (table,) = json.loads((tmp_path / "out/benchmark_gpu.json").read_text())["tables"]
    assert [row[:2] for row in table["rows"]] == [[c, f"{n} cache"] for c in "12" for n in ("immutable", "static")]
    assert all(float(cell) > 0 for row in table["rows"] for cell in row[2:6]) and len(table["columns"]) == 7
    assert "32x32, 3 steps, 4 latent frames, 1 layers, float32, CPU" in (tmp_path / "out/benchmark_gpu.md").read_text()


def test_an_update_is_measured_beside_its_estimate(script, tiny_pipeline, monkeypatch):
    gpu, cpu = script("benchmark_gpu"), (torch.device("cpu"), torch.float32)
    updates = [gpu.Update(str(tiny_pipeline), 2, (32, 32), 3, 2, lora) for lora in (True, False)]
    said = [update.estimated(*cpu) for update in updates]
    assert said[0].trainable < said[0].parameters and said[1].trainable == said[1].parameters
    seen = []
    monkeypatch.setattr(gpu, "timed", lambda call, device: seen.append(call()) or 1.0)
    for update in updates:
        assert gpu.roll_out(update, *cpu) == gpu.learn(update, *cpu) == 1.0
    assert seen[0].shape == (2, 3, 4, 4, 8, 8) and seen[1:3] == [None, None]  # a rollout, two steps of a learner
    policy = gpu.random_policy(str(tiny_pipeline), 1, torch.device("cpu"), torch.bfloat16, chunk_size=2)
    types = {name: p.dtype for name, p in policy.transformer.named_parameters()}
    assert types["blocks.0.ffn.net.0.proj.weight"] == torch.bfloat16 and types["scale_shift_table"] == torch.float32
    given = gpu.Update(str(tiny_pipeline), 1, (32, 32), 3, 2, False).given(1, torch.device("cpu"))
    assert torch.isfinite(gpu.generate_latents(policy, gpu.Plan.all("ode", 3), given)).all()
    assert policy.transformer.config["chunk_size"] == 2 and len(policy.transformer.blocks) == 1
    whole = gpu.random_policy(str(tiny_pipeline), None, *cpu)
    loaded = VideoPolicy.from_pretrained(tiny_pipeline)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), loaded.parameters(), strict=True))


def test_benchmark_refuses(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--only", "speed"])
    with pytest.raises(SystemExit, match="choose of cache, replay"):
        script("benchmark").main()


# --- pretrain


@pytest.mark.slow
def test_pretraining_makes_a_pipeline_stage_by_stage(tmp_path):
    stages = ["codec", "text", "base", "few_step"]
    for stage in stages:  # each in a process of its own, as a run that was interrupted goes on
        subprocess.run(
            [sys.executable, EXPERIMENTS / "pretrain.py", "--output_dir", tmp_path, "--size", "32", "--clips", "4",
             "--codec_steps", "1", "--codec_batch", "1", "--base_steps", "2", "--base_batch", "2",
             "--few_step_steps", "1", "--few_step_batch", "2", "--stages", stage],
            check=True, capture_output=True,
        )  # fmt: skip
    policy = VideoPolicy.from_pretrained(tmp_path / "pipeline")
    env = ARDragEnv(tmp_path / "pipeline", "sprites", num_frames=2)
    obs, _ = env.reset(seed=0)
    action = policy.session(1).transition({k: v[None] for k, v in obs.items()}, Kernel("ode")).mean[0]
    assert action.shape == env.action_space.shape and torch.isfinite(action).all()
    assert {p.name for p in tmp_path.iterdir()} >= {"pipeline", "clips", "codec", "base", "few_step"}
