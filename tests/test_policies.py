"""The causal transformer, its cache, sessions and replay, held against diffusers' own dense forward.

The independent reference is diffusers' `WanTransformer3DModel` with a boolean block-causal mask over all tokens.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from ardrag_rl.codec import Codec
from ardrag_rl.flow import Kernel, Schedule
from ardrag_rl.policies import CausalWanTransformer3DModel, RollingCache, VideoPolicy, transformer
from ardrag_rl.policies.generate import generate_latents
from ardrag_rl.rollout import Plan, Rollout

BATCH, FRAMES, WINDOW = 2, 8, 3  # the last frame is beyond twice the window
SHAPE = (4, 8, 8)
SMALL = dict(
    patch_size=(1, 4, 4),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=13,
    out_channels=4,
    text_dim=16,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
)
CLOSE = dict(atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def policy(tiny_pipeline):
    return VideoPolicy.from_pretrained(tiny_pipeline)


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return VideoPolicy(CausalWanTransformer3DModel(**{**SMALL, "window": WINDOW, **changes}))


def conditions(frames=FRAMES, batch=BATCH, seed=0, **extra):
    """What an environment would fix at reset: noise, trajectory, reference, text."""
    g = torch.Generator().manual_seed(seed)
    noise, trajectory, reference = (torch.randn(batch, frames, *SHAPE, generator=g) for _ in range(3))
    return {"noise": noise, "trajectory": trajectory, "reference": reference, "text": text_of(batch, g), **extra}


def text_of(batch, g, length=8):
    return torch.randn(batch, length, 16, generator=g)


def observe(given, latents, m, n):
    """The environment's observation of a batch at frame m, step n."""
    obs = {key: value for key, value in given.items() if key != "noise"}
    batch = len(latents)
    return {**obs, "latents": latents, "frame": torch.full((batch, 1), m), "step": torch.full((batch, 1), n)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def act(policy, plan, given, seed=0):
    """A rollout by sessions, as a collector takes it: recorded actions and the log-probabilities of the scored ones."""
    noise = given["noise"]
    batch, frames = noise.shape[:2]
    session, g, latents = policy.session(batch), generator(seed), noise.clone()
    states, log_probs = [], []
    for m in range(frames):
        chain = [latents[:, m].clone()]
        for n, kernel in enumerate(plan.kernels):
            step = session.transition(observe(given, latents, m, n), kernel)
            chain.append(step.sample(g))
            latents[:, m] = chain[-1]
            if n in plan.scored:
                log_probs.append(step.log_prob(chain[-1]))
        states.append(torch.stack(chain, 1))
    return Rollout(
        trajectory=given["trajectory"],
        reference=given["reference"],
        text=given["text"],
        image=given.get("image"),
        latents=torch.stack(states, 1),
        plan=plan,
        schedule=policy.schedule,
        log_probs=torch.stack(log_probs, 1).view(batch, frames, -1) if log_probs else torch.zeros(batch, frames, 0),
        rewards=torch.zeros(batch, frames),
        reward_terms={},
        task_ids=("t",) * batch,
        groups=torch.zeros(batch, dtype=torch.int64),
    )


class Masked(WanAttnProcessor):
    """diffusers' attention with a mask that its block does not pass on."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


@torch.no_grad()
def dense(policy, frames, timesteps, text, image=None):
    """What the last layer predicts, (B, F, C, h, w), of frames (B, F, C_in, h, w) at timesteps (F,), masked."""
    model = policy.transformer
    config = {k: v for k, v in model.config.items() if not k.startswith("_") and k not in ("window", "prediction_type")}
    plain = WanTransformer3DModel(**config)
    plain.load_state_dict(model.state_dict())  # the same parameters under the same names
    _, ph, pw = model.config.patch_size
    tokens = frames.shape[-2] // ph * (frames.shape[-1] // pw)
    owner = torch.arange(frames.shape[1]).repeat_interleave(tokens)
    back = owner[:, None] - owner[None]
    mask = (back >= 0) & (back <= model.config.window)
    for block in plain.blocks:
        block.attn1.set_processor(Masked(mask))
    per_token = timesteps.repeat_interleave(tokens).expand(len(frames), -1)
    return plain(frames.transpose(1, 2), per_token, text, image).sample.transpose(1, 2)


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
        monkeypatch.setattr(transformer, "CHUNK_TOKENS", tokens * 4)  # one frame at a time; unequal chunks; all at once
        torch.testing.assert_close(policy(rollout).mean, want, **CLOSE)


def test_a_cache_continues_a_pass(policy):
    """Clean frames at once, one by one or in parts leave the same entries, and noisy frames continue any of them."""
    given, clean = conditions(), conditions(seed=1)["noise"]
    model = policy.transformer
    inputs = policy.frame_inputs(clean, given["reference"], given["trajectory"])
    with torch.no_grad():
        context = model.encode_context(given["text"])
        _, whole = model(context, inputs)
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


# --- sessions ---


def means(session, given, latents, where):
    """Copies of the means at these (frame, step)."""
    return [session.transition(observe(given, latents, m, n), Kernel("cps")).mean.clone() for m, n in where]


def test_a_fresh_session_in_mid_episode_rebuilds_the_cache(policy):
    given, latents = conditions(), conditions(seed=1)["noise"]
    running = policy.session(BATCH)
    for m in range(FRAMES):
        (cached,) = means(running, given, latents, [(m, 1)])
        (rebuilt,) = means(policy.session(BATCH), given, latents, [(m, 1)])
        torch.testing.assert_close(cached, rebuilt, **CLOSE)


@pytest.mark.parametrize(
    "change", ["rewind", "fork", "latents", "trajectory", "reference", "text", "skip", "new episode"]
)
def test_a_session_answers_what_does_not_continue_its_episode(policy, change):
    given, latents = conditions(), conditions(seed=1)["noise"]
    session = policy.session(BATCH)
    before = means(session, given, latents, [(m, 0) for m in range(6)])
    given, latents, m = {k: v.clone() for k, v in given.items()}, latents.clone(), 6
    if change == "rewind":
        m = 3
    elif change == "fork":
        m, latents[:, 3:] = 5, latents[:, 3:] + 1
    elif change == "latents":
        latents[0, 2] += 1  # one episode of the batch, long ago
    elif change == "skip":
        m = 7
    elif change == "new episode":
        m, latents, given = 0, latents + 1, conditions(seed=7)
    else:
        given[change][:, 0] += 1
    where = [(m, 1), (m, 2)]
    got, want = means(session, given, latents, where), means(policy.session(BATCH), given, latents, where)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    # and back where it was
    given, latents = conditions(), conditions(seed=1)["noise"]
    torch.testing.assert_close(means(session, given, latents, [(5, 0)])[0], before[5], **CLOSE)


def test_the_cache_is_used(policy, monkeypatch):
    """Continuing an episode runs one clean frame for each new one, never a rebuild."""
    given, latents = conditions(), conditions(seed=1)["noise"]
    ran = []
    forward = policy.transformer.forward

    def counting(context, clean=None, noisy=None, timestep=0.0, cache=None):
        ran.append(0 if clean is None else clean.shape[1])
        return forward(context, clean, noisy, timestep, cache)

    monkeypatch.setattr(policy.transformer, "forward", counting)
    session = policy.session(BATCH)
    means(session, given, latents, [(m, n) for m in range(3) for n in range(3)])
    assert ran == [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]
    ran.clear()
    means(session, given, latents, [(1, 0), (1, 1)])  # a rewind
    assert ran == [1, 0, 0]


def test_a_session_does_not_trust_arrays_it_was_shown(policy):
    """The caller may write into them: what the cache was computed from is a copy."""
    given, latents = conditions(), conditions(seed=1)["noise"]
    session = policy.session(BATCH)
    means(session, given, latents, [(0, 0), (1, 0), (2, 0)])
    latents[:, 0] += 1  # in place
    (got,) = means(session, given, latents, [(2, 0)])
    (want,) = means(policy.session(BATCH), given, latents, [(2, 0)])
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("steps", [[0, 0, 0, 0], [1, 0, 2, 1]])
def test_episodes_at_different_frames_in_one_batch(policy, steps):
    given, latents = conditions(batch=4), conditions(seed=1, batch=4)["noise"]
    frames = [2, 0, 5, 2]
    obs = observe(given, latents, 0, 0) | {"frame": torch.tensor(frames)[:, None], "step": torch.tensor(steps)[:, None]}
    mixed = policy.session(4).transition(obs, Kernel("cps"))
    for i, (m, n) in enumerate(zip(frames, steps, strict=True)):
        row = {k: v[i : i + 1] for k, v in given.items()}
        alone = policy.session(1).transition(observe(row, latents[i : i + 1], m, n), Kernel("cps"))
        torch.testing.assert_close(mixed.mean[i : i + 1], alone.mean, **CLOSE)
        std = torch.as_tensor(mixed.std).expand(4, 1, 1, 1)[i]
        torch.testing.assert_close(std.squeeze(), torch.as_tensor(alone.std).squeeze())


def test_observations_may_be_numpy_and_steps_carry_no_gradient(policy):
    given, latents = conditions(), conditions(seed=1)["noise"]
    obs = observe(given, latents, 2, 1)
    arrays = {k: np.asarray(v) for k, v in obs.items()} | {"timestep": np.full((BATCH, 1), 755.0, np.float32)}
    a, b = (policy.session(BATCH).transition(o, Kernel("cps")) for o in (obs, arrays))
    assert torch.equal(a.mean, b.mean) and not a.mean.requires_grad
    assert a.mean.shape == (BATCH, *SHAPE)


def test_bad_observations(policy):
    given, latents = conditions(), conditions(seed=1)["noise"]
    with pytest.raises(ValueError, match="2 episodes in a session of 3"):
        policy.session(3).transition(observe(given, latents, 0, 0), Kernel("ode"))
    with pytest.raises(ValueError, match="step 3 of 3: the episode is over"):
        policy.session(BATCH).transition(observe(given, latents, FRAMES - 1, 3), Kernel("ode"))
    with pytest.raises(ValueError, match="batch_size=0"):
        policy.session(0)


# --- the cache ---


def test_a_cache_is_never_written_to(policy):
    given, clean = conditions(), conditions(seed=1)["noise"]
    model = policy.transformer
    inputs = policy.frame_inputs(clean, given["reference"], given["trajectory"])
    with torch.no_grad():
        context = model.encode_context(given["text"])
        _, entries = model(context, inputs)
    empty = model.new_cache()
    assert isinstance(empty, RollingCache) and empty.view(0) is None and empty.num_frames == 0
    caches = [empty]
    for entry in entries:
        caches.append(caches[-1].append([entry]))
    before = [[t.clone() for layer in e.layers for t in layer] for e in entries]
    assert [c.num_frames for c in caches] == list(range(FRAMES + 1))
    assert [len(c.entries) for c in caches] == [0, 1, 2] + [WINDOW] * (FRAMES - 2)
    keys, values = caches[-1].view(1)
    assert keys.shape == values.shape == (BATCH, WINDOW, 16, 2, 12)
    for i, m in enumerate(range(FRAMES - WINDOW, FRAMES)):  # the last frames, oldest first
        assert torch.equal(keys[:, i], entries[m].layers[1][0])
    at_once = empty.append(entries)
    assert at_once.num_frames == FRAMES and torch.equal(at_once.view(1)[0], keys)
    row = caches[4].select(torch.tensor([1]))
    assert row.num_frames == 4 and torch.equal(row.view(0)[0], caches[4].view(0)[0][1:])
    with torch.no_grad():  # running on from a cache leaves it as it was
        model(context, inputs[:, 4:5], inputs[:, None, 4:5], 755.0, caches[4])
    after = [[t for layer in e.layers for t in layer] for e in entries]
    assert all(torch.equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))


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


# --- the policy and its files ---


def test_frame_inputs_mark_the_reference_image(policy):
    x = torch.randn(2, 3, *SHAPE)
    first, later = policy.frame_inputs(x, x + 1, x + 2), policy.frame_inputs(x, x + 1, x + 2, first=3)
    assert first.shape == (2, 3, 13, 8, 8)
    assert (
        torch.equal(first[:, :, :4], x) and torch.equal(first[:, :, 5:9], x + 1) and torch.equal(first[:, :, 9:], x + 2)
    )
    assert (first[:, 0, 4] == 1).all() and (first[:, 1:, 4] == 0).all() and (later[:, :, 4] == 0).all()
    stacked = policy.frame_inputs(x[:, None], x[:, None], x[:, None])  # any leading dimensions
    assert (stacked[:, :, 0, 4] == 1).all() and (stacked[:, :, 1:, 4] == 0).all()


def test_a_saved_policy_is_a_whole_pipeline(policy, tmp_path):
    folder = tmp_path / "new" / "pipeline"
    schedule = Schedule((1000.0, 600.0, 300.0))
    VideoPolicy(policy.transformer, schedule, policy.source).save_pretrained(folder)
    loaded = VideoPolicy.from_pretrained(folder)
    assert loaded.schedule == schedule and loaded.source == folder and loaded.latent_channels == 4
    assert loaded.transformer.config.window == WINDOW
    given = conditions(frames=2)
    same = VideoPolicy(loaded.transformer, policy.schedule)
    assert torch.equal(act(same, Plan.every("cps"), given).latents, act(policy, Plan.every("cps"), given).latents)
    a, b = Codec.from_pretrained(folder), Codec.from_pretrained(policy.source)
    assert torch.equal(a.encode_text(["a red square"]), b.encode_text(["a red square"]))
    assert not list(folder.rglob("*.bin")) and list(folder.glob("transformer/*.safetensors"))
    loaded.save_pretrained(folder)  # onto itself
    Codec.from_pretrained(folder)


def test_saving_without_a_source_writes_what_there_is(policy, tmp_path):
    VideoPolicy(policy.transformer).save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"transformer", "scheduler"}


def test_loading_says_what_is_wrong(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match="'nowhere' is unknown"):
        VideoPolicy.from_pretrained("nowhere")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="transformer"):
        VideoPolicy.from_pretrained(tmp_path)


def test_a_bare_diffusers_transformer_loads(tmp_path):
    """Parameters have diffusers' names, so published Wan weights fit; the window is ours and has a default."""
    torch.manual_seed(0)
    plain = WanTransformer3DModel(**SMALL)
    plain.save_pretrained(tmp_path)
    causal = CausalWanTransformer3DModel.from_pretrained(tmp_path)
    assert causal.config.window == 7
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), causal.parameters(), strict=True))


def test_bad_models_and_calls(policy):
    with pytest.raises(ValueError, match="temporal patch of 1"):
        small(patch_size=(2, 4, 4))
    with pytest.raises(ValueError, match="window=0"):
        small(window=0)
    with pytest.raises(ValueError, match="in_channels=4: expected more than 12"):
        small(in_channels=4)
    model = policy.transformer
    context = model.encode_context(torch.zeros(1, 8, 16))
    frames = torch.zeros(1, 4, 13, 8, 8)
    with pytest.raises(ValueError, match="both are None"):
        model(context)
    with pytest.raises(ValueError, match="4 noisy frames need 3 clean ones before them, got 2"):
        model(context, frames[:, :2], frames[:, None])
    short = small(rope_max_seq_len=3).transformer
    with pytest.raises(ValueError, match="frame 3 is beyond rope_max_seq_len=3"):
        short(short.encode_context(torch.zeros(1, 8, 16)), frames)


# --- generate ---


def test_generate_is_a_session_acting(policy):
    given = conditions(frames=4)
    plan = Plan.every("cps")
    a, b = (generate_latents(policy, plan, **given, generator=generator(1)) for _ in range(2))
    assert a.shape == (BATCH, 4, 4, *SHAPE)
    assert torch.equal(a, b) and torch.equal(a[:, :, 0], given["noise"])
    assert torch.equal(a, act(policy, plan, given, seed=1).latents)
    assert not torch.equal(a, generate_latents(policy, plan, **given, generator=generator(2)))


def test_generate_with_a_generator_for_each_video(policy):
    given = conditions(frames=3)
    both = generate_latents(policy, Plan.every("cps"), **given, generator=[generator(1), generator(2)])
    for i in range(BATCH):
        alone = {k: v[i : i + 1] for k, v in given.items()}
        one = generate_latents(policy, Plan.every("cps"), **alone, generator=[generator(i + 1)])
        torch.testing.assert_close(both[i : i + 1], one, **CLOSE)
