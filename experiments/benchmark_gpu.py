"""What a real model's size costs: generation as users wait for it, and an update of GRPO. See `benchmark.py --gpu`.

- inference: seconds to the first frame, frames per second and peak memory of one video, for each size and chunk: with
  the immutable cache that training needs, with the static one, and with that compiled, on a GPU by CUDA graphs too.
  "alone" is the transformer without codec. With a checkout of Self-Forcing (`--self_forcing`, or ARDRAG_SELF_FORCING)
  its own code runs the same weights beside ours, with the same window; on a CPU, where both draw the same noise, the
  benchmark stops where latents differ. Memory is what a GPU has reserved, of its code without an autoencoder.
- update: rollout and learner of a group with LoRA and with all weights, each in a process of its own: seconds, and
  peak memory beside what `grpo.py --dry_run` says of it. Transformer only, as that is.

Weights are the pipeline's, or random where it has none: speed does not depend on them. On a machine without a GPU all
is small (`--sizes`, `--layers`, `--length`), and says little about one.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from measuring import MeasureArguments, Table
from self_forcing import STEPS, as_policy, is_checkout, random_pipeline, self_forcing

from ardrag_rl import hub
from ardrag_rl.codec import Codec
from ardrag_rl.control import Control
from ardrag_rl.envs.fit import parse_size
from ardrag_rl.flow import Kernel
from ardrag_rl.metrics.latency import Latency, measure_latency, median_seconds, timed
from ardrag_rl.policies import CausalWanTransformer3DModel, VideoPolicy
from ardrag_rl.policies.chunks import Conditions
from ardrag_rl.policies.generate import generate_latents
from ardrag_rl.policies.widen import widen
from ardrag_rl.rollout import Plan
from ardrag_rl.training.config import GRPOConfig
from ardrag_rl.training.estimate import Estimate, estimate, peak_memory, rollout_of
from ardrag_rl.training.lora import add_lora

PARTS = ("inference", "update")
GIB, NAN = 2**30, float("nan")
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc: or a process holds what it freed, and seems twice as large
Size = tuple[int, int]  # (height, width), pixels


@dataclass
class GpuArguments(MeasureArguments):
    """What is measured at a real model's size."""

    gpu: bool = field(default=False, metadata={"help": "Measure a real model's size: `inference` and `update`."})
    device: str | None = field(default=None, metadata={"help": "Unset: cpu; of --gpu, a GPU where there is one."})
    model: str = field(
        default="wan2.1-1.3b", metadata={"help": "Of --gpu: an embedded pipeline, a folder or a hub id."}
    )
    sizes: list[str] = field(
        default_factory=list, metadata={"help": "WIDTHxHEIGHT; unset: 832x480 and 640x368, without a GPU 96x64."}
    )
    chunks: list[int] = field(default_factory=lambda: [1, 3], metadata={"help": "Frames denoised together."})
    length: int | None = field(default=None, metadata={"help": "Latent frames; unset: 21, without a GPU 12."})
    layers: int | None = field(default=None, metadata={"help": "Unset: all, without a GPU 4."})
    attention: str | None = field(default=None, metadata={"help": "diffusers' attention backend; unset: PyTorch's."})
    compile: bool = field(default=True, metadata={"help": "Also measure compiled blocks."})
    group_size: int | None = field(default=None, metadata={"help": "Videos of an update; unset: 8, without a GPU 2."})
    self_forcing: str | None = field(
        default_factory=lambda: os.environ.get("ARDRAG_SELF_FORCING"), metadata={"help": "A checkout of its code."}
    )


class GpuBench:
    """The measurements."""

    def __init__(self, args: GpuArguments) -> None:
        if args.self_forcing and not is_checkout(args.self_forcing):
            raise SystemExit(f"--self_forcing {args.self_forcing}: no checkout of Self-Forcing.")
        self.args = args
        self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if gpu else torch.float32
        self.sizes = [parse_size(name) for name in args.sizes or (["832x480", "640x368"] if gpu else ["96x64"])]
        self.length = args.length or (21 if gpu else 12)
        self.layers = args.layers or (None if gpu else 4)
        self.group = args.group_size or (8 if gpu else 2)
        self.policy = random_policy(args.model, self.layers, torch.device("meta"), self.dtype)
        self.where = device_name(self.device)
        self._prompts = TemporaryDirectory()
        self.window = int(self.policy.transformer.config["window"])
        print(f"{self.where}: {self.length} latent frames, window {self.window}, {self.dtype}", flush=True)

    def inference(self) -> Iterator[Table]:
        """Latency, speed and memory."""
        for height, width in self.sizes:
            rows = []
            for chunk in self.args.chunks:
                for name, latency in self._variants((height, width), chunk):
                    cells = (latency.transformer_first, latency.transformer_fps, latency.first_frame, latency.fps)
                    shown = [f"{x:.3g}" if x == x else "" for x in (*cells, latency.peak_memory)]
                    rows.append((str(chunk), name, *shown))
                    print("  ".join((f"{width}x{height}", *rows[-1])), flush=True)
            steps = len(STEPS) if self.args.self_forcing else self.policy.schedule.num_steps
            title = f"One video of {width}x{height}, {steps} steps, {self._about()}"
            columns = ("chunk", "", "first frame alone, s", "frames/s alone", "first frame, s", "frames/s", "peak, GiB")
            yield Table(title, columns, tuple(rows))

    def update(self) -> Iterator[Table]:
        """Seconds and memory of an update, and what was estimated."""
        rows = []
        for lora in (True, False):
            settings = Update(self.args.model, self.layers, self.sizes[0], self.length, self.group, lora)
            said = settings.estimated(self.device, self.dtype)
            (acted, acting), (learned, learning) = (self._apart(part, settings) for part in (roll_out, learn))
            weights = 4 * said.parameters / GIB  # float32, computed with in `dtype`
            learner = (said.model_bytes + said.activation_bytes) / GIB
            cells = acted, learned * self.group, acting, weights + said.rollout_bytes / GIB, learning, learner
            rows.append(("LoRA" if lora else "all weights", *(f"{x:.3g}" for x in cells)))
            print("  ".join(rows[-1]), flush=True)
        columns = ("", "rollout, s", "learner, s", "rollout, GiB", "estimated", "learner, GiB", "estimated")
        height, width = self.sizes[0]
        yield Table(f"An update on a group of {self.group} of {width}x{height}, {self._about()}", columns, tuple(rows))

    def _apart(self, part: Callable[..., float], settings: Update) -> tuple[float, float]:
        """Seconds and GiB of a part, in a process of its own."""
        given = (part, torch.get_num_threads(), settings, self.device, self.dtype)

        def run() -> tuple[float, float]:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                return pool.apply(watched, given)

        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # it is the other process's
            return run()
        with mock.patch.dict(os.environ, GIVE_BACK):
            memory = run()[1]
        return run()[0], memory  # again: to give memory back at once takes time

    def _about(self) -> str:
        layers = len(self.policy.transformer.blocks)
        return f"{self.length} latent frames, {layers} layers, {str(self.dtype)[6:]}, {self.where}"

    def _variants(self, size: Size, chunk: int) -> Iterator[tuple[str, Latency]]:
        if self.args.self_forcing and self.length % chunk == 0:  # it has no shorter last chunk
            policy, theirs = self._beside(size, chunk)
            yield "Self-Forcing's code", theirs
        else:
            policy = random_policy(self.args.model, self.layers, self.device, self.dtype, chunk_size=chunk)
        codec = random_codec(self.args.model, self.device, self.dtype, self._prompts.name)
        control = Control(torch.full((codec.pixel_frames(self.length), 1, 3), 0.5), "", torch.zeros(3, *size))
        if self.args.attention:
            policy.transformer.set_attention_backend(self.args.attention)

        gpu = self.device.type == "cuda"
        variants = {"immutable cache": lambda: policy, "static cache": lambda: policy.for_inference(cuda_graphs=False)}
        if gpu:
            variants["static, CUDA graphs"] = policy.for_inference
        if self.args.compile:
            name = "static, compiled, CUDA graphs" if gpu else "static, compiled"
            variants[name] = lambda: policy.for_inference(compile=True)
        for name, make in variants.items():
            torch._dynamo.reset()  # of another chunk and size
            yield name, measure_latency(make(), codec, control, self.args.repeats)

    def _beside(self, size: Size, chunk: int) -> tuple[VideoPolicy, Latency]:
        """Self-Forcing's pipeline with random weights, and our policy of the same."""
        codec = Codec.from_pretrained(self.args.model, "meta")
        shape, geometry = codec.latent_shape(*size), dict(self.policy.transformer.config)
        _, ph, pw = geometry["patch_size"]
        g = torch.Generator().manual_seed(0)
        text = torch.randn(1, *codec.text_shape, generator=g).to(self.device, self.dtype)
        noise = torch.randn(1, self.length, *shape, generator=g).to(self.device, self.dtype)
        given = Conditions(noise.float(), torch.zeros_like(noise, dtype=torch.float32), noise.float(), text)
        with (
            self_forcing(self.args.self_forcing or "", self.dtype) as theirs,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            pipeline = random_pipeline(
                theirs,
                geometry,
                text,
                tokens=shape[1] // ph * (shape[2] // pw),
                chunk=chunk,
                local=self.window + chunk,
                frames=self.length,
            )
            gpu = self.device.type == "cuda"
            if gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(self.device)

            @torch.no_grad()
            def run(frames: int) -> torch.Tensor:
                torch.manual_seed(1)
                return pipeline.inference(noise[:, :frames], [""], return_latents=True)[1]

            repeats = self.args.repeats
            first, whole = (median_seconds(lambda n=n: run(n), self.device, repeats) for n in (chunk, self.length))
            peak = torch.cuda.max_memory_reserved(self.device) / GIB if gpu else NAN
            latency = Latency(NAN, NAN, first, codec.pixel_frames(self.length) / whole, peak)
            policy = as_policy(pipeline, self.window, chunk)
            cast(policy.transformer, self.dtype).to(self.device)
            if not gpu:
                plan = Plan((Kernel("renoise"),) * policy.schedule.num_steps)
                ours = generate_latents(policy, plan, given, torch.Generator().manual_seed(1))[:, :, -1]
                difference = float((run(self.length) - ours).abs().max())
                if not difference < 1e-3:
                    raise SystemExit(f"Self-Forcing's latents and ours differ by {difference:.1e}.")
        return policy, latency


@dataclass(frozen=True)
class Update:
    """One to be measured; LoRA or all weights."""

    model: str
    layers: int | None
    size: Size
    length: int
    group: int
    lora: bool
    narrow: bool = False  # one head, one layer: to warm up

    def policy(self, device: torch.device) -> VideoPolicy:
        """As `grpo.py` has it with wan2.1-1.3b.yaml: activation checkpointing, LoRA of rank 64."""
        changes = dict(num_attention_heads=1, attention_head_dim=16, ffn_dim=16) if self.narrow else {}
        policy = random_policy(self.model, self.layers, device, torch.float32, **changes)
        policy.transformer.enable_gradient_checkpointing()
        if self.lora:
            add_lora(policy, 64, 128)
        return policy

    def config(self, device: torch.device, dtype: torch.dtype) -> GRPOConfig:
        """Micro-batches of one video."""
        return GRPOConfig(
            num_generations=self.group,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=self.group,
            groups_per_batch=1,
            use_peft=self.lora,
            bf16=dtype == torch.bfloat16,
            use_cpu=device.type == "cpu",
            report_to="none",
        )

    def estimated(self, device: torch.device, dtype: torch.dtype) -> Estimate:
        """Of `--dry_run`."""
        config = self.config(device, dtype)
        codec = Codec.from_pretrained(self.model, "meta")
        shapes = codec.latent_shape(*self.size), codec.text_shape, codec.image_shape
        return estimate(self.policy(torch.device("meta")), config, self.length, *shapes)

    def given(self, batch: int, device: torch.device) -> Conditions:
        """Noise for all."""
        codec = Codec.from_pretrained(self.model, "meta")
        noise = torch.randn(batch, self.length, *codec.latent_shape(*self.size), device=device)
        image = None if codec.image_shape is None else torch.randn(batch, *codec.image_shape, device=device)
        return Conditions(noise, noise, noise, torch.randn(batch, *codec.text_shape, device=device), image)


def watched(
    part: Callable[..., float], threads: int, settings: Update, device: torch.device, dtype: torch.dtype
) -> Any:
    """Seconds of a part, and the GiB that it took."""
    torch.set_num_threads(threads)
    small = replace(settings, size=(32, 32), length=2, group=1, layers=1, narrow=True)
    # what libraries take is not the policy's
    part(small, device, dtype)
    before = 0.0 if device.type == "cuda" else peak_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = part(settings, device, dtype)
    return seconds, peak_memory(device) - before


def roll_out(settings: Update, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of a group's rollout."""
    policy, given = settings.policy(device), settings.given(settings.group, device)
    plan = Plan.selective(0, Kernel("cps", 0.6))
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return timed(lambda: generate_latents(policy, plan, given), device)


def learn(settings: Update, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of a micro-batch, forward and backward; an optimizer's step, counted to none, follows the first."""
    policy, plan = settings.policy(device), Plan.selective(0, Kernel("cps", 0.6))
    rollout = rollout_of(plan, policy.schedule, settings.given(1, device)).to(device)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], fused=True)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = policy(rollout).log_prob(rollout.actions).mean()
        loss.backward()

    timed(step, device)
    optimizer.step()
    optimizer.zero_grad()
    seconds = timed(step, device)
    optimizer.step()
    return seconds


def random_policy(
    pipeline: str, layers: int | None, device: torch.device, dtype: torch.dtype, **changes: Any
) -> VideoPolicy:
    """A pipeline's policy, with its weights where it has them and keeps its geometry; else with random ones."""
    path = hub.pipeline_path(pipeline)
    config = dict(CausalWanTransformer3DModel.load_config(path / "transformer"))
    if layers is None and any((path / "transformer").glob("*.safetensors")):
        policy = VideoPolicy.from_pretrained(path, device, dtype)
        policy.transformer.register_to_config(**changes)
        return policy
    config |= {"num_layers": layers or config["num_layers"], **changes}
    torch.manual_seed(0)
    with torch.device(device):
        transformer = CausalWanTransformer3DModel.from_config(config)
    return VideoPolicy(widen(cast(transformer, dtype)), hub.load_schedule(path), path)


def cast(transformer: Any, dtype: torch.dtype) -> Any:
    """In place, all but what `from_pretrained` leaves in float32."""
    for name, p in transformer.named_parameters():
        if not set(transformer._keep_in_fp32_modules) & set(name.split(".")):
            p.data = p.data.to(dtype)
    return transformer


def random_codec(pipeline: str, device: torch.device, dtype: torch.dtype, folder: str) -> Codec:
    """A pipeline's codec, or one of random weights, which knows the empty prompt alone: it is kept in a folder."""
    path = hub.pipeline_path(pipeline)
    if any((path / "vae").glob("*.safetensors")):
        return Codec.from_pretrained(path, device, {"dtype": str(dtype)[6:]})
    import diffusers
    from transformers import AutoTokenizer

    vae_class = getattr(diffusers, hub.read_json(path / "vae" / "config.json")["_class_name"])
    torch.manual_seed(0)
    vae = vae_class.from_config(vae_class.load_config(path / "vae"))
    vae = vae if dtype == vae.dtype else vae.to(dtype)
    tokenizer = AutoTokenizer.from_pretrained(path / "tokenizer")
    codec = Codec(vae, path / "text_encoder", tokenizer, device, {"text_cache": folder})
    assert codec.text.cache is not None
    codec.text.cache.put("", torch.randn(20, codec.text_shape[1]))
    return codec


def device_name(device: torch.device) -> str:
    """In words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
