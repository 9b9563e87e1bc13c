"""The plan of a run: what an update takes, by the model's own code on tensors without data."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ardrag_rl.codec import Codec
from ardrag_rl.envs import ARDragVectorEnv
from ardrag_rl.flow import Kernel
from ardrag_rl.policies import CausalWanTransformer3DModel, VideoPolicy
from ardrag_rl.training.collect import collect
from ardrag_rl.training.config import GRPOConfig
from ardrag_rl.training.estimate import estimate, peak_memory

SCRIPT = Path(__file__).parent.parent / "experiments" / "grpo.py"
FRAMES, GROUP, MICRO = 5, 3, 2


@pytest.fixture(scope="module")
def policy(tiny_pipeline):
    """Of more layers than the two that are looked at."""
    config = CausalWanTransformer3DModel.load_config(tiny_pipeline / "transformer")
    return VideoPolicy(CausalWanTransformer3DModel.from_config(dict(config) | {"num_layers": 5}))


@pytest.fixture(scope="module")
def envs(tiny_pipeline):
    return ARDragVectorEnv(2 * GROUP, str(tiny_pipeline), "sprites", ["dynamic_degree"], num_frames=FRAMES)


def config(folder, **changes):
    given = dict(num_generations=GROUP, per_device_train_batch_size=MICRO, gradient_accumulation_steps=6)
    return GRPOConfig(str(folder), use_cpu=True, groups_per_batch=2, report_to="none", **given | changes)


def of(policy, envs, args):
    space = envs.single_observation_space
    return estimate(policy, args, FRAMES, space["latents"].shape[1:], space["text"].shape)


def observation(envs, size, frame, step):
    space = envs.single_observation_space
    obs = {key: torch.zeros(size, *space[key].shape) for key in ("latents", "reference", "trajectory", "text")}
    return obs | {"frame": torch.full((size, 1), frame), "step": torch.full((size, 1), step)}


def test_the_estimate_is_what_the_code_does(policy, envs, tmp_path):
    args = config(tmp_path)
    said = of(policy, envs, args)
    assert (said.groups, said.videos, said.actions, said.scored) == (4, 12, 12 * FRAMES * 3, 12 * FRAMES)
    assert said.parameters == said.trainable == sum(p.numel() for p in policy.parameters())
    assert said.model_bytes == 16 * said.parameters  # weights, gradients, two averages, 4 bytes each

    size, session = 2 * GROUP, policy.session(2 * GROUP)
    with FlopCounterMode(display=False) as acted:  # all but attention
        for m in range(FRAMES):
            for n in range(3):
                session.transition(observation(envs, size, m, n), Kernel("ode"))
    geometry, tokens, text = policy.transformer.config, 16, 8  # tokens of a frame
    width, layers = geometry["num_attention_heads"] * geometry["attention_head_dim"], geometry["num_layers"]
    seen = [4 * tokens * (1 + min(m, geometry["window"])) for m in range(FRAMES)]  # by three steps and a clean frame
    seen[-1] = 3 * tokens * (1 + geometry["window"])  # whose last nobody looks back on
    passes = 4 * FRAMES - 1
    attention = 4 * size * tokens * width * layers * (sum(seen) + passes * text)
    assert said.rollout_flops == pytest.approx(2 * (acted.get_total_flops() + attention), rel=0.02)
    held = sum(k.nbytes + v.nbytes for e in session._cache.entries for k, v in e.layers)
    assert said.rollout_bytes == held  # the window is full

    rollout = collect(envs, policy, args.plan(0, 3), 0, tasks=[0, 1])
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    part = rollout.select(range(MICRO))

    def forward():
        """The mean, and the bytes that are kept for its gradient; of blocks that are run again what they are given."""
        kept, alive = {}, []

        def keep(x):
            alive.append(x)
            if x.untyped_storage().data_ptr() not in own:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        def run_again(run, *args):
            for x in tree_leaves(args):
                if isinstance(x, torch.Tensor):
                    keep(x)
            return checkpoint(run, *args, use_reentrant=False)

        if policy.transformer.is_gradient_checkpointing:
            policy.transformer.enable_gradient_checkpointing(run_again)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            mean = policy(part).mean
        return mean, sum(kept.values())

    with FlopCounterMode(display=False) as learned:
        mean, plain = forward()
        mean.sum().backward()
    policy.zero_grad()
    assert said.learner_flops > 6 * learned.get_total_flops()  # of six micro-batches, and attention
    assert said.activation_bytes == pytest.approx(plain, rel=0.05)

    policy.transformer.enable_gradient_checkpointing()
    outside = forward()[1]
    policy.transformer.disable_gradient_checkpointing()
    saving = of(policy, envs, config(tmp_path, gradient_checkpointing=True))
    assert saving.activation_bytes == pytest.approx(outside + (plain - outside) / layers, rel=0.05)
    inputs = layers * 4 * MICRO * (2 * FRAMES - 1) * tokens * width  # clean and noisy frames, float32
    assert inputs < outside < 0.5 * plain


def test_settings_show_in_the_estimate(policy, envs, tmp_path):
    plain = of(policy, envs, config(tmp_path))
    saving = of(policy, envs, config(tmp_path, activation_checkpointing=True))
    assert saving.activation_bytes < 0.7 * plain.activation_bytes and saving.learner_flops > plain.learner_flops
    every = of(policy, envs, config(tmp_path, exploration="every"))
    assert every.scored == 2 * plain.scored and every.learner_flops > 1.2 * plain.learner_flops
    anchored = of(policy, envs, config(tmp_path, beta=0.1))
    assert anchored.model_bytes == plain.model_bytes + 4 * plain.parameters


@pytest.mark.slow
def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny_pipeline, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, str(SCRIPT), "--dry_run", "true", "--output_dir", str(folder), "--use_cpu", "true"]
    done = subprocess.run([*command, "--pipeline", str(tiny_pipeline)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8 groups, 96 videos, 4608 actions, of which 1536 are trained on" in done.stdout
    assert "memory of the learner" in done.stdout and not folder.exists()


@pytest.mark.slow
def test_a_dry_run_of_the_large_configuration_reads_no_weights(tmp_path):
    config = SCRIPT.parent / "configs/wan2.1-1.3b.yaml"
    command = [sys.executable, str(SCRIPT), "--config", str(config), "--dry_run", "true", "--use_cpu", "true"]
    done = subprocess.run([*command, "--bf16", "false"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 groups, 16 videos, 1008 actions, of which 336 are trained on" in done.stdout
    parameters = int(done.stdout.split("parameters: ")[1].split(", trainable")[0].replace(",", ""))
    assert parameters == pytest.approx(1.52e9, rel=0.05) and not list(tmp_path.iterdir())
    for load in (VideoPolicy.from_pretrained, Codec.from_pretrained):
        with pytest.raises(ValueError, match="holds no weights"):
            load("wan2.1-1.3b")


def test_peak_memory_is_this_processs_own():
    """Not what its parent held, from which a process is forked."""
    held = torch.ones(2**28)  # 1 GiB
    assert peak_memory(torch.device("cpu")) > 1
    code = "import torch; from ardrag_rl.training.estimate import peak_memory; print(peak_memory(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.1 < float(done.stdout) < 1 and len(held)
