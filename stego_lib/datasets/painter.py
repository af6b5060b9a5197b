"""Draws the labeled, synthetic images of the `scenes` dataset. The same seed gives the same images.

A scene has two or three wavy bands of *stuff* (sky, water, meadow, wall) and a few *things* (tree, house, ball, zebra).
Classes differ in texture and shape; the two colors of a region come from one distribution for all classes, so color
carries almost no information. Scale, slant, light and overlap vary, and fog, dusk, blur and grain change whole images.
"""

import colorsys
import itertools
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# Class names in the order of their ids.
CLASSES = ("sky", "water", "meadow", "wall", "tree", "house", "ball", "zebra")
STUFF, THINGS = CLASSES[:4], CLASSES[4:]
# Increase when the images change.
VERSION = 2
# Height and width of a scene in pixels.
SIZE = 128

Grid = np.ndarray


def paint_scene(seed: int, index: int, size: int = SIZE, weather: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Draws scene `index` of the series `seed`: image, uint8 (H, W, 3), and label map, uint8 (H, W).

    Labels index `CLASSES` and do not depend on `weather`, which is fog, dusk, blur and grain.
    """
    image, label, _ = paint_with_distance(seed, index, size, weather)
    return image, label


def paint_with_distance(seed: int, index: int, size: int = SIZE, weather: bool = True) -> tuple[np.ndarray, ...]:
    """Like `paint_scene`, and the distance of each pixel, uint8 (H, W): 255 in the first layer, 0 in the last."""
    rng = np.random.default_rng([seed, index])
    y, x = np.mgrid[:size, :size].astype(np.float32)
    image = np.zeros((size, size, 3), np.float32)
    label = np.zeros((size, size), np.uint8)
    layer = np.zeros((size, size), np.int64)
    painted = itertools.count()

    def paint(name: str, mask: Grid, shade: Grid | float = 1.0) -> None:
        dark, bright = _color_pair(rng)
        mix = _TEXTURES[name](rng, x, y)[..., None]
        light = np.asarray(shade, np.float32)
        color = (dark * (1 - mix) + bright * mix) * (light[..., None] if light.ndim else light)
        alpha = mask[..., None]
        image[:] = image * (1 - alpha) + color * alpha
        label[mask > 0.5] = CLASSES.index(name)
        layer[mask > 0.5] = next(painted)

    for name, mask in _bands(rng, x, y):
        paint(name, mask)
    for _ in range(rng.integers(2, 6)):
        name = THINGS[rng.integers(len(THINGS))]
        center = rng.uniform(0.1, 0.9, 2) * size
        radius = rng.uniform(0.13, 0.27) * size
        mask = _SHAPES[name](rng, size, center, radius)
        light = 1 + 0.3 * ((x - center[0]) * rng.choice([-1, 1]) - (y - center[1])) / radius
        offset = int(rng.integers(2, 6))
        image[offset:, offset:] *= 1 - 0.35 * mask[:-offset, :-offset, None]  # shadow
        paint(name, mask, np.clip(light, 0.6, 1.3))
    distance = np.round(255 * (1 - layer / max(1, layer.max()))).astype(np.uint8)
    return _photograph(rng, image, x, y, weather), label, distance


def _bands(rng: np.random.Generator, x: Grid, y: Grid) -> list[tuple[str, Grid]]:
    """Names and masks of two or three bands from top to bottom; sky is always on top."""
    size = len(x)
    names = list(rng.permutation(STUFF)[: rng.integers(2, 4)])
    names.sort(key=lambda name: name != "sky")
    edges = np.sort(rng.uniform(0.2, 0.85, len(names) - 1)) * size
    bands = [(names[0], np.ones_like(x))]
    for name, edge in zip(names[1:], edges, strict=True):
        line = edge + 0.12 * size * (_noise(rng, size, (1, 4))[0] - 0.5) + rng.uniform(-0.25, 0.25) * (x[0] - size / 2)
        bands.append((name, np.clip(y - line + 0.5, 0, 1)))
    return bands


def _photograph(rng: np.random.Generator, image: Grid, x: Grid, y: Grid, weather: bool) -> np.ndarray:
    """Applies light from one side, exposure, weather, blur and grain; returns uint8."""
    angle = rng.uniform(0, 2 * np.pi)
    slope = (np.cos(angle) * (x / len(x) - 0.5) + np.sin(angle) * (y / len(y) - 0.5))[..., None]
    image = np.clip(image * (1 + rng.uniform(0, 0.6) * slope), 0, 1) ** rng.uniform(0.8, 1.25)
    if weather:  # two thirds of the images have nearly gray fog, half of them dusk
        thickness = rng.uniform(0, 0.65) * rng.choice([0, 1, 1])
        fog = rng.uniform(0.5, 1.0) * (1 + 0.15 * rng.normal(0, 1, 3))
        image = np.clip(image * (1 - thickness) + thickness * fog, 0, 1)
        image = image ** rng.choice([1.0, rng.uniform(1.5, 2.5)])
    blur = rng.uniform(0.2, 1.3 if weather else 0.7)
    soft = Image.fromarray((image * 255).round().astype(np.uint8)).filter(ImageFilter.GaussianBlur(blur))
    grain = rng.uniform(1, 18) if weather else 4
    return np.clip(np.asarray(soft) + rng.normal(0, grain, image.shape), 0, 255).astype(np.uint8)


def _color_pair(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A dark and a bright color, from the same distribution for all classes."""
    hue, saturation, value = rng.uniform(0, 1), rng.uniform(0.1, 0.8), rng.uniform(0.55, 1.0)
    bright = colorsys.hsv_to_rgb(hue, saturation, value)
    dark = colorsys.hsv_to_rgb(
        (hue + rng.normal(0, 0.08)) % 1, min(1.0, saturation * rng.uniform(0.7, 1.3)), value * rng.uniform(0.35, 0.65)
    )
    return np.array(dark, np.float32), np.array(bright, np.float32)


def _noise(rng: np.random.Generator, size: int, cells: tuple[int, int]) -> Grid:
    """Smooth noise in [0, 1], (size, size): `cells` random values down and across, bicubic in between."""
    coarse = Image.fromarray(rng.uniform(0, 1, cells).astype(np.float32))
    return np.clip(np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)), 0, 1)


def _turned(rng: np.random.Generator, x: Grid, y: Grid, spread: float) -> tuple[Grid, Grid]:
    """Coordinates rotated by a random angle of standard deviation `spread` (radians), with a random origin."""
    angle = rng.normal(0, spread)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    return u + rng.uniform(0, 64), v + rng.uniform(0, 64)


def _water(rng: np.random.Generator, x: Grid, y: Grid) -> Grid:
    _, v = _turned(rng, x, y, 0.08)
    wobble = 10 * _noise(rng, len(x), (6, 8))
    return 0.5 + 0.5 * np.sin(2 * np.pi * (v + wobble) / rng.uniform(6, 9))


def _meadow(rng: np.random.Generator, x: Grid, y: Grid) -> Grid:
    size = len(x)
    return _sharpen(_noise(rng, size, (size // int(rng.integers(7, 11)), size // int(rng.integers(2, 4)))), 3)


def _wall(rng: np.random.Generator, x: Grid, y: Grid) -> Grid:
    u, v = _turned(rng, x, y, 0.06)
    height = rng.uniform(6, 9)
    width = height * rng.uniform(1.7, 2.2)
    row = np.floor(v / height)
    across, down = (u + row % 2 * width / 2) % width, v % height
    return 1.0 - ((across < 1.6) | (down < 1.6)).astype(np.float32)


def _foliage(rng: np.random.Generator, x: Grid, y: Grid) -> Grid:
    cells = len(x) // int(rng.integers(4, 6))
    return _sharpen(_noise(rng, len(x), (cells, cells)), 3)


def _windows(rng: np.random.Generator, x: Grid, y: Grid) -> Grid:
    u, v = _turned(rng, x, y, 0.03)
    pitch = rng.uniform(10, 14)
    pane = pitch * rng.uniform(0.45, 0.6)
    return 1.0 - ((u % pitch < pane) & (v % pitch < pane)).astype(np.float32)


def _dots(rng: np.random.Generator, x: Grid, y: Grid) -> Grid:
    u, v = _turned(rng, x, y, 0.8)
    pitch = rng.uniform(8, 11)
    row = np.floor(v / pitch)
    across, down = (u + row % 2 * pitch / 2) % pitch - pitch / 2, v % pitch - pitch / 2
    return np.clip(0.32 * pitch - np.hypot(across, down) + 0.5, 0, 1)


def _stripes(rng: np.random.Generator, x: Grid, y: Grid) -> Grid:
    u, _ = _turned(rng, x, y, 0.35)
    return _sharpen(0.5 + 0.5 * np.sin(2 * np.pi * (u + 4 * _noise(rng, len(x), (5, 5))) / rng.uniform(7, 11)), 3)


def _sharpen(values: Grid, gain: float) -> Grid:
    return np.clip((values - 0.5) * gain + 0.5, 0, 1)


def _polygon(size: int, points: Grid) -> Grid:
    """Antialiased mask of a polygon, in [0, 1]."""
    canvas = Image.new("L", (4 * size, 4 * size))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in 4 * points], fill=255)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32) / 255


def _blob(rng: np.random.Generator, size: int, center: Grid, radius: float, bumps: float, stretch: float) -> Grid:
    angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    waves = sum(rng.normal(0, bumps / k) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in range(2, 7))
    r = radius * (1 + waves)
    tilt = rng.normal(0, 0.2)
    u, v = r * np.cos(angle) * stretch, r * np.sin(angle) / stretch
    x, y = np.cos(tilt) * u - np.sin(tilt) * v, np.sin(tilt) * u + np.cos(tilt) * v
    return _polygon(size, center + np.stack([x, y], 1))


def _tree(rng: np.random.Generator, size: int, center: Grid, radius: float) -> Grid:
    crown = _blob(rng, size, center, radius, 0.16, rng.uniform(0.8, 1.05))
    half, foot = radius * rng.uniform(0.1, 0.18), radius * rng.uniform(1.3, 1.7)
    trunk = center + np.array([[-half, 0], [half, 0], [half, foot], [-half, foot]])
    return np.maximum(crown, _polygon(size, trunk))


def _house(rng: np.random.Generator, size: int, center: Grid, radius: float) -> Grid:
    half, wall, roof = radius * rng.uniform(0.7, 1.1), radius * rng.uniform(0.7, 1.2), radius * rng.uniform(0.0, 0.7)
    ridge = rng.uniform(-0.5, 0.5) * half
    corners = [[-half, wall], [-half, -wall], [ridge, -wall - roof], [half, -wall], [half, wall]]
    return _polygon(size, center + np.array(corners))


_TEXTURES: dict[str, Callable[..., Grid]] = dict(
    sky=lambda rng, x, y: (
        0.5 * _noise(rng, len(x), (4, 3)) + 0.5 * np.clip(1 - y / len(y) + rng.normal(0, 0.2), 0, 1)
    ),
    water=_water, meadow=_meadow, wall=_wall, tree=_foliage, house=_windows, ball=_dots, zebra=_stripes,
)  # fmt: skip
_SHAPES: dict[str, Callable[..., Grid]] = dict(
    tree=_tree,
    house=_house,
    ball=lambda rng, size, center, radius: _blob(rng, size, center, 0.85 * radius, 0.0, rng.uniform(0.9, 1.1)),
    zebra=lambda rng, size, center, radius: _blob(rng, size, center, 0.9 * radius, 0.08, rng.uniform(1.15, 1.4)),
)
