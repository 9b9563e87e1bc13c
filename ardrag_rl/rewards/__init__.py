"""Rewards: video in, numbers out. `make_rewards` makes them from names; a plugin subclasses `Reward`."""

from ardrag_rl.rewards.aesthetic import Aesthetic
from ardrag_rl.rewards.clip import ClipScore, PickScore
from ardrag_rl.rewards.cotracker import CoTracker
from ardrag_rl.rewards.cotracker_online import CoTrackerOnline
from ardrag_rl.rewards.error import RewardError, RewardLeak
from ardrag_rl.rewards.http_reward import HttpReward
from ardrag_rl.rewards.limits import Limits, reward_limits
from ardrag_rl.rewards.motion import Motion, motion_distance
from ardrag_rl.rewards.registry import WeightedReward, make_rewards, register_reward, reward_names
from ardrag_rl.rewards.reward import BufferedSession, Reward, RewardSession, check_scores
from ardrag_rl.rewards.smoothness import DynamicDegree, Smoothness
from ardrag_rl.rewards.tracker import TemplateTracker, Tracker, TrackerSession, Tracks

__all__ = [
    "Aesthetic",
    "BufferedSession",
    "ClipScore",
    "CoTracker",
    "CoTrackerOnline",
    "DynamicDegree",
    "HttpReward",
    "Limits",
    "Motion",
    "PickScore",
    "Reward",
    "RewardError",
    "RewardLeak",
    "RewardSession",
    "Smoothness",
    "TemplateTracker",
    "Tracker",
    "TrackerSession",
    "Tracks",
    "WeightedReward",
    "check_scores",
    "make_rewards",
    "motion_distance",
    "register_reward",
    "reward_limits",
    "reward_names",
]
