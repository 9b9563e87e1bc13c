"""One block of the causal transformer: who attends to whom, over frames side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from ardrag_rl.policies.cache import Band, LayerKV, Room
from ardrag_rl.policies.rotary import Turn, rotate

CHUNK_TOKENS = 64  # queries of consecutive chunks that share one attention call


@dataclass(frozen=True)
class Layout:
    """How frames lie side by side: `num_clean` clean ones, then `rows` times `num_noisy` noisy ones; who sees whom; and
    whether entries are to be unrotated."""

    num_clean: int
    rows: int
    num_noisy: int
    chunk: int
    band: Band
    unrotated: bool


def run_block(
    block: Any,
    x: Tensor,
    modulation: Tensor,
    turn: Turn,
    layout: Layout,
    past: LayerKV | Room | None,
    text: LayerKV,
    image: LayerKV | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One `WanTransformerBlock` on frames (B, Ft, n, D); also the clean frames' keys and values (and queries)."""
    # (B, Ft, 1, D) each, constant over a frame's tokens
    shift, scale, gate, shift_f, scale_f, gate_f = (block.scale_shift_table + modulation.float()).chunk(6, 2)
    hidden = (block.norm1(x.float()) * (1 + scale) + shift).type_as(x)
    attn = block.attn1
    q, k, v = attn.norm_q(attn.to_q(hidden)), attn.norm_k(attn.to_k(hidden)), attn.to_v(hidden)
    q, k, v = (a.unflatten(-1, (attn.heads, -1)) for a in (q, k, v))  # (B, Ft, n, H, d)
    turned = rotate(q, turn), rotate(k, turn)
    attended = _attend(attn, *turned, v, past, layout)
    x = (x.float() + attn.to_out[0](attended.flatten(-2)) * gate).type_as(x)

    hidden = block.norm2(x.float()).type_as(x).flatten(1, 2)
    x = x + _cross_attend(block.attn2, hidden, text, image).view_as(x)

    hidden = (block.norm3(x.float()) * (1 + scale_f) + shift_f).type_as(x)
    x = (x.float() + block.ffn(hidden).float() * gate_f).type_as(x)
    if not layout.num_clean or isinstance(past, Room):  # nothing to keep, or it is in the room
        return x, ()
    kept = (k, v, q) if layout.unrotated else (turned[1], v)
    return x, tuple(a[:, : layout.num_clean] for a in kept)


def _attend(attn: Any, q: Tensor, k: Tensor, v: Tensor, past: LayerKV | Room | None, layout: Layout) -> Tensor:
    """Each frame over the clean frames in its window and its chunk. (B, Ft, n, H, d) -> the same."""
    if isinstance(past, Room):  # one chunk, which sees all of it
        return _attend_frames(attn, q, *past.with_chunk(k, v))
    num_clean, rows, num_noisy = layout.num_clean, layout.rows, layout.num_noisy
    # split and unbind, never slices: the gradient of a slice is as large as what it was cut from
    clean, noisy = zip(*(x.split([num_clean, rows * num_noisy], 1) for x in (q, k, v)), strict=True)
    old_k, old_v = ((), ()) if past is None else (x.to(k.dtype).unbind(1) for x in past)
    keys, values = [*old_k, *clean[1].unbind(1)], [*old_v, *clean[2].unbind(1)]  # (B, n, H, d) for each clean frame
    attended = [
        _attend_rows(attn, [x.unflatten(1, (count, -1)) for x in stream], keys, values, len(old_k), layout)
        for stream, count in ((clean, 1), (noisy, rows))
        if stream[0].shape[1]
    ]
    return torch.cat(attended, 1)


def _attend_rows(
    attn: Any, qkv: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor], first: int, layout: Layout
) -> Tensor:
    """Rows of F frames, (B, R, F, n, H, d) each, over the clean frames before and their chunk. -> (B, R F, n, H, d).

    Queries go in blocks of whole chunks against the clean keys that any of them sees: the cost is linear in the number
    of frames. A block of one chunk needs no mask; small chunks go several at a time under a small banded one.
    Frame 0 of a row comes after `first` clean ones and starts a chunk.
    """
    q, own_k, own_v = qkv
    rows, num_frames, tokens = q.shape[1:4]
    chunk, window = layout.chunk, layout.band.window
    size = chunk * max(1, CHUNK_TOKENS // (tokens * chunk))
    own_keys, own_values = own_k.unbind(2), own_v.unbind(2)  # (B, R, n, H, d) for each frame
    attended = []
    for a, part in zip(range(0, num_frames, size), q.split(size, 2), strict=True):
        b = min(a + size, num_frames)
        lo, hi = max(0, first + a - window), first + (b - 1) // chunk * chunk
        sink = min(lo, layout.band.sink)  # of it, what the window does not begin with
        mask = None
        if b - a > chunk:
            starts = torch.arange(a, b) // chunk * chunk  # of each frame's chunk
            start, key = (first + starts)[:, None], torch.cat([torch.arange(sink), torch.arange(lo, hi)])
            together = starts[:, None] == starts
            before = (key < start) & ((key >= start - window) | (key < layout.band.sink))
            mask = _mask(torch.cat([before, together], 1), tokens, part)
        seen_k, seen_v = (
            torch.stack(
                [*(x[:, None].expand(-1, rows, -1, -1, -1) for x in (*clean[:sink], *clean[lo:hi])), *own[a:b]], 2
            ).flatten(0, 1)
            for clean, own in ((keys, own_keys), (values, own_values))
        )  # (B R, frames, n, H, d)
        attended.append(_attend_frames(attn, part.flatten(0, 1), seen_k, seen_v, mask).unflatten(0, (-1, rows)))
    return torch.cat(attended, 2).flatten(1, 2)


def _mask(seen: Tensor, tokens: int, like: Tensor) -> Tensor:
    """Frames that see frames, (Fq, Fk) bool -> an additive mask over their tokens, (1, 1, Fq n, Fk n)."""
    bias = torch.zeros(seen.shape, dtype=like.dtype).masked_fill(~seen, float("-inf"))
    return bias.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)[None, None].to(like.device)


def _attend_frames(attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Frames of queries over frames of keys: (N, Fq, n, H, d), (N, Fk, n, H, d) -> (N, Fq, n, H, d)."""
    return _dispatch(attn, q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), mask).reshape(q.shape)


def _dispatch(attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(N, tokens, H, d) by the backend of the model's own `set_attention_backend`, or PyTorch's.

    diffusers' default for a whole process is not asked: it is what the last model was set to, and a rollout would not
    be the same wherever it runs.
    """
    backend = getattr(attn.processor, "_attention_backend", None) or AttentionBackendName.NATIVE
    return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend)


def _cross_attend(attn: Any, hidden: Tensor, text: LayerKV, image: LayerKV | None) -> Tensor:
    """(B, tokens, D) over the prompt's tokens, and over the image's where there are any."""
    q = attn.norm_q(attn.to_q(hidden)).unflatten(-1, (attn.heads, -1))
    out = _dispatch(attn, q, *text)
    if image is not None:
        out = out + _dispatch(attn, q, *image)
    return attn.to_out[0](out.flatten(2))


def cross_kv(attn: Any, to_k: Any, to_v: Any, norm: Any, tokens: Tensor) -> LayerKV:
    """What cross-attention reads of tokens (B, L, D): (B, L, H, d) each."""
    k, v = norm(to_k(tokens)), to_v(tokens)
    return k.unflatten(-1, (attn.heads, -1)), v.unflatten(-1, (attn.heads, -1))
