"""ARDrag-RL: autoregressive few-step video diffusion as a Gymnasium MDP, and reinforcement learning on it.

Importing registers `gym.make("ARDrag-v0")`. What needs a model or a trainer is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ardrag_rl import envs, flow
from ardrag_rl.control import Control
from ardrag_rl.rewards import Reward, register_reward
from ardrag_rl.rollout import Plan, Rollout

if TYPE_CHECKING:
    from ardrag_rl.codec import Codec
    from ardrag_rl.generation import generate
    from ardrag_rl.interaction import interactive
    from ardrag_rl.policies import VideoPolicy
    from ardrag_rl.training.algorithms import register_algorithm
    from ardrag_rl.training.collect import collect
    from ardrag_rl.training.config import GRPOConfig
    from ardrag_rl.training.trainer import GRPOTrainer

__version__ = "0.1.0"

_LAZY = {
    "Codec": "ardrag_rl.codec",
    "GRPOConfig": "ardrag_rl.training.config",
    "GRPOTrainer": "ardrag_rl.training.trainer",
    "VideoPolicy": "ardrag_rl.policies",
    "collect": "ardrag_rl.training.collect",
    "generate": "ardrag_rl.generation",
    "interactive": "ardrag_rl.interaction",
    "register_algorithm": "ardrag_rl.training.algorithms",
}

__all__ = [
    "Codec",
    "Control",
    "GRPOConfig",
    "GRPOTrainer",
    "Plan",
    "Reward",
    "Rollout",
    "VideoPolicy",
    "collect",
    "envs",
    "flow",
    "generate",
    "interactive",
    "register_algorithm",
    "register_reward",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
