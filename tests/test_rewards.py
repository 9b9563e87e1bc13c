"""Rewards: Eq. 15 and 16, streaming = whole, the registry's errors, the tracker against ground truth, head files."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ardrag_rl.control import Control
from ardrag_rl.envs.sprites import Sprites
from ardrag_rl.rewards import (
    Aesthetic,
    BufferedSession,
    DynamicDegree,
    Motion,
    Reward,
    RewardError,
    Smoothness,
    TemplateTracker,
    Tracks,
    WeightedReward,
    check_scores,
    make_rewards,
    motion_distance,
    register_reward,
    reward_names,
)
from ardrag_rl.rewards.aesthetic import load_head
from ardrag_rl.rewards.motion import ALPHA
from ardrag_rl.rewards.tracker import first_touches


@dataclass
class StubTracker:
    """Says what it is told: positions (B, T, K, 2), visible (B, T, K)."""

    positions: Tensor
    visible: Tensor
    frame: int = 0

    def start(self, queries: Tensor) -> StubTracker:
        return StubTracker(self.positions, self.visible)

    def append(self, frames: Tensor) -> Tracks:
        now = slice(self.frame, self.frame + frames.shape[1])
        self.frame = now.stop
        return Tracks(self.positions[:, now], self.visible[:, now].float(), self.visible[:, now])

    def select(self, rows: Sequence[int]) -> StubTracker:
        return StubTracker(self.positions[list(rows)], self.visible[list(rows)], self.frame)


class Brightness(Reward):
    """The mean over all frames so far: needs its whole past."""

    def __call__(self, video: Tensor, controls: Sequence[Control]) -> Tensor:
        mean = video.mean((-3, -2, -1))
        return mean.cumsum(1) / torch.arange(1, video.shape[1] + 1)


def control(points: object, visible: Tensor | None = None) -> Control:
    return Control(points=torch.as_tensor(points).float(), prompt="", image=torch.zeros(3, 8, 8), visible=visible)


def sprites(count: int, level: str = "gentle") -> tuple[Tensor, list[Control]]:
    source = Sprites(level, "heldout")
    return torch.stack([source.video(i) for i in range(count)]), [source[i].control for i in range(count)]


# --- motion ----------------------------------------------------------------------------------------------------------


def test_motion_is_the_hinge_of_eq_16_averaged_over_scored_points() -> None:
    points = torch.tensor([[[0.5, 0.5, 1.0], [0.2, 0.8, 0.3]]]).repeat(3, 1, 1)  # (T=3, K=2, 3)
    seen = torch.tensor([[0.51, 0.5], [0.2, 0.83]]).repeat(1, 3, 1, 1)  # off by 0.01 and 0.03
    reward = Motion(StubTracker(seen, torch.ones(1, 3, 2, dtype=torch.bool)))
    got = reward(torch.zeros(1, 3, 3, 8, 8), [control(points)])
    alpha = 9 / 4096
    by_hand = (5 / alpha) * (max(0, alpha - 0.01**2) + max(0, alpha - 0.03**2)) / 2
    torch.testing.assert_close(got, torch.full((1, 3), by_hand), rtol=1e-4, atol=1e-4)
    assert pytest.approx(ALPHA) == alpha
    far = Motion(StubTracker(seen + 0.1, torch.ones(1, 3, 2, dtype=torch.bool)))
    assert (far(torch.zeros(1, 3, 3, 8, 8), [control(points)]) == 0).all()  # never negative


def test_a_lost_point_scores_zero_and_is_still_averaged() -> None:
    points = torch.tensor([[[0.5, 0.5, 1.0], [0.2, 0.8, 1.0]]]).repeat(2, 1, 1)
    visible = torch.tensor([[[True, True], [True, False]]])
    reward = Motion(StubTracker(points[None, ..., :2], visible))
    got = reward(torch.zeros(1, 2, 3, 8, 8), [control(points)])
    torch.testing.assert_close(got, torch.tensor([[5.0, 2.5]]))


def test_frames_without_touched_and_visible_points_score_zero_and_do_not_count() -> None:
    points = torch.tensor([[[0.5, 0.5, 1.0]], [[0.5, 0.5, 0.0]], [[0.5, 0.5, 1.0]]])
    c = control(points, visible=torch.tensor([[True], [True], [False]]))
    none = control(torch.zeros(3, 0, 3))  # no points is no control; batches of different K
    reward = Motion(StubTracker(torch.full((2, 3, 1, 2), 0.5), torch.ones(2, 3, 1, dtype=torch.bool)))
    video = torch.zeros(2, 3, 3, 8, 8)
    assert reward.counted([c, none]).tolist() == [[True, False, False], [False] * 3]
    assert reward(video, [c, none]).tolist() == [[5.0, 0.0, 0.0], [0.0] * 3]
    distance = motion_distance(video, [c, none], reward.tracker)
    assert distance.isnan().tolist() == [[False, True, True], [True] * 3]


def test_a_point_starts_where_it_is_first_touched() -> None:
    points = torch.zeros(4, 2, 3)
    points[2:, 0] = torch.tensor([0.25, 0.75, 1.0])
    # smooth: white noise hardly correlates with itself between pixels
    rough = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    still = torch.nn.functional.interpolate(rough, (32, 32), mode="bilinear")[:, None].expand(-1, 4, -1, -1, -1)
    queries = first_touches([control(points), control(torch.tensor([[[0.1, 0.2, 1.0]]]))])
    assert queries[0].tolist() == [[2.0, 0.25, 0.75], [-1.0, 0.0, 0.0]]  # the second is never touched
    assert queries[1, 0].tolist() == pytest.approx([0.0, 0.1, 0.2])
    tracks = TemplateTracker().start(queries).append(still)
    assert tracks.visible[0].tolist() == [[False, False], [False, False], [True, False], [True, False]]


def test_motion_distance_is_in_pixels_of_the_video_if_asked() -> None:
    points = torch.tensor([[[0.5, 0.5, 1.0]]])
    tracker = StubTracker(torch.tensor([[[[0.6, 0.5]]]]), torch.zeros(1, 1, 1, dtype=torch.bool))  # lost: best guess
    video = torch.zeros(1, 1, 3, 20, 40)
    assert motion_distance(video, [control(points)], tracker).item() == pytest.approx(0.1)
    assert motion_distance(video, [control(points)], tracker, pixels=True).item() == pytest.approx(4.0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_alpha_must_be_positive(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        Motion(alpha=alpha)


# --- tracker ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["gentle", "hard"])
def test_tracker_follows_sprites(level: str) -> None:
    video, controls = sprites(12, level)
    scored = torch.stack([c.scored for c in controls]).any(-1)
    error = motion_distance(video, controls, pixels=True)
    assert error[scored].median() <= 1
    assert error[scored].quantile(0.95) <= 3
    assert Motion()(video, controls)[scored].mean() > 4.5  # the truth is worth nearly 5


def test_tracker_loses_a_sprite_that_vanishes_and_finds_it_again() -> None:
    video, controls = sprites(6)
    start = torch.cat([first_touches(controls)[..., :1], torch.stack([c.points[0, :, :2] for c in controls])], dim=-1)
    still = video[:, :1].repeat(1, 7, 1, 1, 1)
    blurred = [cv2.GaussianBlur(v[0].permute(1, 2, 0).numpy(), (0, 0), 14) for v in video]
    still[:, 2:5] = torch.from_numpy(np.stack(blurred)).permute(0, 3, 1, 2)[:, None]
    tracks = TemplateTracker().start(start).append(still)
    assert tracks.visible[:, :2].all() and tracks.visible[:, 5:].all()
    assert not tracks.visible[:, 2:5].any()
    torch.testing.assert_close(
        tracks.positions[:, 4], tracks.positions[:, 1], rtol=0, atol=3 / 64
    )  # best guess: it stays


def test_flat_video_has_nothing_to_follow() -> None:
    reward = Motion()(torch.full((1, 3, 3, 32, 32), 0.5), [control(torch.tensor([[[0.5, 0.5, 1.0]]]).repeat(3, 1, 1))])
    assert (reward == 0).all()


def test_larger_frames_give_the_same_fractions() -> None:
    video, controls = sprites(2)
    large = torch.nn.functional.interpolate(video.flatten(0, 1), scale_factor=2, mode="nearest").unflatten(0, (2, -1))
    small = TemplateTracker().start(first_touches(controls)).append(video)
    same = TemplateTracker().start(first_touches(controls)).append(large)
    torch.testing.assert_close(small.positions, same.positions, rtol=0, atol=1e-3)


# --- sessions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Motion, Aesthetic, Smoothness, DynamicDegree, Brightness])
def test_streaming_is_the_whole_call(make: type[Reward]) -> None:
    reward = make()
    video, controls = sprites(3)
    video, controls = video[:, :6], [control(c.points[:6], c.visible[:6]) for c in controls]
    whole = reward(video, controls)
    assert whole.shape == (3, 6)
    session = reward.start(controls)
    parts = [session.append(part) for part in video.split([1, 3, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", [Motion, Aesthetic, Smoothness, DynamicDegree, Brightness])
def test_select_is_independent(make: type[Reward]) -> None:
    reward = make()
    video, controls = sprites(3)
    session = reward.start(controls)
    session.append(video[:, :2])
    fork, copied = session.select([2, 0]), session.select([0, 1, 2])
    fork.append(torch.rand(2, 2, 3, 64, 64))  # another future must not be seen by the others
    first, second = session.append(video[:, 2:5]), copied.append(video[:, 2:5])
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, reward(video, controls)[:, 2:5], rtol=0, atol=1e-4)
    row = session.select([1]).append(video[1:2, 5:6])
    torch.testing.assert_close(row, reward(video, controls)[1:2, 5:6], rtol=0, atol=1e-4)


def test_memory_bounds_what_a_session_keeps() -> None:
    session = Smoothness().start([control(torch.zeros(9, 0, 3))])
    for _ in range(9):
        session.append(torch.rand(1, 1, 3, 8, 8))
    assert isinstance(session, BufferedSession)
    assert sum(f.shape[1] for f in session._frames) == 2


def test_a_reward_that_is_not_causal_has_no_session() -> None:
    class AtTheEnd(Brightness):
        causal = False

    with pytest.raises(ValueError, match="attheend"):
        AtTheEnd().start([])


@pytest.mark.parametrize("scores", [torch.zeros(1), torch.zeros(1, 9), 0.5, None, [[0.0]]])
def test_a_session_names_the_reward_whose_scores_do_not_fit(scores: object) -> None:
    class Wrong(Brightness):
        def __call__(self, video: Tensor, controls: object) -> Tensor:
            return scores  # type: ignore[return-value]

    session = Wrong().start([control(torch.zeros(3, 0, 3))])
    with pytest.raises(RewardError, match=r"'wrong' returned .*\(1, 2\)"):
        session.append(torch.zeros(1, 2, 3, 8, 8))


# --- registry and checks ---------------------------------------------------------------------------------------------


def test_rewards_by_name_object_and_weight() -> None:
    assert [(w.name, w.weight) for w in make_rewards(None)] == [("aesthetic", 1.0), ("motion", 1.0)]
    assert [(w.name, w.weight) for w in make_rewards({"motion": 2, "dynamic_degree": 0})] == [
        ("motion", 2.0),
        ("dynamic_degree", 0.0),
    ]
    mine = Brightness()
    made = make_rewards(["smoothness", mine, WeightedReward(Motion(), 0.5)])
    assert [(w.name, w.weight) for w in made] == [("smoothness", 1.0), ("brightness", 1.0), ("motion", 0.5)]
    assert made[1].reward is mine
    assert {"motion", "aesthetic", "smoothness", "dynamic_degree"} <= set(reward_names())


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ({"motoin": 1.0}, ValueError, r"'motoin'.*aesthetic.*motion"),
        (["motion", "motion"], ValueError, "twice"),
        ({"motion": float("nan")}, ValueError, "finite"),
        ({"motion": float("inf")}, ValueError, "finite"),
        ({"motion": "1"}, TypeError, "number"),
        ({"motion": True}, TypeError, "number"),
        ([Motion], TypeError, r"Motion\(\)"),
        ([3], TypeError, "int"),
        ("motion", TypeError, r"\['motion'\]"),
        ({}, ValueError, "no rewards"),
    ],
)
def test_bad_specifications_are_refused(spec: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make_rewards(spec)  # type: ignore[arg-type]


def test_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    from ardrag_rl.rewards import registry

    monkeypatch.setattr(registry, "_registered", dict(registry._registered))

    @register_reward("mine")
    class Mine(Brightness):
        pass

    assert make_rewards(["mine"])[0].reward.name == "mine"
    register_reward("mine")(Mine)  # the same again, as in a notebook
    register_reward("narrow")(lambda: Motion(alpha=1e-3))
    assert [term.name for term in make_rewards({"motion": 1.0, "narrow": 1.0})] == ["motion", "narrow"]
    with pytest.raises(ValueError, match="'motion' is registered already"):
        register_reward("motion")(Mine)

    class Point:
        name = "installed"

        @staticmethod
        def load() -> type[Reward]:
            return Brightness

    monkeypatch.setattr(registry, "entry_points", lambda group: [Point] if group == "ardrag_rl.rewards" else [])
    assert "installed" in reward_names()
    assert isinstance(make_rewards(["installed"])[0].reward, Brightness)


def test_unusable_scores_name_the_reward() -> None:
    reward = Brightness()

    def fails() -> Tensor:
        raise KeyError("frames")

    scores = torch.zeros(2, 3)
    assert check_scores(reward, scores, (2, 3)).equal(scores)
    assert check_scores(reward, lambda: scores.double(), (2, 3)).dtype == torch.float32
    for bad, says in [
        (torch.full((2, 3), float("nan")), "nan"),
        (torch.tensor([[0.0, 0.0, float("inf")]] * 2), r"inf at \[0, 2\]"),
        (torch.zeros(2), r"\(2,\)"),
        (fails, "KeyError"),
        (None, "NoneType"),
    ]:
        with pytest.raises(RewardError, match=f"'brightness'.*{says}"):
            check_scores(reward, bad, (2, 3))  # type: ignore[arg-type]


# --- aesthetic -------------------------------------------------------------------------------------------------------


def test_head_files_with_the_published_keys_equal_the_formula(tmp_path: Path) -> None:
    folder = tmp_path
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(5, 768, generator=generator), dim=-1)
    linear = {"weight": torch.randn(1, 768, generator=generator), "bias": torch.randn(1, generator=generator)}
    torch.save(linear, folder / "sa_0_4_vit_l_14_linear.pth")
    save_file(linear, folder / "linear.safetensors")
    for file in ("sa_0_4_vit_l_14_linear.pth", "linear.safetensors"):
        by_hand = x.numpy() @ linear["weight"].numpy().T + linear["bias"].numpy()
        got = load_head(folder / file)(x).detach().numpy()
        np.testing.assert_allclose(got, by_hand, rtol=1e-4, atol=1e-5)

    widths, mlp, by_hand = (768, 1024, 128, 64, 16, 1), {}, x.numpy()
    for i, (a, b) in zip((0, 2, 4, 6, 7), itertools.pairwise(widths), strict=True):
        mlp[f"layers.{i}.weight"] = torch.randn(b, a, generator=generator) / a**0.5
        mlp[f"layers.{i}.bias"] = torch.randn(b, generator=generator)
        by_hand = by_hand @ mlp[f"layers.{i}.weight"].numpy().T + mlp[f"layers.{i}.bias"].numpy()
    torch.save(mlp, folder / "mlp.pth")
    np.testing.assert_allclose(load_head(folder / "mlp.pth")(x).detach().numpy(), by_hand, rtol=1e-4, atol=1e-4)

    torch.save({"something": torch.zeros(1)}, folder / "bad.pth")
    with pytest.raises(ValueError, match=r"something.*weight and bias"):
        load_head(folder / "bad.pth")
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        load_head(folder / "absent.pth")


def test_aesthetic_is_eq_15_of_the_raw_score() -> None:
    video, controls = sprites(2)
    reward = Aesthetic()
    scores = reward(video, controls)
    raw = reward.rate(video.flatten(0, 1)).view(2, -1)
    torch.testing.assert_close(scores, 1 + 4 * (raw - 1) / 9)
    torch.testing.assert_close(reward.raw(scores), raw)
    assert scores.min() >= 1 and scores.max() <= 5


def test_aesthetic_falls_with_degradation() -> None:
    clean = sprites(24)[0][:, ::6].flatten(0, 1)  # (N, 3, 64, 64)
    reward = Aesthetic()
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(clean.shape, generator=generator)
    noisy = [reward.rate((clean + s * eps).clip(0, 1)).mean().item() for s in (0, 0.03, 0.08, 0.2)]
    images = clean.permute(0, 2, 3, 1).numpy()
    blurred = [reward.rate(clean).mean().item()]
    for sigma in (0.6, 1.2, 2.5):
        soft = np.stack([cv2.GaussianBlur(image, (0, 0), sigma) for image in images])
        blurred.append(reward.rate(torch.from_numpy(soft).permute(0, 3, 1, 2)).mean().item())
    for scores in (noisy, blurred):
        assert all(a > b + 0.2 for a, b in itertools.pairwise(scores)), scores
        assert scores[0] > 8.5 and scores[-1] < 5, scores


def test_aesthetic_takes_other_sizes() -> None:
    controls = [control(torch.zeros(1, 0, 3))]
    for height, width in ((32, 32), (48, 80), (128, 64)):
        assert Aesthetic()(torch.rand(1, 1, 3, height, width), controls).shape == (1, 1)


def test_aesthetic_copies_are_cheap_and_share_the_model() -> None:
    fresh = Aesthetic()
    assert len(pickle.dumps(copy.deepcopy(fresh))) < 1000
    video, controls = sprites(1)
    before = fresh(video, controls)
    copied = copy.deepcopy(fresh)
    assert len(pickle.dumps(copied)) < 1000  # nor does a copy carry the model after loading
    torch.testing.assert_close(copied(video, controls), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"tower": "ViT-L-41"}, ValueError, "ViT-L-41"),
        ({"tower": "ViT-L-14-quickgelu"}, ValueError, "weights= and head="),
        ({"tower": "ViT-L-14", "weights": "absent.pt", "head": "h.pth"}, FileNotFoundError, r"absent\.pt"),
        ({"weights": "some.pt"}, ValueError, "own weights"),
    ],
)
def test_aesthetic_names_what_is_missing(settings: dict[str, str], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Aesthetic(**settings).rate(torch.rand(1, 3, 64, 64))


# --- smoothness and dynamic degree -----------------------------------------------------------------------------------


def test_smoothness_and_dynamic_degree() -> None:
    video, controls = sprites(4, "hard")
    still = video[:, :1].expand_as(video)
    flicker = still.clone()
    flicker[:, 1::2] *= 0.8
    assert (Smoothness()(still, controls) == 1).all()
    assert Smoothness()(flicker, controls)[:, 2:].max() < Smoothness()(video, controls)[:, 2:].mean()
    assert (DynamicDegree()(still, controls) == 0).all()
    rough = cv2.GaussianBlur(np.random.default_rng(0).random((64, 64, 3)), (0, 0), 2)
    texture = torch.from_numpy((rough - rough.min()) / np.ptp(rough)).permute(2, 0, 1)
    shifted = torch.stack([texture.roll(2 * i, -1) for i in range(4)])[None]  # everything moves by 2 px
    degree = DynamicDegree()(shifted, controls)[:, 1:].median()
    assert degree == pytest.approx(2 / 64, rel=0.5)


def test_importing_rewards_is_light() -> None:
    code = "import sys, ardrag_rl.rewards; print([m for m in ('cv2', 'open_clip', 'trl', 'ray') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
