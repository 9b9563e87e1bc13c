"""Wan2.1's transformer made causal over latent frames, from diffusers' parts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from ardrag_rl.policies import block as blocks
from ardrag_rl.policies.block import Layout, cross_kv
from ardrag_rl.policies.cache import Band, Cache, FrameEntry, LayerKV, Room
from ardrag_rl.policies.cuda_graphs import CudaGraphs
from ardrag_rl.policies.rotary import Rotary, Turn
from ardrag_rl.policies.static_cache import StaticCache
from ardrag_rl.policies.strategies import Strategy, make_cache


class Context(NamedTuple):
    """Cross-attention keys and values of the prompt (and image tokens), per layer, computed once per video.

    Attributes:
        text: per layer (keys, values), each (B, L, heads, head_dim).
        image: the same for image tokens, where the model takes them.
    """

    text: tuple[LayerKV, ...]
    image: tuple[LayerKV, ...] | None = None


# velocity of noisy frames, where there are any; per layer the clean frames' keys and values (and queries)
_Outputs = tuple[list[Tensor], list[tuple[Tensor, ...]]]


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

    static_cache: StaticCache | None = None  # all by `VideoPolicy.for_inference`
    graphs: CudaGraphs | None = None
    compiled: Callable[..., Any] | None = None

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
        if strategy is None and self.static_cache is not None:
            return self.static_cache
        return make_cache(self.config["cache"] if strategy is None else strategy, self.config["window"])

    def encode_context(self, text: Tensor, image: Tensor | None = None) -> Context:
        """Prompt embeddings (B, L, D) and image tokens (B, L', D') -> what cross-attention reads."""
        embedder = self.condition_embedder
        attentions: list[Any] = [block.attn2 for block in self.blocks]
        hidden = embedder.text_embedder(text.to(self.dtype))
        texts = tuple(cross_kv(a, a.to_k, a.to_v, a.norm_k, hidden) for a in attentions)
        if embedder.image_embedder is None:
            return Context(texts)
        if image is None:
            raise ValueError(
                f"the transformer reads image tokens (image_dim={self.config['image_dim']}): got None; an "
                "environment gives them as 'image'."
            )
        tokens = embedder.image_embedder(image.to(self.dtype))
        images = tuple(cross_kv(a, a.add_k_proj, a.add_v_proj, a.norm_added_k, tokens) for a in attentions)
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
        if isinstance(cache, StaticCache) and (rows > 1 or min(num_clean, num_noisy) or torch.is_grad_enabled()):
            gradient = "with" if torch.is_grad_enabled() else "without"
            raise ValueError(
                f"{num_clean} clean frames and {rows} x {num_noisy} noisy ones in one pass, {gradient} gradient: a "
                "static cache takes one chunk, clean or noisy, without."
            )
        _, ph, pw = self.config["patch_size"]
        rotary = Rotary.of(self.rope, streams[0].shape[-2] // ph, streams[0].shape[-1] // pw)

        # All frames side by side, (B, Ft, C_in, h, w): the clean ones, then the rows of noisy ones.
        frames = torch.cat([x.flatten(1, 2) for x in streams], 1)
        steps = torch.zeros(batch, frames.shape[1], device=device)
        if noisy is not None:
            level = timestep if isinstance(timestep, Tensor) else torch.full((), timestep, device=device)
            steps[:, num_clean:] = level.to(steps).expand(batch, rows, num_noisy).flatten(1)
        position = [*range(num_clean), *rows * [*range(num_noisy)]]
        turn = rotary.at([cache.position + m for m in position])
        band = cache.band or Band(sys.maxsize)  # one chunk sees all that the cache shows
        layout = Layout(num_clean, rows, num_noisy, chunk, band, cache.unrotated)
        if self._graphed(cache, num_clean):
            assert self.graphs is not None and isinstance(cache, StaticCache)

            def run(frames: Tensor, steps: Tensor, cos: Tensor, sin: Tensor, context: Context) -> _Outputs:
                past.extend(() if past else map(cache.view, range(len(self.blocks))))  # where it is recorded
                return self._run(frames, steps, (cos, sin), context, layout, past.__getitem__)

            past: list[Any] = []
            key = (layout, cache.key, self.patch_embedding.weight.data_ptr())
            output, kept = self.graphs(run, (frames, steps, *turn), context, key)
            output = [x.clone() for x in output]  # the next pass overwrites it
        else:
            output, kept = self._run(frames, steps, turn, context, layout, cache.view)
        kept = [kvq for kvq in kept if kvq]
        return (output[0] if output else None), tuple(
            FrameEntry(
                tuple((k[:, i], v[:, i]) for k, v, *_ in kept),
                tuple(q[:, i] for _, _, *queries in kept for q in queries),
                rotary if cache.unrotated else None,
            )
            for i in range(num_clean)
        )

    def _graphed(self, cache: Cache, num_clean: int) -> bool:
        """Whether a pass is a graph: over the model's own static cache, with nothing to keep that lies elsewhere."""
        if self.graphs is None or not isinstance(cache, StaticCache) or self.static_cache is None:
            return False
        own = cache.buffer is self.static_cache.buffer
        return own and not (num_clean and not cache.num_frames) and not torch.is_autocast_enabled("cuda")

    def _run(
        self,
        frames: Tensor,
        steps: Tensor,
        turn: Turn,
        context: Context,
        layout: Layout,
        view: Callable[[int], LayerKV | Room | None],
    ) -> _Outputs:
        """A pass without anything that waits for the host.

        Args:
            frames: (B, Ft, C_in, h, w); steps: (B, Ft), their timesteps; turn: their rotary positions.
            view: what the cache shows to a layer.
        """
        x = self._embed_patches(frames.to(self.dtype))  # (B, Ft, n, D)
        temb, modulation = self._embed_time(steps)
        kept: list[tuple[Tensor, ...]] = []
        checkpoint = torch.is_grad_enabled() and self.gradient_checkpointing
        for i, block in enumerate(self.blocks):
            image = context.image[i] if context.image is not None else None
            args = (block, x, modulation, turn, layout, view(i), context.text[i], image)
            run = blocks.run_block if self.compiled is None or checkpoint else self.compiled
            x, kvq = self._gradient_checkpointing_func(run, *args) if checkpoint else run(*args)
            kept.append(kvq)
        if not layout.num_noisy:
            return [], kept
        noisy, level = (a[:, layout.num_clean :] for a in (frames, steps))
        output = self._unembed(x[:, layout.num_clean :], temb[:, layout.num_clean :], *frames.shape[-2:])
        if self.config["prediction_type"] == "sample":
            output = (noisy[:, :, : output.shape[2]].float() - output.float()) / (level / 1000)[..., None, None, None]
        return [output.unflatten(1, (layout.rows, layout.num_noisy))], kept

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
        """(B, Ft, n, D) -> (B, Ft, C, h, w)."""
        _, ph, pw = self.config["patch_size"]
        shift, scale = (self.scale_shift_table[:, None] + temb[:, :, None].float()).chunk(2, 2)  # (B, Ft, 1, D)
        out = self.proj_out((self.norm_out(x.float()) * (1 + scale) + shift).type_as(x))
        out = out.unflatten(2, (h // ph, w // pw)).unflatten(-1, (ph, pw, -1))  # (B, Ft, h', w', ph, pw, C)
        return out.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4)
