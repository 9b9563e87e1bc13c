"""Sessions and the cache they keep."""

import numpy as np
import pytest
import torch
from acting import BATCH, CLOSE, FRAMES, SHAPE, WINDOW, clean_pass, conditions, observe

from ardrag_rl.flow import Kernel
from ardrag_rl.policies import RollingCache, VideoPolicy


@pytest.fixture(scope="module")
def policy(tiny_pipeline):
    return VideoPolicy.from_pretrained(tiny_pipeline)


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
    inputs, context, entries = clean_pass(policy, conditions(), conditions(seed=1)["noise"])
    empty = policy.transformer.new_cache()
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
        policy.transformer(context, inputs[:, 4:5], inputs[:, None, 4:5], 755.0, caches[4])
    after = [[t for layer in e.layers for t in layer] for e in entries]
    assert all(torch.equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))
