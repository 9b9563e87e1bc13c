"""Wan2.1's transformer made causal over latent frames, from diffusers' parts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from ardrag_rl.policies.cache import Band, Cache, FrameEntry, LayerKV
from ardrag_rl.policies.rotary import Rotary, Turn, rotate
from ardrag_rl.policies.strategies import Strategy, make_cache

CHUNK_TOKENS = 64  # queries of consecutive chunks that share one attention call


@dataclass(frozen=True)
class Context:
    """Cross-attention keys and values of the prompt (and image tokens), per layer, computed once per video.

    Attributes:
        text: per layer (keys, values), each (B, heads, L, head_dim).
        image: the same for image tokens, where the model takes them.
    """

    text: tuple[LayerKV, ...]
    image: tuple[LayerKV, ...] | None = None


class CausalWanTransformer3DModel(WanTransformer3DModel):
    """`WanTransformer3DModel` with block-causal attention; parameters and their names are diffusers' own.

    One rule for everything: a frame, clean or noisy, attends to its own chunk and to the last `window` *clean* frames
    before that. A denoising step is one noisy chunk against a cache; writing the cache is one clean chunk; a rebuild is
    all clean frames at once; a replay is [clean frames | noisy frames] in one pass. Chunks are single frames in the
    environment; one chunk as long as the video is the bidirectional model, a teacher.

    Args:
        window: clean frames that a chunk can look back on.
        chunk_size: frames that see each other and are denoised together; frame m is of chunk m // chunk_size.
        prediction_type: what the last layer predicts, in diffusers' names: "flow_prediction", the velocity, as Wan
            does; or "sample", x0_hat, from which the velocity is (x - x0_hat) / t. A model that is narrower than its
            patches cannot pass their noise through, which a velocity asks for.
        cache: the caching strategy, as `strategies.make_cache` takes it. The rule above is that of "rolling"; "sink"
            adds the first frames. What others show a frame is their own matter.
        others: as in diffusers. `in_channels` = C latent + r mask + C reference + C trajectory channels.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 52,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        window: int = 7,
        chunk_size: int = 1,
        prediction_type: str = "flow_prediction",
        cache: str | Mapping[str, Any] = "rolling",
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=num_layers,
            cross_attn_norm=cross_attn_norm,
            qk_norm=qk_norm,
            eps=eps,
            image_dim=image_dim,
            added_kv_proj_dim=added_kv_proj_dim,
            rope_max_seq_len=rope_max_seq_len,
            pos_embed_seq_len=pos_embed_seq_len,
        )
        if patch_size[0] != 1:
            raise ValueError(f"patch_size={tuple(patch_size)}: a causal model needs a temporal patch of 1.")
        if prediction_type not in ("flow_prediction", "sample"):
            raise ValueError(f"prediction_type={prediction_type!r}: expected 'flow_prediction' or 'sample'.")
        if window < 1:
            raise ValueError(f"window={window}: expected at least one frame.")
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}: expected at least one frame.")
        make_cache(cache, window)  # refuses what is unknown

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """diffusers' own, less what only other classes have (SkyReels-V2's): a config here is arguments and notes."""
        arguments, unused, hidden = super().extract_init_dict(config_dict, **kwargs)
        return arguments, unused, {key: value for key, value in hidden.items() if key.startswith("_")}

    def new_cache(self, strategy: Strategy | None = None) -> Cache:
        """An empty cache of the model's window; None for the model's own strategy."""
        return make_cache(self.config["cache"] if strategy is None else strategy, self.config["window"])

    def encode_context(self, text: Tensor, image: Tensor | None = None) -> Context:
        """Prompt embeddings (B, L, D) and image tokens (B, L', D') -> what cross-attention reads."""
        embedder = self.condition_embedder
        attentions: list[Any] = [block.attn2 for block in self.blocks]
        hidden = embedder.text_embedder(text.to(self.dtype))
        texts = tuple(_cross_kv(a, a.to_k, a.to_v, a.norm_k, hidden) for a in attentions)
        if embedder.image_embedder is None:
            return Context(texts)
        if image is None:
            raise ValueError(
                f"the transformer reads image tokens (image_dim={self.config['image_dim']}): got None; an "
                "environment gives them as 'image'."
            )
        tokens = embedder.image_embedder(image.to(self.dtype))
        images = tuple(_cross_kv(a, a.add_k_proj, a.add_v_proj, a.norm_added_k, tokens) for a in attentions)
        return Context(texts, images)

    def forward(  # type: ignore[override]
        self,
        context: Context,
        clean: Tensor | None = None,
        noisy: Tensor | None = None,
        timestep: Tensor | float = 0.0,
        cache: Cache | None = None,
    ) -> tuple[Tensor | None, tuple[FrameEntry, ...]]:
        """Velocity of noisy frames and cache entries of clean ones, in one pass.

        Args:
            context: of `encode_context`.
            clean: (B, F, in_channels, h, w), consecutive clean frames after those in the cache.
            noisy: (B, S, F', in_channels, h, w), S noisy versions of consecutive frames, the first of them the first
                after the cache too; the last chunk of them follows clean frames. A noisy frame sees the clean frames
                before its chunk, and the noisy ones of its chunk in its version.
            timestep: in [0, 1000], broadcast to (B, S, F').
            cache: of the frames before; none for a video's beginning.

        Returns:
            velocity (B, S, F', C, h, w) or None, and F entries for the cache.

        Raises:
            ValueError: frames are missing, too many for the rotary table, or more than the cache takes at a time.
        """
        cache = cache if cache is not None else self.new_cache()
        streams = [x for x in (clean[:, None] if clean is not None else None, noisy) if x is not None]
        if not streams:
            raise ValueError("forward needs clean or noisy frames; both are None.")
        batch, device = streams[0].shape[0], streams[0].device
        num_clean = 0 if clean is None else clean.shape[1]
        rows, num_noisy = (0, 0) if noisy is None else noisy.shape[1:3]
        chunk = self.config["chunk_size"]
        needed = (num_noisy - 1) // chunk * chunk
        if needed > num_clean:
            raise ValueError(f"{num_noisy} noisy frames need {needed} clean ones before them, got {num_clean}.")
        if cache.num_frames % chunk:
            raise ValueError(f"a cache of {cache.num_frames} frames ends within a chunk of {chunk}.")
        if cache.band is None and max(num_clean, num_noisy) > chunk:
            raise ValueError(
                f"{max(num_clean, num_noisy)} frames in one pass: {type(cache).__name__} takes {chunk} at a time, no "
                "mask gives what it shows a frame. Training replays a rollout in one pass, and the ratio would not be "
                "1: train with cache='rolling', 'sink' or 'relative' (without a sink)."
            )
        _, ph, pw = self.config["patch_size"]
        h, w = streams[0].shape[-2] // ph, streams[0].shape[-1] // pw

        # All frames side by side, (B, Ft, n, D): the clean ones, then the rows of noisy ones.
        frames = torch.cat([x.flatten(1, 2) for x in streams], 1).to(self.dtype)
        x = self._embed_patches(frames)
        band = cache.band or Band(sys.maxsize)  # one chunk sees all that the cache shows
        layout = _Layout(num_clean, rows, num_noisy, chunk, band, cache.unrotated)
        steps = torch.zeros(batch, x.shape[1], device=device)
        if noisy is not None:
            level = torch.as_tensor(timestep, dtype=torch.float32, device=device)
            steps[:, num_clean:] = level.expand(batch, rows, num_noisy).flatten(1)
        temb, modulation = self._embed_time(steps)
        position = [*range(num_clean), *rows * [*range(num_noisy)]]
        rotary = Rotary.of(self.rope, h, w)
        turn = rotary.at([cache.position + m for m in position])

        kept: list[tuple[Tensor, ...]] = []
        checkpoint = torch.is_grad_enabled() and self.gradient_checkpointing
        for i, block in enumerate(self.blocks):
            image = context.image[i] if context.image is not None else None
            args = (block, x, modulation, turn, layout, cache.view(i), context.text[i], image)
            x, kvq = self._gradient_checkpointing_func(_run_block, *args) if checkpoint else _run_block(*args)
            kept.append(kvq)
        frame_entries = tuple(
            FrameEntry(
                tuple((k[:, i], v[:, i]) for k, v, *_ in kept),
                tuple(q[:, i] for _, _, *queries in kept for q in queries),
                rotary if cache.unrotated else None,
            )
            for i in range(num_clean)
        )
        if noisy is None:
            return None, frame_entries
        output = self._unembed(x[:, num_clean:], temb[:, num_clean:], h, w).unflatten(1, (rows, num_noisy))
        if self.config["prediction_type"] == "sample":
            level = (steps[:, num_clean:] / 1000).view(batch, rows, num_noisy, 1, 1, 1)
            output = (noisy[..., : output.shape[3], :, :].float() - output.float()) / level
        return output, frame_entries

    def _embed_patches(self, frames: Tensor) -> Tensor:
        """(B, Ft, C_in, h, w) -> (B, Ft, n, D). A patch convolution is a matrix product, and faster as one."""
        _, ph, pw = self.config["patch_size"]
        patches = frames.unflatten(-1, (-1, pw)).unflatten(-3, (-1, ph))  # (B, Ft, C, h', ph, w', pw)
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)  # (B, Ft, n, C ph pw)
        return F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def _embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """(B, Ft) -> (B, Ft, D), (B, Ft, 6, D)."""
        embedder = self.condition_embedder
        waves = embedder.timesteps_proj(timestep.flatten()).to(embedder.time_embedder.linear_1.weight.dtype)
        temb = embedder.time_embedder(waves).to(self.dtype)
        projected = embedder.time_proj(embedder.act_fn(temb))
        return temb.unflatten(0, timestep.shape), projected.unflatten(0, timestep.shape).unflatten(-1, (6, -1))

    def _unembed(self, x: Tensor, temb: Tensor, h: int, w: int) -> Tensor:
        """(B, Ft, n, D) -> (B, Ft, C, h ph, w pw)."""
        _, ph, pw = self.config["patch_size"]
        shift, scale = (self.scale_shift_table[:, None] + temb[:, :, None].float()).chunk(2, 2)  # (B, Ft, 1, D)
        out = self.proj_out((self.norm_out(x.float()) * (1 + scale) + shift).type_as(x))
        out = out.unflatten(2, (h, w)).unflatten(-1, (ph, pw, -1))  # (B, Ft, h, w, ph, pw, C)
        return out.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4)


@dataclass(frozen=True)
class _Layout:
    """How frames lie side by side: `num_clean` clean ones, then `rows` times `num_noisy` noisy ones; who sees whom; and
    whether entries are to be unrotated."""

    num_clean: int
    rows: int
    num_noisy: int
    chunk: int
    band: Band
    unrotated: bool


def _run_block(
    block: Any,
    x: Tensor,
    modulation: Tensor,
    turn: Turn,
    layout: _Layout,
    past: LayerKV | None,
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
    kept = (k, v, q) if layout.unrotated else (turned[1], v)
    attended = _attend(*turned, v, past, layout)
    x = (x.float() + attn.to_out[0](attended.flatten(-2)) * gate).type_as(x)

    hidden = block.norm2(x.float()).type_as(x).flatten(1, 2)
    x = x + _cross_attend(block.attn2, hidden, text, image).view_as(x)

    hidden = (block.norm3(x.float()) * (1 + scale_f) + shift_f).type_as(x)
    x = (x.float() + block.ffn(hidden).float() * gate_f).type_as(x)
    return x, tuple(a[:, : layout.num_clean] for a in kept)


def _attend(q: Tensor, k: Tensor, v: Tensor, past: LayerKV | None, layout: _Layout) -> Tensor:
    """Each frame over the clean frames in its window and its chunk. (B, Ft, n, H, d) -> the same."""
    num_clean, rows, num_noisy = layout.num_clean, layout.rows, layout.num_noisy
    # split and unbind, never slices: the gradient of a slice is as large as what it was cut from
    clean, noisy = zip(*(x.split([num_clean, rows * num_noisy], 1) for x in (q, k, v)), strict=True)
    old_k, old_v = ((), ()) if past is None else (x.to(k.dtype).unbind(1) for x in past)
    keys, values = [*old_k, *clean[1].unbind(1)], [*old_v, *clean[2].unbind(1)]  # (B, n, H, d) for each clean frame
    attended = [
        _attend_rows([x.unflatten(1, (count, -1)) for x in stream], keys, values, len(old_k), layout)
        for stream, count in ((clean, 1), (noisy, rows))
        if stream[0].shape[1]
    ]
    return torch.cat(attended, 1)


def _attend_rows(
    qkv: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor], first: int, layout: _Layout
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
        attended.append(_sdpa(part.flatten(0, 1), seen_k, seen_v, mask).unflatten(0, (-1, rows)))
    return torch.cat(attended, 2).flatten(1, 2)


def _mask(seen: Tensor, tokens: int, like: Tensor) -> Tensor:
    """Frames that see frames, (Fq, Fk) bool -> an additive mask over their tokens."""
    bias = torch.zeros(seen.shape, dtype=like.dtype).masked_fill(~seen, float("-inf"))
    return bias.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1).to(like.device)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Frames of queries over frames of keys: (N, Fq, n, H, d), (N, Fk, n, H, d) -> (N, Fq, n, H, d)."""
    queries, keys, values = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))  # (N, H, tokens, d)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2).reshape(q.shape)


def _cross_attend(attn: Any, hidden: Tensor, text: LayerKV, image: LayerKV | None) -> Tensor:
    """(B, tokens, D) over the prompt's tokens, and over the image's where there are any."""
    q = attn.norm_q(attn.to_q(hidden)).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, *text)
    if image is not None:
        out = out + F.scaled_dot_product_attention(q, *image)
    return attn.to_out[0](out.transpose(1, 2).flatten(2))


def _cross_kv(attn: Any, to_k: Any, to_v: Any, norm: Any, tokens: Tensor) -> LayerKV:
    k, v = norm(to_k(tokens)), to_v(tokens)
    k, v = (a.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for a in (k, v))
    return k, v
