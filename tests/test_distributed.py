"""Runs of several processes, and runs that are killed: what comes out is what one undisturbed process makes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ardrag_rl.policies import VideoPolicy

PROCESS = """
import sys
import torch
from ardrag_rl.training.config import GRPOConfig
from ardrag_rl.training.lora import trainable_state
from ardrag_rl.training.trainer import GRPOTrainer

pipeline, folder, videos, workers = sys.argv[1:]
args = GRPOConfig(
    output_dir=folder, per_device_train_batch_size=int(videos), gradient_accumulation_steps=2, num_generations=4,
    num_frames=3, max_steps=2, learning_rate=1.0, optim="sgd", max_grad_norm=0.0, report_to="none", disable_tqdm=True,
    save_strategy="no", use_cpu=True, rollout_threads=1, stochastic_step=0, rollout_workers=int(workers),
)
trainer = GRPOTrainer(pipeline, args, tasks="sprites", rewards=["smoothness"])
trainer.train()
weights = torch.cat([p.flatten() for p in trainable_state(trainer.policy).values()])
torch.save(weights, f"{folder}/{args.process_index}.pt")
trainer.save_model()
trainer.accelerator.end_training()
"""
TESTS = Path(__file__).parent
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize(
    "workers, launcher", [(0, []), (2, []), (0, [str(TESTS / "sharded.py")])], ids=["data parallel", "one Ray", "FSDP"]
)
def test_two_processes_make_the_update_of_one(tiny_pipeline, tmp_path, workers, launcher):
    """2 x 2 videos per micro-batch against 4: gradients sync, and each process rolls out half of the groups."""
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    for folder, count, more, actors in (("one", 1, [], 0), ("two", 2, launcher, workers)):
        (tmp_path / folder).mkdir()
        command = [
            *LAUNCH,
            str(count),
            *more,
            *map(str, (script, tiny_pipeline, tmp_path / folder, 4 // count, actors)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
        assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (torch.load(tmp_path / f, weights_only=True) for f in ("one/0.pt", "two/0.pt", "two/1.pt"))
    start = weights(VideoPolicy.from_pretrained(tiny_pipeline))
    assert torch.equal(first, second) and torch.equal(first, weights(VideoPolicy.from_pretrained(tmp_path / "two")))
    assert (one - start).norm() > 0
    assert (one - first).norm() < 1e-3 * (one - start).norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launch, places",
    [([sys.executable], ("rollout", "update", "between", "checkpoint")), ([*LAUNCH, "2"], ("update", "checkpoint"))],
    ids=["alone", "two processes"],
)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_were_not(tiny_pipeline, tmp_path, launch, places):
    """While it rolls out, between micro-batches, before a checkpoint and in the middle of one; reference included."""

    def run(folder, where):
        folder.mkdir(exist_ok=True)
        command = [*launch, str(TESTS / "chaos.py"), str(tiny_pipeline), str(folder), where]
        done = subprocess.run(command, capture_output=True, text=True)
        died = {-9, 1}  # by itself, or with the other as torchrun says
        assert done.returncode in ({0} if where == "nothing" else died), done.stderr[-3000:]

    run(tmp_path / "calm", "nothing")
    for where in (*places, "nothing"):
        run(tmp_path / "chaos", where)
    calm, chaos = (load_file(tmp_path / name / "end") for name in ("calm", "chaos"))
    assert all(torch.equal(calm[name], chaos[name]) for name in calm)
    assert len(list((tmp_path / "chaos").glob("died-*"))) == len(places)
