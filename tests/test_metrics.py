"""Metrics against the formulas they are named after."""

import numpy as np
import pytest

from ardrag_rl.metrics import Gaussian, frechet_distance, frechet_interval


def covariance(seed, size=4):
    root = np.random.default_rng(seed).normal(size=(size, size))
    return root @ root.T


# --- Frechet distance ---


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form():
    """For diagonal covariances it is sum (m_a - m_b)^2 + (s_a - s_b)^2."""
    rng = np.random.default_rng(0)
    means, stds = rng.normal(size=(2, 5)), rng.uniform(0.1, 2, (2, 5))
    a, b = (Gaussian(m, np.diag(s**2), 100) for m, s in zip(means, stds, strict=True))
    want = ((means[0] - means[1]) ** 2 + (stds[0] - stds[1]) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_is_symmetric_and_does_not_turn_with_the_axes():
    a, b = Gaussian(np.zeros(4), covariance(0), 9), Gaussian(np.ones(4), covariance(1), 9)
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(4, 4)))
    turned = [Gaussian(turn @ g.mean, turn @ g.covariance @ turn.T, 9) for g in (a, b)]
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(*turned) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    # tr (A B)^1/2 by the eigenvalues of A B, the other way to write it
    root = np.sqrt(np.linalg.eigvals(a.covariance @ b.covariance).real).sum()
    assert frechet_distance(a, b) == pytest.approx(4 + np.trace(a.covariance + b.covariance) - 2 * root, rel=1e-9)


def test_frechet_distance_without_full_rank():
    features = np.random.default_rng(0).normal(size=(5, 20))  # fewer vectors than dimensions
    a = Gaussian.of(features)
    assert np.linalg.matrix_rank(a.covariance) == 4 and a.n == 5
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, Gaussian.of(features + 0.5)) == pytest.approx(20 * 0.25, rel=1e-6)


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 3\): expected \(n, D\) with n of 2"):
        Gaussian.of(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="1 of 6 features"):
        Gaussian.of(np.array([[0.0, 1.0, np.nan], [0.0, 0.0, 0.0]]))
    with pytest.raises(ValueError, match="of 2 and 3 dimensions"):
        frechet_distance(Gaussian.of(np.eye(2)), Gaussian.of(np.eye(3)))


def test_interval_draws_whole_videos_and_covers_the_distance():
    rng = np.random.default_rng(0)
    real = Gaussian(np.zeros(3), np.eye(3), 10_000)

    def videos(n, shift):
        """Frames of a video are alike: what varies is the video."""
        return [shift + rng.normal(size=(1, 3)) + 0.1 * rng.normal(size=(8, 3)) for _ in range(n)]

    want = 3 * 0.5**2  # of the population, about
    sets = videos(40, 0.5), videos(400, 0.5)
    few, many = (frechet_interval(real, groups, resamples=100) for groups in sets)
    assert few.n == 40 and few.low < want < few.high
    assert many.high - many.low < 0.6 * (few.high - few.low)
    assert few == frechet_interval(real, sets[0], resamples=100)  # of a seed
