"""Codec: pixels, heat maps, prompts and reference images to what the policy sees, and latents back to pixels."""

from ardrag_rl.codec.codec import Codec
from ardrag_rl.codec.settings import CodecSettings
from ardrag_rl.codec.stream import State, Stream

__all__ = ["Codec", "CodecSettings", "State", "Stream"]
