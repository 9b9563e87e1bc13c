"""Flow matching: of a bidirectional teacher, of a causal base with clean history, and behind its own history."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ardrag_rl.codec import Codec
from ardrag_rl.envs.task import TaskSource
from ardrag_rl.flow import Kernel, interpolate, velocity
from ardrag_rl.hub import read_json, write_json
from ardrag_rl.policies import VideoPolicy
from ardrag_rl.policies.chunks import Conditions
from ardrag_rl.policies.generate import generate_latents
from ardrag_rl.rollout import Plan


class ClipSource(TaskSource, Protocol):
    """Tasks whose true video is known."""

    def video(self, index: int) -> Tensor:
        """(T, 3, H, W) float32 in [0, 1]."""
        ...


class LatentClips(Dataset[dict[str, Tensor]]):
    """Encoded clips, made once and kept on disk: encoding costs more than a training step.

    A clip is its `latents` and `trajectory` (F, C, h, w), its `text` (L, D), and its first frame's `image` tokens
    (L', D') where the codec makes them; .npy files of float16, that are read as needed.

    Args:
        folder: where the arrays are; they are made where they are missing, from where that was interrupted.
        codec: encodes frames, heat maps and prompts.
        source: the clips.
        num_clips: how many of them.

    Raises:
        ValueError: the folder holds clips of another number, length or size.
    """

    def __init__(self, folder: Path, codec: Codec, source: ClipSource, num_clips: int) -> None:
        frames, shape = codec.latent_frames(source.num_frames), codec.latent_shape(source.height, source.width)
        video = (num_clips, frames, *shape)
        shapes = {"latents": video, "trajectory": video, "text": (num_clips, *codec.text_shape)}
        if codec.image_shape is not None:
            shapes["image"] = (num_clips, *codec.image_shape)
        progress = folder / "progress.json"
        if not all((folder / f"{name}.npy").is_file() for name in shapes):
            folder.mkdir(parents=True, exist_ok=True)
            progress.unlink(missing_ok=True)
            for name, wanted in shapes.items():
                np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, wanted)
        done = read_json(progress)["clips"] if progress.is_file() else 0
        mode: Any = "r+" if done < num_clips else "r"
        self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode=mode) for name in shapes}
        for name, wanted in shapes.items():
            if (found := self.arrays[name].shape) != wanted:
                raise ValueError(
                    f"{str(folder)!r} holds {name} of shape {found}, and {wanted} are asked for: it was encoded with "
                    "other settings. Delete it, or give another folder."
                )
        batch = max(1, BATCH_PIXELS // (source.num_frames * source.height * source.width))
        with tqdm(
            total=num_clips, initial=done, desc="encoding clips", mininterval=5, disable=done >= num_clips
        ) as bar:
            for first in range(done, num_clips, batch):
                rows = range(first, min(first + batch, num_clips))
                self._encode(codec, source, rows)
                write_json(progress, {"clips": rows.stop})
                bar.update(len(rows))

    def __len__(self) -> int:
        return len(self.arrays["latents"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.asarray(x[index], np.float32)) for name, x in self.arrays.items()}

    def _encode(self, codec: Codec, source: ClipSource, rows: range) -> None:
        """Fills these rows, on disk before it returns."""
        controls = [source[i].control for i in rows]
        encoded = {
            "latents": codec.encode(torch.stack([source.video(i) for i in rows])),
            "trajectory": codec.encode_heat_maps(controls, source.height, source.width),
            "text": codec.encode_text([c.prompt for c in controls]),
            "image": codec.encode_images(torch.stack([c.image for c in controls])),
        }
        for name, array in self.arrays.items():
            array[rows.start : rows.stop] = encoded[name].cpu().numpy()  # type: ignore[union-attr]
            array.flush()


BATCH_PIXELS = 2**21  # that are encoded at once: 32 clips of the embedded size, one of Wan's


def reference_of(latents: Tensor) -> Tensor:
    """(B, F, C, h, w): the encoded image at frame 0, fresh Gaussian noise after (Eq. 6)."""
    reference = torch.randn_like(latents)
    reference[:, 0] = latents[:, 0]
    return reference


def bounded_weight(t: Tensor) -> Tensor:
    """Of a squared velocity error at level t: 1, less below t = 0.45.

    A velocity's error is that of x0_hat over t, so that plain flow matching is dominated by levels where there is next
    to nothing left to do. As in min-SNR weighting, an error of x0_hat weighs 1 / t^2 but at most 5.
    """
    return t.square() / t.square().clip(min=0.2)


class FlowMatching(nn.Module):
    """Flow matching (Eq. 7): clean history before every chunk, every chunk at its own noise level.

    A transformer of chunks as long as the video has no history: that is the bidirectional teacher.

    Args:
        policy: its transformer is trained.
        history_noise: at most this much noise is mixed into the history, so that small errors do not add up.
        text_dropout: share of videos that see no prompt, for guidance.
        control_dropout: share of videos that see no drag path (zero latents), for guidance.
        rows: noisy versions of each video that share one pass over its clean history.
        schedule_share: share of noise levels that are the schedule's; the others are uniform.
        lowest: of the uniform noise levels; None is the schedule's.
    """

    def __init__(
        self,
        policy: VideoPolicy,
        history_noise: float = 0.1,
        text_dropout: float = 0.1,
        control_dropout: float = 0.0,
        rows: int = 1,
        schedule_share: float = 0.75,
        lowest: float | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.history_noise, self.rows = policy, history_noise, rows
        self.text_dropout, self.control_dropout = text_dropout, control_dropout
        self.schedule_share, self.lowest = schedule_share, lowest

    def forward(
        self, latents: Tensor, trajectory: Tensor, text: Tensor, image: Tensor | None = None
    ) -> dict[str, Tensor]:
        """latents, trajectory: (B, F, C, h, w); text: (B, L, D); image: (B, L', D') or None."""
        batch, frames = latents.shape[:2]
        told = torch.rand(batch, 1, 1, device=text.device) > self.text_dropout
        if self.control_dropout:
            dragged = torch.rand(batch, 1, 1, device=text.device) > self.control_dropout
            # both at once too, as often as the rarer: what guidance leads away from has neither
            some = torch.rand(batch, 1, 1, device=text.device) > min(self.text_dropout, self.control_dropout)
            told, dragged = told & some, dragged & some
            trajectory = trajectory * dragged[..., None, None]
        text = text * told
        chunk = self.policy.transformer.config["chunk_size"]
        starts = torch.arange(frames) // chunk  # each frame's chunk
        t = self.noise_levels((batch, self.rows, int(starts[-1]) + 1), latents.device)[..., starts]
        shape = (-1, self.rows, *(-1,) * 4)
        reference, target = reference_of(latents), latents[:, None].expand(shape)  # (B, rows, F, C, h, w)
        eps = torch.randn_like(target)
        x = interpolate(target, eps, t[..., None, None, None])
        history = self.history(latents, reference, trajectory, text, image)
        model = self.policy.transformer
        seen = int(starts[-1]) * chunk  # no chunk looks back on the last
        v, _ = model(
            model.encode_context(text, image),
            self.policy.frame_inputs(history, reference, trajectory)[:, :seen] if seen else None,
            self.policy.frame_inputs(x, reference[:, None].expand(shape), trajectory[:, None].expand(shape)),
            1000 * t,
        )
        error = (v.float() - velocity(target, eps)).square()
        return {"loss": (error * bounded_weight(t)[..., None, None, None]).mean()}

    def noise_levels(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Drawn from the schedule's and from between them, in [0, 1]."""
        levels = torch.tensor(self.policy.schedule.levels[:-1], device=device)
        t = levels[torch.randint(len(levels), shape, device=device)]
        lowest = levels[-1] if self.lowest is None else self.lowest
        between = lowest + (1 - lowest) * torch.rand_like(t)
        return torch.where(torch.rand_like(t) < 1 - self.schedule_share, between, t)

    def history(
        self, latents: Tensor, reference: Tensor, trajectory: Tensor, text: Tensor, image: Tensor | None = None
    ) -> Tensor:
        """(B, F, C, h, w): the clean frames that later ones look back on; here the true ones, with a little noise."""
        noise = self.history_noise * torch.rand(len(latents), 1, 1, 1, 1, device=latents.device)
        return latents + noise * torch.randn_like(latents)


class OwnHistory(FlowMatching):
    """Few-step training: flow matching behind a history that the model made itself, in N steps a frame.

    Errors that would add up over the frames are seen and undone. The noisy frames are still the true ones with noise,
    so that a prediction keeps depending on the noisy frame, through which alone a policy can explore. This is
    regression, not distribution matching: it suits data whose control all but determines the video.

    Args:
        policy, text_dropout, rows: as in `FlowMatching`.
        kernels: one is drawn per batch, so that the model meets the samplers it will be used with.
    """

    def __init__(
        self, policy: VideoPolicy, kernels: tuple[Kernel, ...], text_dropout: float = 0.1, rows: int = 1
    ) -> None:
        super().__init__(policy, 0.0, text_dropout, rows=rows)
        self.kernels = kernels

    def history(
        self, latents: Tensor, reference: Tensor, trajectory: Tensor, text: Tensor, image: Tensor | None = None
    ) -> Tensor:
        """(B, F, C, h, w): clean frames of the policy's own rollouts from these conditions."""
        kernel = self.kernels[int(torch.randint(len(self.kernels), ()))]
        plan = Plan((kernel,) * (self.policy.schedule.num_steps - 1) + (Kernel("ode"),))
        given = Conditions(torch.randn_like(latents), trajectory, reference, text, image)
        return generate_latents(self.policy, plan, given)[:, :, -1]
