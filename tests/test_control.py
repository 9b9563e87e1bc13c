"""Control: what is accepted, and how it is drawn (Eq. 6)."""

import pytest
import torch

from ardrag_rl.control import Control

IMAGE = torch.full((3, 64, 64), 0.5)


def control(points, **changes):
    return Control(**{"points": torch.tensor(points), "prompt": "a red square moves", "image": IMAGE, **changes})


def at(column, row, size=64):
    """The fraction of a pixel's centre."""
    return (column + 0.5) / size, (row + 0.5) / size


def test_the_spot_peaks_at_the_point_with_its_intensity():
    maps = control([[[*at(40, 10), 1.0]], [[*at(5, 60), 0.25]]]).heat_maps(64, 64)
    assert maps.shape == (2, 3, 64, 64)
    heat = (maps[:, 0] + 1) / 2
    assert float(heat[0, 10, 40]) == pytest.approx(1.0) and int(heat[0].argmax()) == 10 * 64 + 40
    assert float(heat[1, 60, 5]) == pytest.approx(0.25) and int(heat[1].argmax()) == 60 * 64 + 5


@pytest.mark.parametrize(("height", "width"), [(256, 256), (64, 64), (128, 256), (512, 512)])
def test_the_std_is_10_px_at_256(height, width):
    std = 10 * min(height, width) / 256
    x, y = (width // 2 + 0.5) / width, (height // 2 + 0.5) / height
    heat = (control([[[x, y, 1.0]]]).heat_maps(height, width)[0, 0] + 1) / 2
    row, column = height // 2, width // 2
    for d in (1, 3, 7):
        spot = torch.tensor(-(d**2) / (2 * std**2)).exp()
        torch.testing.assert_close(heat[row + d, column], spot)
        torch.testing.assert_close(heat[row, column - d], spot)


def test_three_equal_channels_in_range():
    maps = control([[[0.2, 0.3, 1.0], [0.8, 0.9, 0.4]]] * 3).heat_maps(48, 64)
    assert torch.equal(maps[:, 0], maps[:, 1]) and torch.equal(maps[:, 0], maps[:, 2])
    assert float(maps.min()) >= -1 and float(maps.max()) <= 1
    assert float(maps[0, 0, -1, 0]) == pytest.approx(-1.0, abs=1e-3)  # -1 is no touch


def test_where_spots_meet_the_stronger_counts():
    a, b = [0.5, 0.5, 1.0], [0.53, 0.5, 0.6]
    both = control([[a, b]]).heat_maps(64, 64)
    alone = [control([[p]]).heat_maps(64, 64) for p in (a, b)]
    assert torch.equal(both, torch.maximum(*alone))


def test_untouched_points_draw_nothing_wherever_they_are():
    maps = control([[[0.5, 0.5, 0.0]], [[-3.0, 7.0, 0.0]]]).heat_maps(64, 64)
    assert torch.equal(maps, torch.full_like(maps, -1))


def test_no_points_is_no_control():
    empty = Control(torch.zeros(5, 0, 3), "p", IMAGE)
    assert empty.num_frames == 5 and empty.scored.shape == (5, 0)
    assert torch.equal(empty.heat_maps(64, 64), torch.full((5, 3, 64, 64), -1.0))


def test_visible_is_touched_by_default():
    points = [[[0.1, 0.1, 1.0], [0.2, 0.2, 0.0]]]
    assert control(points).visible.tolist() == [[True, False]]
    hidden = control(points, visible=torch.tensor([[False, True]]))
    assert hidden.scored.tolist() == [[False, False]]  # scored: touched and visible
    assert control(points, visible=torch.tensor([[True, True]])).scored.tolist() == [[True, False]]


def test_a_point_on_the_border_and_numpy_are_accepted():
    c = Control(torch.tensor([[[0.0, 1.0, 1.0]]]).double().numpy(), "p", IMAGE.double().numpy())
    assert c.points.dtype == c.image.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": [[[1.2, 0.5, 1.0]]]}, r"coordinate 1\.2.*outside \[0, 1\].*intensity 0"),
        ({"points": [[[0.5, -0.1, 0.5]]]}, r"coordinate -0\.1"),
        ({"points": [[[32.0, 10.0, 1.0]]]}, "divide pixels by width"),
        ({"points": [[[0.5, 0.5, 1.5]]]}, r"intensity of 1\.5"),
        ({"points": [[[0.5, 0.5, -0.5]]]}, r"intensity of -0\.5"),
        ({"points": [[[float("nan"), 0.5, 0.0]]]}, "NaN"),
        ({"points": [[0.5, 0.5, 1.0]]}, r"points have shape \(1, 3\)"),
        ({"points": [[[0.5, 0.5]]]}, r"expected \(T, K, 3\)"),
        ({"points": torch.zeros(0, 1, 3)}, "T >= 1"),
        ({"image": torch.zeros(64, 64, 3)}, r"expected \(3, H, W\)"),
        ({"image": torch.full((3, 8, 8), 255.0)}, "divide 8-bit images by 255"),
        ({"image": torch.full((3, 8, 8), torch.nan)}, "image has values outside"),
        ({"visible": torch.ones(1, 2)}, r"visible has shape \(1, 2\): expected \(1, 1\)"),
    ],
)
def test_bad_controls_are_refused(changes, message):
    good = {"points": [[[0.5, 0.5, 1.0]]], "prompt": "p", "image": IMAGE}
    with pytest.raises(ValueError, match=message):
        Control(**{**good, **changes})
