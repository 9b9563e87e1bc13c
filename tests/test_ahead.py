"""Generations that are rolled out ahead: how old they are, and that a resumed run is the uninterrupted one."""

import sys
from concurrent.futures import Future

import pytest
import torch
from acting import small
from test_training import Brightness, trainer_of, weights

from ardrag_rl.training.ahead import Ahead
from ardrag_rl.training.checkpoints import last_checkpoint
from ardrag_rl.training.lora import trainable_state


class Recorder:
    """Rollouts whose result is the weights they ran with."""

    def __init__(self):
        self.started = []

    def run(self, units, policy):
        return [(units, total(trainable_state(policy)))]

    def start(self, units, policy, weights):
        self.started.append(units)
        future = Future()
        future.set_result([(units, total(weights))])
        return future


def total(weights):
    return sum(float(w.sum()) for w in weights.values())


def test_a_generation_is_of_the_policy_before_the_update_that_it_ran_beside():
    policy, rollouts = small(), Recorder()
    ahead = Ahead(rollouts, lambda g: f"units {g}", last=3)
    seen, before = [], []
    for generation in range(4):
        before.append(total(trainable_state(policy)))
        (result,), age = ahead.take(generation, policy)
        seen.append((*result, age))
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(1.0)  # the update
    assert [s[0] for s in seen] == [f"units {g}" for g in range(4)] and [s[2] for s in seen] == [0, 1, 1, 1]
    assert [s[1] for s in seen] == [before[0], before[0], before[1], before[2]]
    assert rollouts.started == ["units 1", "units 2", "units 3"] and ahead.weights == {}


def test_where_a_generation_fails_its_weights_are_still_known():
    policy, rollouts = small(), Recorder()
    ahead = Ahead(rollouts, lambda g: g, last=9)
    ahead.take(0, policy)
    failed = Future()
    failed.set_exception(OSError("gone"))
    object.__setattr__(ahead._pending, "future", failed)
    with pytest.raises(OSError, match="gone"):
        ahead.take(1, policy)
    assert total(ahead.weights) == total(trainable_state(policy))


@pytest.mark.slow
def test_a_run_ahead_learns_off_policy_and_resumes_exactly(tiny_pipeline, tmp_path):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    ray.cloudpickle.register_pickle_by_value(sys.modules[Brightness.__module__])
    settings = dict(rollout_workers=1, max_staleness=1, save_strategy="steps", save_steps=1, save_total_limit=9)
    try:
        whole = trainer_of(tiny_pipeline, tmp_path / "whole", max_steps=4, **settings)
        whole.train()
        rows = [row for row in whole.state.log_history if "staleness" in row]
        assert [row["staleness"] for row in rows] == [0, 1, 1, 1]
        assert ["before_update/ratio" in row for row in rows] == [True, False, False, False]
        middle = tmp_path / "whole" / "checkpoint-2"
        assert (middle / "behind.safetensors").is_file()
        assert not (last_checkpoint(tmp_path / "whole") / "behind.safetensors").exists()
        resumed = trainer_of(tiny_pipeline, tmp_path / "resumed", max_steps=4, **settings)
        resumed.train(resume_from_checkpoint=str(middle))
        assert torch.equal(weights(whole.policy), weights(resumed.policy))
    finally:
        ray.shutdown()
