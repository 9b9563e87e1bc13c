"""Procedural drag tasks: textured sprites over soft backgrounds, with exact ground truth.

Unlimited and reproducible: task `index` of a (level, split, seed) is always the same. Lengths below are in pixels
at a side of 64 and scale with the resolution. Levels:

- `gentle`: one sprite, speeds up to 2.5, slow turns, stops, sometimes a bar that hides part of it. 12 frames.
- `medium`: what happens in `hard` ones, slower and under firmer touches. 16 frames; the embedded pipeline's data.
- `hard`: speeds up to 8, sharp turns, lighter touches, 16 frames, a distractor sprite, bars, release and re-grab.

The held-out split uses (shape, colour, texture) combinations that the train split never shows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ardrag_rl.control import Control
from ardrag_rl.envs.task import Task

COLOURS = {
    "red": (0.86, 0.20, 0.18),
    "orange": (0.95, 0.58, 0.15),
    "yellow": (0.95, 0.86, 0.25),
    "green": (0.22, 0.68, 0.32),
    "cyan": (0.20, 0.74, 0.80),
    "blue": (0.20, 0.36, 0.85),
    "purple": (0.58, 0.28, 0.75),
    "white": (0.95, 0.95, 0.93),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star")
TEXTURES = ("plain", "striped", "dotted", "ringed")
INK = np.array((0.10, 0.10, 0.14))  # texture and outline colour
BACKGROUNDS = {
    "grey": (0.52, 0.54, 0.56),
    "sand": (0.72, 0.64, 0.50),
    "moss": (0.40, 0.48, 0.36),
    "slate": (0.36, 0.42, 0.52),
    "rose": (0.66, 0.48, 0.50),
    "night": (0.20, 0.20, 0.28),
}
BAR = np.array((0.30, 0.24, 0.22))
_COMBINATIONS = list(itertools.product(range(len(SHAPES)), range(len(COLOURS)), range(len(TEXTURES))))
SPLITS = {
    "train": [c for c in _COMBINATIONS if (c[0] + 3 * c[1] + 5 * c[2]) % 8],
    "heldout": [c for c in _COMBINATIONS if not (c[0] + 3 * c[1] + 5 * c[2]) % 8],
}
HIDDEN_FRACTION = 0.3  # of a sprite's area behind a bar, above which the task calls the point not visible


@dataclass(frozen=True)
class Level:
    """What a level may ask for; lengths in pixels at a side of 64, angles in radians per frame."""

    num_frames: int
    max_speed: float
    min_speed: float
    turn: float  # std of the change of heading per frame
    sharp_turn: float  # probability per frame of turning by 90 to 150 degrees
    stop: float  # probability of a pause of 2 to 3 frames
    bar: float  # probability of an occluder
    distractor: float  # probability of a second, resting sprite
    release: float  # probability of letting go for 2 to 4 frames
    force: float  # the lightest touch; the force changes evenly from frame 0 to the last


LEVELS = {
    "gentle": Level(12, 2.5, 0.6, 0.18, 0.02, 0.25, 0.25, 0.0, 0.0, 1.0),
    "hard": Level(16, 8.0, 2.0, 0.40, 0.12, 0.35, 0.40, 0.4, 0.35, 0.35),
    "medium": Level(16, 5.0, 0.6, 0.30, 0.06, 0.30, 0.35, 0.4, 0.30, 0.5),  # last: a level's place seeds its tasks
}


@dataclass(frozen=True)
class _Sprite:
    shape: int
    colour: int
    texture: int
    radius: float

    @property
    def name(self) -> str:
        texture = TEXTURES[self.texture]
        words = [tuple(COLOURS)[self.colour], "" if texture == "plain" else texture, SHAPES[self.shape]]
        return " ".join(w for w in words if w)


@dataclass(frozen=True)
class Scene:
    """Everything that is drawn. Lengths in pixels at a side of 64."""

    sprite: _Sprite
    path: np.ndarray  # (T, 2) centre of the sprite
    force: np.ndarray  # (T,) of the touch in [0, 1]; 0 where it is let go
    background: tuple[int, int]
    angle: float
    ripple: tuple[float, float, float]  # frequency, angle, strength
    bar: tuple[bool, float, float] | None  # vertical, centre, half width
    distractor: tuple[_Sprite, np.ndarray] | None  # with its centre (2,)


class Sprites:
    """A task source of procedural clips.

    Args:
        level: "gentle", "medium" or "hard".
        split: "train" or "heldout".
        num_frames: latent and pixel frames of a clip; None for the level's own number.
        height, width: in pixels.
        seed: another seed is another, equally distributed world.
    """

    def __init__(
        self,
        level: str = "gentle",
        split: str = "train",
        num_frames: int | None = None,
        height: int = 64,
        width: int = 64,
        seed: int = 0,
    ) -> None:
        if level not in LEVELS:
            raise ValueError(f"sprite level {level!r} is unknown; choose one of {', '.join(LEVELS)}.")
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}.")
        self.level, self.split, self.seed = level, split, seed
        self.num_frames = num_frames or LEVELS[level].num_frames
        self.height, self.width = height, width

    def __len__(self) -> int:
        return 2**31 - 1

    def __getitem__(self, index: int) -> Task:
        if not 0 <= index < len(self):
            raise IndexError(f"task index {index} is outside 0..{len(self) - 1}.")
        scene = self.scene(index)
        scale = np.array([self.width, self.height]) / min(self.height, self.width)
        xy = scene.path / 64 / scale
        points = np.concatenate([xy, scene.force[:, None]], axis=1)[:, None]  # (T, 1, 3)
        video = self._render(scene, frames=1)
        control = Control(
            points=torch.from_numpy(points).float(),
            prompt=_prompt(scene),
            image=torch.from_numpy(video[0]),
            visible=torch.from_numpy(self._visible(scene))[:, None],
        )
        return Task(id=f"sprites-{self.level}:{self.split}/{self.seed}/{index}", control=control)

    def video(self, index: int) -> Tensor:
        """The ground truth clip, (T, 3, H, W) float32 in [0, 1]."""
        return torch.from_numpy(self._render(self.scene(index), self.num_frames))

    def scene(self, index: int) -> Scene:
        """What task `index` shows."""
        level = LEVELS[self.level]
        key = [self.seed, list(LEVELS).index(self.level), list(SPLITS).index(self.split), index]
        rng = np.random.default_rng(key)
        size = 64 * np.array([self.width, self.height]) / min(self.height, self.width)
        sprite = self._sprite(rng)
        bar = None
        if rng.random() < level.bar:
            vertical = bool(rng.random() < 0.5)
            length = size[0] if vertical else size[1]
            bar = (vertical, float(rng.uniform(0.35, 0.65) * length), float(rng.uniform(3.0, 5.0)))
        margin = sprite.radius + 2
        low, high = np.full(2, margin), size - margin
        start = rng.uniform(low, high)
        while bar is not None and abs(start[0 if bar[0] else 1] - bar[1]) < bar[2] + sprite.radius + 1:
            start = rng.uniform(low, high)  # frame 0 shows the whole sprite: trackers start there
        path, force = _path(rng, level, start, low, high, self.num_frames)
        distractor = None
        if rng.random() < level.distractor:
            other = self._sprite(rng)
            centre = rng.uniform(low, high)
            for _ in range(20):
                if np.linalg.norm(centre - start) > sprite.radius + other.radius + 2:
                    distractor = (other, centre)
                    break
                centre = rng.uniform(low, high)
        first, second = rng.choice(len(BACKGROUNDS), 2, replace=False)
        ripple = (float(rng.uniform(0.12, 0.28)), float(rng.uniform(0, np.pi)), float(rng.choice([0.0, 0.04, 0.08])))
        return Scene(
            sprite, path, force, (int(first), int(second)), float(rng.uniform(0, 2 * np.pi)), ripple, bar, distractor
        )

    def _sprite(self, rng: np.random.Generator) -> _Sprite:
        options = SPLITS[self.split]
        shape, colour, texture = options[rng.integers(len(options))]
        return _Sprite(shape, colour, texture, float(rng.uniform(8.0, 11.0)))

    def _grid(self) -> tuple[np.ndarray, np.ndarray]:
        unit = 64 / min(self.height, self.width)
        y = (np.arange(self.height, dtype=np.float32) + 0.5) * unit
        x = (np.arange(self.width, dtype=np.float32) + 0.5) * unit
        return y[:, None], x[None, :]  # (H, 1), (1, W)

    def _bar_cover(self, scene: Scene) -> np.ndarray:
        """(H, W) opacity of the bar."""
        y, x = self._grid()
        if scene.bar is None:
            return np.zeros((self.height, self.width), np.float32)
        vertical, centre, half = scene.bar
        cover = np.clip(half + 0.5 - np.abs((x if vertical else y) - centre), 0, 1)
        return np.broadcast_to(cover, (self.height, self.width)).astype(np.float32)

    def _visible(self, scene: Scene) -> np.ndarray:
        """(T,) bool: whether enough of the sprite is in front of the bar."""
        if scene.bar is None:
            return np.ones(self.num_frames, bool)
        vertical, centre, half = scene.bar
        offset = scene.path[:, 0 if vertical else 1] - centre
        r = scene.sprite.radius
        overlap = np.minimum(offset + r, half) - np.maximum(offset - r, -half)
        return np.clip(overlap, 0, None) / (2 * r) < HIDDEN_FRACTION

    def _render(self, scene: Scene, frames: int) -> np.ndarray:
        """(frames, 3, H, W) float32 in [0, 1]."""
        y, x = self._grid()
        canvas = np.broadcast_to(self._background(scene)[None], (frames, 3, self.height, self.width)).copy()
        if scene.distractor is not None:
            other, centre = scene.distractor
            rgb, cover = _paint(other, x - centre[0], y - centre[1])
            canvas += cover * (rgb - canvas)
        path = scene.path[:frames].astype(np.float32)
        rgb, cover = _paint(scene.sprite, x[None] - path[:, 0, None, None], y[None] - path[:, 1, None, None])
        canvas += cover * (rgb - canvas)
        if scene.bar is not None:
            canvas += self._bar_cover(scene) * (BAR.astype(np.float32)[:, None, None] - canvas)
        return np.clip(canvas, 0, 1).astype(np.float32)

    def _background(self, scene: Scene) -> np.ndarray:
        """(3, H, W): a gradient with soft waves."""
        y, x = self._grid()
        colours = np.array(list(BACKGROUNDS.values()), np.float32)[list(scene.background)]
        along = (np.cos(scene.angle) * (x - 32) + np.sin(scene.angle) * (y - 32)) / 90 + 0.5
        mix = np.clip(along, 0, 1)[None]
        frequency, angle, strength = scene.ripple
        wave = strength * np.sin(frequency * (np.cos(angle) * x + np.sin(angle) * y))
        return (colours[0][:, None, None] * (1 - mix) + colours[1][:, None, None] * mix + wave).astype(np.float32)


def _path(
    rng: np.random.Generator, level: Level, start: np.ndarray, low: np.ndarray, high: np.ndarray, num_frames: int
) -> tuple[np.ndarray, np.ndarray]:
    """A drag path (T, 2) inside [low, high] and the force of the touch (T,)."""
    heading = np.arctan2(*((low + high) / 2 - start)[::-1]) + rng.normal(0, 0.8)
    speed = rng.uniform(level.min_speed, level.max_speed)
    target = speed
    paused = np.zeros(num_frames, bool)
    touched = np.ones(num_frames, bool)
    if rng.random() < level.stop and num_frames > 6:
        at = rng.integers(2, num_frames - 3)
        paused[at : at + rng.integers(2, 4)] = True
    if rng.random() < level.release and num_frames > 8:
        at = rng.integers(3, num_frames - 5)
        touched[at : at + rng.integers(2, 5)] = False
    position = start.astype(np.float64)
    path = [position]
    for m in range(1, num_frames):
        heading += rng.normal(0, level.turn)
        if rng.random() < level.sharp_turn:
            heading += rng.choice([-1, 1]) * rng.uniform(np.pi / 2, 5 * np.pi / 6)
        if rng.random() < 0.2:
            target = rng.uniform(level.min_speed, level.max_speed)
        speed += 0.5 * (target - speed)
        step = speed * np.array([np.cos(heading), np.sin(heading)])
        if paused[m] or not touched[m]:
            step = np.zeros(2)  # a released sprite rests where it was let go
        moved = position + step
        for axis in range(2):  # turn back at the margin
            if not low[axis] <= moved[axis] <= high[axis]:
                step[axis] = -step[axis]
                heading = np.arctan2(step[1], step[0])
        position = np.clip(position + step, low, high)
        path.append(position)
    first, last = rng.uniform(level.force, 1.0, 2) if level.force < 1 else (1.0, 1.0)
    return np.stack(path), touched * np.linspace(first, last, num_frames)


def _paint(sprite: _Sprite, dx: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colour (..., 3, H, W) and opacity (..., 1, H, W) of a sprite centred where dx = dy = 0."""
    r = sprite.radius
    distance = _outside(SHAPES[sprite.shape], dx, dy, r)  # signed, in pixels
    cover = np.clip(0.5 - distance, 0, 1)
    ink = np.clip(distance + 2.0, 0, 1)  # an outline of 1.5 px
    texture = TEXTURES[sprite.texture]
    if texture == "striped":
        ink = np.maximum(ink, _soft(np.sin((dx + dy) * (2 * np.pi / 7.5))))
    elif texture == "dotted":
        ink = np.maximum(ink, _soft(np.sin(dx * (2 * np.pi / 7)) * np.sin(dy * (2 * np.pi / 7)) * 2 - 0.6))
    elif texture == "ringed":
        ink = np.maximum(ink, _soft(1.6 - np.abs(np.hypot(dx, dy) - 0.45 * r)))
    colour = np.array(list(COLOURS.values()), np.float32)[sprite.colour]
    ink = ink[..., None, :, :].astype(np.float32)
    rgb = colour[:, None, None] * (1 - ink) + INK.astype(np.float32)[:, None, None] * ink
    return rgb, cover[..., None, :, :].astype(np.float32)


def _soft(x: np.ndarray) -> np.ndarray:
    return np.clip(x * 1.5, 0, 1)


def _outside(shape: str, dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    """About the signed distance to the outline, negative inside."""
    dx, dy = np.broadcast_arrays(dx, dy)
    if shape == "circle":
        return np.hypot(dx, dy) - 0.95 * r
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - 0.82 * r
    if shape == "diamond":
        return (np.abs(dx) + np.abs(dy) - 1.1 * r) / np.sqrt(2)
    if shape == "triangle":
        return np.maximum(dy - 0.75 * r, np.abs(dx) * 0.87 - dy * 0.5 - 0.6 * r)
    angle = np.arctan2(dx, -dy)
    return np.hypot(dx, dy) - r * (0.8 + 0.28 * np.cos(5 * angle))


def _prompt(scene: Scene) -> str:
    names = tuple(BACKGROUNDS)
    text = (
        f"{_a(scene.sprite.name)} moves over a {names[scene.background[0]]} and {names[scene.background[1]]} background"
    )
    if scene.distractor is not None:
        text += f", {_a(scene.distractor[0].name)} rests"
    if scene.bar is not None:
        text += f", behind a {'vertical' if scene.bar[0] else 'horizontal'} bar"
    return text


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
