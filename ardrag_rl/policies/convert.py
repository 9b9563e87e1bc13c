"""A published checkpoint becomes a pipeline folder of ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ardrag_rl import hub
from ardrag_rl.flow import Schedule
from ardrag_rl.policies.policy import VideoPolicy
from ardrag_rl.policies.weights import load_transformer
from ardrag_rl.policies.widen import widen


def convert(
    source: str | Path,
    output: str | Path,
    components: str | Path | None = None,
    *,
    timesteps: Sequence[float] | None = None,
    height: int = 480,
    width: int = 832,
    **how: Any,
) -> VideoPolicy:
    """Writes what `VideoPolicy.from_pretrained` and `Codec.from_pretrained` load.

    While the control is absent (no points: zero latents), the result generates what its source generates from the same
    noise, prompt and, where it reads them, condition and image tokens; `widen` has the channels. What that takes:

    - Self-Forcing, CausVid, Causal-Forcing: their `chunk_size` (3, frame-wise 1), `timesteps` (1000, 937.5, 833.3333,
      625; CausVid 1000, 757, 522), the `renoise` kernel, and a `window` over all earlier frames (18 of 21). Where they
      set `local_attn_size`, that counts the chunk: `window` = `local_attn_size` - `chunk_size`.
    - LongLive: the same, until its local attention rolls; the sink that it keeps from there is not a rolling window's.
    - Wan2.1, SkyReels-V2 and Fun see all frames at once: a `chunk_size` of as many frames. A smaller one makes them
      causal, which they were not trained for: a start for distillation.
    - Text to video: the reference image has no effect until it is trained.
    - Image to video: mask and reference of frame 0 are as an environment gives them. For later frames the sources
      condition on the latents of grey frames (Fun-Control: on zeros), and so are reproduced when `reference` holds
      those; an environment puts Eq. 6's noise there, which they have not seen.

    Args:
        source: of `load_transformer`.
        output: a folder that is not there yet.
        components: the pipeline whose vae, text_encoder and tokenizer (and image_encoder, image_processor, where the
            transformer takes image tokens) are copied: an embedded name, a folder, a hub id; None for the source.
        timesteps: of the few-step schedule; None for the components' own, or AR-Drag's.
        height, width: px, the pipeline's resolution.
        how: of `load_transformer`: entry, lora, lora_alpha, window, chunk_size.

    Raises:
        FileExistsError: output is there.
        FileNotFoundError, ValueError: of `load_transformer`; components are no pipeline, or one for another model.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"output={str(output)!r} is there already: name a new folder.")
    local = Path(source).expanduser()
    if components is None and local.exists() and not (local / "model_index.json").is_file():
        raise ValueError(f"{str(source)!r} is no whole pipeline: give as components one with vae and text encoder.")
    origin = hub.pipeline_path(source if components is None else components)
    schedule = hub.load_schedule(origin) if timesteps is None else Schedule(tuple(timesteps))
    policy = VideoPolicy(widen(load_transformer(source, **how)), schedule, origin)
    vae, text = (hub.read_json(origin / part / "config.json") for part in ("vae", "text_encoder"))
    has = vae.get("z_dim", vae.get("latent_channels")), text.get("d_model")
    needs = policy.latent_channels, policy.transformer.config["text_dim"]
    if has != needs:
        raise ValueError(
            f"the components in {str(origin)!r} give (latent channels, text width) {has}, and the transformer takes "
            f"{needs}: name the pipeline that it was made for."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=f"{output.name}.") as folder:  # never half of it
        partial = Path(folder) / output.name
        policy.save_pretrained(partial)
        index = hub.read_json(partial / "model_index.json")
        hub.write_json(partial / "model_index.json", index | {"sample_height": height, "sample_width": width})
        partial.rename(output)
    return VideoPolicy(policy.transformer, schedule, output)
