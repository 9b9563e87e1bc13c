"""The causal transformer, its cache, sessions and replay, held against diffusers' own dense forward.

The independent reference is diffusers' `WanTransformer3DModel` with a boolean block-causal mask over all tokens.
"""

from dataclasses import replace

import pytest
import torch
from acting import (
    BATCH,
    CLOSE,
    FRAMES,
    SHAPE,
    WINDOW,
    act,
    clean_pass,
    conditions,
    generator,
    masked_forward,
    observe,
    small,
    text_of,
)
from diffusers import WanTransformer3DModel

from ardrag_rl.flow import Kernel, Schedule
from ardrag_rl.policies import CausalWanTransformer3DModel, VideoPolicy, block
from ardrag_rl.rollout import Plan


@pytest.fixture(scope="module")
def policy(tiny_pipeline):
    return VideoPolicy.from_pretrained(tiny_pipeline)


OURS = ("window", "chunk_size", "prediction_type", "cache")  # what diffusers' class does not know


@torch.no_grad()
def dense(policy, frames, timesteps, text, image=None):
    """What the last layer predicts, (B, F, C, h, w), of frames (B, F, C_in, h, w) at timesteps (F,), masked."""
    model = policy.transformer
    config = {k: v for k, v in model.config.items() if not k.startswith("_") and k not in OURS}
    plain = WanTransformer3DModel(**config)
    plain.load_state_dict(model.state_dict())  # the same parameters under the same names
    return masked_forward(plain, frames, timesteps, text, image, model.config.chunk_size, model.config.window)


def dense_velocity(policy, given, clean, x, m, n):
    """Velocity of frame m = x at step n after the clean frames before it."""
    frames = torch.cat([clean[:, :m], x[:, None]], 1)
    inputs = policy.frame_inputs(frames, given["reference"][:, : m + 1], given["trajectory"][:, : m + 1])
    timesteps = torch.zeros(m + 1)
    timesteps[m] = policy.schedule.timesteps[n]
    return dense(policy, inputs, timesteps, given["text"], given.get("image"))[:, m]


# --- the transformer against diffusers ---


@pytest.mark.parametrize("image", [False, True])
def test_one_frame_is_diffusers_own_forward(image):
    g = generator()
    changes = dict(image_dim=10, added_kv_proj_dim=24) if image else {}
    policy = small(**changes)
    tokens = torch.randn(BATCH, 5, 10, generator=g) if image else None
    text = text_of(BATCH, g, 512 if image else 8)  # diffusers takes the last 512 tokens for the text
    x = torch.randn(BATCH, 1, 13, 8, 8, generator=g)
    model = policy.transformer
    with torch.no_grad():
        t = torch.tensor([755.0, 522.0])
        want = WanTransformer3DModel.forward(model, x.transpose(1, 2), t, text, tokens).sample.transpose(1, 2)
        got, entries = model(model.encode_context(text, tokens), None, x[:, None], t[:, None, None])
    assert entries == ()
    torch.testing.assert_close(got[:, 0], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("image", [False, True])
def test_one_chunk_is_the_bidirectional_forward(image):
    g = generator()
    policy = small(chunk_size=FRAMES, **(dict(image_dim=10, added_kv_proj_dim=24) if image else {}))
    tokens = torch.randn(BATCH, 5, 10, generator=g) if image else None
    x, text = torch.randn(BATCH, FRAMES, 13, 8, 8, generator=g), text_of(BATCH, g, 512 if image else 8)
    model = policy.transformer
    with torch.no_grad():
        t = torch.tensor([755.0, 522.0])
        want = WanTransformer3DModel.forward(model, x.transpose(1, 2), t, text, tokens).sample.transpose(1, 2)
        got, _ = model(model.encode_context(text, tokens), None, x[:, None], t[:, None, None])
    torch.testing.assert_close(got[:, 0], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [4, 64])  # one chunk at a time; several under a mask
@pytest.mark.parametrize(("chunk", "window"), [(2, 2), (2, 3), (3, 3), (3, 7)])
def test_chunks_are_the_dense_forward(chunk, window, tokens, monkeypatch):
    """Frames of a chunk see each other: in one pass over [clean | noisy], and step by step against a cache."""
    monkeypatch.setattr(block, "CHUNK_TOKENS", tokens)
    policy = small(chunk_size=chunk, window=window)
    given, model = conditions(), policy.transformer
    clean, context, _ = clean_pass(policy, given, conditions(seed=1)["noise"])
    noisy = policy.frame_inputs(given["noise"], given["reference"], given["trajectory"])
    with torch.no_grad():
        at_once, _ = model(context, clean, noisy[:, None], 755.0)
        cache = model.new_cache()
        for a in range(0, FRAMES, chunk):
            here = slice(a, min(a + chunk, FRAMES))
            steps = torch.tensor([0.0] * a + [755.0] * (here.stop - a))
            want = dense(policy, torch.cat([clean[:, :a], noisy[:, here]], 1), steps, given["text"])[:, a:]
            stepped, _ = model(context, None, noisy[:, None, here], 755.0, cache)
            torch.testing.assert_close(at_once[:, 0, here], want, **CLOSE)
            torch.testing.assert_close(stepped[:, 0], want, **CLOSE)
            cache = cache.append(model(context, clean[:, here], cache=cache)[1])
        with pytest.raises(ValueError, match=f"8 noisy frames need {7 // chunk * chunk} clean ones before them, got 1"):
            model(context, clean[:, :1], noisy[:, None])
        with pytest.raises(ValueError, match=f"a cache of 1 frames ends within a chunk of {chunk}"):
            model(context, None, noisy[:, None, :1], cache=model.new_cache().append(model(context, clean[:, :1])[1]))
    with pytest.raises(ValueError, match=f"chunk_size={chunk}: an environment goes frame by frame"):
        policy.session(BATCH)


def test_cached_steps_are_the_dense_forward(policy):
    """Sessions with a rolling cache = one pass over all frames under the full mask, also beyond two windows."""
    given, clean = conditions(), conditions(seed=1)["noise"]
    session = policy.session(BATCH)
    for m in range(FRAMES):
        for n in (0, 2):
            latents = clean.clone()
            latents[:, m] = x = given["noise"][:, m] + n
            step = session.transition(observe(given, latents, m, n), Kernel("ode"))
            v = dense_velocity(policy, given, clean, x, m, n)
            levels = policy.schedule.levels
            torch.testing.assert_close(step.mean, x - (levels[n] - levels[n + 1]) * v, **CLOSE)


def test_a_model_may_predict_the_clean_frame():
    """With prediction_type="sample" the last layer gives x0_hat, what an `ode` step to level 0 returns."""
    policy = small(prediction_type="sample")
    given, clean = conditions(frames=3), conditions(frames=3, seed=1)["noise"]
    clean[:, 2] = x = given["noise"][:, 2]
    x0 = policy.session(BATCH).transition(observe(given, clean, 2, 2), Kernel("ode")).mean
    torch.testing.assert_close(x0, dense_velocity(policy, given, clean, x, 2, 2), **CLOSE)
    rollout = act(policy, Plan.every("cps"), conditions())
    with torch.no_grad():
        torch.testing.assert_close(policy(rollout).log_prob(rollout.actions), rollout.log_probs, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"prediction_type='epsilon'.*'flow_prediction' or 'sample'"):
        small(prediction_type="epsilon")


def test_replay_is_the_dense_forward(policy):
    """One pass over [clean | noisy] = one dense pass for every transition."""
    given = conditions()
    rollout = act(policy, Plan.every("cps"), given)
    with torch.no_grad():
        steps = policy(rollout)
    assert steps.mean.shape == (BATCH, FRAMES, 2, *SHAPE) and steps.std.shape == (2, 1, 1, 1)
    levels = policy.schedule.levels
    for m in (0, 1, 4, FRAMES - 1):
        for n in rollout.plan.scored:
            x = rollout.latents[:, m, n]
            v = dense_velocity(policy, given, rollout.clean, x, m, n)
            want = rollout.plan.kernels[n].step(x, v, levels[n], levels[n + 1])
            torch.testing.assert_close(steps.mean[:, m, n], want.mean, **CLOSE)


@pytest.mark.parametrize("tokens", [1, 9, 10**6])
def test_chunks_do_not_change_the_numbers(policy, tokens, monkeypatch):
    rollout = act(policy, Plan.every("cps"), conditions())
    with torch.no_grad():
        want = policy(rollout).mean
        monkeypatch.setattr(block, "CHUNK_TOKENS", tokens * 4)  # one frame at a time; unequal chunks; all at once
        torch.testing.assert_close(policy(rollout).mean, want, **CLOSE)


def test_a_cache_continues_a_pass(policy):
    """Clean frames at once, one by one or in parts leave the same entries, and noisy frames continue any of them."""
    given, model = conditions(), policy.transformer
    inputs, context, whole = clean_pass(policy, given, conditions(seed=1)["noise"])
    with torch.no_grad():
        for parts in ((1,) * FRAMES, (3, 5), (2, 4, 2)):
            cache, got = model.new_cache(), []
            for part in inputs.split(parts, 1):
                velocity, entries = model(context, part, cache=cache)
                assert velocity is None
                cache = cache.append(entries)
                got += entries
            for a, b in zip(whole, got, strict=True):
                for (k, v), (k2, v2) in zip(a.layers, b.layers, strict=True):
                    torch.testing.assert_close(k, k2, **CLOSE)
                    torch.testing.assert_close(v, v2, **CLOSE)
        noisy = policy.frame_inputs(given["noise"], given["reference"], given["trajectory"])[:, None]
        want, _ = model(context, inputs, noisy, 755.0)
        half = model.new_cache().append(whole[:4])
        got, _ = model(context, inputs[:, 4:], noisy[:, :, 4:], 755.0, half)
        torch.testing.assert_close(got, want[:, :, 4:], **CLOSE)


def test_the_window_is_full_attention_while_it_covers_the_history(policy):
    config = {k: v for k, v in policy.transformer.config.items() if not k.startswith("_")}
    full = VideoPolicy(CausalWanTransformer3DModel(**{**config, "window": 100}))
    full.transformer.load_state_dict(policy.transformer.state_dict())
    rollout = act(policy, Plan.selective(0, "cps"), conditions())
    with torch.no_grad():
        a, b = policy(rollout).mean, full(rollout).mean
    torch.testing.assert_close(a[:, : WINDOW + 1], b[:, : WINDOW + 1], **CLOSE)
    assert all(not torch.allclose(a[:, m], b[:, m], **CLOSE) for m in range(WINDOW + 1, FRAMES))


# --- who sees whom ---


@pytest.fixture(scope="module")
def seen(policy):
    """seen(changed clean frame or None, changed noisy frame or None) -> which noisy frames' velocities move."""
    given, clean = conditions(), conditions(seed=1)["noise"]
    model = policy.transformer

    @torch.no_grad()
    def velocity(clean, noise):
        fixed = given["reference"], given["trajectory"]
        inputs, noisy = (policy.frame_inputs(x, *fixed) for x in (clean, noise))
        return model(model.encode_context(given["text"]), inputs, noisy[:, None], 755.0)[0][:, 0]

    before = velocity(clean, given["noise"])

    def moved(clean_frame=None, noisy_frame=None):
        changed, noise = clean.clone(), given["noise"].clone()
        if clean_frame is not None:
            changed[:, clean_frame] += 1
        if noisy_frame is not None:
            noise[:, noisy_frame] += 1
        difference = (velocity(changed, noise) - before).abs().amax((0, 2, 3, 4))
        return [m for m in range(FRAMES) if difference[m] > 1e-6]

    return moved


@pytest.mark.parametrize("frame", range(FRAMES))
def test_noisy_frames_never_see_noisy_frames(seen, frame):
    assert seen(noisy_frame=frame) == [frame]


@pytest.mark.parametrize("frame", range(FRAMES))
def test_clean_frames_are_seen_by_later_frames_only(seen, frame):
    """And through the entries of the frames between as far as window x layers: the window is recursive."""
    assert seen(clean_frame=frame) == [m for m in range(FRAMES) if frame < m <= frame + 2 * WINDOW]


def test_an_episode_does_not_see_the_future(policy):
    given = conditions()
    later = {k: v.clone() for k, v in given.items()}
    for key in ("noise", "trajectory", "reference"):
        later[key][:, 4:] += 1
    a, b = (act(policy, Plan.every("cps"), g).latents for g in (given, later))
    assert torch.equal(a[:, :4], b[:, :4]) and not torch.allclose(a[:, 4], b[:, 4])


def test_videos_of_a_batch_do_not_see_each_other(policy):
    given = conditions()
    other = {k: torch.cat([v[:1], v[1:] + 1]) for k, v in given.items()}
    a, b = (act(policy, Plan.all("ode"), g).latents for g in (given, other))
    torch.testing.assert_close(a[0], b[0], **CLOSE)


# --- replay = rollout ---


@pytest.mark.parametrize(
    "kernel",
    [Kernel("flow_sde", 0.7), Kernel("dance_sde", 0.5), Kernel("cps", 0.6), Kernel("renoise")],
    ids=lambda k: k.name,
)
@pytest.mark.parametrize("scored", ["every", "step 0", "step 1", "step 1, others renoise"])
def test_replayed_log_probs_are_the_recorded_ones(policy, kernel, scored):
    """The ratio before an update is 1 within 1e-4, for every kernel that has a density."""
    plan = {
        "every": Plan.every(kernel),
        "step 0": Plan.selective(0, kernel),
        "step 1": Plan.selective(1, kernel),
        "step 1, others renoise": Plan.selective(1, kernel, others="renoise"),
    }[scored]
    rollout = act(policy, plan, conditions())
    with torch.no_grad():
        replayed = policy(rollout).log_prob(rollout.actions)
    assert replayed.shape == rollout.log_probs.shape == (BATCH, FRAMES, len(plan.scored))
    assert float((replayed - rollout.log_probs).abs().max()) < 1e-4
    assert float(rollout.log_probs.std()) > 1e-3  # there is something to tell apart


def test_replay_with_image_tokens():
    policy = small(image_dim=10, added_kv_proj_dim=24)
    given = conditions(image=torch.randn(BATCH, 5, 10, generator=generator(3)))
    rollout = act(policy, Plan.every("cps"), given)
    with torch.no_grad():
        replayed = policy(rollout).log_prob(rollout.actions)
        blind = policy(replace(rollout, image=-rollout.image)).log_prob(rollout.actions)
    torch.testing.assert_close(replayed, rollout.log_probs, atol=1e-4, rtol=0)
    assert not torch.allclose(blind, replayed, atol=1e-4)


def test_replay_of_part_of_a_batch_is_that_part(policy):
    rollout = act(policy, Plan.every("cps"), conditions())
    with torch.no_grad():
        torch.testing.assert_close(policy(rollout.select([1])).mean, policy(rollout).mean[1:], **CLOSE)


def test_replay_of_one_frame(policy):
    rollout = act(policy, Plan.every("cps"), conditions(frames=1))
    with torch.no_grad():
        torch.testing.assert_close(policy(rollout).log_prob(rollout.actions), rollout.log_probs, atol=1e-4, rtol=0)


def test_replay_needs_a_scored_step(policy):
    with pytest.raises(ValueError, match=r"no scored step.*Plan\.selective"):
        policy(act(policy, Plan.all("ode"), conditions(frames=1)))


@pytest.mark.parametrize("schedule", [(1000.0, 500.0), (1000.0, 900.0, 700.0, 300.0)])
def test_other_schedules(tiny_pipeline, schedule):
    policy = VideoPolicy(VideoPolicy.from_pretrained(tiny_pipeline).transformer, Schedule(schedule))
    rollout = act(policy, Plan.every("cps", len(schedule)), conditions(frames=3))
    with torch.no_grad():
        torch.testing.assert_close(policy(rollout).log_prob(rollout.actions), rollout.log_probs, atol=1e-4, rtol=0)


def test_bfloat16_models_step_in_float32(tiny_pipeline):
    policy = VideoPolicy.from_pretrained(tiny_pipeline, dtype=torch.bfloat16)
    exact = VideoPolicy.from_pretrained(tiny_pipeline)
    rollout = act(policy, Plan.every("cps"), conditions(frames=5))
    with torch.no_grad():
        steps, want = policy(rollout), exact(rollout)
    assert rollout.latents.dtype == steps.mean.dtype == torch.float32
    torch.testing.assert_close(steps.mean, want.mean, atol=0.1, rtol=0)
    assert float((steps.log_prob(rollout.actions) - rollout.log_probs).abs().max()) < 0.05


# --- learning ---


def loss_of(policy, rollout):
    """A loss in which every scored transition counts."""
    weight = torch.randn(rollout.log_probs.shape, generator=generator(5))
    return (weight * policy(rollout).log_prob(rollout.actions)).sum()


def gradients(policy, rollout):
    policy.zero_grad()
    loss_of(policy, rollout).backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


def test_every_parameter_learns(tiny_pipeline):
    policy = VideoPolicy.from_pretrained(tiny_pipeline)
    rollout = act(policy, Plan.every("cps"), conditions(frames=4))
    for name, grad in gradients(policy, rollout).items():
        assert torch.isfinite(grad).all() and grad.abs().max() > 0, name


def test_replay_gradients_are_right_by_finite_differences(tiny_pipeline):
    """Along a random direction in all parameters at once, so nothing between a weight and the loss is detached."""
    policy = VideoPolicy.from_pretrained(tiny_pipeline)
    rollout = act(policy, Plan.every("cps"), conditions(frames=5))
    grads = gradients(policy, rollout)
    direction = {
        n: torch.randn(g.shape, generator=generator(i), dtype=g.dtype) for i, (n, g) in enumerate(grads.items())
    }
    expected = float(sum((grads[n] * d).sum() for n, d in direction.items()))
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            for n, p in policy.named_parameters():
                p += sign * 1e-3 * direction[n]
            values.append(float(loss_of(policy, rollout)))
            for n, p in policy.named_parameters():
                p -= sign * 1e-3 * direction[n]
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(expected, rel=0.02)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_pipeline):
    policy = VideoPolicy.from_pretrained(tiny_pipeline)
    policy.train()
    rollout = act(policy, Plan.every("cps"), conditions(frames=4))
    want = gradients(policy, rollout)
    policy.transformer.enable_gradient_checkpointing()
    for name, grad in gradients(policy, rollout).items():
        torch.testing.assert_close(grad, want[name], atol=1e-6, rtol=1e-5, msg=name)
