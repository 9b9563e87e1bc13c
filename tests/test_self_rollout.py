"""Self-Rollout against inference, and against Self-Forcing."""

from dataclasses import replace

import pytest
import torch
from acting import BATCH, FRAMES, conditions, generator, small

from ardrag_rl.distill.dmd import dmd_gradient, dmd_loss
from ardrag_rl.distill.self_rollout import self_rollout
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.policies.chunks import Conditions
from ardrag_rl.policies.generate import generate_latents
from ardrag_rl.rollout import Plan


@pytest.fixture(scope="module")
def policy(tiny_pipeline):
    return VideoPolicy.from_pretrained(tiny_pipeline)


@pytest.fixture(scope="module")
def given():
    return Conditions(**conditions())


def entries_of(cache):
    return [t for entry in cache.entries for layer in entry.layers for t in layer]


@pytest.mark.parametrize("steps", [0, 1, 2, [0, 1, 2, 0, 1, 2, 0, 1]])
def test_a_self_rollout_is_inference(policy, given, steps):
    """Frames and cache are those of sampling with the same noise, whatever the step that carries gradient."""
    video = self_rollout(policy, given, steps, generator=generator())
    latents = generate_latents(policy, Plan.all("renoise"), given, generator())
    assert torch.equal(video.clean, latents[:, :, -1])
    model = policy.transformer
    cache = model.new_cache()
    with torch.no_grad():
        context = model.encode_context(given.text)
        for m in range(FRAMES):
            here = slice(m, m + 1)
            clean = policy.frame_inputs(latents[:, here, -1], given.reference[:, here], given.trajectory[:, here], m)
            cache = cache.append(model(context, clean, cache=cache)[1])
    assert video.cache.num_frames == FRAMES
    assert all(torch.equal(a, b) for a, b in zip(entries_of(video.cache), entries_of(cache), strict=True))


def test_at_the_last_step_self_rollout_is_self_forcing(policy, given):
    last = policy.schedule.num_steps - 1
    for s in range(last + 1):
        a, b = (self_rollout(policy, given, s, h, generator=generator()) for h in ("self_rollout", "self_forcing"))
        assert torch.equal(a.clean, b.clean) == torch.equal(a.predictions, b.predictions) == (s == last)
        assert torch.equal(b.clean, b.predictions.detach())
        assert torch.equal(a.predictions[:, 0], b.predictions[:, 0])  # frame 0 has no history


@pytest.mark.parametrize("history", ["self_rollout", "self_forcing", "teacher_forcing"])
def test_no_gradient_crosses_frames(policy, given, history):
    noise = given.noise.clone().requires_grad_()
    reference = given.reference.clone().requires_grad_()
    video = self_rollout(policy, replace(given, noise=noise, reference=reference), 0, history, given.noise, generator())
    video.predictions[:, 5].sum().backward()
    for grad in (noise.grad, reference.grad):
        touched = [m for m in range(FRAMES) if grad[:, m].abs().max() > 0]
        assert touched == [5]
    assert not video.clean.requires_grad and not any(t.requires_grad for t in entries_of(video.cache))


def test_the_gradient_is_that_of_the_one_step(policy, given):
    """d predictions / d weights, against the same step on given frames before it."""
    video = self_rollout(policy, given, 1, generator=generator())
    weights = list(policy.transformer.proj_out.parameters())
    grads = torch.autograd.grad(video.predictions.sum(), weights)
    assert all(g.abs().max() > 0 for g in grads)
    latents = generate_latents(policy, Plan.all("renoise"), given, generator())
    noisy = policy.frame_inputs(latents[:, :, 1], given.reference, given.trajectory)[:, None]
    clean = policy.frame_inputs(latents[:, :, -1], given.reference, given.trajectory)
    t = policy.schedule.levels[1]
    with torch.no_grad():
        context = policy.transformer.encode_context(given.text)
    v, _ = policy.transformer(context, clean[:, :-1], noisy, 1000 * t)
    want = torch.autograd.grad((latents[:, :, 1] - t * v[:, 0]).sum(), weights)
    for got, expected in zip(grads, want, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("chunk", [3, FRAMES])
def test_chunks_roll_out_together(given, chunk):
    """No gradient crosses chunks, but frames of one see each other; at s = N-1 what is cached is what was predicted."""
    policy = small(chunk_size=chunk)
    noise = given.noise.clone().requires_grad_()
    video = self_rollout(policy, replace(given, noise=noise), 0, generator=generator())
    video.predictions[:, 4].sum().backward()
    touched = [m for m in range(FRAMES) if noise.grad[:, m].abs().max() > 0]
    assert touched == [m for m in range(FRAMES) if m // chunk == 4 // chunk]
    last = self_rollout(policy, given, 2, generator=generator())
    assert torch.equal(last.clean, last.predictions.detach()) and last.cache.num_frames == FRAMES
    assert torch.equal(last.clean, video.clean)


def test_teacher_forcing_looks_back_on_the_data(policy, given):
    data = conditions(seed=7)["noise"]
    video = self_rollout(policy, given, 2, "teacher_forcing", data, generator())
    assert torch.equal(video.clean, data) and video.predictions.shape == (BATCH, *data.shape[1:])


def test_bad_calls(policy, given):
    with pytest.raises(ValueError, match="history='own'"):
        self_rollout(policy, given, 0, "own")
    with pytest.raises(ValueError, match="needs data="):
        self_rollout(policy, given, 0, "teacher_forcing")
    with pytest.raises(ValueError, match=r"expected one in 0..2 for each of 8 chunks"):
        self_rollout(policy, given, 3)
    with pytest.raises(ValueError, match=r"steps=\[0, 1\]"):
        self_rollout(policy, given, [0, 1])


# --- DMD ---


def test_dmd_s_gradient_is_the_difference_of_the_scores():
    x0, real, fake = (torch.randn(2, 3, 4, 8, 8, generator=generator(i)) for i in range(3))
    x0.requires_grad_()
    gradient = dmd_gradient(x0, real, fake)
    for i in range(2):
        want = (fake[i] - real[i]) / (x0[i] - real[i]).abs().mean()
        torch.testing.assert_close(gradient[i], want.detach())
    dmd_loss(x0, gradient).backward()
    torch.testing.assert_close(x0.grad, gradient / x0.numel())


def test_dmd_s_gradient_is_zero_when_fake_is_real():
    x0, real = (torch.randn(2, 3, 4, 8, 8, generator=generator(i)) for i in range(2))
    assert not dmd_gradient(x0, real, real).any()
    assert not dmd_gradient(real, real, real).any()  # nor where the teacher changes nothing
