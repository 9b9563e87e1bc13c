"""VideoMDP: generating a video as a Markov decision process, for a batch of videos (paper Eq. 8, 11 and 12).

State     s[m,n] = (c_0..c_m, t_n, X[m,n]): clean frames before m, frame m after n steps, initial noise after m.
Action    a[m,n] = x[m,n+1], the next latent of frame m.
Transition deterministic; (m, N) is (m+1, 0) until the last frame is clean.
Reward    on the action that makes frame m clean: the weighted scores of its pixel frames; otherwise 0.

A departure from the letter of the paper: all noise is drawn at reset, so it is part of the state.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from ardrag_rl.control import Control
from ardrag_rl.envs.task import Task, TaskSource
from ardrag_rl.envs.tasks import TaskSpec, fit, make_tasks
from ardrag_rl.flow import Schedule
from ardrag_rl.rewards.reward import check_scores

if TYPE_CHECKING:
    from ardrag_rl.codec import Codec, CodecSettings, Stream
    from ardrag_rl.rewards import RewardSession, WeightedReward

ACTION_BOUND = 10.0  # for clients that demand a finite Box; nothing is clipped
CACHED_TASKS = 64

Observation = dict[str, np.ndarray]


@dataclass(frozen=True)
class Conditions:
    """One task as the policy sees it.

    Attributes:
        trajectory: (F, C, h, w), the encoded heat maps of all frames.
        image: (C, h, w), the encoded reference image.
        text: (L, D), the prompt's embedding.
        tokens: (1, L', D'), of the reference image, where the pipeline has an image encoder.
    """

    trajectory: Tensor
    image: Tensor
    text: Tensor
    tokens: Tensor | None


@dataclass(frozen=True)
class Outcome:
    """What one action brought to B episodes in lockstep.

    Attributes:
        rewards: (B,) float64.
        terms: name -> (B,) float64, unweighted, on frame ends; otherwise None.
        terminated: whether the last frame is clean now.
    """

    rewards: np.ndarray
    terms: dict[str, np.ndarray] | None
    terminated: bool


class VideoMDP:
    """What stays the same over episodes: the codec, the noise levels, the rewards, the tasks and the sizes.

    Args:
        codec: pixels, heat maps and prompts to latents and back.
        schedule: the N noise levels of a frame.
        rewards: what scores pixel frames, each with its weight.
        source: where tasks come from; they are fitted to the sizes below.
        num_frames: F = M+1, in latent frames.
        height, width: in pixels.

    Raises:
        ValueError: the size is no multiple of the codec's stride.
    """

    def __init__(
        self,
        codec: Codec,
        schedule: Schedule,
        rewards: Sequence[WeightedReward],
        source: TaskSource,
        num_frames: int,
        height: int,
        width: int,
    ) -> None:
        self.codec, self.schedule, self.rewards, self.source = codec, schedule, tuple(rewards), source
        self.num_frames, self.height, self.width = num_frames, height, width
        self.latent_shape: tuple[int, int, int] = tuple(codec.latent_shape(height, width))  # type: ignore[assignment]
        self.pixel_frames: int = codec.pixel_frames(num_frames)
        self._cache: OrderedDict[str, tuple[Task, Conditions]] = OrderedDict()

    @classmethod
    def from_pipeline(
        cls,
        pipeline: str | Path,
        tasks: TaskSpec,
        rewards: Any = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        device: str | torch.device = "cpu",
        codec_settings: CodecSettings | Mapping[str, Any] | None = None,
    ) -> VideoMDP:
        """Loads what an environment's arguments name; None is the pipeline's size, the source's length.

        Raises:
            ValueError: something named is unknown or does not fit, or num_frames is below 1.
        """
        from ardrag_rl.codec import Codec
        from ardrag_rl.hub import load_schedule, pipeline_path, pipeline_size
        from ardrag_rl.rewards import make_rewards

        if num_frames is not None and num_frames < 1:
            raise ValueError(f"num_frames={num_frames}: expected at least 1 latent frame.")
        path = pipeline_path(pipeline)
        height, width = pipeline_size(path, height, width)
        made = make_rewards(rewards)
        codec = Codec.from_pretrained(path, device, codec_settings)
        codec.latent_shape(height, width)  # refuses a wrong size before any task is made
        source = make_tasks(tasks, num_frames, height, width)
        num_frames = num_frames if num_frames is not None else source.num_frames
        length = codec.pixel_frames(num_frames)
        if length != source.num_frames:  # a video codec: clips are longer than latents
            source = make_tasks(tasks, length, height, width)
        return cls(codec, load_schedule(path), made, source, num_frames, height, width)

    @property
    def num_steps(self) -> int:
        """N, denoising steps per frame."""
        return self.schedule.num_steps

    @property
    def observation_space(self) -> spaces.Dict:
        """Of one episode; the design's table."""
        video = (self.num_frames, *self.latent_shape)

        def real(shape: tuple[int, ...]) -> spaces.Box:
            return spaces.Box(-np.inf, np.inf, shape, np.float32)

        entries: dict[str, spaces.Space] = {
            "latents": real(video),
            "trajectory": real(video),
            "reference": real(video),
            "text": real(tuple(self.codec.text_shape)),
            "frame": spaces.Box(0, self.num_frames - 1, (1,), np.int64),
            "step": spaces.Box(0, self.num_steps, (1,), np.int64),
            "timestep": spaces.Box(0.0, 1000.0, (1,), np.float32),
        }
        if self.codec.image_shape is not None:
            entries["image"] = real(self.codec.image_shape)
        return spaces.Dict(entries)

    @property
    def action_space(self) -> spaces.Box:
        """Of one episode: the next latent."""
        return spaces.Box(-ACTION_BOUND, ACTION_BOUND, self.latent_shape, np.float32)

    def fit(self, task: Task) -> Task:
        """The task at this environment's resolution and number of frames."""
        return fit(task, self.pixel_frames, self.height, self.width)

    def latent(self, value: Any, batch: int | None = None, what: str = "action") -> Tensor:
        """A user's latent as a float32 CPU tensor of its own, (C, h, w) or (batch, C, h, w).

        Raises:
            ValueError: another shape, not real numbers, or NaN or infinity.
        """
        shape = self.latent_shape if batch is None else (batch, *self.latent_shape)
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = value.float() if value.is_floating_point() else value  # bfloat16 has no numpy dtype
        array = np.asarray(value)
        wanted = f"expected real numbers of shape {shape}: the next latent of the current frame"
        if array.dtype.kind not in "fiu":
            raise ValueError(f"the {what} has dtype {array.dtype}; {wanted}.")
        if array.shape != shape:
            raise ValueError(f"the {what} has shape {array.shape}; {wanted}.")
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            bad = int(np.size(array) - np.isfinite(array).sum())
            raise ValueError(f"the {what} has {bad} of {array.size} values that are NaN or infinite; {wanted}, finite.")
        return torch.from_numpy(array)

    def encode(self, task: Task) -> Conditions:
        """The conditions of a fitted task; a group of rows with one task encodes once."""
        known = self._cache.get(task.id)
        if known is not None and _same(known[0], task):
            self._cache.move_to_end(task.id)
            return known[1]
        control = task.control
        # one task at a time: a batch of another size would give other last digits
        conditions = Conditions(
            trajectory=self.codec.encode_heat_maps([control], self.height, self.width)[0].float().cpu(),
            image=self.codec.encode(control.image[None, None])[0, 0].float().cpu(),
            text=self.codec.encode_text([control.prompt])[0].float().cpu(),
            tokens=self.codec.encode_images(control.image[None]),
        )
        self._cache[task.id] = (task, conditions)
        while len(self._cache) > CACHED_TASKS:
            self._cache.popitem(last=False)
        return conditions

    def reset(self, tasks: Sequence[Task], seeds: Sequence[int]) -> Episodes:
        """Starts episodes that will advance together.

        Args:
            tasks: B of them, fitted.
            seeds: B of them; each draws its own row's noise, so a row alone and in a batch gets the same numbers.
        """
        conditions = [self.encode(task) for task in tasks]
        latents, references = [], []
        for seed, row in zip(seeds, conditions, strict=True):
            generator = torch.Generator().manual_seed(int(seed))
            latents.append(torch.randn((self.num_frames, *self.latent_shape), generator=generator))
            noise = torch.randn((self.num_frames - 1, *self.latent_shape), generator=generator)
            references.append(torch.cat([row.image[None], noise]))
        controls = [task.control for task in tasks]
        tokens = [row.tokens for row in conditions if row.tokens is not None]
        return Episodes(
            mdp=self,
            tasks=tuple(tasks),
            latents=torch.stack(latents),
            trajectory=torch.stack([row.trajectory for row in conditions]),
            reference=torch.stack(references),
            text=torch.stack([row.text for row in conditions]),
            image=torch.cat(tokens).cpu() if tokens else None,
            decoder=self.codec.decoder(),
            sessions=tuple(w.reward.start(controls) if w.reward.causal else None for w in self.rewards),
        )


@dataclass
class Episodes:
    """B episodes in lockstep: the state s[m,n] of each, and the decoder's and rewards' running state.

    `step` changes it; `select` copies it, so that neither changes the other.

    Attributes:
        tasks: B of them.
        latents: (B, F, C, h, w), X[m,n].
        trajectory: (B, F, C, h, w), of all frames; an observation shows it up to frame m.
        reference: (B, F, C, h, w), the encoded image, then fixed noise (Eq. 6).
        text: (B, L, D).
        image: (B, L', D'), tokens of the reference image, where the pipeline has an image encoder.
        decoder: decodes clean frames as they come.
        sessions: of the causal rewards; None for the others, which score the whole video at its end.
        frame, step_index: m and n.
        pixels: (B, t, 3, H, W) in [0, 1], the last decoded frame; None before the first.
        past: all decoded frames, kept only for rewards that need the whole video.
        broken: a reward failed in the middle of a frame; only a reset helps.
    """

    mdp: VideoMDP
    tasks: tuple[Task, ...]
    latents: Tensor
    trajectory: Tensor
    reference: Tensor
    text: Tensor
    image: Tensor | None
    decoder: Stream
    sessions: tuple[RewardSession | None, ...]
    frame: int = 0
    step_index: int = 0
    pixels: Tensor | None = None
    past: tuple[Tensor, ...] = ()
    broken: bool = False

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def terminated(self) -> bool:
        """Whether the last frame is clean."""
        return self.step_index == self.mdp.num_steps

    @property
    def controls(self) -> list[Control]:
        """B of them."""
        return [task.control for task in self.tasks]

    def observe(self) -> Observation:
        """The design's table with a batch dimension B; arrays of its own."""
        b, m, n = len(self), self.frame, self.step_index
        trajectory = np.zeros(tuple(self.trajectory.shape), np.float32)
        trajectory[:, : m + 1] = self.trajectory[:, : m + 1].numpy()
        return {
            "latents": self.latents.numpy().copy(),
            "trajectory": trajectory,
            "reference": self.reference.numpy().copy(),
            "text": self.text.numpy().copy(),
            "frame": np.full((b, 1), m, np.int64),
            "step": np.full((b, 1), n, np.int64),
            "timestep": np.full((b, 1), 1000 * self.mdp.schedule.levels[n], np.float32),
            **({} if self.image is None else {"image": self.image.numpy().copy()}),
        }

    def step(self, actions: Tensor) -> Outcome:
        """x[m,n+1] = a[m,n]; a frame that is clean then is decoded and scored, one call for all rows.

        Args:
            actions: (B, C, h, w) float32, finite (`VideoMDP.latent` sees to that).

        Raises:
            gymnasium.error.ResetNeeded: the episodes have ended.
            RewardError: a reward failed; these episodes must be reset.
        """
        if self.terminated or self.broken:
            why = "a reward failed in it" if self.broken else "the last frame is clean"
            raise gym.error.ResetNeeded(f"the episode has ended ({why}); call reset() before the next step().")
        self.latents[:, self.frame] = actions
        self.step_index += 1
        zeros = np.zeros(len(self))
        if self.step_index < self.mdp.num_steps:
            return Outcome(zeros, None, False)
        last = self.frame == self.mdp.num_frames - 1
        self.broken = True  # until all rewards have answered
        terms = self._score(last)
        self.broken = False
        if not last:
            self.frame, self.step_index = self.frame + 1, 0
        total = sum((w.weight * terms[w.reward.name] for w in self.mdp.rewards), zeros)
        return Outcome(total, terms, last)

    def set_noise(self, noise: Tensor) -> None:
        """Replaces the initial noise x[m,0] of the current frame, (B, C, h, w).

        Raises:
            ValueError: the frame is not at its first step any more.
        """
        if self.step_index != 0:
            raise ValueError(
                f"the noise of frame {self.frame} can be set at its first step only; it is at step {self.step_index}."
            )
        self.latents[:, self.frame] = noise

    def select(self, rows: Sequence[int] | None = None) -> Episodes:
        """An independent copy of these rows; None for all."""
        rows = list(range(len(self)) if rows is None else rows)
        return replace(
            self,
            tasks=tuple(self.tasks[i] for i in rows),
            latents=self.latents[rows],
            trajectory=self.trajectory[rows],
            reference=self.reference[rows],
            text=self.text[rows],
            image=None if self.image is None else self.image[rows],
            decoder=self.decoder.select(rows),
            sessions=tuple(None if s is None else s.select(rows) for s in self.sessions),
            pixels=None if self.pixels is None else self.pixels[rows],
            past=tuple(p[rows] for p in self.past),
        )

    @torch.no_grad()
    def _score(self, last: bool) -> dict[str, np.ndarray]:
        """Decodes the clean frame m and gives name -> (B,), what each reward pays for it.

        A latent frame's score is the mean over its pixel frames. A reward that needs the whole video pays at the end
        what a causal one would have paid on the way: the sum of the frames' scores.
        """
        pixels = self.decoder.append(self.latents[:, self.frame])
        self.pixels = pixels
        whole = any(session is None for session in self.sessions)
        if whole:
            self.past = (*self.past, pixels)
        terms: dict[str, np.ndarray] = {}
        for weighted, session in zip(self.mdp.rewards, self.sessions, strict=True):
            scores: tuple[Tensor, ...] = ()
            if session is not None:
                ask = partial(session.append, pixels)
                scores = (check_scores(weighted.reward, ask, tuple(pixels.shape[:2])),)
            elif last:
                video = torch.cat(self.past, 1)
                ask = partial(weighted.reward, video, self.controls)
                lengths = [p.shape[1] for p in self.past]
                scores = check_scores(weighted.reward, ask, tuple(video.shape[:2])).split(lengths, 1)
            terms[weighted.reward.name] = sum((s.mean(1).double().numpy() for s in scores), np.zeros(len(self)))
        return terms


def _same(a: Task, b: Task) -> bool:
    """Whether two tasks of one id say the same."""
    return a is b or (
        a.control.prompt == b.control.prompt
        and torch.equal(a.control.points, b.control.points)
        and torch.equal(a.control.image, b.control.image)
    )
