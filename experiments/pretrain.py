"""Makes the tiny pipeline from nothing, stage by stage: codec, text encoder, causal base, few-step base.

    python experiments/pretrain.py --output_dir runs/tiny                    # all stages, resumes where it stopped
    python experiments/pretrain.py --output_dir runs/tiny --stages codec     # one of them

Every stage is a `transformers.Trainer` run with its own checkpoints under the output folder; the pipeline grows in
`<output_dir>/pipeline`. What departs from the textbook: the few-step stage is not distribution matching but regression
on the model's own rollouts, which the sprites allow because a drag path all but determines their video.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from trl import TrlParser

from ardrag_rl import hub
from ardrag_rl.codec import Codec
from ardrag_rl.distill.flow_matching import FlowMatching, LatentClips, OwnRollouts
from ardrag_rl.envs.sprites import LEVELS, Sprites
from ardrag_rl.flow import Kernel, Schedule
from ardrag_rl.policies import CausalWanTransformer3DModel, VideoPolicy, transformer


@dataclass
class PretrainArguments:
    """What to build; sizes of the defaults are those of the embedded tiny pipeline."""

    output_dir: str = field(default="runs/tiny", metadata={"help": "Folder of the pipeline and the checkpoints."})
    stages: list[str] = field(
        default_factory=lambda: ["codec", "text", "base", "few_step"], metadata={"help": "Stages to run, in order."}
    )
    size: int = field(default=64, metadata={"help": "Side of the frames in pixels."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights and the data."})
    bf16: bool = field(default=True, metadata={"help": "bfloat16 autocast."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU even where there is a GPU."})
    latent_channels: int = field(default=12, metadata={"help": "Channels of a latent frame."})
    codec_steps: int = field(default=2000, metadata={"help": "Updates of the codec."})
    codec_batch: int = field(default=8, metadata={"help": "Clips per codec update, 6 images each."})
    codec_lr: float = field(default=1e-3, metadata={"help": "Peak rate of the codec."})
    clips: int = field(default=24000, metadata={"help": "Encoded gentle clips, the base's training set."})
    dim: int = field(default=192, metadata={"help": "Width of the transformer."})
    heads: int = field(default=4, metadata={"help": "Attention heads."})
    layers: int = field(default=5, metadata={"help": "Transformer blocks."})
    patch: int = field(default=4, metadata={"help": "Side of a token in latent pixels."})
    window: int = field(default=7, metadata={"help": "Clean frames a frame can look back on."})
    base_steps: int = field(default=8000, metadata={"help": "Updates of block-causal flow matching."})
    base_batch: int = field(default=16, metadata={"help": "Clips per update of the base."})
    base_lr: float = field(default=1e-3, metadata={"help": "Peak rate of the base."})
    few_step_steps: int = field(default=800, metadata={"help": "Updates on the model's own rollouts."})
    few_step_batch: int = field(default=24, metadata={"help": "Clips per update on own rollouts."})
    few_step_lr: float = field(default=3e-4, metadata={"help": "Peak rate on own rollouts."})
    compile: bool = field(default=False, metadata={"help": "torch.compile the transformer block (2.5x on a CPU)."})
    save_steps: int = field(default=250, metadata={"help": "Updates between checkpoints."})


def train_codec(args: PretrainArguments, pipeline: Path) -> None:
    """Stage 1: a 4x image autoencoder that convolves at reduced resolution (unshuffle first)."""
    from ardrag_rl.distill.codec_training import CodecImages, CodecLoss, image_autoencoder, start_linear

    torch.manual_seed(args.seed)
    vae = image_autoencoder(args.latent_channels, (8, 24, 96), blocks=2)
    data = CodecImages(args.codec_steps * args.codec_batch, args.size, args.seed)
    start_linear(vae, torch.cat([data[i]["pixels"] for i in range(200)]))
    fit(args, "codec", CodecLoss(vae), data, args.codec_steps, args.codec_batch, args.codec_lr, args.compile)
    vae.save_pretrained(pipeline / "vae")


def make_text_encoder(args: PretrainArguments, pipeline: Path) -> None:
    """Stage 2: a word tokenizer and a small random, frozen UMT5 encoder.

    The reference image shows what the prompt says, so the encoder only has to tell prompts apart.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words: set[str] = set()
    split = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    for level in LEVELS:
        for name in ("train", "heldout"):
            source = Sprites(level, name)
            for i in range(500):
                words.update(w for w, _ in split.pre_tokenize_str(source[i].control.prompt))
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    ).save_pretrained(pipeline / "tokenizer")
    torch.manual_seed(args.seed)
    config = UMT5Config(
        vocab_size=len(vocabulary), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    UMT5EncoderModel(config).save_pretrained(pipeline / "text_encoder")


def train_base(args: PretrainArguments, pipeline: Path) -> None:
    """Stage 3: block-causal flow matching with clean history, from random weights."""
    codec, data = _clips(args, pipeline)
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
        ffn_dim=8 * args.dim // 3,
        num_layers=args.layers,
        window=args.window,
        prediction_type="sample",  # 16 tokens a frame carry as many numbers as the model is wide
    )
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    policy = VideoPolicy(model, hub.load_schedule(pipeline), pipeline)
    _compile(args)
    fit(args, "base", FlowMatching(policy), data, args.base_steps, args.base_batch, args.base_lr)
    policy.save_pretrained(pipeline)


def train_few_step(args: PretrainArguments, pipeline: Path) -> None:
    """Stage 4: regression of the base's own three-step rollouts, with its own history, onto the true frames."""
    _, data = _clips(args, pipeline)
    policy = VideoPolicy.from_pretrained(pipeline)
    _compile(args)
    kernels = (Kernel("ode"), Kernel("cps", 0.6), Kernel("renoise"))
    model = OwnRollouts(policy, kernels)
    fit(args, "few_step", model, data, args.few_step_steps, args.few_step_batch, args.few_step_lr)
    policy.save_pretrained(pipeline)


def _clips(args: PretrainArguments, pipeline: Path) -> tuple[Codec, LatentClips]:
    codec = Codec.from_pretrained(pipeline, "cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu")
    source = Sprites("gentle", "train", None, args.size, args.size, args.seed)
    return codec, LatentClips(Path(args.output_dir) / "clips", codec, source, args.clips)


def _compile(args: PretrainArguments) -> None:
    """Compiles the block for training only: in rollouts the cache grows, and every length would be compiled anew."""
    if args.compile:
        eager = transformer._run_block
        compiled = torch.compile(eager, dynamic=False)
        transformer._run_block = lambda *a: (compiled if torch.is_grad_enabled() else eager)(*a)


def fit(
    args: PretrainArguments,
    stage: str,
    model: torch.nn.Module,
    data: torch.utils.data.Dataset,
    steps: int,
    batch: int,
    rate: float,
    compile_all: bool = False,
) -> None:
    """One resumable Trainer run."""
    folder = Path(args.output_dir) / stage
    settings = TrainingArguments(
        output_dir=str(folder),
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
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer = Trainer(model=model, args=settings, train_dataset=data)
    trainer.train(resume_from_checkpoint=last)
    model.eval()


def main() -> None:
    (args,) = TrlParser((PretrainArguments,)).parse_args_and_config()
    pipeline = Path(args.output_dir) / "pipeline"
    hub.save_schedule(pipeline, Schedule())
    hub.save_index(
        pipeline,
        args.size,
        args.size,
        {
            "transformer": ("ardrag_rl.policies", "CausalWanTransformer3DModel"),
            "vae": ("diffusers", "AutoencoderDC"),
            "text_encoder": ("transformers", "UMT5EncoderModel"),
            "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
            "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        },
    )
    stages = {"codec": train_codec, "text": make_text_encoder, "base": train_base, "few_step": train_few_step}
    for stage in args.stages:
        if stage not in stages:
            raise ValueError(f"stage {stage!r} is unknown; choose from {', '.join(stages)}.")
        stages[stage](args, pipeline)


if __name__ == "__main__":
    main()
