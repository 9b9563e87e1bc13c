"""Metrics: how videos compare with real ones, how they move, and how fast they come."""

from ardrag_rl.metrics.frechet import Gaussian, frechet_distance, frechet_interval

__all__ = ["Gaussian", "frechet_distance", "frechet_interval"]
