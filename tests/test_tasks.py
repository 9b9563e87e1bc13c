"""Tasks: sprites, folders of clips, manifests, an image with a drag path; media files."""

import json
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ardrag_rl.control import Control
from ardrag_rl.envs import Sprites, Task, TaskList, TaskSource, draw_drag, fit, image_task, make_tasks
from ardrag_rl.envs.fit import Crop
from ardrag_rl.envs.sprites import LEVELS
from ardrag_rl.media import (
    MediaError,
    read_frames,
    read_image,
    read_video,
    video_info,
    write_gif,
    write_image,
    write_video,
)

CLIPS = Path(__file__).parents[1] / "../shared/data/videos"


def moving_square(num_frames=30, height=96, width=128, step=2):
    """A textured square that moves right over a textured ground: a video, and its centre's x per frame."""
    rng = np.random.default_rng(0)
    ground = torch.from_numpy(rng.uniform(0.3, 0.5, (3, height // 8, width // 8))).float()
    ground = torch.nn.functional.interpolate(ground[None], (height, width), mode="bilinear")[0]
    square = torch.from_numpy(rng.uniform(0, 1, (3, 6, 6))).float()
    square = torch.nn.functional.interpolate(square[None], (36, 36), mode="nearest")[0]
    video = ground.expand(num_frames, -1, -1, -1).clone()
    for t in range(num_frames):
        video[t, :, 30:66, 20 + step * t : 56 + step * t] = square
    return video


@pytest.fixture
def folder(tmp_path):
    write_video(tmp_path / "a-square.mp4", moving_square(), fps=12)
    write_video(tmp_path / "other.mp4", moving_square(24).flip(-1), fps=12)
    (tmp_path / "other.txt").write_text("a square goes left\n")
    return tmp_path


# sprites


@pytest.mark.parametrize(
    "name", ["sprites", "sprites-medium", "sprites-hard", "sprites:heldout", "sprites-hard:heldout"]
)
def test_sprites_by_name(name):
    source = make_tasks(name, 6, 32, 48)
    assert isinstance(source, TaskSource)
    task = source[3]
    assert task.control.num_frames == 6 and task.control.image.shape == (3, 32, 48)
    assert fit(task, 6, 32, 48) is task
    assert make_tasks(name, None, 64, 64).num_frames == (12 if name.startswith("sprites:") or name == "sprites" else 16)


@pytest.mark.parametrize("level", LEVELS)
def test_sprites_are_reproducible_and_their_truth_is_in_the_frame(level):
    source, again = Sprites(level), Sprites(level)
    for index in range(20):
        control, other = source[index].control, again[index].control
        assert torch.equal(control.points, other.points) and torch.equal(control.image, other.image)
        assert control.prompt == other.prompt
        xy = control.points[..., :2]
        assert (xy > 0).all() and (xy < 1).all()
        assert torch.equal(source.video(index)[0], control.image)
    assert not torch.equal(Sprites(level, seed=1)[0].control.points, source[0].control.points)


def test_sprites_move_as_their_points_say():
    """The difference of two frames is where the sprite was and where it is."""
    source = Sprites("gentle")
    for index in range(10):
        scene = source.scene(index)
        if scene.bar is not None:
            continue
        video, path = source.video(index), scene.path
        changed = (video[-1] - video[0]).abs().sum(0) > 0.05
        y, x = torch.nonzero(changed, as_tuple=True)
        both = torch.stack([x + 0.5, y + 0.5], -1).float()
        distance = torch.cdist(both, torch.from_numpy(path[[0, -1]]).float()).amin(1)
        assert (distance < 1.3 * scene.sprite.radius + 2).all()


def test_splits_show_disjoint_sprites():
    def shown(split):
        source = Sprites("hard", split)
        scenes = [source.scene(i) for i in range(200)]
        return {(s.sprite.shape, s.sprite.colour, s.sprite.texture) for s in scenes}

    assert not shown("train") & shown("heldout")


def test_levels_leave_more_and_more_room():
    def speed(level):
        paths = [Sprites(level).scene(i).path for i in range(100)]
        return np.mean([np.linalg.norm(np.diff(p, axis=0), axis=1).mean() for p in paths])

    assert speed("hard") > 1.3 * speed("medium") > 1.5 * speed("gentle")
    touches = {level: {f for i in range(50) for f in Sprites(level).scene(i).force} for level in LEVELS}
    lightest = {level: min(touches[level] - {0.0}) for level in LEVELS}
    assert touches["gentle"] == {1.0} and 0.35 < lightest["hard"] < 0.5 < lightest["medium"] < 0.7
    assert any(not Sprites("hard").scene(i).force.all() for i in range(50))
    assert any(Sprites("hard").scene(i).distractor for i in range(50))


# fitting


def test_fit_cuts_longer_paths_and_holds_shorter_ones():
    points = torch.rand(5, 2, 3)
    task = Task("t", Control(points, "p", torch.rand(3, 32, 32)))
    assert torch.equal(fit(task, 3, 32, 32).control.points, points[:3])
    held = fit(task, 8, 32, 32).control.points
    assert torch.equal(held[:5], points) and (held[5:] == points[4]).all()


def test_fit_crops_image_and_points_together():
    """A white spot stays under its point."""
    image = torch.zeros(3, 60, 100)
    image[:, 18:26, 54:62] = 1
    points = torch.tensor([[[58 / 100, 22 / 60, 1.0], [0.01, 0.5, 1.0]]])
    control = fit(Task("t", Control(points, "p", image)), 1, 30, 30).control
    assert control.image.shape == (3, 30, 30)
    y, x = torch.nonzero(control.image[0] > 0.5, as_tuple=True)
    spot = torch.tensor([(x.float().mean() + 0.5) / 30, (y.float().mean() + 0.5) / 30])
    assert torch.allclose(control.points[0, 0, :2], spot, atol=0.02)
    assert control.points[0, :, 2].tolist() == [1.0, 0.0]  # the second point is cropped away


def test_crop_is_the_largest_centred_part():
    assert Crop((60, 100), (30, 30)).box == (0, 20, 60, 60)
    assert Crop((100, 60), (30, 30)).box == (20, 0, 60, 60)
    assert Crop((60, 100), (60, 100)).box == (0, 0, 60, 100)


# clips


def test_folder_of_clips(folder):
    source = make_tasks(folder, 6, 32, 32)
    held = make_tasks(f"{folder}:heldout", 6, 32, 32)
    assert len(source) > 10 and len(held) >= 1
    windows = {w.name for w in source.windows}, {w.name for w in held.windows}
    assert not windows[0] & windows[1]
    assert {w.split("/")[0] for w in windows[0]} == {"a-square", "other"}
    for index in range(len(source)):
        task = source[index]
        assert torch.equal(source.video(index)[0], task.control.image)
        right = "a-square" in task.id
        assert task.control.prompt == ("a square" if right else "a square goes left")
        points = task.control.points
        assert points.shape[0] == 6 and points.shape[1] >= 1 and (points[..., 2] == 1).all()
        # 2 px a frame, and the crop shows 96 of 128 columns
        moved = (points[1:, 0, 0] - points[:-1, 0, 0]) * 96
        assert torch.allclose(moved, torch.full_like(moved, 2.0 if right else -2.0), atol=0.3)
    again = make_tasks(folder, 6, 32, 32)
    assert torch.equal(again[3].control.points, source[3].control.points)


def test_a_bad_clip_is_skipped_with_its_name(folder, caplog):
    (folder / "broken.mp4").write_bytes(b"no video at all")
    write_video(folder / "short.mp4", moving_square(3), fps=12)
    with caplog.at_level(logging.WARNING):
        source = make_tasks(folder, 6, 32, 32)
    assert "broken.mp4" in caplog.text and "has 3 frames: expected at least 6" in caplog.text
    assert {w.path.name for w in source.windows} == {"a-square.mp4", "other.mp4"}


def test_a_folder_without_clips_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="gives no task: of 0 clips"):
        make_tasks(tmp_path, 6, 32, 32)


def test_a_still_grey_clip_has_no_control(tmp_path, caplog):
    write_video(tmp_path / "grey.mp4", torch.full((10, 3, 32, 32), 0.5))
    with caplog.at_level(logging.WARNING):
        assert make_tasks(tmp_path / "grey.mp4", 4, 32, 32)[0].control.points.shape == (4, 0, 3)
    assert "no point to track" in caplog.text


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not beside this checkout")
def test_real_clips():
    source = make_tasks(CLIPS, 8, 64, 64)
    clips = {w.path.stem for w in source.windows}
    assert len(clips) == 5
    for clip in sorted(clips):
        index = next(i for i, w in enumerate(source.windows) if w.path.stem == clip)
        control = source[index].control
        assert control.image.shape == (3, 64, 64) and control.points.shape[1] >= 1
        assert (control.points[0, :, 2] == 1).all()
        assert control.points[:, 0, 2].mean() > 0.5


# manifests


def test_manifest(folder):
    image = torch.rand(3, 40, 40)
    write_image(folder / "photo.png", image)
    lines = [
        {"clip": "other.mp4", "start": 2, "prompt": "left", "tracks": [[[0.5, 0.5, 1], [0.4, 0.5, 0.5]]]},
        {"image": "photo.png", "tracks": [[[0.5, 0.5]], [[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]]]},
        {"image": "photo.png", "prompt": "nothing moves", "tracks": []},
    ]
    path = folder / "tasks.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    train, held = make_tasks(path, None, 32, 32), make_tasks(f"{path}:heldout", None, 32, 32)
    assert (len(train), len(held)) == (2, 1) and train.num_frames == 3
    tasks = {t.id: t.control for t in [train[0], train[1], held[0]]}
    assert tasks.keys() == {"tasks:1", "tasks:2", "tasks:3"}
    every = make_tasks(f"{path}:all", None, 32, 32)
    assert [every[i].id for i in range(len(every))] == ["tasks:1", "tasks:2", "tasks:3"]
    first, second = tasks["tasks:1"], tasks["tasks:2"]
    frame = read_video(folder / "other.mp4", 2, 1)
    assert torch.allclose(first.image, Crop((96, 128), (32, 32)).images(frame)[0].clamp(0, 1))
    assert first.prompt == "left" and first.points[:, 0, 2].tolist() == [1.0, 0.5, 0.5]
    assert torch.allclose(second.points[:, 0, :2], torch.tensor(0.5))
    assert torch.allclose(second.points[2, 1], torch.tensor([0.3, 0.3, 1.0]))
    assert tasks["tasks:3"].points.shape == (3, 0, 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON"),
        ("[1]", "expected an object"),
        ('{"prompt": "p", "tracks": []}', 'expected one of "clip" and "image"'),
        ('{"image": "nowhere.png", "tracks": []}', "nowhere.png' is not there"),
        ('{"clip": "other.mp4"}', '"tracks" is missing'),
        ('{"clip": "other.mp4", "tracks": [[[1.5, 0.5, 1]]]}', r"coordinate 1.5, outside \[0, 1\]"),
        ('{"clip": "other.mp4", "tracks": [[[0.5]]]}', r"point 0: .* its shape is \(1, 1\)"),
        ('{"clip": "other.mp4", "tracks": [["x"]]}', "point 0"),
        ('{"clip": "other.mp4", "tracks": [[[0.5, 0.5, NaN]]]}', "NaN"),
        ('{"clip": "other.mp4", "start": "x", "tracks": []}', "start='x'"),
        ('{"clip": "other.mp4", "trakcs": []}', r"unknown keys \['trakcs'\]"),
    ],
)
def test_a_manifest_error_has_its_line(folder, line, message):
    path = folder / "tasks.jsonl"
    path.write_text('{"clip": "other.mp4", "tracks": []}\n' + line + "\n")
    with pytest.raises(ValueError, match=message) as error:
        make_tasks(path, None, 32, 32)
    assert "line 2" in str(error.value) and "tasks.jsonl" in str(error.value)


def test_an_empty_manifest_is_an_error(tmp_path):
    (tmp_path / "m.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        make_tasks(tmp_path / "m.jsonl", None, 32, 32)
    (tmp_path / "m.jsonl").write_bytes('{"prompt": "caf\u00e9"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"m\.jsonl' is no UTF-8 text"):
        make_tasks(tmp_path / "m.jsonl", None, 32, 32)


# one image


def test_images_come_from_anywhere(tmp_path):
    from PIL import Image

    array = (255 * torch.rand(20, 40, 3, generator=torch.Generator().manual_seed(0))).byte().numpy()
    want = torch.from_numpy(array).permute(2, 0, 1) / 255
    write_image(tmp_path / "photo.png", want)
    for image in (tmp_path / "photo.png", Image.fromarray(array), array, array / 255, want):
        got = image_task(image, [[[0.5, 0.5]]]).control.image
        assert torch.allclose(got, want, atol=1e-6) and got.dtype == torch.float32
    with pytest.raises(TypeError, match=r"shape \(3, 20, 40\): expected .* an array \(H, W, 3\)"):
        image_task(want.numpy(), [[[0.5, 0.5]]])


def test_a_released_point_does_not_pull_the_path():
    drag = [[[0.9, 0.9, 1], [0.7, 0.9, 1], [5, 5, 0], [0.1, 0.1, 1]]]  # what an untouched point says means nothing
    points = image_task(torch.zeros(3, 8, 8), drag, num_frames=13).control.points[:, 0]
    touched = points[:, 2] > 0
    assert touched.tolist() == [True] * 6 + [False] * 5 + [True] * 2
    assert torch.allclose(points[:5, 0], torch.linspace(0.9, 0.7, 5))
    assert (points[touched][:, 1] - 0.9).abs().minimum((points[touched][:, 1] - 0.1).abs()).max() < 1e-6


def test_image_and_drag(tmp_path):
    write_image(tmp_path / "photo.png", torch.rand(3, 20, 40))
    drag = {"units": "pixels", "points": [[[0, 0], [39, 19, 0.5]], [[19.5, 9.5]]]}
    (tmp_path / "drag.json").write_text(json.dumps(drag))
    task = image_task(tmp_path / "photo.png", tmp_path / "drag.json", "a photo")
    points = task.control.points
    assert task.id == "photo" and points.shape == (2, 2, 3)
    assert torch.allclose(points[:, 0], torch.tensor([[0.5 / 40, 0.5 / 20, 1], [39.5 / 40, 19.5 / 20, 0.5]]))
    assert torch.allclose(points[:, 1], torch.tensor([[0.5, 0.5, 1.0]] * 2))
    resampled = image_task(tmp_path / "photo.png", [[[0.0, 0.2], [1.0, 0.2]]], num_frames=5).control.points
    assert torch.allclose(resampled[:, 0, 0], torch.linspace(0, 1, 5))
    assert len(make_tasks(task, None, 32, 32)) == 1 and isinstance(TaskList([task]), TaskSource)


@pytest.mark.parametrize(
    ("drag", "message"),
    [
        ("nothing", "cannot be read as JSON"),
        ('{"paths": []}', '"points"'),
        ('{"points": [], "units": "miles"}', "miles"),
        ('{"points": [[[50, 3]]], "units": "pixels"}', "outside"),
        ('{"points": 4}', "expected a list of tracks"),
    ],
)
def test_a_bad_drag_is_named(tmp_path, drag, message):
    (tmp_path / "drag.json").write_text(drag)
    with pytest.raises(ValueError, match=message) as error:
        image_task(torch.rand(3, 20, 40), tmp_path / "drag.json")
    assert "drag.json" in str(error.value)


# names


def test_unknown_names_say_what_exists(tmp_path):
    with pytest.raises(ValueError, match="sprites, sprites-hard"):
        make_tasks("sprite", None, 32, 32)
    (tmp_path / "photo.png").write_bytes(b"")
    with pytest.raises(ValueError, match="image_task"):
        make_tasks(tmp_path / "photo.png", None, 32, 32)
    with pytest.raises(ValueError, match="expected a name, a path"):
        make_tasks(3, None, 32, 32)
    with pytest.raises(ValueError, match="at least one"):
        make_tasks([], None, 32, 32)


# media


@pytest.mark.parametrize("degrees, turns", [(90, 1), (-90, -1), (180, 2)])
def test_a_video_filmed_sideways_is_turned_upright(tmp_path, degrees, turns):
    """The display matrix of an mp4's track, as phones write it; degrees counter-clockwise."""
    file = tmp_path / "v.mp4"
    write_video(file, moving_square(3), fps=10)
    whole, data = read_frames(file), file.read_bytes()
    cos, sin = round(np.cos(np.deg2rad(degrees))), round(np.sin(np.deg2rad(degrees)))
    unit, upright = 1 << 16, (1, 0, 0, 1)
    matrices = [
        struct.pack(">9i", unit * a, unit * b, 0, unit * c, unit * d, 0, 0, 0, 1 << 30)
        for a, b, c, d in (upright, (cos, -sin, sin, cos))
    ]
    track = data.index(b"tkhd")
    file.write_bytes(data[:track] + data[track:].replace(*matrices, 1))
    assert torch.equal(read_frames(file), torch.rot90(whole, turns, (2, 3)))


def test_video_there_and_back(tmp_path):
    video = moving_square(7)[:, :, :33, :41]
    write_video(tmp_path / "v.mp4", video, fps=10)
    info = video_info(tmp_path / "v.mp4")
    assert (info.num_frames, info.fps) == (7, 10.0)
    back = read_video(tmp_path / "v.mp4")[..., :33, :41]
    assert back.shape == video.shape and (back - video).abs().mean() < 0.03
    assert torch.equal(read_frames(tmp_path / "v.mp4", 1, 3, 2), read_frames(tmp_path / "v.mp4")[1:7:2])
    write_gif(tmp_path / "v.gif", video, fps=10)
    gif = Image.open(tmp_path / "v.gif")
    assert gif.n_frames == 7 and gif.size == (41, 33) and gif.info["duration"] == 100


def test_media_errors_name_the_file(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"nothing")
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    write_video(tmp_path / "v.mp4", moving_square(3))
    for call in (
        lambda: read_image(tmp_path / "bad.png"),
        lambda: read_image(tmp_path / "missing.png"),
        lambda: read_video(tmp_path / "bad.mp4"),
        lambda: video_info(tmp_path / "missing.mp4"),
        lambda: read_frames(tmp_path / "v.mp4", 0, 9),
        lambda: write_video(tmp_path / "no" / "v.mp4", moving_square(2)),
        lambda: write_gif(tmp_path / "no" / "v.gif", moving_square(2)),
    ):
        with pytest.raises(MediaError, match=str(tmp_path)):
            call()
    with pytest.raises(ValueError, match=r"shape \(2, 4, 8, 8\)"):
        write_video(tmp_path / "v.mp4", torch.rand(2, 4, 8, 8))


def test_drawing_shows_path_and_point():
    points = torch.tensor([[[0.2, 0.5, 1]], [[0.5, 0.5, 1]], [[0.8, 0.5, 1]]])
    control = Control(points, "p", torch.zeros(3, 32, 32))
    drawn = draw_drag(control.image, control, 1)
    assert drawn.shape == (256, 256, 3)
    row = drawn[128, :, 0].astype(int)
    solid, faint = row[70], row[190]
    assert solid > faint > 0
    assert drawn[:, 128].any() and not drawn[10].any()
    assert draw_drag(torch.zeros(3, 300, 400), control, 0).shape == (300, 400, 3)
