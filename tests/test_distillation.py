"""Distillation: who learns from what, guidance, averages, and the script from interruption to pipeline."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from acting import BATCH, FRAMES, conditions, generator, small
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments

from ardrag_rl.distill.buckets import BucketSampler
from ardrag_rl.distill.critic import Critic, Judgement, adversarial_gradient, denoise, discriminator_loss, guided
from ardrag_rl.distill.distillation import Distillation, DistillSettings
from ardrag_rl.distill.fit import averaged, fit, settings
from ardrag_rl.distill.flow_matching import bounded_weight
from ardrag_rl.distill.trainers import DistillTrainer
from ardrag_rl.flow import Schedule, interpolate, predict_x0, shift_level
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.policies.chunks import Conditions
from ardrag_rl.training.checkpoints import last_checkpoint

SCRIPT = Path(__file__).parent.parent / "experiments" / "distill.py"


def bidirectional(seed=0):
    return small(seed, chunk_size=FRAMES)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Distillation(small(), bidirectional(1), Critic(bidirectional(2)))


@pytest.fixture(scope="module")
def given():
    return Conditions(**conditions())


@pytest.fixture(scope="module")
def batch(given):
    return {"latents": conditions(seed=5)["noise"], "trajectory": given.trajectory, "text": given.text}


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# --- scores and critic


def test_denoise_is_the_transformers_prediction(given):
    policy, x = bidirectional(), given.noise
    t = torch.tensor([0.3, 0.9])
    both = denoise(policy, x, t, given)
    context = policy.transformer.encode_context(given.text)
    inputs = policy.frame_inputs(x, given.reference, given.trajectory)[:, None]
    for i in range(BATCH):
        v, _ = policy.transformer(context, None, inputs, 1000 * float(t[i]))
        torch.testing.assert_close(both[i], predict_x0(x, v[:, 0], float(t[i]))[i], atol=1e-5, rtol=1e-4)


def test_guidance_is_diffusers(given):
    policy, t = bidirectional(), torch.full((BATCH,), 0.7)
    negative = torch.zeros_like(given.text)
    told = denoise(policy, given.noise, t, given)
    free = Conditions(given.noise, torch.zeros_like(given.trajectory), given.reference, negative)
    untold = denoise(policy, given.noise, t, free)
    assert torch.equal(guided(policy, given.noise, t, given, negative, 1.0), told)
    torch.testing.assert_close(guided(policy, given.noise, t, given, negative, 0.0), untold)
    torch.testing.assert_close(guided(policy, given.noise, t, given, negative, 4.0), 4 * told - 3 * untold)


def test_an_undecided_discriminator_has_no_gradient_for_anyone_but_its_last_layer(given):
    critic = Critic(bidirectional())
    x0, eps, t = given.noise, given.reference, torch.full((BATCH,), 0.5)
    loss, gradient, x0_hat = adversarial_gradient(critic, x0, eps, t, given)
    torch.testing.assert_close(x0_hat, critic(interpolate(x0, eps, 0.5), t, given).x0_hat)
    assert float(loss) == pytest.approx(torch.tensor(2.0).log()) and not gradient.any()
    said = critic(x0, t, given)
    assert said.logits.shape == (BATCH, FRAMES, 4) and not said.logits.any()  # 2x2 tokens a frame
    assert discriminator_loss(said.logits, said.logits).item() == pytest.approx(2 * torch.tensor(2.0).log())


def test_the_adversarial_gradient_raises_the_logits_and_leaves_the_critic_alone(given):
    critic = Critic(bidirectional())
    nn.init.normal_(critic.head[-1].weight, generator=generator())
    x0, eps, t = given.noise, given.reference, torch.full((BATCH,), 0.3)
    before, gradient, _ = adversarial_gradient(critic, x0, eps, t, given)
    after, *_ = adversarial_gradient(critic, x0 - 10 * gradient, eps, t, given)
    assert float(after) < float(before)
    assert not gradients(critic) and not x0.requires_grad


# --- one update


def test_at_its_turn_only_the_critic_learns(model, batch):
    torch.manual_seed(0)
    losses = model(**batch, student_turn=False)
    losses["loss"].backward()
    assert set(losses) == {"loss", "critic", "discriminator"}
    assert not gradients(model.policy) and not gradients(model.teacher)
    learned = gradients(model.critic)
    assert learned.keys() == dict(model.critic.named_parameters()).keys()


def test_the_students_losses_leave_the_critics_gradient_as_it_is(model, batch):
    nn.init.normal_(model.critic.head[-1].weight, generator=generator())
    torch.manual_seed(0)
    model(**batch, student_turn=False)["loss"].backward()
    alone = gradients(model.critic)
    model.zero_grad()
    torch.manual_seed(0)
    losses = model(**batch, student_turn=True)
    losses["loss"].backward()
    assert set(losses) == {"loss", "critic", "discriminator", "dmd", "adversarial"}
    assert losses["loss"].item() == pytest.approx(sum(float(v) for k, v in losses.items() if k != "loss"))
    together = gradients(model.critic)
    assert all(torch.equal(alone[k], together[k]) for k in alone)
    assert gradients(model.policy).keys() == dict(model.policy.named_parameters()).keys()
    assert not gradients(model.teacher)


def test_a_critic_that_is_the_teacher_moves_no_student(batch):
    """DMD's gradient is zero when fake = real, and an undecided discriminator's is too."""
    torch.manual_seed(0)
    model = Distillation(small(), bidirectional(1), Critic(bidirectional(1)))
    model(**batch, student_turn=True)["loss"].backward()
    assert all(not g.any() for g in gradients(model.policy).values())


def test_the_students_gradient_is_from_the_critics_prediction_to_the_teachers(model, given, monkeypatch):
    """The critic says 0 and the teacher 3: every latent is to rise, by as much as the weight says."""
    monkeypatch.setattr(model.teacher.transformer, "forward", says(3.0))
    monkeypatch.setattr(model.critic.policy.transformer, "forward", says(0.0))
    monkeypatch.setattr(
        model.critic, "forward", lambda x, t, given: Judgement(denoise(model.critic.policy, x, t, given), x)
    )
    x0 = given.noise.clone().requires_grad_()
    model.student_losses(x0, given)["dmd"].backward()
    scale = (x0 - 3).abs().mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(x0.grad, (-3 / scale / x0.numel()).expand_as(x0).detach(), rtol=1e-4, atol=1e-9)


def test_guidance_leads_away_from_the_negative_prompt(batch, given, monkeypatch):
    negative = torch.randn(8, 16, generator=generator(3))
    model = Distillation(small(), bidirectional(1), Critic(bidirectional(2)), DistillSettings(guidance=3.0), negative)
    seen = []

    def spy(policy, x, t, given, untold, scale):
        seen.append((untold, scale))
        return x

    monkeypatch.setattr("ardrag_rl.distill.distillation.guided", spy)
    model.student_losses(given.noise.clone().requires_grad_(), given)
    ((untold, scale),) = seen
    assert scale == 3.0 and torch.equal(untold, negative.expand(BATCH, -1, -1))


def says(value):
    """A transformer whose x0_hat is a constant."""

    def forward(context, clean, noisy, timestep):
        x = noisy[:, :, :, :4]
        return (x - value) / (timestep[..., None, None, None] / 1000), ()

    return forward


@pytest.mark.parametrize("rollout", ["self_forcing", "teacher_forcing"])
def test_other_histories_train_too(rollout, batch):
    torch.manual_seed(0)
    settings = DistillSettings(rollout, step_per_frame=True)
    model = Distillation(small(), bidirectional(1), Critic(bidirectional(2)), settings)
    model(**batch, student_turn=True)["loss"].backward()
    assert all(g.isfinite().all() for g in gradients(model).values()) and gradients(model.policy)


def test_gradient_checkpointing_changes_nothing(batch):
    got = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = Distillation(small(), bidirectional(1), Critic(bidirectional(2)))
        if checkpointing:
            model.policy.transformer.enable_gradient_checkpointing()
            model.critic.policy.transformer.enable_gradient_checkpointing()
        torch.manual_seed(1)
        model(**batch, student_turn=True)["loss"].backward()
        got.append(gradients(model))
    assert got[0].keys() == got[1].keys()
    assert all(torch.allclose(got[0][k], got[1][k], atol=1e-6) for k in got[0])


def test_noise_levels_and_weights():
    t = torch.linspace(0.01, 1, 50)
    assert torch.equal(shift_level(t, 1.0), t) and (shift_level(t, 5.0) >= t).all()
    assert float(shift_level(torch.tensor(0.5), 8.0)) == pytest.approx(8 * 0.5 / (1 + 7 * 0.5))
    weight = bounded_weight(t)
    assert (weight[t > 0.45] == 1).all() and float(weight[0] / t[0] ** 2) == pytest.approx(5)
    for bad in (dict(rollout="own"), dict(lowest=0.0), dict(lowest=0.9, highest=0.5)):
        with pytest.raises(ValueError, match="="):
            DistillSettings(**bad)


def test_rechunked_policies_have_the_same_weights(tiny_pipeline):
    policy = VideoPolicy.from_pretrained(tiny_pipeline)
    teacher = policy.with_chunks(5, Schedule((1000, 500)), window=2)
    config = teacher.transformer.config
    assert (config["chunk_size"], config["window"], teacher.schedule.num_steps) == (5, 2, 2)
    own, other = policy.state_dict(), teacher.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(own[k], other[k]) for k in own)
    assert policy.transformer.config["chunk_size"] == 1


# --- training


def test_an_average_follows_its_source():
    source = nn.Linear(2, 2)
    average = averaged(source, 0.9)
    want = source.weight.detach().clone()
    for n in range(40):
        with torch.no_grad():
            source.weight.normal_(generator=generator(n))
        average.update_parameters(source)
        decay = min(0.9, (1 + n) / (10 + n)) if n else 0.0  # the first is a copy
        want = want + (1 - decay) * (source.weight.detach() - want)
    torch.testing.assert_close(average.module.weight, want)
    assert not any(p.requires_grad for p in average.parameters())


class Turns(nn.Module):
    """Says whose turn it was."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.zeros(1)), []

    def forward(self, x, student_turn):
        self.seen.append(student_turn)
        loss = (self.weight - x).square().mean()
        return {"loss": loss, "part": loss.detach()}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        return {"x": torch.tensor([float(i)])}


def arguments(folder, **changes):
    given = TrainingArguments(str(folder), report_to="none", use_cpu=True, logging_steps=1, disable_tqdm=True)
    return settings(given, folder, changes.pop("max_steps", 6), 4, 0.1, **changes)


def test_turns_are_counted_in_updates_not_in_batches(tmp_path):
    model = Turns()
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = fit(model, Rows(), args, trainer_class=lambda **k: DistillTrainer(student_every=3, **k))
    assert model.seen == [True] * 2 + [False] * 4 + [True] * 2 + [False] * 4
    assert all("part" in row for row in trainer.state.log_history[:-1])


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, model, batch):
    class Clips(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return {k: v[i % BATCH] for k, v in batch.items()}

    def run(folder, stop=None):
        torch.manual_seed(0)
        model = Distillation(small(), bidirectional(1), Critic(bidirectional(2)))
        model.average = averaged(model.policy.transformer, 0.9)
        args = arguments(folder, max_steps=4, save_steps=2, per_device_train_batch_size=2)

        class Stopped(DistillTrainer):
            def compute_loss(self, *a, **k):
                if self.state.global_step == stop:
                    raise KeyboardInterrupt
                return super().compute_loss(*a, **k)

        average = (model.average, model.policy.transformer)
        fit(model, Clips(), args, None, average, lambda **k: Stopped(student_every=2, **k))
        return model.state_dict()

    whole = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", stop=3)
    resumed = run(tmp_path / "b")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert any("average" in k for k in whole) and not any("teacher" in k for k in whole)


def test_batches_are_of_one_bucket():
    sampler = BucketSampler([7, 12], 3, seed=1)
    first = list(sampler)
    assert len(first) == len(sampler) == 18 and len(set(first)) == 18
    batches = [first[i : i + 3] for i in range(0, 18, 3)]
    assert all(len({i < 7 for i in b}) == 1 for b in batches) and list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    with pytest.raises(ValueError, match="bucket 1 has 2 clips, fewer than a batch of 3"):
        BucketSampler([7, 2], 3)


def test_resolutions_train_together(tmp_path):
    class Squares(torch.utils.data.Dataset):
        def __init__(self, side):
            self.side = side

        def __len__(self):
            return 10

        def __getitem__(self, i):
            return {"x": torch.zeros(self.side, self.side)}

    class Shapes(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.seen = nn.Parameter(torch.zeros(1)), []

        def forward(self, x):
            self.seen.append(tuple(x.shape))
            return {"loss": (self.weight - x).square().mean()}

    model = Shapes()
    fit(model, torch.utils.data.ConcatDataset([Squares(2), Squares(3)]), arguments(tmp_path, max_steps=8))
    assert set(model.seen) == {(4, 2, 2), (4, 3, 3)} and len(model.seen) == 8


TINY = [
    *("--tasks", "sprites", "--clips", "6", "--num_frames", "3", "--teacher_updates", "2", "--start_updates", "2"),
    *("--student_updates", "2", "--teacher_batch", "2", "--start_batch", "2", "--student_batch", "2"),
    *("--teacher_steps", "4", "--report_to", "none", "--use_cpu", "true", "--save_steps", "1", "--student_every", "1"),
]


PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")  # gloo
SHARDED = (*PROCESSES, str(Path(__file__).parent / "sharded.py"))


def distil(pipeline, folder, *more, launch=()):
    command = [sys.executable, *launch, str(SCRIPT), "--init", str(pipeline), "--output_dir", str(folder), *TINY, *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_the_script_makes_three_pipelines_and_does_nothing_twice(tiny_pipeline, tmp_path):
    changed = ("--lora_rank", "2", "--chunk_size", "2", "--window", "4", "--gradient_checkpointing", "true")
    first = distil(tiny_pipeline, tmp_path, *changed)
    assert first.returncode == 0, first.stderr
    configs = {s: json.loads((tmp_path / s / "transformer" / "config.json").read_text()) for s in ("teacher", "start")}
    assert configs["teacher"]["chunk_size"] == 3 and configs["start"]["chunk_size"] == 2
    assert configs["start"]["window"] == 4
    teacher = VideoPolicy.from_pretrained(tmp_path / "teacher")
    assert teacher.schedule.num_steps == 4
    start, student = (VideoPolicy.from_pretrained(tmp_path / s).state_dict() for s in ("start", "student"))
    assert start.keys() == student.keys() and any(not torch.equal(start[k], student[k]) for k in start)
    weights = load_file(tmp_path / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    other = distil(tiny_pipeline, tmp_path, *changed, "--rollout", "self_forcing")
    assert other.returncode and "student in" in other.stderr and "was begun with self_rollout" in other.stderr
    again = distil(tiny_pipeline, tmp_path, *changed)
    assert again.returncode == 0 and again.stdout.count("is left as it is") == 3
    kept = load_file(tmp_path / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weights[k], kept[k]) for k in weights)


@pytest.fixture(scope="module")
def two_processes(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    done = distil(tiny_pipeline, folder, launch=PROCESSES)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_two_processes_learn_together(two_processes):
    checkpoint = two_processes / "checkpoints" / "student" / "checkpoint-2"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 2
    assert VideoPolicy.from_pretrained(two_processes / "student").schedule.num_steps == 3
    a, b = (torch.load(p, weights_only=False)["cpu"] for p in sorted(checkpoint.glob("rng_state_*.pth")))
    assert not torch.equal(a, b)  # each draws its own noise


@pytest.mark.slow
def test_shards_learn_what_whole_copies_learn_and_resume(two_processes, tiny_pipeline, tmp_path):
    """FSDP gives the weights of DDP, whether interrupted or not."""
    done = distil(tiny_pipeline, tmp_path, launch=SHARDED)
    assert done.returncode == 0, done.stderr
    checkpoints = tmp_path / "checkpoints" / "student"
    assert (checkpoints / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file()  # it was FSDP
    shutil.rmtree(checkpoints / "checkpoint-2")
    (tmp_path / "student").rename(tmp_path / "whole")
    again = distil(tiny_pipeline, tmp_path, launch=SHARDED)
    assert again.returncode == 0, again.stderr
    file = Path("transformer") / "diffusion_pytorch_model.safetensors"
    for stage in ("teacher", "start", "student"):
        one, other = load_file(two_processes / stage / file), load_file(tmp_path / stage / file)
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(other[name], one[name], atol=1e-6, rtol=1e-5, msg=f"{stage} {name}")
    whole, resumed = load_file(tmp_path / "whole" / file), load_file(tmp_path / "student" / file)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_shards_of_single_blocks_are_refused(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP")
    done = distil(tiny_pipeline, tmp_path, launch=SHARDED)
    assert done.returncode and "--fsdp_auto_wrap_policy NO_WRAP" in done.stderr


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-12").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_checkpoint(tmp_path / "none") is None


@pytest.mark.slow
def test_the_embedded_teacher_is_a_teacher_that_is_there(tmp_path):
    policy = VideoPolicy.from_pretrained("tiny-teacher")
    assert policy.transformer.config["chunk_size"] == 16 and policy.schedule.num_steps == 24
    with pytest.raises(ValueError, match="goes frame by frame"):
        policy.session(1)
    done = distil("tiny", tmp_path, "--stages", "teacher", "--teacher", "tiny-teacher")
    assert done.returncode == 0 and "is there and is left as it is" in done.stdout, done.stderr
    assert not (tmp_path / "checkpoints").exists()


def test_unknown_stages_are_refused(tiny_pipeline, tmp_path):
    done = distil(tiny_pipeline, tmp_path, "--stages", "students")
    assert done.returncode and "choose from teacher, start, student" in done.stderr
