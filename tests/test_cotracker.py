"""CoTracker: a stub of its interface with known motion; the real package, with random weights, where there is one."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ardrag_rl.control import Control
from ardrag_rl.rewards import CoTracker, CoTrackerOnline, Motion, Tracker, Tracks
from ardrag_rl.rewards import cotracker_online as online_module
from ardrag_rl.rewards.cotracker import load_cotracker

HEIGHT, WIDTH, LENGTH = 40, 96, 26

# --- a stub: the published interface around a model that follows colours ---------------------------------------------


class ColourModel(nn.Module):
    """Moves each query with the centre of the light in its colour, the brightest channel there; dark is unseen."""

    model_resolution = (60, 64)  # neither the clip's size nor its aspect
    window_len = 16

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(1))

    def init_video_online_processing(self) -> None:
        self.online_ind = 0
        self.online_track_feat, self.online_track_support = [None], [None]
        self.online_coords_predicted = self.online_vis_predicted = self.online_conf_predicted = None

    def get_track_feat(self, video: Tensor, frames: Tensor, xy: Tensor) -> Tensor:
        """(B, N, 3), one-hot: the brightest channel, 0 where the query is in another window."""
        assert xy.dtype == torch.float32
        b = torch.arange(len(video))[:, None]
        t = frames.long()
        x, y = xy.round().long().clip(min=0).unbind(-1)
        colours = video[b, t.clip(0, video.shape[1] - 1), :, y.clip(max=59), x.clip(max=63)]
        return F.one_hot(colours.argmax(-1), 3).float() * ((t >= 0) & (t < video.shape[1]))[..., None]

    def forward(self, video: Tensor, queries: Tensor, iters: int = 6, is_online: bool = False) -> tuple[Tensor, ...]:
        first = self.online_ind if is_online else 0
        entry = queries[..., 0] - first
        colours = self.get_track_feat(video, entry, queries[..., 1:])
        if is_online:
            if self.online_track_feat[0] is None:
                self.online_track_feat = [torch.zeros_like(colours)]
                self.online_track_support = [torch.zeros_like(colours[..., :2])]
            fresh = self.online_track_feat[0].sum(-1, keepdim=True) == 0
            self.online_track_feat[0] += colours * fresh  # in place, as the model does
            colours = self.online_track_feat[0]
        light = torch.einsum("btchw,bnc->btnhw", video, colours) * torch.exp(self.gain)
        total = light.sum((-2, -1))
        y, x = torch.arange(60.0), torch.arange(64.0)
        centre = torch.stack([(light.sum(-2) * x).sum(-1), (light.sum(-1) * y).sum(-1)], -1)
        centre = centre / total[..., None].clip(min=1e-6)
        index = entry.long().clip(0, video.shape[1] - 1)[:, None, :, None].expand(-1, -1, -1, 2)
        offset = (queries[..., 1:] - centre.gather(1, index)[:, 0]).float()
        if is_online:
            self.online_track_support[0] += offset * fresh * (colours.sum(-1, keepdim=True) > 0)
            offset = self.online_track_support[0]
        coords = centre + offset[:, None]
        visible = (total > 5 * 255).float()
        if is_online:
            past = self.online_coords_predicted
            coords = coords if past is None else torch.cat((past[:, :first], coords), 1)
            visible = visible if past is None else torch.cat((self.online_vis_predicted[:, :first], visible), 1)
            self.online_coords_predicted, self.online_vis_predicted = coords, visible
            self.online_conf_predicted = torch.ones_like(visible)
            self.online_ind += 8
        return coords, visible, torch.ones_like(visible), None


class ColourPredictor(nn.Module):
    """Frames resized to the model's, points mapped there and back."""

    step = 8

    def __init__(self, checkpoint: None = None, offline: bool = True, window_len: int = 60) -> None:
        super().__init__()
        torch.manual_seed(0)  # as the package does
        self.model = ColourModel()

    def scale(self, video: Tensor) -> Tensor:
        return torch.tensor([63 / (video.shape[-1] - 1), 59 / (video.shape[-2] - 1)])

    def resized(self, video: Tensor) -> Tensor:
        frames = F.interpolate(video.flatten(0, 1), (60, 64), mode="bilinear", align_corners=True)
        return frames.unflatten(0, video.shape[:2])

    def forward(self, video: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        assert video.max() > 1, "expected 0..255"
        queries = torch.cat((queries[..., :1], queries[..., 1:] * self.scale(video)), -1)
        tracks, visible, *_ = self.model.forward(video=self.resized(video), queries=queries, iters=6)
        return tracks / self.scale(video), visible > 0.9


class OnlineColourPredictor(ColourPredictor):
    def forward(self, chunk: Tensor, is_first_step: bool = False, queries: Tensor | None = None) -> tuple[Any, Any]:
        if is_first_step:
            assert queries is not None
            self.model.init_video_online_processing()
            self.queries = torch.cat((queries[..., :1], queries[..., 1:] * self.scale(chunk)), -1)
            return None, None
        assert chunk.shape[1] <= 16
        tracks, visible, *_ = self.model(video=self.resized(chunk), queries=self.queries, iters=6, is_online=True)
        return tracks / self.scale(chunk), visible > 0.6


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A file of weights for the stub, which stands for the package."""
    module = ModuleType("cotracker.predictor")
    module.CoTrackerPredictor, module.CoTrackerOnlinePredictor = ColourPredictor, OnlineColourPredictor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cotracker", ModuleType("cotracker"))
    monkeypatch.setitem(sys.modules, "cotracker.predictor", module)
    file = tmp_path / "weights.pth"
    torch.save({"model": {"gain": torch.ones(1)}}, file)
    return str(file)


def clip() -> tuple[Tensor, list[Control]]:
    """Two clips, wider than high. A red and a blue spot, the blue one touched from frame 2 and hidden in 9 to 12; and
    a green one that is alone. Points are in the middle of the spots."""
    t = torch.linspace(0, 1, LENGTH)
    red = torch.stack([0.2 + 0.5 * t, 0.3 + 0.3 * t], -1)
    blue = torch.stack([0.8 - 0.5 * t, 0.7 - 0.2 * t], -1)
    green = torch.stack([0.3 + 0.1 * t, 0.7 - 0.4 * t], -1)
    hidden = torch.zeros(LENGTH, dtype=torch.bool)
    hidden[9:13] = True
    video = torch.zeros(2, LENGTH, 3, HEIGHT, WIDTH)
    video[0, :, 0], video[0, :, 2], video[1, :, 1] = spot(red), spot(blue), spot(green)
    video[0, hidden, 2] = 0
    touched = torch.ones(LENGTH, 2)
    touched[:2, 1] = 0
    points = torch.cat((torch.stack([red, blue], 1), touched[..., None]), -1)
    visible = touched.bool() & ~torch.stack([torch.zeros_like(hidden), hidden], 1)
    image = torch.zeros(3, HEIGHT, WIDTH)
    alone = torch.cat((green, torch.ones(LENGTH, 1)), -1)[:, None]
    return video, [Control(points, "", image, visible), Control(alone, "", image)]


def spot(xy: Tensor) -> Tensor:
    """(T, H, W), light around the fractions (T, 2); pixel centres are at (i + 0.5) / size."""
    x = (torch.arange(WIDTH) + 0.5 - WIDTH * xy[:, :1]) / 2
    y = (torch.arange(HEIGHT) + 0.5 - HEIGHT * xy[:, 1:]) / 2
    return torch.exp(-(y[:, :, None] ** 2) - x[:, None] ** 2)


def queries() -> Tensor:
    return torch.tensor([[[0, 0.2, 0.3], [2, 0.76, 0.684]], [[0, 0.3, 0.7], [-1, 0, 0]]])


STUBBED = [
    functools.partial(CoTracker, window=8),
    functools.partial(CoTracker, window=None),
    CoTrackerOnline,
]


@pytest.mark.parametrize("make", STUBBED)
def test_tracks_are_where_the_points_are(stub: str, make: Any) -> None:
    video, controls = clip()
    tracks = make(stub).start(queries()).append(video)
    assert tracks.positions.shape == (2, LENGTH, 2, 2) and tracks.visible.shape == (2, LENGTH, 2)
    truth = torch.stack([controls[0].points, controls[1].points.expand(-1, 2, -1)])
    seen = torch.stack([controls[0].scored, torch.cat([controls[1].scored, torch.zeros(LENGTH, 1)], 1).bool()])
    assert tracks.visible.equal(seen)
    # half a pixel is 0.005 of the width and 0.012 of the height
    torch.testing.assert_close(tracks.positions[seen], truth[seen][:, :2], rtol=0, atol=1e-3)


@pytest.mark.parametrize("make", STUBBED)
def test_motion_by_cotracker_pays_for_the_drag_that_was_asked_for(stub: str, make: Any) -> None:
    video, controls = clip()
    reward = Motion(make(stub))
    scores = reward(video, controls)
    scored = reward.counted(controls)
    assert scores[scored].min() > 4.95
    assert reward(video.flip(-1), controls).mean() < 1  # mirrored, the spots go elsewhere


def test_a_tracker_of_whole_videos_makes_motion_a_reward_that_is_paid_at_the_end(stub: str) -> None:
    video, controls = clip()
    reward = Motion(CoTracker(stub, window=None))
    assert not reward.causal and Motion(CoTracker(stub)).causal and Motion(CoTrackerOnline(stub)).causal
    with pytest.raises(ValueError, match="'motion' tracks whole videos"):
        reward.start(controls)
    session = CoTracker(stub, window=None).start(queries())
    session.append(video)
    with pytest.raises(ValueError, match="all frames at once"):
        session.append(video)


@pytest.mark.parametrize("make", [functools.partial(CoTracker, window=8), CoTrackerOnline])
def test_sessions_stream_fork_and_look_back_only(stub: str, make: Any) -> None:
    streams_and_forks(make(stub), clip()[0], queries())


def streams_and_forks(tracker: Tracker, video: Tensor, asked: Tensor) -> None:
    whole = tracker.start(asked).append(video)
    cuts = [3, len(video[0]) - 5, 2]  # the second one takes it through every window
    session = tracker.start(asked)
    parts = [session.append(part) for part in video.split([cuts[0], cuts[1] - cuts[0], 5], 1)[:2]]
    fork = session.select([1])
    session.select([0, 1]).append(video[:, :2])  # another future
    parts.append(session.append(video[:, cuts[1] :]))
    same(Tracks(*(torch.cat([getattr(p, k) for p in parts], 1) for k in ("positions", "scores", "visible"))), whole)
    last = fork.append(video[1:, cuts[1] :])
    same(last, Tracks(*(x[1:, cuts[1] :] for x in (whole.positions, whole.scores, whole.visible))))


def same(a: Tracks, b: Tracks) -> None:
    torch.testing.assert_close(a.positions, b.positions, rtol=0, atol=1e-4)
    assert a.visible.equal(b.visible)


@pytest.mark.parametrize("online", [False, True])
def test_loading_leaves_the_random_numbers_of_others_alone(stub: str, online: bool) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    load_cotracker(stub, "cpu", online)
    assert torch.get_rng_state().equal(before)


def test_errors_say_what_is_wrong(stub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video, controls = clip()
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        Motion(CoTracker("absent.pth"))(video, controls)
    torch.save({"other": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"(?s)other\.pth does not fit.*gain.*other"):
        Motion(CoTrackerOnline(tmp_path / "other.pth"))(video, controls)
    with pytest.raises(ValueError, match="window=1"):
        CoTracker("weights.pth", window=1)
    monkeypatch.setitem(sys.modules, "cotracker.predictor", None)
    load_cotracker.cache_clear()
    for make in (CoTracker, CoTrackerOnline):
        with pytest.raises(ImportError, match=r"pip install git\+https"):
            Motion(make(stub))(video, controls)


# --- the real package ------------------------------------------------------------------------------------------------


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[bool, str]:
    """Random weights by whether they are the online model's; narrower and smaller than published, for a CPU."""
    if os.environ.get("ARDRAG_COTRACKER"):
        monkeypatch.syspath_prepend(os.environ["ARDRAG_COTRACKER"])
    reason = "cotracker is not installed, and ARDRAG_COTRACKER does not name a checkout of it"
    predictor = pytest.importorskip("cotracker.predictor", reason=reason)
    from cotracker.models.core.cotracker import cotracker3_online as core

    narrow = {"hidden_size": 48, "num_heads": 1, "space_depth": 1, "time_depth": 1, "num_virtual_tracks": 4}

    def transformer(**settings: Any) -> nn.Module:
        return former(**{**settings, **narrow})

    def mlp(in_features: int, hidden_features: int, out_features: int) -> nn.Module:
        return wide(in_features, 16, out_features)

    former, wide = core.EfficientUpdateFormer, core.Mlp
    monkeypatch.setattr(core, "EfficientUpdateFormer", transformer)
    monkeypatch.setattr(core, "Mlp", mlp)
    monkeypatch.setattr(online_module, "_SUPPORT", 1)  # the middle of the frame
    files = {}
    for online, make in ((False, predictor.CoTrackerPredictor), (True, predictor.CoTrackerOnlinePredictor)):
        torch.manual_seed(3)
        model = make(checkpoint=None, window_len=16 if online else 60).model
        # nearly zero at first: points would stay, and never be seen; much more, and rounding would grow to pixels
        nn.init.normal_(model.updateformer.flow_head.weight, std=0.02)
        nn.init.normal_(model.updateformer.vis_conf_head.weight, std=0.1)
        files[online] = str(tmp_path / f"{online}.pth")
        torch.save(model.state_dict(), files[online])
        loaded = load_cotracker(files[online], "cpu", online)
        loaded.interp_shape = loaded.model.model_resolution = (32, 48)
        loaded.support_grid_size = 2
    return files


def noise(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rough = torch.rand(2 * length, 3, 8, 8, generator=generator)
    return F.interpolate(rough, (HEIGHT, WIDTH), mode="bilinear").unflatten(0, (2, length))


def in_pixels(asked: Tensor) -> Tensor:
    return torch.cat((asked[..., :1], asked[..., 1:] * torch.tensor([WIDTH, HEIGHT]) - 0.5), -1)


def in_fractions(tracks: Tensor) -> Tensor:
    return ((tracks + 0.5) / torch.tensor([WIDTH, HEIGHT])).clip(0, 1)


def test_offline_tracks_are_the_predictors_own(real: dict[bool, str]) -> None:
    video, asked = noise(5), queries()
    tracks = CoTracker(real[False], window=None).start(asked).append(video)
    predictor = load_cotracker(real[False], "cpu", False)
    for row, count in ((0, 2), (1, 1)):  # one by one: padding changes nothing
        wanted, seen = predictor(255 * video[[row]], queries=in_pixels(asked[[row], :count]))
        torch.testing.assert_close(tracks.positions[row, 2:, :count], in_fractions(wanted)[0, 2:], rtol=0, atol=1e-4)
        assert tracks.visible[row, 2:, :count].equal(seen[0, 2:])
    assert tracks.positions.diff(dim=1)[0].abs().max() > 0.05  # they do move
    assert not tracks.visible[0, :2, 1].any() and not tracks.visible[1, :, 1].any()
    assert tracks.visible[0, 0, 0] and tracks.visible[0, 2, 1] and not tracks.visible.all()


def test_offline_windows_are_prefixes(real: dict[bool, str]) -> None:
    video, asked = noise(5), queries()
    tracks = CoTracker(real[False], window=5).start(asked).append(video)
    for t in (1, 4):
        prefix = CoTracker(real[False], window=None, batch_size=1).start(asked).append(video[:, : t + 1])
        torch.testing.assert_close(tracks.positions[:, t], prefix.positions[:, t], rtol=0, atol=1e-4)
        assert tracks.visible[:, t].equal(prefix.visible[:, t])
    streams_and_forks(CoTracker(real[False], window=3), noise(9), asked)


@pytest.mark.slow
def test_online_tracks_are_the_predictors_own_where_windows_end(real: dict[bool, str]) -> None:
    video, asked = noise(24), queries()
    asked[0, 1, 0] = 18  # in the second window
    tracks = CoTrackerOnline(real[True]).start(asked).append(video)
    predictor = load_cotracker(real[True], "cpu", True)
    support = torch.tensor([[[0, 0.5, 0.5]]])
    for row, count in ((0, 2), (1, 1)):
        points = in_pixels(torch.cat((asked[[row], :count], support), 1))
        predictor(255 * video[[row], :16], is_first_step=True, queries=points)
        for first in (0, 8):
            wanted, seen = predictor(255 * video[[row], first : first + 16])
            now = in_fractions(wanted)[0, -1, :count]
            begun = asked[row, :count, 0] <= first + 15
            torch.testing.assert_close(tracks.positions[row, first + 15, :count][begun], now[begun], rtol=0, atol=1e-4)
            assert tracks.visible[row, first + 15, :count].equal(seen[0, -1, :count] & begun)
    assert tracks.positions[0, :, 0].diff(dim=0).abs().max() > 0.05


@pytest.mark.slow
def test_online_sessions_of_the_real_package_stream_and_fork(real: dict[bool, str]) -> None:
    streams_and_forks(CoTrackerOnline(real[True]), noise(19), queries())


@pytest.mark.parametrize("online", [False, True])
def test_half_precision_is_near_and_batches_are_the_same(real: dict[bool, str], online: bool) -> None:
    make: Any = CoTrackerOnline if online else CoTracker
    video, asked = noise(3), queries()
    asked[1, 1] = torch.tensor([1.0, 0.6, 0.6])
    full = make(real[online]).start(asked).append(video)
    same(make(real[online], batch_size=1).start(asked).append(video), full)
    half = make(real[online], dtype=torch.bfloat16).start(asked).append(video)
    assert half.positions.dtype == torch.float32
    assert 0 < (half.positions - full.positions).abs().max() < 0.05


def test_weights_of_the_other_model_are_refused(real: dict[bool, str]) -> None:
    with pytest.raises(ValueError, match=r"(?s)True\.pth does not fit.*time_emb"):
        load_cotracker(real[True], "cpu", False)
