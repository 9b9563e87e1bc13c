"""The Frechet distance between two sets of features: FID on frames, FVD on clips."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of n feature vectors.

    Attributes:
        mean: (D,) float64.
        covariance: (D, D) float64, with n - 1 in the denominator, as pytorch-fid has it.
        n: how many vectors; a covariance of D dimensions has full rank from D + 1 on.
    """

    mean: np.ndarray
    covariance: np.ndarray
    n: int

    @classmethod
    def of(cls, features: np.ndarray) -> Gaussian:
        """Of features (n, D).

        Raises:
            ValueError: fewer than two vectors, another shape, or values that are not finite.
        """
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features have the shape {features.shape}: expected (n, D) with n of 2 or more.")
        if not np.isfinite(features).all():
            raise ValueError(f"{int((~np.isfinite(features)).sum())} of {features.size} features are not finite.")
        return cls(features.mean(0), np.cov(features, rowvar=False).reshape(features.shape[1], -1), len(features))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), Heusel et al. 2017, Eq. 6.

    The symmetric form of tr (A B)^1/2: eigenvalues of a positive matrix, which a covariance without full rank has too.

    Raises:
        ValueError: the features have different lengths.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and {len(b.mean)} dimensions come from different networks.")
    root = _root(a.covariance)
    cross = np.linalg.eigvalsh(root @ b.covariance @ root)
    offset = a.mean - b.mean
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(cross.clip(min=0)).sum()
    return float(max(offset @ offset + trace, 0.0))


def _root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a positive semi-definite matrix (D, D)."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
