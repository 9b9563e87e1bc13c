"""ARDragVectorEnv: G videos as one Gymnasium vector environment, one decode and one reward call per frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from ardrag_rl.envs.env import ARDragEnv, Snapshot, adopt, check_render_mode, render_row
from ardrag_rl.envs.mdp import Episodes, Observation, VideoMDP
from ardrag_rl.envs.order import TaskOrder, checked_index, checked_task, chosen
from ardrag_rl.envs.task import Task, TaskSource
from ardrag_rl.envs.tasks import TaskSpec

if TYPE_CHECKING:
    from ardrag_rl.codec import Codec, CodecSettings
    from ardrag_rl.flow import Schedule
    from ardrag_rl.rewards import WeightedReward

Cohort = tuple[tuple[int, ...], Episodes]  # rows that were reset together, and their episodes


class ARDragVectorEnv(VectorEnv[Observation, NDArray[np.float32], NDArray[Any]]):
    """`num_envs` ARDragEnv in one: the same numbers, batched. `gym.make_vec("ARDrag-v0", num_envs=G)` gives it.

    Rows that were reset together advance together, with one decode and one reward call per frame for all of them.
    A group of videos for one control: `envs.reset(seed=[s] * G, options={"task": task})`.

    `reset` takes `options={"task": a Task or one per row}` or `{"index": an int or one per row}`, and where
    `autoreset_mode` is "Disabled" also `{"reset_mask": (G,) bool}`, which leaves the other rows as they are.
    Seeds are an int (row i gets seed + i) or one per row.

    Args:
        num_envs: G.
        autoreset_mode: Gymnasium's "NextStep" (default) or "Disabled".
        others: as in ARDragEnv.
    """

    def __init__(
        self,
        num_envs: int = 1,
        pipeline: str | Path = "tiny",
        tasks: TaskSpec = "sprites-hard",
        rewards: Any = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        device: str | torch.device = "cpu",
        render_mode: str | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        codec_settings: CodecSettings | Mapping[str, Any] | None = None,
    ) -> None:
        check_render_mode(render_mode)
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs}: expected at least 1.")
        mode = AutoresetMode(autoreset_mode)
        if mode == AutoresetMode.SAME_STEP:
            raise ValueError("autoreset_mode='SameStep' is not supported: choose 'NextStep' or 'Disabled'.")
        self.num_envs, self.render_mode, self.autoreset_mode = num_envs, render_mode, mode
        self.metadata = {**ARDragEnv.metadata, "autoreset_mode": mode}
        self.mdp = VideoMDP.from_pipeline(pipeline, tasks, rewards, num_frames, height, width, device, codec_settings)
        self.single_observation_space = self.mdp.observation_space
        self.single_action_space = self.mdp.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._cohorts: list[Cohort] = []
        self._orders: list[TaskOrder | None] = [None] * num_envs

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The G tasks of the running episodes, fitted to this environment."""
        found = {row: task for rows, e in self._running() for row, task in zip(rows, e.tasks, strict=True)}
        return tuple(found[row] for row in range(self.num_envs))

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

    def reset(  # type: ignore[override]  # Gymnasium's own vector environments take a list of seeds too
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts the episodes of all rows, or of those in `options["reset_mask"]`."""
        g = self.num_envs
        task, index = chosen(options, extra=("reset_mask",))
        mask = _mask((options or {}).get("reset_mask"), g)
        if not mask.all() and not self._cohorts:
            raise gym.error.ResetNeeded("no episode is running; the first reset() must be of all rows.")
        if seed is None or isinstance(seed, (int, np.integer)):
            seeds = [None if seed is None else int(seed) + i for i in range(g)]
        else:
            seeds = [None if s is None else int(s) for s in seed]
            if len(seeds) != g:
                raise ValueError(f"{len(seeds)} seeds for {g} environments: expected one for each.")
        tasks = [None if t is None else checked_task(t) for t in _per_row(task, g, "task")]
        indices = [None if i is None else checked_index(i, self.mdp.source) for i in _per_row(index, g, "index")]
        rows = [int(i) for i in np.flatnonzero(mask)]
        infos = self._start(rows, seeds, tasks, indices)
        return self._observe(), infos

    def step(
        self, actions: Any
    ) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Takes `x[m,n+1]` of every row, (G, C, h, w).

        With "NextStep", rows that ended in the last step are reset instead; their action is not looked at.

        Raises:
            ValueError: an action has a wrong shape or type, or is not finite; nothing has changed.
            gymnasium.error.ResetNeeded: no episode runs, or with "Disabled" one has ended.
        """
        cohorts = self._running()
        ended = [row for rows, e in cohorts if e.terminated for row in rows]
        if ended and self.autoreset_mode == AutoresetMode.DISABLED:
            raise gym.error.ResetNeeded(
                f'the episodes {sorted(ended)} have ended; call reset(options={{"reset_mask": ended}}) or reset().'
            )
        if len(ended) < self.num_envs:
            actions = self._latents(actions, ended)
        rewards = np.zeros(self.num_envs, np.float64)
        terminated = np.zeros(self.num_envs, np.bool_)
        infos: dict[str, Any] = {}
        row_infos: dict[int, dict[str, Any]] = {}
        for rows, episodes in cohorts:
            if episodes.terminated:
                continue
            outcome = episodes.step(actions[list(rows)])
            rewards[list(rows)] = outcome.rewards
            terminated[list(rows)] = outcome.terminated
            for i, row in enumerate(rows):
                info: dict[str, Any] = {"task": episodes.tasks[i].id}
                if outcome.terms is not None:
                    info["reward_terms"] = {name: float(v[i]) for name, v in outcome.terms.items()}
                row_infos[row] = info
        if ended:
            nothing: list[Any] = [None] * self.num_envs
            infos = self._start(sorted(ended), nothing, nothing, nothing)
        for row in sorted(row_infos):
            infos = self._add_info(infos, row_infos[row], row)
        return self._observe(), rewards, terminated, np.zeros(self.num_envs, np.bool_), infos

    def set_noise(self, noise: Any) -> Observation:
        """Replaces `x[m,0]` of every row, (G, C, h, w); all rows must be at the first step of a frame."""
        values = self.mdp.latent(noise, self.num_envs, "noise")
        late = [row for rows, e in self._running() if e.step_index for row in rows]
        if late:
            raise ValueError(
                f"the noise can be set at the first step of a frame only; the rows {sorted(late)} are past it."
            )
        for rows, episodes in self._cohorts:
            episodes.set_noise(values[list(rows)])
        return self._observe()

    def snapshot(self) -> Snapshot:
        """The whole state of all episodes; see ARDragEnv.snapshot."""
        return Snapshot(tuple((rows, episodes.select()) for rows, episodes in self._running()))

    def restore(self, state: Snapshot) -> Observation:
        """Goes back to a snapshot, any number of times; see ARDragEnv.restore."""
        count = sum(len(rows) for rows, _ in state.cohorts)
        if count != self.num_envs:
            raise ValueError(f"the snapshot has {count} rows: expected {self.num_envs}.")
        self._cohorts = [(rows, adopt(self.mdp, episodes)) for rows, episodes in state.cohorts]
        return self._observe()

    def render(self) -> tuple[np.ndarray, ...] | None:  # type: ignore[override]
        """One picture per row; see ARDragEnv.render."""
        if self.render_mode is None:
            gym.logger.warn('render() without a render mode draws nothing; pass render_mode="rgb_array".')
            return None
        found = {row: render_row(e, i) for rows, e in self._running() for i, row in enumerate(rows)}
        return tuple(found[row] for row in range(self.num_envs))

    def _running(self) -> list[Cohort]:
        if not self._cohorts:
            raise gym.error.ResetNeeded("no episode is running; call reset() first.")
        return self._cohorts

    def _start(
        self,
        rows: Sequence[int],
        seeds: Sequence[int | None],
        tasks: Sequence[Task | None],
        indices: Sequence[int | None],
    ) -> dict[str, Any]:
        """Resets these rows as one cohort; the arguments have an entry for each of the G rows."""
        noise, chosen_tasks = [], []
        by_index: dict[int, Task] = {}  # a group with one index makes its task once
        for row in rows:
            order = self._orders[row]
            if order is None or seeds[row] is not None:
                rng, _ = seeding.np_random(seeds[row])  # what a single environment draws from
                order = self._orders[row] = TaskOrder(self.mdp.source, rng)
            noise.append(order.noise_seed())
            task = tasks[row]
            if task is None:
                given = indices[row]
                at = order.next() if given is None else given
                task = by_index[at] if at in by_index else self.mdp.source[at]
                by_index[at] = task
            chosen_tasks.append(task)
        fitted = {id(task): self.mdp.fit(task) for task in chosen_tasks}
        started = self.mdp.reset([fitted[id(task)] for task in chosen_tasks], noise)
        gone = set(rows)
        kept: list[Cohort] = []
        for old, episodes in self._cohorts:
            stay = [i for i, row in enumerate(old) if row not in gone]
            if len(stay) == len(old):
                kept.append((old, episodes))
            elif stay:
                kept.append((tuple(old[i] for i in stay), episodes.select(stay)))
        self._cohorts = [*kept, (tuple(rows), started)]
        infos: dict[str, Any] = {}
        for row, task in zip(rows, started.tasks, strict=True):
            infos = self._add_info(infos, {"task": task.id}, row)
        return infos

    def _latents(self, actions: Any, unread: Sequence[int]) -> torch.Tensor:
        """(G, C, h, w), where the rows in `unread` may hold anything."""
        if unread and isinstance(actions, (np.ndarray, torch.Tensor)) and len(actions) == self.num_envs:
            actions = actions.clone() if isinstance(actions, torch.Tensor) else actions.copy()
            actions[list(unread)] = 0
        return self.mdp.latent(actions, self.num_envs, "actions")

    def _observe(self) -> Observation:
        cohorts = self._cohorts
        if len(cohorts) == 1 and cohorts[0][0] == tuple(range(self.num_envs)):
            return cohorts[0][1].observe()
        out: Observation = {}
        for rows, episodes in cohorts:
            for key, value in episodes.observe().items():
                if key not in out:
                    out[key] = np.empty((self.num_envs, *value.shape[1:]), value.dtype)
                out[key][list(rows)] = value
        return out


def _mask(mask: Any, num_envs: int) -> NDArray[np.bool_]:
    """The rows to reset; None for all. The checks are those of Gymnasium's own vector environments."""
    if mask is None:
        return np.ones(num_envs, np.bool_)
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        raise TypeError(f"the reset option 'reset_mask' is {mask!r}: expected a numpy array of bool.")
    if mask.shape != (num_envs,):
        raise ValueError(f"the reset option 'reset_mask' has shape {mask.shape}: expected ({num_envs},).")
    if not mask.any():
        raise ValueError("the reset option 'reset_mask' has no True: nothing to reset.")
    return mask


def _per_row(value: Any, num_envs: int, what: str) -> list[Any]:
    """One entry per row from one value for all or a list."""
    if isinstance(value, (list, tuple, np.ndarray)):
        if len(value) != num_envs:
            raise ValueError(f"the reset option {what!r} has {len(value)} entries: expected one, or {num_envs}.")
        return list(value)
    return [value] * num_envs
