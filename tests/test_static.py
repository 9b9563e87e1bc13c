"""Inference in place: the static cache, CUDA graphs, compiled blocks, attention backends, the codec's stream.

There need not be a GPU: graphs are recorded by a stand-in that calls the function again at every replay, on the same
tensors; and that nothing waits for the host is seen on fake CUDA tensors.
"""

from types import SimpleNamespace

import pytest
import torch
from acting import BATCH, CLOSE, FRAMES, WINDOW, conditions, generator, small
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ardrag_rl.codec.side_stream import SideStream
from ardrag_rl.policies import block as blocks
from ardrag_rl.policies.chunks import Chunk, Conditions
from ardrag_rl.policies.compiled import eager_blocks
from ardrag_rl.policies.cuda_graphs import CudaGraphs
from ardrag_rl.policies.generate import generate_latents
from ardrag_rl.policies.static_cache import StaticCache
from ardrag_rl.rollout import Plan


@pytest.fixture(scope="module")
def policy():
    return small()


def made(policy, cache=None, frames=FRAMES, seed=0, kernel="renoise", batch=BATCH):
    given = Conditions(**conditions(frames, batch, seed))
    return generate_latents(policy, Plan.all(kernel, 3), given, generator(seed), cache)


# --- the static cache ---


@pytest.mark.parametrize("chunk", [1, 3])  # of 8 frames, the last chunk of three is shorter
@pytest.mark.parametrize("sink", [0, 1, 2])
@pytest.mark.parametrize("extra", [{}, {"prediction_type": "sample"}])
def test_it_is_the_window_it_stands_for(chunk, sink, extra):
    policy = small(chunk_size=chunk, **extra)
    got = made(policy, {"name": "static", "sink": sink}, frames=14)
    torch.testing.assert_close(got, made(policy, {"name": "sink", "sink": sink}, frames=14), **CLOSE)


def test_it_lies_where_it_was_written(policy):
    """One buffer for any length and one video after another; and a pass allocates none of its history."""
    static = StaticCache(WINDOW)
    given, model = Conditions(**conditions()), policy.transformer
    places, keys = set(), []
    for _ in range(2):
        context, cache = model.encode_context(given.text), static
        for m in range(FRAMES):
            chunk = Chunk(policy, given, context, cache, slice(m, m + 1))
            with torch.no_grad():
                cache = cache.append(chunk.entries(given.noise[:, m : m + 1]))
            room = cache.view(1)
            assert room.keys.shape[1] == 1 + min(m + 1, WINDOW) and room.keys._base is static.buffer.data
            places.add(room.keys.data_ptr())
            keys.append(cache.key)
    assert len(places) == 1 and keys[:FRAMES] == keys[FRAMES:] and len(set(keys)) == WINDOW
    k = torch.randn(BATCH, 1, *room.keys.shape[2:])
    seen, _ = room.with_chunk(k, k)
    assert seen.data_ptr() == room.keys.data_ptr() and torch.equal(seen[:, :1], k)


def test_what_was_overwritten_is_not_used(policy):
    given, model = Conditions(**conditions()), policy.transformer
    context, caches = model.encode_context(given.text), [StaticCache(WINDOW)]

    def entries(cache, m):
        with torch.no_grad():
            return Chunk(policy, given, context, cache, slice(m, m + 1)).entries(given.noise[:, m : m + 1])

    for m in range(2):
        caches.append(caches[-1].append(entries(caches[-1], m)))
    row = caches[2].select(torch.tensor([1]))
    for use in (lambda c: c.view(0), lambda c: c.append(entries(caches[2], 2)), lambda c: c.select(torch.tensor([0]))):
        with pytest.raises(RuntimeError, match=r"of 1 frames was appended to, .*take cache='rolling'"):
            use(caches[1])
    before = [x.clone() for x in row.view(1)[:2]]
    caches.append(caches[2].append(entries(caches[2], 2)))
    assert all(torch.equal(a, b) for a, b in zip(row.view(1), before, strict=False))  # its own buffer
    caches[0].append(entries(caches[0], 0))  # another video
    with pytest.raises(RuntimeError, match="of 3 frames was appended to, or its buffer serves another video"):
        caches[3].view(0)


def test_it_has_room_for_one_chunk(policy):
    given, model = Conditions(**conditions()), policy.transformer
    context, chunk = model.encode_context(given.text), Chunk(policy, given, None, None, slice(0, 1))
    inputs = chunk._inputs(given.noise[:, :1])
    for noisy, clean in ((inputs[:, None], inputs), (inputs[:, None].expand(-1, 2, -1, -1, -1, -1), None)):
        with pytest.raises(ValueError, match="in one pass: StaticCache has room for one chunk of 1 at a time"):
            model(context, clean, noisy, 755.0, StaticCache(WINDOW))


def test_a_policy_for_inference_takes_it_by_itself():
    policy = small(cache={"name": "sink", "sink": 2})
    want = made(policy)
    assert policy.for_inference() is policy
    first, second = policy.transformer.new_cache(), policy.transformer.new_cache()
    assert first is second and (first.window, first.sink) == (WINDOW, 2) and policy.transformer.graphs is None
    torch.testing.assert_close(made(policy), want, **CLOSE)
    assert policy.transformer.new_cache("rolling").forks
    with pytest.raises(ValueError, match="cuda_graphs=True: the policy is on 'cpu', move it"):
        policy.for_inference(cuda_graphs=True)
    with pytest.raises(ValueError, match="cache='tether': only 'rolling' and 'sink' can be static"):
        small(cache="tether").for_inference()


# --- CUDA graphs ---


@pytest.fixture
def recordings(monkeypatch):
    """A stand-in for `torch.cuda.make_graphed_callables`: what a graph does, by calling the function again."""
    made = []

    def record(function, samples, pool):
        assert pool == "pool" and not torch.is_grad_enabled()
        fixed, outputs = samples, function(*samples)
        made.append(outputs)

        def replay(*inputs):
            for there, here in zip(fixed, inputs, strict=True):
                there.copy_(here)
            for there, here in zip(tree_leaves(outputs), tree_leaves(function(*fixed)), strict=True):
                there.copy_(here)
            return outputs

        return replay

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    return made


@pytest.mark.parametrize("chunk", [1, 3])
def test_graphs_are_recorded_once_and_give_the_same(recordings, chunk):
    policy, plain = (small(chunk_size=chunk, window=WINDOW) for _ in range(2))
    policy.for_inference()
    policy.transformer.graphs = CudaGraphs()
    first = made(policy, frames=14)
    kept = first.clone()
    number = len(recordings)
    # noisy and clean, for every length of history; with chunks of three there is a last one of two, never cleaned
    assert number == {1: 2 * (WINDOW + 1), 3: 2 * 2 + 1}[chunk]
    second = made(policy, frames=14, seed=1)  # another prompt, control and noise
    assert len(recordings) == number and torch.equal(first, kept)
    for got, seed in ((first, 0), (second, 1)):
        torch.testing.assert_close(got, made(plain, frames=14, seed=seed), **CLOSE)
    assert float((first - second).abs().max()) > 0.1
    made(policy, frames=3, batch=1)  # another shape
    assert len(recordings) > number
    number = len(recordings)
    made(policy, "rolling", frames=3)  # not at fixed addresses
    assert len(recordings) == number


def test_weights_may_change_under_a_graph(recordings):
    policy, other = small(), small(1)
    policy.for_inference().transformer.graphs = CudaGraphs()
    made(policy)
    number = len(recordings)
    policy.load_state_dict(other.state_dict())
    torch.testing.assert_close(made(policy), made(other), **CLOSE)
    assert len(recordings) == number


class Places(TorchDispatchMode):
    """Which devices every operation touches."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        self.seen.append((str(function), devices))
        return out


def test_nothing_waits_for_the_host():
    """On a GPU no number comes from or goes to the CPU while a chunk is denoised and remembered."""
    policy = small(prediction_type="sample")
    with FakeTensorMode(), torch.no_grad():
        for part in policy.modules():
            for name, p in part.named_parameters(recurse=False):
                setattr(part, name, torch.nn.Parameter(torch.empty(p.shape, device="cuda"), False))
            for name, x in part.named_buffers(recurse=False):
                setattr(part, name, torch.empty(x.shape, dtype=x.dtype, device="cuda"))
        given = conditions()
        given = Conditions(
            *(torch.empty(given[k].shape, device="cuda") for k in Conditions.__annotations__ if k in given)
        )
        context, cache = policy.transformer.encode_context(given.text), StaticCache(WINDOW)
        with Places() as places:
            for m in range(WINDOW + 2):
                chunk = Chunk(policy, given, context, cache, slice(m, m + 1))
                cache = cache.append(chunk.entries(chunk.velocity(given.noise[:, m : m + 1], 1)))
    elsewhere = {name for name, devices in places.seen if devices - {"cuda"}}
    assert len(places.seen) > 1000 and not elsewhere


# --- compiled blocks ---


@pytest.mark.slow
def test_compiled_blocks_give_the_same():
    policy = small(chunk_size=3)
    want, want_short = made(policy, frames=14), made(policy, frames=2)
    try:
        policy.for_inference(compile=True)
        torch._dynamo.reset()
        counted = torch._dynamo.utils.counters
        counted.clear()
        torch.testing.assert_close(made(policy, frames=14), want, **CLOSE)
        frames = counted["stats"]["unique_graphs"]
        assert 2 <= frames <= 6 and not counted["graph_break"]  # noisy and clean, some by length
        made(policy, frames=14)
        assert counted["stats"]["unique_graphs"] == frames
        torch.testing.assert_close(made(policy, frames=2), want_short, **CLOSE)
    finally:
        eager_blocks()


# --- the attention kernel, the codec's stream ---


def test_diffusers_attention_backends_are_taken(policy, monkeypatch):
    asked, own = set(), blocks.dispatch_attention_fn

    def dispatch(*args, backend, **kwargs):
        asked.add(getattr(backend, "value", backend))
        return own(*args, backend=backend, **kwargs)

    monkeypatch.setattr(blocks, "dispatch_attention_fn", dispatch)
    want = made(policy)
    assert asked == {"native"}
    policy.transformer.set_attention_backend("_native_math")
    try:
        torch.testing.assert_close(made(policy), want, **CLOSE)
    finally:
        policy.transformer.reset_attention_backend()
    assert asked == {"native", "_native_math"}
    asked.clear()
    made(policy)
    made(small())  # diffusers keeps the last as every model's default
    assert asked == {"native"}


def test_the_codec_has_a_stream_of_its_own(monkeypatch):
    x = torch.arange(3.0)
    here = SideStream(torch.device("cpu"))
    assert torch.equal(here(lambda t: t + 1, x), x + 1)
    here.join()

    said, current = [], SimpleNamespace(wait_stream=lambda s: said.append("main waits"))
    aside = SimpleNamespace(wait_stream=lambda s: said.append("aside waits" if s is current else "?"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: aside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)

    class Within:
        def __init__(self, stream):
            assert stream is aside

        def __enter__(self):
            said.append("aside")

        def __exit__(self, *_):
            said.append("main")

    monkeypatch.setattr(torch.cuda, "stream", Within)
    latents = SimpleNamespace(record_stream=lambda s: said.append("kept" if s is aside else "?"))
    there = SideStream(torch.device("cuda"))
    assert there(lambda t: said.append("decoded") or t, latents) is latents
    assert said == ["aside waits", "kept", "aside", "decoded", "main"]
    there.join()
    assert said[-1] == "main waits"
