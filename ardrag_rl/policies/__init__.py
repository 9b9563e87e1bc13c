"""Causal video policies: latents in, a Gaussian over the next latent out."""

from ardrag_rl.policies.cache import Cache, FrameEntry, RollingCache
from ardrag_rl.policies.policy import VideoPolicy
from ardrag_rl.policies.session import Session
from ardrag_rl.policies.transformer import CausalWanTransformer3DModel

__all__ = ["Cache", "CausalWanTransformer3DModel", "FrameEntry", "RollingCache", "Session", "VideoPolicy"]
