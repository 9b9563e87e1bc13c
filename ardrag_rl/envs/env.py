"""ARDragEnv: the video MDP as a Gymnasium environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from ardrag_rl.envs.mdp import Episodes, Observation, VideoMDP
from ardrag_rl.envs.order import TaskOrder, checked_index, checked_task, chosen
from ardrag_rl.envs.render import draw_drag
from ardrag_rl.envs.task import Task, TaskSource
from ardrag_rl.envs.tasks import TaskSpec

if TYPE_CHECKING:
    from ardrag_rl.codec import Codec, CodecSettings
    from ardrag_rl.flow import Schedule
    from ardrag_rl.rewards import WeightedReward


@dataclass(frozen=True)
class Snapshot:
    """The whole state of an environment's episode(s); later steps do not change it.

    Attributes:
        cohorts: each the rows of an environment (all of them 0 for a single one) and their episodes.
    """

    cohorts: tuple[tuple[tuple[int, ...], Episodes], ...]


class ARDragEnv(gym.Env[Observation, NDArray[np.float32]]):
    """
    ## Description
    A video is generated frame by frame, each frame in N denoising steps, while a person drags points in it. The agent
    is the denoiser: it sees the latents so far and gives the next latent of the current frame. This is the Markov
    decision process of AR-Drag (Zhao et al., 2025, Eq. 8, 11 and 12). "Frame" means latent frame; the codec turns it
    into one or more pixel frames.

    ## Action Space
    `Box(-10, 10, (C, h, w), float32)`: `x[m,n+1]`, frame m after one step more. The bounds are for clients that demand
    finite ones; nothing is clipped. Other real dtypes are cast to float32. A wrong shape, NaN or infinity is a
    `ValueError` and leaves the state as it was.

    ## Observation Space
    A `Dict` of Boxes, with M+1 frames, N steps, prompts of L tokens of D numbers:

    | key          | shape           | dtype   | what |
    |--------------|-----------------|---------|------|
    | `latents`    | (M+1, C, h, w)  | float32 | clean frames before m, frame m after n steps, noise after m |
    | `trajectory` | (M+1, C, h, w)  | float32 | encoded control up to frame m, zeros after |
    | `reference`  | (M+1, C, h, w)  | float32 | the encoded reference image, then fixed noise (Eq. 6) |
    | `text`       | (L, D)          | float32 | prompt embedding |
    | `frame`      | (1,)            | int64   | m |
    | `step`       | (1,)            | int64   | n |
    | `timestep`   | (1,)            | float32 | 1000 t_n |
    | `image`      | (L', D')        | float32 | tokens of the reference image, if the pipeline has them |

    ## Rewards
    0, except on the step that completes a frame: the weighted sum of the rewards' scores of its pixel frames, averaged
    over them. `info["reward_terms"]` then holds each unweighted term. A reward that needs the whole video pays at the
    end the sum of its frames' scores.

    ## Starting State
    `reset` takes a task (a drag path, a prompt, a reference image) and draws the initial noise of all frames and the
    reference noise of the later ones. `options={"task": task}` or `{"index": i}` chooses the task; otherwise the next
    one comes. A seed restarts both the order of tasks and the noise; the noise does not depend on the task.

    ## Episode End
    After exactly (M+1) N steps the episode terminates; it is never truncated. The terminal observation shows the clean
    video, with frame=M, step=N, timestep=0. Stepping on raises `gymnasium.error.ResetNeeded`.

    ## Arguments
    - `pipeline="tiny"`: an embedded pipeline, a folder in diffusers layout, or a hub id.
    - `tasks="sprites-hard"`: a name, "name:heldout", a JSON-lines manifest, a folder of clips, tasks, or a task source.
    - `rewards=None`: weights by name, or a list of names or `Reward` objects; None for the aesthetic and motion ones.
    - `num_frames=None`: latent frames of an episode; None for the task source's own number.
    - `height=None`, `width=None`: in pixels; None for the pipeline's own size.
    - `device="cpu"`: of the codec; observations are numpy.
    - `render_mode=None`: "rgb_array" draws the last frame with the drag path on it.
    - `codec_settings=None`: memory and speed of the codec by name, `ardrag_rl.codec.CodecSettings`; None is exact.

    `snapshot` and `restore` fork, rewind and regenerate; `set_noise` replaces the noise of the frame that starts.

    ## Version History
    - v0: first version.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 8}

    def __init__(
        self,
        pipeline: str | Path = "tiny",
        tasks: TaskSpec = "sprites-hard",
        rewards: Any = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        device: str | torch.device = "cpu",
        render_mode: str | None = None,
        codec_settings: CodecSettings | Mapping[str, Any] | None = None,
    ) -> None:
        check_render_mode(render_mode)
        self.render_mode = render_mode
        self.mdp = VideoMDP.from_pipeline(pipeline, tasks, rewards, num_frames, height, width, device, codec_settings)
        self.observation_space = self.mdp.observation_space  # type: ignore[assignment]
        self.action_space = self.mdp.action_space  # type: ignore[assignment]
        self._episodes: Episodes | None = None
        self._order: TaskOrder | None = None

    @property
    def task(self) -> Task:
        """The task of the running episode, fitted to this environment."""
        return self._running().tasks[0]

    @property
    def source(self) -> TaskSource:
        """Where tasks come from."""
        return self.mdp.source

    @property
    def codec(self) -> Codec:
        """Pixels, heat maps and prompts to latents and back."""
        return self.mdp.codec

    @property
    def schedule(self) -> Schedule:
        """The N noise levels."""
        return self.mdp.schedule

    @property
    def rewards(self) -> tuple[WeightedReward, ...]:
        """What scores the frames."""
        return self.mdp.rewards

    @property
    def num_frames(self) -> int:
        """M+1, latent frames of an episode."""
        return self.mdp.num_frames

    @property
    def num_steps(self) -> int:
        """N, denoising steps of a frame."""
        return self.mdp.num_steps

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts an episode; see the class page."""
        task, index = chosen(options)
        super().reset(seed=seed)
        if self._order is None or seed is not None:
            self._order = TaskOrder(self.mdp.source, self.np_random)
        noise = self._order.noise_seed()
        if task is None:
            at = self._order.next() if index is None else checked_index(index, self.mdp.source)
            task = self.mdp.source[at]
        fitted = self.mdp.fit(checked_task(task))
        self._episodes = self.mdp.reset([fitted], [noise])
        return self._observe(), {"task": fitted.id}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Takes `x[m,n+1]`; see the class page."""
        episodes = self._running()
        outcome = episodes.step(self.mdp.latent(action)[None])
        info: dict[str, Any] = {"task": episodes.tasks[0].id}
        if outcome.terms is not None:
            info["reward_terms"] = {name: float(v[0]) for name, v in outcome.terms.items()}
        return self._observe(), float(outcome.rewards[0]), outcome.terminated, False, info

    def set_noise(self, noise: Any) -> Observation:
        """Replaces `x[m,0]`, the initial noise of the frame that is about to be denoised.

        Args:
            noise: (C, h, w), real and finite.

        Returns:
            the observation that follows.

        Raises:
            ValueError: a wrong value, or the frame is not at its first step.
        """
        self._running().set_noise(self.mdp.latent(noise, what="noise")[None])
        return self._observe()

    def snapshot(self) -> Snapshot:
        """The whole state of the episode: latents, m and n, the decoder's and the rewards' running state."""
        return Snapshot((((0,), self._running().select()),))

    def restore(self, state: Snapshot) -> Observation:
        """Goes back to a snapshot, any number of times, also one of another environment of the same shapes.

        The order of tasks is not part of an episode and goes on. An environment fresh from `gym.make` takes steps only
        after a first `reset()`, whatever it was restored to.

        Returns:
            the observation there.

        Raises:
            ValueError: the snapshot is of an environment with other spaces or more than one row.
        """
        (rows, episodes), *more = state.cohorts
        if more or len(rows) != 1:
            raise ValueError("the snapshot is of a vector environment; restore it there.")
        self._episodes = adopt(self.mdp, episodes)
        return self._observe()

    def render(self) -> np.ndarray | None:
        """The last frame with the drag path on it, (H', W', 3) uint8; the reference image before the first frame.

        The path so far is solid, the rest faint, the current point a ring; small frames are enlarged.
        """
        if self.render_mode is None:
            gym.logger.warn('render() without a render mode draws nothing; pass render_mode="rgb_array" to make().')
            return None
        return render_row(self._running(), 0)

    def _running(self) -> Episodes:
        if self._episodes is None:
            raise gym.error.ResetNeeded("no episode is running; call reset() first.")
        return self._episodes

    def _observe(self) -> Observation:
        return {key: value[0] for key, value in self._running().observe().items()}


def adopt(mdp: VideoMDP, episodes: Episodes) -> Episodes:
    """A copy of a snapshot's episodes for this MDP.

    Raises:
        ValueError: they are of an MDP with other spaces or rewards.
    """
    other = episodes.mdp
    if other is not mdp:
        names = [[w.reward.name for w in m.rewards] for m in (mdp, other)]
        if mdp.observation_space != other.observation_space or names[0] != names[1]:
            raise ValueError(
                "the snapshot is of an environment with other spaces or rewards; restore it in one like it."
            )
    return replace(episodes.select(), mdp=mdp)


def render_row(episodes: Episodes, row: int) -> np.ndarray:
    """One episode's last frame with its drag path, (H', W', 3) uint8."""
    control = episodes.tasks[row].control
    done = episodes.frame + episodes.terminated  # clean latent frames
    at = max(0, episodes.mdp.codec.pixel_frames(done) - 1) if done else 0
    image = control.image if episodes.pixels is None else episodes.pixels[row, -1]
    return draw_drag(image, control, at)


def check_render_mode(render_mode: str | None) -> None:
    """Raises ValueError for a mode that is neither None nor rgb_array."""
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"render_mode={render_mode!r}: expected None or 'rgb_array'.")
