"""The video MDP as Gymnasium environments. Importing this package registers "ARDrag-v0"."""

import gymnasium

from ardrag_rl.envs.env import ARDragEnv, Snapshot
from ardrag_rl.envs.render import draw_drag
from ardrag_rl.envs.sprites import Sprites
from ardrag_rl.envs.task import Task, TaskSource
from ardrag_rl.envs.tasks import TaskList, fit, image_task, make_tasks
from ardrag_rl.envs.vector import ARDragVectorEnv
from ardrag_rl.envs.wrappers import FlattenSpaces, NoiseAction
from ardrag_rl.rewards.error import RewardError

if "ARDrag-v0" not in gymnasium.registry:
    gymnasium.register(
        id="ARDrag-v0",
        entry_point="ardrag_rl.envs.env:ARDragEnv",
        vector_entry_point="ardrag_rl.envs.vector:ARDragVectorEnv",
    )

__all__ = [
    "ARDragEnv",
    "ARDragVectorEnv",
    "FlattenSpaces",
    "NoiseAction",
    "RewardError",
    "Snapshot",
    "Sprites",
    "Task",
    "TaskList",
    "TaskSource",
    "draw_drag",
    "fit",
    "image_task",
    "make_tasks",
]
