"""VideoPolicy: observations in, a Gaussian over the next latent out."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from ardrag_rl import hub
from ardrag_rl.flow import GaussianStep, Schedule
from ardrag_rl.policies.cache import RollingCache, SinkCache
from ardrag_rl.policies.compiled import compiled_block
from ardrag_rl.policies.cuda_graphs import CudaGraphs
from ardrag_rl.policies.session import Session
from ardrag_rl.policies.static_cache import StaticCache
from ardrag_rl.policies.strategies import Strategy
from ardrag_rl.policies.transformer import CausalWanTransformer3DModel
from ardrag_rl.policies.weights import check_keys
from ardrag_rl.policies.widen import widen
from ardrag_rl.rollout import Rollout


class VideoPolicy(nn.Module):
    """The policy pi(a[m,n] | s[m,n]) that a causal video transformer and a kernel make (paper Eq. 8-11).

    Args:
        transformer: predicts velocities.
        schedule: the N noise levels of a frame.
        source: the pipeline folder it came from; `save_pretrained` copies the other components from there.

    Raises:
        ValueError: the transformer has too few input channels to take a control.
    """

    def __init__(
        self, transformer: CausalWanTransformer3DModel, schedule: Schedule | None = None, source: Path | None = None
    ) -> None:
        super().__init__()
        channels, given = int(transformer.config["out_channels"]), int(transformer.config["in_channels"])
        if given <= 3 * channels:
            raise ValueError(
                f"the transformer takes in_channels={given}: expected more than {3 * channels}, that is {channels} "
                "each of latent, reference and trajectory, and a mask. Widen its patch embedding by zeros (`widen`)."
            )
        self.transformer = transformer
        self.schedule = schedule or Schedule()
        self.source = source

    @classmethod
    def from_pretrained(
        cls, pipeline: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> VideoPolicy:
        """Loads the transformer and schedule of a pipeline: an embedded name, a folder or a hub id.

        Pipelines of diffusers' own Wan2.1 and SkyReels-V2 classes are taken too, their input channels widened
        (`widen`); other checkpoints by way of `convert`. On the device "meta" no weights are read.

        Raises:
            ValueError: the pipeline is unknown or its files do not fit together; all keys that do not are listed.
        """
        path = hub.pipeline_path(pipeline)
        hub.read_json(path / "transformer" / "config.json")  # a missing one is otherwise looked for on the hub
        where = f"the transformer of {str(path)!r}"
        if torch.device(device).type == "meta":
            with torch.device("meta"):
                config = CausalWanTransformer3DModel.load_config(path / "transformer")
                transformer = CausalWanTransformer3DModel.from_config(config)
            return cls(widen(transformer), hub.load_schedule(path), path)
        hub.check_weights(path / "transformer")
        try:
            transformer, info = CausalWanTransformer3DModel.from_pretrained(
                path / "transformer",
                torch_dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, all at once
            )
        except (NotImplementedError, RuntimeError, ValueError) as error:  # diffusers' words for another geometry
            raise ValueError(f"{where} does not fit its config.json: {error}") from error
        misshaped = [f"{key} {tuple(has)}, expected {tuple(want)}" for key, has, want in info["mismatched_keys"]]
        check_keys(f"{where} does not fit its config.json", info["missing_keys"], info["unexpected_keys"], misshaped)
        return cls(widen(transformer), hub.load_schedule(path), path).to(device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a whole pipeline: this transformer and schedule, the other components copied from the source."""
        folder = Path(folder)
        if self.source is not None and folder.resolve() != self.source.resolve():
            for name in ("vae", "text_encoder", "tokenizer", "image_encoder", "image_processor"):
                if (self.source / name).is_dir():
                    shutil.copytree(self.source / name, folder / name, dirs_exist_ok=True)
            index = hub.read_json(self.source / "model_index.json") | hub.OWN
            hub.write_json(folder / "model_index.json", index)
        self.transformer.save_pretrained(folder / "transformer")
        config = hub.read_json(folder / "transformer" / "config.json")
        config.pop("_name_or_path", None)  # diffusers writes where the weights were loaded from: a path of this machine
        hub.write_json(folder / "transformer" / "config.json", config)
        hub.save_schedule(folder, self.schedule)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
        """Uploads the whole pipeline; returns the commit's address."""
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))

    def with_chunks(self, chunk_size: int, schedule: Schedule | None = None, window: int | None = None) -> VideoPolicy:
        """A float32 copy whose transformer denoises `chunk_size` frames together.

        As many as a video has make it bidirectional, a teacher.

        Args:
            chunk_size: frames.
            schedule, window: None for the same.
        """
        config = {k: v for k, v in self.transformer.config.items() if not k.startswith("_")}  # diffusers' notes
        config |= {"chunk_size": chunk_size, **({} if window is None else {"window": window})}
        model = CausalWanTransformer3DModel(**config)
        model.load_state_dict(self.transformer.state_dict())
        return VideoPolicy(model, schedule or self.schedule, self.source).to(self.device)

    def for_inference(self, compile: bool = False, cuda_graphs: bool | None = None) -> VideoPolicy:
        """A policy of the same weights that generates fast: a static cache, written in place, and on a GPU one launch
        for a whole pass.

        For one video (or batch) at a time: where another is begun, one that goes on afterwards recomputes its history,
        or raises. Not for training. Weights may change in place; after any other change (device, dtype, adapters added
        or switched, the attention kernel of `transformer.set_attention_backend`, diffusers' own) take a new one. The
        first video takes longer, in which every length of history is met for the first time.

        Args:
            compile: also torch.compile the blocks, which takes a minute more of the first video.
            cuda_graphs: None for where there is CUDA. Autocast does without them: load the weights in bfloat16.

        Raises:
            ValueError: the transformer's caching strategy is another one than "rolling", "sink" or "static"; or hooks
                (offloading) have replaced its forward.
        """
        own = self.transformer.new_cache()
        if type(own) not in (RollingCache, SinkCache, StaticCache):
            raise ValueError(f"cache={self.transformer.config['cache']!r}: only 'rolling' and 'sink' can be static.")
        if "forward" in vars(self.transformer):
            raise ValueError("the transformer's forward was replaced by hooks, as offloading does: remove them first.")
        graphs = self.device.type == "cuda" if cuda_graphs is None else cuda_graphs
        if graphs and self.device.type != "cuda":
            raise ValueError(f"cuda_graphs=True: the policy is on {str(self.device)!r}, move it to a GPU first.")
        transformer = copy.copy(self.transformer)  # its parts are shared
        transformer.static_cache = StaticCache(self.transformer.config["window"], getattr(own, "sink", 0))
        transformer.graphs = CudaGraphs() if graphs else None
        transformer.compiled = compiled_block() if compile else None
        return VideoPolicy(transformer, self.schedule, self.source)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.transformer.parameters()).device

    @property
    def latent_channels(self) -> int:
        """C."""
        return int(self.transformer.config["out_channels"])

    def session(self, batch_size: int, cache: Strategy | None = None) -> Session:
        """A KV-cached session for `batch_size` running episodes; another caching strategy is for inference."""
        return Session(self, batch_size, cache)

    def frame_inputs(self, latents: Tensor, reference: Tensor, trajectory: Tensor, first: int = 0) -> Tensor:
        """What the transformer sees of F frames, the first of them frame `first` of its video (Eq. 6).

        Args:
            latents, reference, trajectory: (..., F, C, h, w).

        Returns:
            (..., F, C + r + C + C, h, w): latent, mask (1 where the reference is the image), reference, trajectory.
        """
        channels = int(self.transformer.config["in_channels"]) - 3 * self.latent_channels
        mask = latents.new_zeros(*latents.shape[:-3], channels, *latents.shape[-2:])
        if first == 0:
            mask[..., 0, :, :, :].fill_(1)
        return torch.cat([latents, mask, reference, trajectory], -3)

    def forward(self, rollout: Rollout) -> GaussianStep:
        """Replays every scored transition of a rollout in ONE block-causal pass over [clean frames | noisy frames].

        This is what a learner calls, so that data parallelism and gradient hooks see it.

        Returns:
            a step with mean (B, F, S, C, h, w) and std (S, 1, 1, 1).

        Raises:
            ValueError: the rollout's plan scores no step, or the transformer's cache cannot be replayed.
        """
        plan = rollout.plan
        if not plan.scored:
            raise ValueError("the rollout's plan has no scored step: collect it with Plan.selective or Plan.every.")
        rollout = rollout.to(self.device)
        levels = rollout.schedule.levels
        states = rollout.states.transpose(1, 2)  # (B, S, F, C, h, w)
        shape = (-1, states.shape[1], *(-1,) * 4)
        noisy = self.frame_inputs(
            states, rollout.reference[:, None].expand(shape), rollout.trajectory[:, None].expand(shape)
        )
        clean = None
        if rollout.num_frames > 1:  # no frame looks back on the last
            clean = self.frame_inputs(rollout.clean, rollout.reference, rollout.trajectory)[:, :-1]
        timestep = torch.tensor([1000 * levels[n] for n in plan.scored])[:, None]
        context = self.transformer.encode_context(rollout.text, rollout.image)
        velocity, _ = self.transformer(context, clean, noisy, timestep)
        steps = [
            plan.kernels[n].step(states[:, i], velocity[:, i], levels[n], levels[n + 1])
            for i, n in enumerate(plan.scored)
        ]
        std = torch.stack([torch.as_tensor(step.std, device=self.device) for step in steps])
        return GaussianStep(torch.stack([step.mean for step in steps], 2), std[:, None, None, None])
