"""Metrics against the formulas they are named after."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from ardrag_rl.codec import Codec
from ardrag_rl.envs.fit import fit
from ardrag_rl.envs.sprites import Sprites
from ardrag_rl.metrics import (
    Distance,
    Gaussian,
    Mean,
    Scorer,
    Scores,
    bootstrap_interval,
    frechet_distance,
    load_features,
    measure_latency,
)
from ardrag_rl.policies import VideoPolicy


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


# --- intervals ---


def test_interval_draws_whole_videos_and_covers_the_distance():
    rng = np.random.default_rng(0)

    def videos(n, shift):
        """Frames of a video are alike: what varies is the video."""
        return np.stack([shift + rng.normal(size=(1, 3)) + 0.1 * rng.normal(size=(8, 3)) for _ in range(n)])

    want = 3 * 0.5**2  # of the population, about
    few, many = (bootstrap_interval([Distance(videos(n, 0.0), videos(n, 0.5))], n, resamples=100) for n in (60, 600))
    assert few.n == 60 and few.low < want < few.high and many.low < want < many.high
    assert many.high - many.low < 0.6 * (few.high - few.low)


def test_what_tasks_show_cancels():
    """Videos that miss the true ones by a constant: the distance is known whatever the tasks are."""
    true = np.random.default_rng(0).normal(size=(30, 8, 3))
    interval = bootstrap_interval([Distance(true, true + 0.5)], 30, resamples=50)
    assert interval.mean == pytest.approx(0.75) and interval.high - interval.low < 1e-6


def test_runs_that_differ_widen_an_interval():
    alike = [Mean(np.zeros(50))] * 3
    apart = [Mean(k * np.ones(50)) for k in range(3)]
    one, three = (bootstrap_interval(runs, 50) for runs in (alike, apart))
    assert (one.low, one.mean, one.high, one.n) == (0, 0, 0, 150)
    assert three.mean == 1 and three.high - three.low > 0.8
    scores = Mean(np.random.default_rng(0).normal(size=200))
    single, copies = (bootstrap_interval([scores] * k, 200, resamples=400) for k in (1, 4))
    assert copies.high - copies.low == pytest.approx(single.high - single.low, rel=0.15)  # the tasks are the same
    gaps = Mean(np.array([1.0, np.nan, 3.0]))
    assert bootstrap_interval([gaps], 3).mean == 2 and np.isnan(Mean(np.full(3, np.nan))(np.arange(3)))
    for runs, tasks in (([], 3), ([gaps], 0)):
        with pytest.raises(ValueError, match="expected at least one of each"):
            bootstrap_interval(runs, tasks)


# --- features ---


def distance_from(true):
    return lambda made: Distance(true, made)(np.arange(len(true)))


def sprite_videos(count=24, level="gentle"):
    source = Sprites(level, "heldout", 10)
    return torch.stack([source.video(i) for i in range(count)])


@pytest.mark.parametrize("kind", ["frame", "clip"])
def test_the_embedded_networks_see_damage(kind):
    """More of it is farther from the truth."""
    network, videos = load_features(kind), sprite_videos()
    distance = distance_from(network(videos))
    assert distance(network(videos)) == pytest.approx(0, abs=1e-6)
    noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))
    for damaged in (
        [(videos + s * noise).clip(0, 1) for s in (0.05, 0.15)],
        [TF.gaussian_blur(videos, [9, 9], [s]) for s in (0.8, 2.0)],
    ):
        little, much = (distance(network(v)) for v in damaged)
        assert 0 < little < much


def test_the_clip_network_sees_movement_and_the_frame_network_does_not():
    videos = sprite_videos(48)
    order = torch.tensor([0, 5, 1, 6, 2, 7, 3, 8, 4, 9])
    shuffled = videos[:, order]
    frame, clip = (load_features(k) for k in ("frame", "clip"))
    torch.testing.assert_close(torch.from_numpy(frame(shuffled)), torch.from_numpy(frame(videos))[:, order])
    distance = distance_from(clip(videos))
    grainy = (videos + 0.05 * torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))).clip(0, 1)
    assert distance(clip(shuffled)) > 3 * distance(clip(grainy))
    assert frame(videos).shape[:2] == (48, 10) and clip(videos).shape[:2] == (48, 1)


def test_other_sizes_are_resized_and_a_network_is_named():
    video = sprite_videos(2)
    network = load_features("frame")
    large = torch.nn.functional.interpolate(video.flatten(0, 1), (96, 96), mode="bilinear").unflatten(0, (2, 10))
    assert network(large).shape == network(video).shape
    assert network.name == load_features("frame").name != load_features("clip").name


def test_networks_of_the_literature_come_from_files(tmp_path):
    for kind in ("frame", "clip"):
        with pytest.raises(FileNotFoundError, match="give a local file"):
            load_features(kind, tmp_path / "none.pt")

    class Answer(torch.nn.Module):
        def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool):
            assert rescale and resize and return_features
            return x.mean((2, 3, 4))

    torch.jit.script(Answer()).save(str(tmp_path / "i3d.pt"))
    i3d, video = load_features("clip", tmp_path / "i3d.pt"), sprite_videos(2)
    want = 255 * video.mean((1, 3, 4))
    torch.testing.assert_close(torch.from_numpy(i3d(video))[:, 0], want, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="clips of 9 frames: I3D needs at least 10"):
        i3d(video[:, :9])


# --- scores and latency ---


def test_true_videos_score_best():
    source = Sprites("gentle", "heldout", 10)
    controls = [source[i].control for i in range(6)]
    scorer = Scorer(load_features("frame"), load_features("clip"))
    true = scorer(sprite_videos(6), controls)
    still = scorer(sprite_videos(6)[:, :1].expand(-1, 10, -1, -1, -1), controls)
    assert np.nanmean(true.motion_error) < 0.6 < np.nanmean(still.motion_error)
    assert np.nanmean(true.consistency) > np.nanmean(still.consistency)
    assert (still.dynamic_degree == 0).all() and (still.smoothness == 1).all() and (true.dynamic_degree > 0).all()
    unknown = scorer(sprite_videos(6))
    assert np.isnan(unknown.consistency).all() and np.array_equal(unknown.aesthetic, true.aesthetic)
    both = Scores.concatenate([true, still])
    assert len(both) == 12 and both.frame_features.shape == (12, 10, true.frame_features.shape[-1])


def test_latency_of_a_chunked_model_waits_for_the_chunk(tiny_pipeline):
    """Counted in passes: seconds are no test."""
    policy, codec = VideoPolicy.from_pretrained(tiny_pipeline), Codec.from_pretrained(tiny_pipeline)
    control = fit(Sprites("gentle", "train", 6, 32, 32)[0], 6, 32, 32).control
    seen = []
    for size in (1, 6):
        chunked = policy.with_chunks(size)
        frames = []
        plain = chunked.transformer.forward

        def spy(context, clean=None, noisy=None, *rest, plain=plain, frames=frames, **more):
            frames.append(0 if noisy is None else noisy.shape[2])
            return plain(context, clean, noisy, *rest, **more)

        chunked.transformer.forward = spy
        latency = measure_latency(chunked, codec, control, repeats=1)
        assert latency.first_frame > 0 and latency.fps > 0 and latency.transformer_fps > 0
        seen.append(frames[:3])
    assert seen == [[1, 1, 1], [6, 6, 6]]
