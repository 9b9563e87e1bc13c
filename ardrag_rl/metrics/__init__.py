"""Metrics: how videos compare with real ones, how they move, and how fast they come."""

from ardrag_rl.metrics.features import I3D, Embedded, Features, Inception, SpriteFeatures, load_features
from ardrag_rl.metrics.frechet import Gaussian, frechet_distance
from ardrag_rl.metrics.interval import bootstrap_interval
from ardrag_rl.metrics.latency import Latency, measure_latency
from ardrag_rl.metrics.scores import Distance, Mean, Scorer, Scores

__all__ = [
    "I3D",
    "Distance",
    "Embedded",
    "Features",
    "Gaussian",
    "Inception",
    "Latency",
    "Mean",
    "Scorer",
    "Scores",
    "SpriteFeatures",
    "bootstrap_interval",
    "frechet_distance",
    "load_features",
    "measure_latency",
]
