"""A published checkpoint as a pipeline folder that `gym.make(..., pipeline=...)` and every script here take.

    python experiments/convert.py --source self_forcing_dmd.pt --components Wan2.1-T2V-1.3B-Diffusers \
        --output models/self-forcing --chunk_size 3 --window 18 --timesteps 1000 937.5 833.3333 625
    python experiments/convert.py --source longlive_base.pt --lora lora.pt --components ... --output ...
    python experiments/convert.py --source Wan2.1-Fun-1.3B-InP --output models/fun-inp \
        --components SkyReels-V2-I2V-1.3B-540P-Diffusers

The input channels grow by columns of zeros, so the result first generates what its source generates;
`ardrag_rl.policies.convert` says which settings that takes. An environment goes frame by frame: `--chunk_size 1`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from trl import TrlParser

from ardrag_rl.policies.convert import convert


@dataclass
class ConvertArguments:
    """What to convert."""

    source: str = field(metadata={"help": "A folder or hub id with safetensors, a .safetensors or a .pt file."})
    output: str = field(metadata={"help": "A new folder."})
    components: str | None = field(
        default=None, metadata={"help": "The diffusers pipeline that has vae, text encoder and tokenizer."}
    )
    entry: str | None = field(default=None, metadata={"help": "Of a .pt file; else its generator_ema, or generator."})
    lora: str | None = field(default=None, metadata={"help": "An adapter to merge: LongLive's lora.pt."})
    lora_alpha: float | None = field(default=None, metadata={"help": "Of the adapter; its rank where not given."})
    window: int = field(default=7, metadata={"help": "Clean frames that a chunk looks back on."})
    chunk_size: int = field(default=1, metadata={"help": "Frames that are denoised together."})
    timesteps: list[float] | None = field(default=None, metadata={"help": "Of the steps; AR-Drag's where not given."})
    height: int = field(default=480, metadata={"help": "Of the video, px."})
    width: int = field(default=832, metadata={"help": "Of the video, px."})


def main() -> None:
    """Convert and say what came out."""
    (args,) = TrlParser((ConvertArguments,)).parse_args_and_config()
    policy = convert(**asdict(args))
    size = sum(p.numel() for p in policy.transformer.parameters())
    print(f"{args.output}: {size / 1e6:.0f} M parameters, {policy.transformer.config['in_channels']} input channels")


if __name__ == "__main__":
    main()
