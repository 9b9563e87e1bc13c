"""Caching strategies, each held to the identity that defines it."""

from dataclasses import replace

import pytest
import torch
from acting import BATCH, CLOSE, FRAMES, WINDOW, act, clean_pass, conditions, generator, observe, small

from ardrag_rl.flow import Kernel
from ardrag_rl.policies import strategies
from ardrag_rl.policies.cache import Band, FrameEntry, RollingCache, SinkCache
from ardrag_rl.policies.deep_cache import DeepSinkCache
from ardrag_rl.policies.quantised_cache import Quantised, QuantisedCache
from ardrag_rl.policies.relative_cache import EmaSinkCache, RelativeCache
from ardrag_rl.policies.rotary import rotate
from ardrag_rl.policies.tether_cache import TetherCache, aligned, recall_score
from ardrag_rl.rollout import Plan
from ardrag_rl.training.config import GRPOConfig
from ardrag_rl.training.trainer import GRPOTrainer

TRAINED = ["rolling", "sink", "relative"]
UNTRAINED = [{"name": "relative", "sink": 1}, "ema", "deep", "tether", "int8", "fp8"]


@pytest.fixture(scope="module")
def policy():
    return small(patch_size=(1, 2, 2))


def means(policy, cache, frames=FRAMES, batch=BATCH):
    """One step of every frame behind given clean ones, (B, F, C, h, w), under a strategy."""
    given, clean = conditions(frames, batch), conditions(frames, batch, seed=1)["noise"]
    session = policy.session(batch, cache)
    return torch.stack(
        [session.transition(observe(given, clean, m, 1), Kernel("ode")).mean.clone() for m in range(frames)], 1
    )


def entries_of(policy, unrotated, frames=FRAMES):
    """Entries of clean frames that saw one another under the window, and what they would have to be rotated by."""
    given, clean = conditions(frames), conditions(frames, seed=1)["noise"]
    model = policy.transformer
    inputs = policy.frame_inputs(clean, given["reference"], given["trajectory"])
    context = model.encode_context(given["text"])
    with torch.no_grad():
        return model(context, inputs, cache=(RelativeCache if unrotated else RollingCache)(WINDOW))[1]


def same(a, b):
    """Whether two caches show the same."""
    pairs = [(x, y) for i in range(2) for x, y in zip(a.view(i), b.view(i), strict=True)]
    return a.num_frames == b.num_frames and all(torch.equal(x, y) for x, y in pairs)


def filled(cache, entries):
    for entry in entries:
        cache = cache.append([entry])
    return cache


# --- all of them ---


@pytest.mark.parametrize("cache", [*strategies.STRATEGIES, {"name": "relative", "sink": 2}])
def test_nothing_changes_while_the_window_covers_the_history(policy, cache):
    """While nothing was dropped every strategy is full attention, those of one byte a number within their rounding."""
    frames = WINDOW + 1
    tolerance = {"int8": dict(atol=5e-4, rtol=0), "fp8": dict(atol=5e-3, rtol=0)}.get(str(cache), CLOSE)
    got, want = means(policy, cache, frames), means(small(patch_size=(1, 2, 2), window=100), "rolling", frames)
    torch.testing.assert_close(got, want, **tolerance)


@pytest.mark.parametrize("cache", [*strategies.STRATEGIES, {"name": "relative", "sink": 2}])
def test_a_session_rebuilds_any_cache(policy, cache):
    """In mid-episode, after a rewind and under another control: what a session says that went there step by step."""
    given, clean = conditions(), conditions(seed=1)["noise"]
    want = means(policy, cache)
    session = policy.session(BATCH, cache)
    for m in (6, 3, 7):
        got = session.transition(observe(given, clean, m, 1), Kernel("ode")).mean
        torch.testing.assert_close(got, want[:, m], **CLOSE)
    other = {**given, "trajectory": given["trajectory"].clone()}
    other["trajectory"][:, 1] += 1
    running, late = policy.session(BATCH, cache), policy.session(BATCH, cache)
    steps = [running.transition(observe(other, clean, m, 1), Kernel("ode")).mean for m in range(8)]
    for s in (session, late):
        torch.testing.assert_close(s.transition(observe(other, clean, 7, 1), Kernel("ode")).mean, steps[7], **CLOSE)


@pytest.mark.parametrize(
    "cache", [*(s for s in strategies.STRATEGIES if s != "static"), {"name": "relative", "sink": 2}]
)
def test_videos_of_a_batch_have_caches_of_their_own(policy, cache):
    """Rows of a cache are the cache of these videos; and appending leaves a cache as it was."""
    empty = policy.transformer.new_cache(cache)
    entries = entries_of(policy, empty.unrotated)
    rows = torch.tensor([1])
    alone = filled(empty, [e.select(rows) for e in entries])
    both = filled(empty, entries[:6])
    before = [x.clone() for x in both.view(1)]
    after = filled(both, entries[6:])
    assert same(filled(both.select(rows), [e.select(rows) for e in entries[6:]]), alone) and same(
        after.select(rows), alone
    )
    fresh = filled(empty, entries[:6])  # nothing kept of what was computed
    assert all(torch.equal(a, b) for a, b in zip(fresh.view(1), before, strict=True)) and fresh.num_frames == 6
    assert empty.view(0) is None and empty.num_frames == 0


@pytest.mark.parametrize("cache", TRAINED)
def test_replay_is_the_rollout(cache):
    policy = small(cache=cache)
    rollout = act(policy, Plan.every("cps"), conditions())
    with torch.no_grad():
        replayed = policy(rollout).log_prob(rollout.actions)
    torch.testing.assert_close(replayed, rollout.log_probs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cache", UNTRAINED)
def test_what_cannot_be_replayed_is_refused(cache, tiny_pipeline, tmp_path):
    policy = small(cache=cache)
    rollout = act(policy, Plan.every("cps"), conditions(frames=3))
    with pytest.raises(ValueError, match=r"frames in one pass: .*ratio would not be 1: train with cache='rolling'"):
        policy(rollout)
    with pytest.raises(ValueError, match=r"is for inference: .*ratio would not be 1"):
        GRPOTrainer(policy, GRPOConfig(output_dir=str(tmp_path), report_to="none"), pipeline=tiny_pipeline)


@pytest.mark.parametrize("cache", UNTRAINED)
def test_it_would_not_have_been_exact(policy, cache):
    """The refusal is no false alarm: under the banded mask other numbers come out."""
    got, want = means(policy, cache), means(policy, "rolling")
    assert float((got - want)[:, -1].abs().max()) > 5e-5


def test_a_strategy_is_saved_with_the_model(tmp_path):
    policy = small(cache={"name": "sink", "sink": 2})
    policy.transformer.save_pretrained(tmp_path)
    loaded = type(policy.transformer).from_pretrained(tmp_path)
    assert loaded.new_cache() == SinkCache(WINDOW, sink=2) and loaded.new_cache("rolling") == RollingCache(WINDOW)
    own = TetherCache(9)
    assert loaded.new_cache(own) is own and policy.with_chunks(2).transformer.new_cache().sink == 2


@pytest.mark.parametrize(
    ("strategy", "error"),
    [
        ("lru", "cache='lru' is unknown: expected a name of rolling, sink"),
        ({"sink": 1}, "is unknown: expected a name"),
        ({"name": "sink", "decay": 1}, "an argument that 'sink' does not take: .*decay"),
        ({"name": "sink", "sink": -1}, "sink=-1: expected at least 0"),
        ({"name": "ema", "sink": 0}, "sink=0: an EMA sink needs"),
        ({"name": "ema", "decay": 1.5}, r"decay=1.5: expected a number in \[0, 1\]"),
        ({"name": "deep", "budget": 99}, "budget=99, window=3: expected .*budget <= window"),
        ({"name": "tether", "recent": 0}, "recent=0, window=3: expected"),
        ({"name": "tether", "alignment": 2}, "alignment=2: expected"),
        ({"name": "int8", "kind": "int4"}, "kind='int4': expected one of int8, fp8"),
    ],
)
def test_a_wrong_strategy_is_refused(strategy, error):
    with pytest.raises(ValueError, match=error):
        small(cache=strategy)


# --- sink ---


def test_a_sink_of_none_is_the_rolling_window(policy):
    assert torch.equal(means(policy, {"name": "sink", "sink": 0}), means(policy, "rolling"))


def test_a_sink_keeps_the_first_frames(policy):
    entries = entries_of(policy, False)
    cache = filled(SinkCache(WINDOW, sink=2), entries)
    assert cache.entries == (*entries[:2], *entries[-WINDOW:]) == SinkCache(WINDOW, sink=2).append(entries).entries
    assert cache.position == FRAMES and cache.band == Band(WINDOW, 2)
    full = means(small(patch_size=(1, 2, 2), window=100), "rolling")
    torch.testing.assert_close(means(policy, {"name": "sink", "sink": FRAMES}), full, **CLOSE)


@pytest.mark.parametrize(("chunk", "sink"), [(1, 1), (1, 2), (2, 2), (2, 3), (3, 1)])
@pytest.mark.parametrize("tokens", [4, 64])
def test_one_pass_with_a_sink_is_step_by_step(chunk, sink, tokens, monkeypatch):
    monkeypatch.setattr("ardrag_rl.policies.block.CHUNK_TOKENS", tokens)
    policy = small(chunk_size=chunk, cache={"name": "sink", "sink": sink})
    given, model = conditions(), policy.transformer
    clean, context, _ = clean_pass(policy, given, conditions(seed=1)["noise"])
    noisy = policy.frame_inputs(given["noise"], given["reference"], given["trajectory"])[:, None]
    with torch.no_grad():
        want, _ = model(context, clean, noisy, 755.0)
        cache, half = model.new_cache(), None
        for a in range(0, FRAMES, chunk):
            here = slice(a, min(a + chunk, FRAMES))
            torch.testing.assert_close(
                model(context, None, noisy[:, :, here], 755.0, cache)[0], want[:, :, here], **CLOSE
            )
            cache = cache.append(model(context, clean[:, here], cache=cache)[1])
            half = cache if here.stop == 6 else half
        got, _ = model(context, clean[:, 6:], noisy[:, :, 6:], 755.0, half)  # sink and window are no longer one
        torch.testing.assert_close(got, want[:, :, 6:], **CLOSE)


# --- relative positions ---


def test_relative_positions_are_absolute_ones(policy):
    """Bit for bit while nothing was dropped; then all distances stay, and the numbers up to rounding."""
    got, want = means(policy, "relative"), means(policy, "rolling")
    assert torch.equal(got[:, : WINDOW + 1], want[:, : WINDOW + 1])
    torch.testing.assert_close(got, want, **CLOSE)


def test_relative_positions_do_not_end():
    """The rotary table does, and with it the video of a cache with absolute ones."""
    policy = small(rope_max_seq_len=5)
    with pytest.raises(ValueError, match="frame 5 is beyond rope_max_seq_len=5"):
        means(policy, "rolling")
    torch.testing.assert_close(means(policy, "relative"), means(small(), "relative"), **CLOSE)


def test_a_relative_sink_is_next_to_the_window(policy):
    entries = entries_of(policy, True)
    cache = filled(RelativeCache(WINDOW, sink=1), entries)
    keys, values = cache.view(0)
    assert cache.position == WINDOW + 1 and cache.band is None
    for i, m in enumerate((0, 5, 6, 7)):
        k, v = entries[m].layers[0]
        turn = entries[m].rotary.at([i])
        assert torch.equal(keys[:, i], rotate(k[:, None], turn)[:, 0]) and torch.equal(values[:, i], v)


# --- EMA sink ---


@pytest.mark.parametrize("sink", [1, 2])
def test_an_ema_that_never_forgets_is_the_sink(policy, sink):
    entries = entries_of(policy, True)
    assert same(
        filled(EmaSinkCache(WINDOW, sink=sink, decay=1.0), entries), filled(RelativeCache(WINDOW, sink=sink), entries)
    )


def test_an_ema_that_keeps_nothing_is_a_longer_window(policy):
    """Its sink is the frame that left last."""
    for n in range(1, FRAMES + 1):
        entries = entries_of(policy, True)[:n]
        assert same(filled(EmaSinkCache(WINDOW, decay=0.0), entries), filled(RelativeCache(WINDOW + 1), entries))


@pytest.mark.parametrize("at_once", [False, True])
def test_an_ema_is_that_of_the_frames_that_left(policy, at_once):
    entries = entries_of(policy, True)
    empty = EmaSinkCache(2, sink=2, decay=0.9)
    cache = empty.append(entries) if at_once else filled(empty, entries)
    for slot in (0, 1):  # frames 2..5 have left: 2 and 4 into slot 0
        for part in (0, 1):
            a, b, c = (entries[slot + m].layers[1][part] for m in (0, 2, 4))
            want = 0.9 * (0.9 * a + 0.1 * b) + 0.1 * c
            torch.testing.assert_close(cache.entries[slot].layers[1][part], want)
    low = [replace(e, layers=tuple((k.bfloat16(), v.bfloat16()) for k, v in e.layers)) for e in entries]
    cache = filled(EmaSinkCache(2, decay=0.999), low)
    assert cache.entries[0].layers[0][0].dtype == torch.float32 and cache.view(0)[0].dtype == torch.bfloat16


# --- deep sink ---


def test_a_deep_sink_without_room_for_more_is_a_sink(policy):
    entries = entries_of(policy, True)
    deep = filled(DeepSinkCache(3, sink=1, recent=2, budget=3), entries)
    sink = filled(RelativeCache(2, sink=1), entries)
    for i in range(2):
        for a, b in zip(deep.view(i), sink.view(i), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def test_a_deep_sink_grows_and_then_compresses(policy):
    cache, sizes = DeepSinkCache(6, sink=2, recent=1, budget=4), []
    for entry in entries_of(policy, True):
        cache = cache.append([entry])
        sizes.append(cache.view(0)[0].shape[1])
    assert sizes == [1, 2, 3, 4, 5, 6, 4, 5] and cache.position == 5


def test_the_tokens_that_recent_frames_attend_to_stay(policy):
    """By plain loops over tokens, with every head's product of rotated queries and keys added up."""
    entries = entries_of(policy, True, frames=6)
    cache = filled(DeepSinkCache(5, sink=1, recent=2, budget=4), entries)
    rotary = entries[0].rotary
    for layer in range(2):
        keys, values = cache.view(layer)
        for row in range(BATCH):
            turned = [
                [rotate(x[layer][row][None], rotary.at([m]))[0] for x in (e.queries, [k for k, _ in e.layers])]
                for m, e in enumerate(entries)
            ]
            queries = torch.cat([turned[m][0] for m in (4, 5)])
            score = {(m, j): float((queries * turned[m][1][j]).sum()) for m in (1, 2, 3) for j in range(16)}
            best = sorted(sorted(score, key=score.get)[-16:])
            want = torch.stack([entries[m].layers[layer][1][row, j] for m, j in best])
            assert torch.equal(values[row, 1], want)
            place = rotary.at([1])  # where they are read, at their own tokens
            for t, (m, j) in enumerate(best):
                k = rotate(entries[m].layers[layer][0][row, j], (place[0][0, j], place[1][0, j]))
                torch.testing.assert_close(keys[row, 1, t], k, **CLOSE)
            assert len({m for m, _ in best}) > 1  # tokens, not a frame


def test_a_deep_sink_is_scaled_to_the_window():
    assert strategies.make_cache("deep", 21) == DeepSinkCache(21) == DeepSinkCache(21, sink=10, recent=4, budget=16)
    assert strategies.make_cache({"name": "deep", "sink": 2}, 7) == DeepSinkCache(7, sink=2, recent=1, budget=6)
    assert strategies.make_cache("tether", 21) == TetherCache(21) and strategies.make_cache("tether", 7).memory == 5


# --- gated recall ---


def test_recall_without_a_memory_is_a_sink(policy):
    entries = entries_of(policy, True)
    assert same(filled(TetherCache(4, sink=1, recent=3), entries), filled(RelativeCache(3, sink=1), entries))


def test_the_frame_of_the_lowest_score_goes(policy):
    """Unedited, a memory holds frames as they were: those that win against the frame that leaves, time after time."""
    entries = entries_of(policy, True)
    cache = filled(TetherCache(5, sink=1, recent=2, alignment=0.0), entries)
    for layer in range(2):
        for row in range(BATCH):
            kept = [1, 2]
            for newest in (5, 6, 7):
                rivals = [*kept, newest - 2]
                query = entries[newest].queries[layer][row]
                keys = [entries[m].layers[layer][0][row] for m in rivals]
                products = torch.stack([torch.einsum("ihd,jhd->hij", query, k).mean() for k in keys]) / 12**0.5
                mass, span = products.softmax(0), max(1, (rivals[-1] - rivals[0] + 1) / 2)
                score = [
                    mass[a]
                    + 0.35
                    * (
                        1
                        - max(mass[b] * 2.718281828 ** (-abs(rivals[a] - rivals[b]) / span) for b in range(3) if b != a)
                    )
                    for a in range(3)
                ]
                kept = [m for a, m in enumerate(rivals) if a != min(range(3), key=lambda a: score[a])]
            assert cache.frames[layer][row].tolist() == kept
            for slot, m in enumerate((0, *kept, 6, 7)):
                assert torch.equal(cache.entries[slot].layers[layer][1][row], entries[m].layers[layer][1][row])


def test_diversity_favours_frames_apart():
    """Of frames that are attended to alike, the one in the crowd goes."""
    q, k = torch.zeros(1, 4, 2, 3), torch.zeros(1, 4, 4, 2, 3)
    score = recall_score(q, k, torch.tensor([[1, 8, 9, 20]]), 1.0)
    assert score.argsort()[0, :2].sort().values.tolist() == [1, 2] and score.argmax() == 3
    assert torch.equal(recall_score(q, k, torch.tensor([[1, 8, 9, 20]]), 0.0), torch.full((1, 4), 0.25))


def test_alignment_gives_a_frame_the_statistics_of_the_trusted():
    x = torch.randn(2, 4, 50, 2, 3, generator=generator()) * torch.tensor([1.0, 1, 1, 5])[:, None, None, None] + 1
    full = aligned(x, 1.0)
    trusted = x[:, :3].flatten(1, 2)
    torch.testing.assert_close(full[:, 3].mean(1), trusted.mean(1))
    torch.testing.assert_close(full[:, 3].std(1, correction=0), trusted.std(1, correction=0))
    assert torch.equal(full[:, :3], x[:, :3]) and torch.equal(aligned(x, 0.0), x)
    torch.testing.assert_close(aligned(x, 0.25), 0.75 * x + 0.25 * full)


# --- one byte a number ---


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantised_within_its_error(kind):
    x = torch.randn(64, 32, generator=generator()) * torch.logspace(-6, 6, 64)[:, None]
    q = Quantised.of(x, kind)
    error, top = (q.restored() - x).abs(), x.abs().amax(-1, keepdim=True)
    bound = top / 254 if kind == "int8" else torch.maximum(x.abs() / 16, top / 448 / 2**10)
    assert (error <= bound * 1.00001).all() and error.max() > 0
    assert q.values.element_size() == 1 and q.scale.shape == (64, 1)
    zeros = Quantised.of(torch.zeros(3, 4), kind)
    assert torch.equal(zeros.restored(), torch.zeros(3, 4))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_what_the_format_has_is_exact(kind):
    if kind == "int8":
        x = torch.arange(-127, 128.0).view(5, 51)
        x[:, 0] = 127  # the largest of every vector
    else:
        x = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        x = torch.cat([x[x.isfinite()], torch.tensor([448.0])])[None]
    for scale in (1.0, 2.0**-9, 2.0**5):
        assert torch.equal(Quantised.of(x * scale, kind).restored(), x * scale)
    low = (x * 0.5).bfloat16()
    assert torch.equal(Quantised.of(low, kind).restored(), low)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantised_cache_is_the_rolling_one_of_rounded_entries(policy, kind):
    entries = entries_of(policy, False)

    def rounded(e):
        return FrameEntry(tuple(tuple(Quantised.of(x, kind).restored() for x in kv) for kv in e.layers))

    for quantised, plain in (
        (QuantisedCache(WINDOW, kind=kind), RollingCache(WINDOW)),
        (QuantisedCache(WINDOW, sink=1, kind=kind), SinkCache(WINDOW, sink=1)),
    ):
        assert same(filled(quantised, entries), filled(plain, [rounded(e) for e in entries]))
