"""Makes the tiny pipeline from nothing, stage by stage: codec, text encoder, causal base, few-step base.

    python experiments/pretrain.py --output_dir runs/tiny                    # all stages, resumes where it stopped
    python experiments/pretrain.py --output_dir runs/tiny --stages codec     # one of them

Every stage is a `transformers.Trainer` run with its own checkpoints under the output folder; the pipeline grows in
`<output_dir>/pipeline`. What departs from the textbook: the few-step stage is not distribution matching but flow
matching behind the model's own history, which the sprites allow because a drag path all but determines their video.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import TrainingArguments
from trl import TrlParser

from ardrag_rl import hub
from ardrag_rl.codec import Codec
from ardrag_rl.distill.fit import fit
from ardrag_rl.distill.flow_matching import FlowMatching, LatentClips, OwnHistory
from ardrag_rl.distill.muon import muon
from ardrag_rl.distill.text_encoder import save_text_encoder
from ardrag_rl.envs.sprites import LEVELS, SPLITS, Sprites
from ardrag_rl.flow import Kernel, Schedule
from ardrag_rl.policies import CausalWanTransformer3DModel, VideoPolicy
from ardrag_rl.policies.compiled import compile_blocks


@dataclass
class PretrainArguments:
    """What to build; sizes of the defaults are those of the embedded tiny pipeline."""

    output_dir: str = field(default="runs/tiny", metadata={"help": "Folder of the pipeline and the checkpoints."})
    stages: list[str] = field(
        default_factory=lambda: ["codec", "text", "base", "few_step"], metadata={"help": "Stages to run, in order."}
    )
    size: int = field(default=64, metadata={"help": "Side of the frames in pixels."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights and the data."})
    bf16: bool = field(default=False, metadata={"help": "bfloat16 autocast; for GPUs and CPUs that multiply in it."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU even where there is a GPU."})
    latent_channels: int = field(default=12, metadata={"help": "Channels of a latent frame."})
    codec_steps: int = field(default=2000, metadata={"help": "Updates of the codec."})
    codec_batch: int = field(default=8, metadata={"help": "Clips per codec update, 6 images each."})
    codec_lr: float = field(default=1e-3, metadata={"help": "Peak rate of the codec."})
    clips: int = field(default=5000, metadata={"help": "Encoded gentle clips, the base's training set."})
    dim: int = field(default=128, metadata={"help": "Width of the transformer."})
    heads: int = field(default=4, metadata={"help": "Attention heads."})
    layers: int = field(default=4, metadata={"help": "Transformer blocks."})
    patch: int = field(default=2, metadata={"help": "Side of a token in latent pixels."})
    window: int = field(default=7, metadata={"help": "Clean frames a frame can look back on."})
    base_from: str | None = field(default=None, metadata={"help": "Pipeline whose weights the base starts from."})
    base_steps: int = field(default=1600, metadata={"help": "Updates of block-causal flow matching."})
    base_batch: int = field(default=8, metadata={"help": "Clips per update of the base."})
    base_lr: float = field(default=3e-3, metadata={"help": "Peak rate of the base."})
    base_rows: int = field(default=2, metadata={"help": "Noisy versions of a clip that share its clean history."})
    few_step_steps: int = field(default=400, metadata={"help": "Updates behind the model's own history."})
    few_step_batch: int = field(default=8, metadata={"help": "Clips per update behind it."})
    few_step_lr: float = field(default=1e-3, metadata={"help": "Peak rate behind it."})
    compile: bool = field(default=False, metadata={"help": "torch.compile the transformer block (2.5x on a CPU)."})
    save_steps: int = field(default=250, metadata={"help": "Updates between checkpoints."})


def train_codec(args: PretrainArguments, pipeline: Path) -> None:
    """Stage 1: a 4x image autoencoder that convolves at reduced resolution (unshuffle first)."""
    from ardrag_rl.distill.codec_training import CodecImages, CodecLoss, image_autoencoder, start_linear

    torch.manual_seed(args.seed)
    vae = image_autoencoder(args.latent_channels, (8, 24, 96), blocks=2)
    data = CodecImages(args.codec_steps * args.codec_batch, args.size, args.seed)
    start_linear(vae, torch.cat([data[i]["pixels"] for i in range(200)]))
    train(
        args, "codec", CodecLoss(vae), data, args.codec_steps, args.codec_batch, args.codec_lr, compile_all=args.compile
    )
    vae.save_pretrained(pipeline / "vae")


def make_text_encoder(args: PretrainArguments, pipeline: Path) -> None:
    """Stage 2: the words of the sprites' prompts."""
    sources = [Sprites(level, split) for level in LEVELS for split in SPLITS]
    save_text_encoder(pipeline, (source[i].control.prompt for source in sources for i in range(500)), 32, 32, args.seed)


def train_base(args: PretrainArguments, pipeline: Path) -> None:
    """Stage 3: block-causal flow matching with clean history, from random weights or those of a pipeline."""
    codec, data = _clips(args, pipeline)
    model = _new_transformer(args, codec)
    if args.base_from is not None:
        model.load_state_dict(VideoPolicy.from_pretrained(args.base_from).transformer.state_dict())
    policy = VideoPolicy(model, hub.load_schedule(pipeline), pipeline)
    if args.compile:
        compile_blocks()
    loss = FlowMatching(policy, rows=args.base_rows)
    optimizer = partial(muon, loss.parameters(), args.base_lr)
    train(args, "base", loss, data, args.base_steps, args.base_batch, args.base_lr, optimizer)
    policy.save_pretrained(pipeline)


def _new_transformer(args: PretrainArguments, codec: Codec) -> CausalWanTransformer3DModel:
    channels, (_, text_dim) = codec.latent_channels, codec.text_shape
    torch.manual_seed(args.seed)
    model = CausalWanTransformer3DModel(
        patch_size=(1, args.patch, args.patch),
        num_attention_heads=args.heads,
        attention_head_dim=args.dim // args.heads,
        in_channels=3 * channels + codec.temporal_stride,
        out_channels=channels,
        text_dim=text_dim,
        freq_dim=64,
        ffn_dim=3 * args.dim,
        num_layers=args.layers,
        window=args.window,
        prediction_type="sample",  # a narrow model cannot pass the noise of its patches through
    )
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    return model


def train_few_step(args: PretrainArguments, pipeline: Path) -> None:
    """Stage 4: flow matching behind the model's own history, so that errors do not add up over the frames."""
    _, data = _clips(args, pipeline)
    policy = VideoPolicy.from_pretrained(pipeline)
    if args.compile:
        compile_blocks()
    kernels = (Kernel("ode"), Kernel("cps", 0.6), Kernel("renoise"))
    model = OwnHistory(policy, kernels, rows=args.base_rows)
    optimizer = partial(muon, model.parameters(), args.few_step_lr)
    train(args, "few_step", model, data, args.few_step_steps, args.few_step_batch, args.few_step_lr, optimizer)
    policy.save_pretrained(pipeline)


def _clips(args: PretrainArguments, pipeline: Path) -> tuple[Codec, LatentClips]:
    codec = Codec.from_pretrained(pipeline, "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu")
    source = Sprites("gentle", "train", None, args.size, args.size, args.seed)
    return codec, LatentClips(Path(args.output_dir) / "clips", codec, source, args.clips)


def train(
    args: PretrainArguments,
    stage: str,
    model: torch.nn.Module,
    data: torch.utils.data.Dataset,
    steps: int,
    batch: int,
    rate: float,
    optimizer: Callable[[], torch.optim.Optimizer] | None = None,
    compile_all: bool = False,
) -> None:
    """One resumable Trainer run; the optimizer is AdamW where nothing makes another."""
    settings = TrainingArguments(
        output_dir=str(Path(args.output_dir) / stage),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, steps // 10),
        weight_decay=0.01,
        max_grad_norm=1.0,
        bf16=args.bf16,
        use_cpu=args.use_cpu or not torch.cuda.is_available(),
        seed=args.seed,
        logging_steps=25,
        save_steps=args.save_steps,
        save_total_limit=2,
        report_to="tensorboard",
        dataloader_num_workers=1,
        remove_unused_columns=False,
        torch_compile=compile_all,
    )
    fit(model, data, settings, optimizer)


def main() -> None:
    (args,) = TrlParser((PretrainArguments,)).parse_args_and_config()
    pipeline = Path(args.output_dir) / "pipeline"
    hub.save_schedule(pipeline, Schedule())
    hub.save_index(pipeline, args.size, args.size)
    stages = {"codec": train_codec, "text": make_text_encoder, "base": train_base, "few_step": train_few_step}
    for stage in args.stages:
        if stage not in stages:
            raise ValueError(f"stage {stage!r} is unknown; choose from {', '.join(stages)}.")
        stages[stage](args, pipeline)


if __name__ == "__main__":
    main()
