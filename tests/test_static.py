"""Inference in place: the static cache, CUDA graphs, compiled blocks, attention backends, the codec's stream.

There need not be a GPU: graphs are recorded by a stand-in that calls the function again at every replay, on the same
tensors; and that nothing waits for the host is seen on fake CUDA tensors. The last test wants a GPU.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from acting import BATCH, CLOSE, FRAMES, WINDOW, conditions, generator, observe, small
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ardrag_rl.codec import Codec
from ardrag_rl.codec.side_stream import SideStream, side_stream
from ardrag_rl.control import Control
from ardrag_rl.flow import Kernel
from ardrag_rl.generation import generate_controlled
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.policies import block as blocks
from ardrag_rl.policies.chunks import Chunk, Conditions
from ardrag_rl.policies.cuda_graphs import CudaGraphs, Recorded
from ardrag_rl.policies.generate import denoise, generate_latents
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
            assert room.keys.shape[1] == 1 + min(m + 1, WINDOW)
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


@pytest.mark.parametrize("chunk", [1, 2])
def test_it_has_room_for_one_chunk_without_gradient(chunk):
    policy = small(chunk_size=chunk)
    given, model = Conditions(**conditions()), policy.transformer
    context = model.encode_context(given.text)
    inputs = Chunk(policy, given, context, StaticCache(WINDOW), slice(0, 1))._inputs(given.noise[:, :1])
    with torch.no_grad():
        for noisy, clean in ((inputs[:, None], inputs), (inputs[:, None].expand(-1, 2, -1, -1, -1, -1), None)):
            with pytest.raises(ValueError, match="in one pass, without gradient: a static cache takes one chunk"):
                model(context, clean, noisy, 755.0, StaticCache(WINDOW))
    with pytest.raises(ValueError, match="0 clean frames and 1 x 1 noisy ones in one pass, with gradient"):
        model(context, None, inputs[:, None], 755.0, StaticCache(WINDOW))


def test_videos_of_other_sizes_have_buffers_of_their_own(policy):
    """One for each size, at the address that it had."""
    fast = policy.for_inference()
    buffer, places = fast.transformer.static_cache.buffer, []
    for batch in (1, 2, 1, 2, 3):
        torch.testing.assert_close(made(fast, batch=batch), made(policy, batch=batch), **CLOSE)
        places.append(buffer.data.data_ptr())
    assert places[:2] == places[2:4] and places[0] != places[1] and len(buffer._kept) == 2
    assert copy.deepcopy(fast).transformer.static_cache.buffer.data is None


def test_inference_mode_comes_and_goes(policy):
    fast, want = policy.for_inference(), made(policy)
    fast.transformer.graphs = None
    with torch.inference_mode():
        first = made(fast)
    for got in (first, made(fast)):
        torch.testing.assert_close(got.clone(), want, **CLOSE)


def test_a_policy_for_inference_shares_its_weights():
    policy = small(cache={"name": "sink", "sink": 2})
    fast = policy.for_inference()
    assert all(a is b for a, b in zip(policy.parameters(), fast.parameters(), strict=True))
    static = fast.transformer.new_cache()
    assert fast.transformer.new_cache() is static and (static.window, static.sink) == (WINDOW, 2)
    assert policy.transformer.new_cache().band and fast.transformer.new_cache("rolling").band
    torch.testing.assert_close(made(fast), made(policy), **CLOSE)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(0.9)
    torch.testing.assert_close(made(fast), made(policy), **CLOSE)
    with pytest.raises(ValueError, match="cuda_graphs=True: the policy is on 'cpu', move it"):
        policy.for_inference(cuda_graphs=True)
    policy.transformer.forward = policy.transformer.forward  # as offloading does
    with pytest.raises(ValueError, match="forward was replaced by hooks, as offloading does"):
        policy.for_inference()
    with pytest.raises(ValueError, match="cache='tether': only 'rolling' and 'sink' can be static"):
        small(cache="tether").for_inference()


def test_half_precision_keeps_what_diffusers_keeps_whole(policy, tmp_path):
    policy.transformer.save_pretrained(tmp_path)
    half = type(policy.transformer).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.scale_shift_table.dtype == torch.float32 and half.proj_out.weight.dtype == torch.bfloat16
    half, want = VideoPolicy(half), made(policy)
    fast = half.for_inference()
    got, fast_got = made(half), made(fast)
    assert fast.transformer.static_cache.buffer.data.dtype == torch.bfloat16 and got.dtype == torch.float32
    for video in (got, fast_got):
        torch.testing.assert_close(video, want, atol=0.1, rtol=0.05)


def test_sessions_answer_whatever_comes_between(policy):
    """Two sessions in turns, and episodes at different frames, share one buffer: histories are computed again."""
    fast, kernel = policy.for_inference(), Kernel("ode")
    given, clean = conditions(), conditions(seed=1)["noise"]
    want = [policy.session(BATCH).transition(observe(given, clean, m, 1), kernel).mean for m in range(5)]
    one, two = fast.session(BATCH), fast.session(BATCH)
    for m in (1, 2, 3):
        for session in (one, two):
            got = session.transition(observe(given, clean, m, 1), kernel).mean
            torch.testing.assert_close(got, want[m], **CLOSE)
    rows = [observe(given, clean, m, 1) for m in (4, 2)]
    mixed = {key: torch.stack([rows[i][key][i] for i in range(2)]) for key in rows[0]}
    got = one.transition(mixed, kernel).mean
    torch.testing.assert_close(got, torch.stack([want[4][0], want[2][1]]), **CLOSE)
    torch.testing.assert_close(one.transition(observe(given, clean, 4, 1), kernel).mean, want[4], **CLOSE)


# --- CUDA graphs ---


@pytest.fixture
def recordings(monkeypatch):
    """A stand-in for a CUDA graph: what it does, by calling the function again on the same tensors."""
    recorded = []

    def record(self, function, inputs):
        outputs = function(*inputs)
        recorded.append(outputs)

        def replay():
            for there, here in zip(tree_leaves(outputs), tree_leaves(function(*inputs)), strict=True):
                there.copy_(here)

        return Recorded(replay, inputs, outputs)

    monkeypatch.setattr(CudaGraphs, "_record", record)
    return recorded


def graphed(policy):
    fast = policy.for_inference()
    fast.transformer.graphs = CudaGraphs()
    return fast


@pytest.mark.parametrize("chunk", [1, 3])
def test_graphs_are_recorded_once_and_give_the_same(recordings, chunk):
    policy = small(chunk_size=chunk)
    fast = graphed(policy)
    first = made(fast, frames=14)
    kept = first.clone()
    number = len(recordings)
    # noisy and clean, for every length of history; of none, noisy alone; and with chunks of three a last one of two
    assert number == {1: 2 * WINDOW + 1, 3: 1 + 2 + 1}[chunk]
    assert all(len(tree_leaves(outputs)) <= 1 for outputs in recordings)  # what a graph keeps alive: a velocity
    second = made(fast, frames=14, seed=1)  # another prompt, control and noise
    assert len(recordings) == number and torch.equal(first, kept)
    for got, seed in ((first, 0), (second, 1)):
        torch.testing.assert_close(got, made(policy, frames=14, seed=seed), **CLOSE)
    assert float((first - second).abs().max()) > 0.1
    made(fast, frames=3, batch=1)  # another shape
    assert len(recordings) > number
    number = len(recordings)
    for cache in ("rolling", "static"):  # not at the addresses of the policy's own
        torch.testing.assert_close(made(fast, cache, frames=3), made(policy, frames=3), **CLOSE)
    with torch.inference_mode():
        torch.testing.assert_close(made(fast, frames=14).clone(), kept, **CLOSE)
    assert len(recordings) == number


def test_weights_may_change_under_a_graph_and_a_copy_has_none(recordings):
    policy, other = small(), small(1)
    fast = graphed(policy)
    made(fast)
    number = len(recordings)
    policy.load_state_dict(other.state_dict())
    torch.testing.assert_close(made(fast), made(other), **CLOSE)
    assert len(recordings) == number
    copied = copy.deepcopy(fast)
    copied.load_state_dict(small(2).state_dict())
    torch.testing.assert_close(made(copied), made(small(2)), **CLOSE)
    torch.testing.assert_close(made(fast), made(other), **CLOSE)


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
                cache = cache.append(chunk.entries(denoise(chunk, Plan.all("ode", 3))[:, :, -1]))
    copies = {name for name, devices in places.seen if "copy" in name and len(devices) > 1}
    asked = {name for name, devices in places.seen if "local_scalar" in name and "cuda" in devices}
    assert len(places.seen) > 1000 and not copies and not asked


# --- compiled blocks ---


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 3])
def test_compiled_blocks_give_the_same(chunk):
    counted, graphs = torch._dynamo.utils.counters, []
    for layers in (2, 4):
        policy = small(chunk_size=chunk, num_layers=layers)
        fast = policy.for_inference(compile=True)
        torch._dynamo.reset()
        counted.clear()
        torch.testing.assert_close(made(fast, frames=14), made(policy, frames=14), **CLOSE)
        graphs.append(counted["stats"]["unique_graphs"])
        assert not counted["graph_break"]
        made(fast, frames=14)
        assert counted["stats"]["unique_graphs"] == graphs[-1]
    assert graphs[0] == graphs[1] <= 8  # no layer is compiled for itself; some lengths are


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
    assert torch.equal(here(lambda t: t + 1, x), x + 1) and here._stream is None
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
    latents = SimpleNamespace(is_cuda=True, record_stream=lambda s: said.append("kept" if s is aside else "?"))
    there = SideStream(torch.device("cuda"))
    assert there(lambda t: said.append("decoded") or t, latents) is latents
    assert said == ["aside waits", "kept", "aside", "decoded", "main"]
    there.join()
    assert said[-1] == "main waits"
    assert side_stream(torch.device("cpu")) is side_stream(torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compile", [False, True])
def test_a_gpu_gives_the_same(compile, tiny_pipeline):
    """Graphs, compiled blocks and the codec's stream against the plain policy, at once and again."""
    policy, codec = VideoPolicy.from_pretrained(tiny_pipeline, "cuda"), Codec.from_pretrained(tiny_pipeline, "cuda")
    fast, control = policy.for_inference(compile), Control(torch.full((9, 1, 3), 0.5), "circle", torch.zeros(3, 32, 32))
    want, *got = (
        generate_controlled(which, codec, [control], [0], Plan.all("renoise", 3)) for which in (policy, fast, fast)
    )
    for video in got:
        torch.testing.assert_close(video, want, atol=1e-3, rtol=0)
