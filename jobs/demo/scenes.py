"""Rendered scenes with exact masks: what the demo labels and what the bundled checkpoint learnt from.

Enters: a seed. Leaves: an image and its instances. A seed decides every pixel.
Letters: S side of the square scene in pixels, N instances.

A scene is a textured background with textured shapes, at most six, painted one over another. A mask is the
set of pixels whose centre the shape covers and nothing later hides, so it is exact by construction; the image
itself is antialiased.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SCENE_SIDE_PX = 256
MIN_RADIUS_PX, MAX_RADIUS_PX = 24.0, 64.0
SHAPE_REACH = 1.15  # farthest point of any shape from its centre, in radii: the box's corner, 0.8 * sqrt(2)
MAX_OBJECTS = 6
MIN_VISIBLE = 0.4  # a shape that would hide more of an earlier one than this leaves is not painted
TRAIN_SEED = 10_000_000  # scenes to train on count up from here; the demo's from 0, so none is in both
MIN_CONTRAST = 60.0  # least distance in RGB between a shape's colour and what it is painted on

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class SceneInstance:
    """One visible shape: category_id, mask (S, S) bool of its visible pixels (at least one)."""

    category_id: int
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Scene:
    """image: (S, S, 3) uint8 RGB; instances in painting order."""

    image: NDArray[np.uint8]
    instances: tuple[SceneInstance, ...]


def render_scene(seed: int, side: int = SCENE_SIDE_PX) -> Scene:
    """Paint the scene that `seed` decides."""
    rng = np.random.default_rng(seed)
    canvas = _background(rng, side)
    masks: list[NDArray[np.bool_]] = []
    full_areas: list[int] = []
    categories: list[int] = []
    for _ in range(int(rng.integers(2, MAX_OBJECTS + 1))):
        category_id = int(rng.integers(1, len(SCENE_CATEGORIES) + 1))
        window, distance = _place(rng, category_id, side)
        inside = distance < 0
        if not inside.any() or any(
            m.sum() - (m[window] & inside).sum() < MIN_VISIBLE * full
            for m, full in zip(masks, full_areas, strict=True)
        ):
            continue
        _paint(rng, canvas[window], distance, inside)
        for earlier in masks:
            earlier[window] &= ~inside
        mask = np.zeros((side, side), dtype=np.bool_)
        mask[window] = inside
        masks.append(mask)
        full_areas.append(int(inside.sum()))
        categories.append(category_id)
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(1.0, 8.0))
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    return Scene(image, tuple(SceneInstance(c, m) for c, m in zip(categories, masks, strict=True)))


def _background(rng: np.random.Generator, side: int) -> Floats:
    """(S, S, 3): a gradient between two colours under noise of three scales."""
    colours = rng.uniform(30, 225, (2, 3)).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    at = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    ramp = np.clip(
        0.5 + np.float32(np.cos(angle)) * at[None, :] + np.float32(np.sin(angle)) * at[:, None], 0, 1
    )
    canvas: Floats = colours[0] + (colours[1] - colours[0]) * ramp[..., None]
    for cells, strength_max in ((4, 60), (12, 40), (48, 30)):
        canvas += _value_noise(rng, side, cells)[..., None] * np.float32(rng.uniform(0, strength_max))
    return canvas


def _value_noise(rng: np.random.Generator, side: int, cells: int) -> Floats:
    """(S, S) smooth noise in [-1, 1]: random values on a coarse grid, bilinear between."""
    values = rng.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32)
    at = np.linspace(0, cells, side, endpoint=False, dtype=np.float32)
    low = at.astype(np.int64)
    weight = at - low
    rows = values[low] * (1 - weight)[:, None] + values[low + 1] * weight[:, None]
    both: Floats = rows[:, low] * (1 - weight) + rows[:, low + 1] * weight
    return both


def _place(rng: np.random.Generator, category_id: int, side: int) -> tuple[tuple[slice, slice], Floats]:
    """A shape of random size, place and turn.

    Returns:
        the window of the scene that holds it, and on that window its signed distance: about pixels,
        negative inside.
    """
    radius = float(np.exp(rng.uniform(np.log(MIN_RADIUS_PX), np.log(MAX_RADIUS_PX))))
    center_x, center_y = rng.uniform(0.3 * radius, side - 0.3 * radius, 2)
    angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 1.0)
    reach = SHAPE_REACH * radius + 1
    columns = slice(max(0, int(center_x - reach)), min(side, int(center_x + reach) + 2))
    rows = slice(max(0, int(center_y - reach)), min(side, int(center_y + reach) + 2))
    x = (np.arange(columns.start, columns.stop, dtype=np.float32) + np.float32(0.5 - center_x))[None, :]
    y = (np.arange(rows.start, rows.stop, dtype=np.float32) + np.float32(0.5 - center_y))[:, None]
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u = (x * cos + y * sin) / np.float32(radius)
    v = (y * cos - x * sin) / np.float32(radius * stretch)
    _, shape = SCENE_SHAPES[category_id - 1]
    return (rows, columns), shape(u, v) * np.float32(radius * stretch)


def _paint(rng: np.random.Generator, canvas: Floats, distance: Floats, inside: NDArray[np.bool_]) -> None:
    """Blend a two-colour texture over the window where the shape is, its edge antialiased over one pixel."""
    under = canvas[inside].mean(axis=0)
    colour = rng.uniform(10, 245, 3).astype(np.float32)
    while np.linalg.norm(colour - under) < MIN_CONTRAST:
        colour = rng.uniform(10, 245, 3).astype(np.float32)
    second = np.clip(colour + rng.uniform(-45, 45, 3), 0, 255).astype(np.float32)
    blend = _texture(rng, *distance.shape)
    shade = np.clip(1.0 + 0.2 * distance / (np.abs(distance[inside]).max() + 1), 0.8, 1.0)
    paint = (colour + (second - colour) * blend[..., None]) * shade[..., None]
    alpha = np.clip(np.float32(0.5) - distance, 0, 1)[..., None]
    canvas += alpha * (paint - canvas)


def _texture(rng: np.random.Generator, height: int, width: int) -> Floats:
    """(height, width) in [0, 1]: plain, stripes, checks or noise."""
    kind = int(rng.integers(0, 4))
    angle, wave_number = rng.uniform(0, np.pi), 2 * np.pi / rng.uniform(5, 24)
    if kind == 0:
        return np.zeros((height, width), np.float32)
    if kind == 3:
        return (_value_noise(rng, max(height, width), 12)[:height, :width] + 1) / 2
    x = np.arange(width, dtype=np.float32)[None, :] * np.float32(wave_number)
    y = np.arange(height, dtype=np.float32)[:, None] * np.float32(wave_number)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    wave = np.sin(cos * x + sin * y)
    if kind == 2:
        wave = wave * np.sin(cos * y - sin * x)
    stripes: Floats = (wave > 0).astype(np.float32)
    return stripes


def _ellipse(u: Floats, v: Floats) -> Floats:
    return np.hypot(u, v) - 1


def _box(u: Floats, v: Floats) -> Floats:
    distance: Floats = np.maximum(np.abs(u), np.abs(v)) - np.float32(0.8)
    return distance


def _triangle(u: Floats, v: Floats) -> Floats:
    slope = np.float32(np.sqrt(3) / 2)
    half = np.float32(0.5)
    distance: Floats = np.maximum(-v - half, half * v + slope * np.abs(u) - half)
    return distance


def _star(u: Floats, v: Floats) -> Floats:
    """Five-pointed: the radius of its outline falls linearly in angle from 1 at a tip to 0.5 between tips."""
    sector = np.float32(2 * np.pi / 5)
    to_tip = np.abs(np.mod(np.arctan2(u, v), sector) / sector - np.float32(0.5)) * 2  # 1 at a tip
    distance: Floats = (np.hypot(u, v) - (np.float32(0.5) + np.float32(0.5) * to_tip)) * np.float32(0.7)
    return distance


def _ring(u: Floats, v: Floats) -> Floats:
    return np.abs(np.hypot(u, v) - np.float32(0.75)) - np.float32(0.25)


# category_id = position + 1
SCENE_SHAPES: tuple[tuple[str, Callable[[Floats, Floats], Floats]], ...] = (
    ("ellipse", _ellipse),
    ("box", _box),
    ("triangle", _triangle),
    ("star", _star),
    ("ring", _ring),
)
SCENE_CATEGORIES: tuple[tuple[int, str], ...] = tuple(
    (i + 1, name) for i, (name, _) in enumerate(SCENE_SHAPES)
)
