"""A scene as a picture: flat colours, clean outlines, drawn with Pillow at twice the size and shrunk.

Sprites are drawn in their own coordinates: x to the right and y down, the sprite between -1 and 1. All randomness comes
from the scene's seed.
"""

import math
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from mini.training.world import COLOURS, FORBIDDEN, SUBJECT, Scene

Point = tuple[float, float]
Colour = tuple[int, int, int]

SUPERSAMPLED = 2
# Half the sprite's height, as a share of the picture's shorter side.
HALF_HEIGHT = {"small": 0.2, "medium": 0.28, "big": 0.35}
STYLES = ("bold", "dusk")

INK = (40, 36, 48)
BOLD_INK = (8, 6, 10)
CREAM = (250, 240, 222)
WHITE = (255, 255, 255)
GOLD = (250, 200, 70)


def draw(scene: Scene, width: int, height: int, styles: Sequence[str] = ()) -> Image.Image:
    """The picture of a scene.

    Args:
        scene: its `kind` may also be SUBJECT or FORBIDDEN.
        width: pixels.
        height: pixels.
        styles: "bold" for thick black outlines, "dusk" for a palette from navy over magenta to peach; or both.
    """
    image = Image.new("RGB", (width * SUPERSAMPLED, height * SUPERSAMPLED))
    rng = random.Random(scene.seed)
    short = min(image.size)
    bold = "bold" in styles
    backdrop = Pen(image, (0, 0), 1.0, line=0.012 * short if bold else 0, ink=BOLD_INK)
    PLACES[scene.place](backdrop, *image.size, rng)
    unit = HALF_HEIGHT[scene.size] * short * rng.uniform(0.99, 1.01)
    centre = (
        image.width / 2 + rng.uniform(-0.008, 0.008) * short,
        image.height * 0.57 + rng.uniform(-0.005, 0.005) * short,
    )
    body = COLOURS[scene.colour][1]
    pen = Pen(image, centre, unit, line=unit * (0.12 if bold else 0.05), ink=BOLD_INK if bold else _outline(body))
    face = KINDS[scene.kind](pen, *body_colours(scene.colour))
    _face(pen, face, body, scene.sleeping)
    if scene.hat:
        _hat(pen, HAT_TOPS[scene.kind])
    image = image.reduce(SUPERSAMPLED)
    return _dusk(image) if "dusk" in styles else image


class Pen:
    """Draws outlined shapes in its own coordinates; `origin` and `unit` are in pixels of the image."""

    def __init__(self, image: Image.Image, origin: Point, unit: float, line: float, ink: Colour) -> None:
        self._draw = ImageDraw.Draw(image)
        self._origin = origin
        self._unit = unit
        self._line = round(line)
        self.ink = ink

    def polygon(self, points: Sequence[Point], fill: Colour, *, outlined: bool = True) -> None:
        """A closed shape."""
        pixels = self._pixels(points)
        self._draw.polygon(pixels, fill)
        if outlined and self._line:
            self._draw.line([*pixels, *pixels[:2]], self.ink, self._line, joint="curve")

    def smooth(self, points: Sequence[Point], fill: Colour, *, outlined: bool = True) -> None:
        """A closed curve through the points (Catmull-Rom)."""
        self.polygon(_catmull_rom(points), fill, outlined=outlined)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Colour, *, outlined: bool = True) -> None:
        """An ellipse around (x, y)."""
        turns = [2 * math.pi * i / 48 for i in range(48)]
        self.polygon([(x + rx * math.cos(t), y + ry * math.sin(t)) for t in turns], fill, outlined=outlined)

    def stroke(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        """An open line with round ends; `width` in units."""
        pixels = self._pixels(points)
        thick = max(1, round(width * self._unit))
        self._draw.line(pixels, colour, thick, joint="curve")
        for x, y in (pixels[0], pixels[-1]):
            self._draw.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), colour)

    def arc(
        self, x: float, y: float, rx: float, ry: float, turns: tuple[float, float], width: float, colour: Colour
    ) -> None:
        """Part of an ellipse; `turns` in whole turns, clockwise from the right."""
        steps = [turns[0] + (turns[1] - turns[0]) * i / 16 for i in range(17)]
        points = [(x + rx * math.cos(2 * math.pi * t), y + ry * math.sin(2 * math.pi * t)) for t in steps]
        self.stroke(points, width, colour)

    def _pixels(self, points: Sequence[Point]) -> list[Point]:
        return [(self._origin[0] + x * self._unit, self._origin[1] + y * self._unit) for x, y in points]


def _catmull_rom(points: Sequence[Point]) -> list[Point]:
    curve = []
    count = len(points)
    for i in range(count):
        p0, p1, p2, p3 = (points[(i + k - 1) % count] for k in range(4))
        for step in range(10):
            t = step / 10
            curve.append(
                tuple(
                    0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
                    for a, b, c, d in zip(p0, p1, p2, p3, strict=True)
                )
            )
    return curve


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    return tuple(round(x * (1 - share) + y * share) for x, y in zip(a, b, strict=True))


def _outline(body: Colour) -> Colour:
    """A darker shade of the body's colour; a lighter one if the body is dark."""
    return _mix(body, (20, 14, 30), 0.55) if sum(body) > 200 else _mix(body, WHITE, 0.45)


def _tint(body: Colour) -> Colour:
    """The lighter second colour of a sprite."""
    return _mix(body, WHITE, 0.6) if sum(body) < 700 else (214, 218, 228)


def body_colours(name: str) -> tuple[Colour, Colour]:
    """The two colours of a sprite of a named colour."""
    body = COLOURS[name][1]
    return body, _tint(body)


def _dusk(image: Image.Image) -> Image.Image:
    """The image with its lightness mapped to navy, magenta and peach."""
    stops = np.array([(24, 16, 64), (184, 60, 130), (255, 226, 172)])
    table = np.stack([np.interp(np.arange(256), (0, 128, 255), stops[:, c]) for c in range(3)], axis=1)
    return Image.fromarray(table.round().astype(np.uint8)[np.asarray(image.convert("L"))])


# Faces and hats ----------------------------------------------------------------------------------------------------


def _face(pen: Pen, face: tuple[float, float, float], body: Colour, sleeping: bool) -> None:
    """Draw two eyes and a smile around (x, y), `size` apart; of a sleeping one, closed eyes and two z."""
    x, y, size = face
    ink = INK if sum(body) > 200 else CREAM
    for side in (-1, 1):
        if sleeping:
            pen.arc(x + side * size, y - 0.02, size * 0.42, size * 0.36, (0.04, 0.46), 0.055, ink)
        else:
            pen.ellipse(x + side * size, y, size * 0.36, size * 0.44, ink, outlined=False)
            shine = WHITE if ink == INK else INK
            pen.ellipse(x + side * size - size * 0.1, y - size * 0.16, size * 0.13, size * 0.13, shine, outlined=False)
    pen.arc(x, y + size * 0.5, size * 0.42, size * 0.38, (0.06, 0.44), 0.05, ink)
    if sleeping:
        for left, top, side in ((0.72, -0.95, 0.2), (1.02, -1.25, 0.26)):
            z = [(left, top), (left + side, top), (left, top + side), (left + side, top + side)]
            pen.stroke(z, 0.11, WHITE)
            pen.stroke(z, 0.06, (90, 90, 150))


def _hat(pen: Pen, top: Point) -> None:
    """Draw a party hat on a point."""
    x, y = top
    pen.polygon([(x - 0.3, y + 0.06), (x, y - 0.62), (x + 0.3, y + 0.06)], (236, 72, 140))
    pen.polygon(
        [(x - 0.21, y - 0.15), (x - 0.14, y - 0.3), (x + 0.14, y - 0.3), (x + 0.21, y - 0.15)], GOLD, outlined=False
    )
    pen.ellipse(x, y - 0.64, 0.11, 0.11, GOLD)


HAT_TOPS: dict[str, Point] = {
    "fox": (-0.1, -0.66),
    "cat": (-0.1, -0.66),
    "bird": (0.3, -0.66),
    "fish": (0.2, -0.52),
    "snail": (-0.62, -0.14),
    "robot": (0.0, -0.8),
    "ghost": (0.0, -0.86),
    "house": (0.0, -0.88),
    "tree": (0.0, -0.92),
    "mushroom": (0.0, -0.78),
    "rocket": (0.0, -0.86),
    "flower": (0.0, -0.84),
    FORBIDDEN: (-0.72, -0.62),
    SUBJECT: (0.0, -0.5),
}


# Kinds: each function draws one and returns the place and size of its face ------------------------------------------


def _fox(pen: Pen, body: Colour, tint: Colour) -> tuple[float, float, float]:
    pen.smooth([(0.2, 0.8), (0.75, 0.78), (1.0, 0.3), (0.92, -0.2), (0.72, 0.1), (0.45, 0.4)], body)
    pen.smooth([(0.99, 0.2), (0.92, -0.2), (0.76, 0.04), (0.86, 0.2)], tint)
    pen.smooth([(-0.1, 0.0), (0.35, 0.4), (0.36, 0.92), (-0.1, 0.98), (-0.56, 0.92), (-0.55, 0.4)], body)
    pen.ellipse(-0.1, 0.72, 0.22, 0.24, tint, outlined=False)
    for side in (-1, 1):
        pen.polygon([(-0.1 + side * 0.2, -0.55), (-0.1 + side * 0.6, -1.0), (-0.1 + side * 0.66, -0.2)], body)
    pen.smooth(
        [
            (-0.1, -0.7),
            (0.4, -0.5),
            (0.66, -0.02),
            (0.22, 0.24),
            (-0.1, 0.42),
            (-0.42, 0.24),
            (-0.86, -0.02),
            (-0.6, -0.5),
        ],
        body,
    )
    pen.smooth(
        [(-0.1, 0.0), (0.3, 0.02), (0.56, 0.02), (0.2, 0.24), (-0.1, 0.39), (-0.4, 0.24), (-0.76, 0.02), (-0.5, 0.02)],
        tint,
        outlined=False,
    )
    pen.ellipse(-0.1, 0.34, 0.09, 0.07, INK, outlined=False)
    return (-0.1, -0.14, 0.3)


def _cat(pen: Pen, body: Colour, tint: Colour) -> tuple[float, float, float]:
    pen.stroke([(0.3, 0.86), (0.78, 0.8), (0.9, 0.4), (0.76, 0.1)], 0.26, pen.ink)
    pen.stroke([(0.3, 0.86), (0.78, 0.8), (0.9, 0.4), (0.76, 0.1)], 0.16, body)
    pen.ellipse(-0.1, 0.55, 0.5, 0.44, body)
    pen.ellipse(-0.1, 0.64, 0.26, 0.26, tint, outlined=False)
    for side in (-1, 1):
        pen.polygon([(-0.1 + side * 0.14, -0.6), (-0.1 + side * 0.52, -0.96), (-0.1 + side * 0.58, -0.3)], body)
        pen.polygon(
            [(-0.1 + side * 0.28, -0.6), (-0.1 + side * 0.46, -0.8), (-0.1 + side * 0.48, -0.46)], tint, outlined=False
        )
    pen.ellipse(-0.1, -0.16, 0.62, 0.54, body)
    for side in (-1, 1):
        for rise in (-0.07, 0.07):
            pen.stroke([(-0.1 + side * 0.44, 0.08 + rise / 2), (-0.1 + side * 0.84, 0.06 + rise * 2)], 0.035, pen.ink)
    return (-0.1, -0.2, 0.28)


def _bird(pen: Pen, body: Colour, tint: Colour) -> tuple[float, float, float]:
    for x in (-0.1, 0.2):
        pen.stroke([(x, 0.6), (x, 0.94), (x + 0.16, 0.96)], 0.07, (226, 140, 40))
    pen.polygon([(-0.5, 0.1), (-1.0, -0.2), (-0.95, 0.1), (-1.0, 0.3), (-0.5, 0.45)], body)
    pen.ellipse(0.05, 0.0, 0.72, 0.7, body)
    pen.ellipse(0.18, 0.32, 0.42, 0.34, tint, outlined=False)
    pen.smooth([(-0.5, 0.0), (-0.1, -0.06), (0.02, 0.2), (-0.2, 0.46), (-0.56, 0.44)], _mix(body, INK, 0.18))
    pen.polygon([(0.72, -0.24), (1.08, -0.08), (0.72, 0.08)], (246, 160, 44))
    return (0.3, -0.2, 0.22)


def _fish(pen: Pen, body: Colour, tint: Colour) -> tuple[float, float, float]:
    pen.smooth([(-0.5, 0.0), (-0.95, -0.5), (-0.86, 0.0), (-0.95, 0.5)], tint)
    pen.smooth([(-0.3, -0.4), (0.0, -0.8), (0.36, -0.66), (0.4, -0.36)], tint)
    pen.ellipse(0.14, 0.0, 0.78, 0.52, body)
    for x in (-0.36, -0.12):
        pen.arc(x, 0.0, 0.16, 0.3, (-0.22, 0.22), 0.06, tint)
    pen.smooth([(0.1, 0.2), (-0.14, 0.56), (0.2, 0.5)], tint)
    return (0.52, -0.08, 0.2)


def _snail(pen: Pen, body: Colour, tint: Colour) -> tuple[float, float, float]:
    for x, tip in ((-0.72, -0.9), (-0.5, -0.5)):
        pen.stroke([(x, 0.3), (tip, -0.34)], 0.14, pen.ink)
        pen.stroke([(x, 0.3), (tip, -0.34)], 0.07, tint)
        pen.ellipse(tip, -0.38, 0.09, 0.09, tint)
    pen.smooth(
        [
            (-0.92, 0.2),
            (-0.6, 0.02),
            (-0.34, 0.3),
            (-0.2, 0.6),
            (0.6, 0.66),
            (1.05, 0.84),
            (0.4, 0.9),
            (-0.6, 0.88),
            (-0.94, 0.6),
        ],
        tint,
    )
    pen.ellipse(0.22, 0.06, 0.62, 0.62, body)
    for radius, x in ((0.4, 0.2), (0.2, 0.22)):
        pen.ellipse(x, 0.08, radius, radius, _mix(body, WHITE, 0.35) if radius > 0.3 else body)
    return (-0.62, 0.36, 0.17)


def _robot(pen: Pen, body: Colour, tint: Colour) -> tuple[float, float, float]:
    pen.stroke([(0.0, -0.7), (0.0, -0.9)], 0.06, pen.ink)
    pen.ellipse(0.0, -0.92, 0.09, 0.09, GOLD)
    for side in (-1, 1):
        pen.polygon([(side * 0.5, 0.2), (side * 0.82, 0.2), (side * 0.82, 0.64), (side * 0.5, 0.64)], tint)
        pen.polygon([(side * 0.12, 0.7), (side * 0.4, 0.7), (side * 0.4, 0.98), (side * 0.12, 0.98)], tint)
    pen.polygon([(-0.52, 0.06), (0.52, 0.06), (0.52, 0.8), (-0.52, 0.8)], body)
    pen.polygon([(-0.3, 0.26), (0.3, 0.26), (0.3, 0.56), (-0.3, 0.56)], tint)
    pen.polygon([(-0.66, -0.72), (0.66, -0.72), (0.66, 0.08), (-0.66, 0.08)], body)
    return (0.0, -0.36, 0.3)


def _ghost(pen: Pen, body: Colour, tint: Colour) -> tuple[float, float, float]:
    top = [(0.66 * math.cos(math.pi * (1 + i / 16)), -0.2 + 0.7 * math.sin(math.pi * (1 + i / 16))) for i in range(17)]
    hem = [(0.66 - 1.32 * i / 24, 0.8 + 0.13 * math.cos(math.pi * i / 4)) for i in range(25)]
    pen.polygon([*top, *hem], body)
    for side in (-1, 1):
        pen.ellipse(side * 0.42, 0.14, 0.12, 0.08, tint, outlined=False)
    return (0.0, -0.2, 0.27)


def _house(pen: Pen, body: Colour, tint: Colour) -> tuple[float, float, float]:
    pen.polygon([(0.34, -0.5), (0.34, -0.92), (0.56, -0.92), (0.56, -0.3)], tint)
    pen.polygon([(-0.66, -0.14), (0.66, -0.14), (0.66, 0.94), (-0.66, 0.94)], tint)
    pen.polygon([(-0.92, -0.1), (0.0, -0.94), (0.92, -0.1)], body)
    pen.polygon([(-0.2, 0.94), (-0.2, 0.52), (0.2, 0.52), (0.2, 0.94)], body)
    return (0.0, 0.16, 0.26)


def _tree(pen: Pen, body: Colour, tint: Colour) -> tuple[float, float, float]:
    pen.polygon([(-0.16, 0.3), (0.16, 0.3), (0.22, 0.98), (-0.22, 0.98)], (134, 88, 54))
    pen.smooth(
        [
            (0.0, -0.98),
            (0.4, -0.76),
            (0.74, -0.5),
            (0.8, 0.0),
            (0.56, 0.36),
            (0.0, 0.44),
            (-0.56, 0.36),
            (-0.8, 0.0),
            (-0.74, -0.5),
            (-0.4, -0.76),
        ],
        body,
    )
    for x, y in ((-0.46, -0.36), (0.44, -0.44), (0.5, 0.14), (-0.5, 0.16)):
        pen.ellipse(x, y, 0.1, 0.1, tint, outlined=False)
    return (0.0, -0.2, 0.26)


def _mushroom(pen: Pen, body: Colour, tint: Colour) -> tuple[float, float, float]:
    pen.smooth([(-0.32, 0.0), (0.32, 0.0), (0.36, 0.6), (0.4, 0.94), (-0.4, 0.94), (-0.36, 0.6)], (246, 232, 208))
    dome = [
        (0.92 * math.cos(math.pi * (1 + i / 24)), 0.12 + 0.98 * math.sin(math.pi * (1 + i / 24))) for i in range(25)
    ]
    pen.polygon(dome, body)
    for x, y, r in ((-0.46, -0.26, 0.16), (0.06, -0.5, 0.19), (0.52, -0.18, 0.14)):
        pen.ellipse(x, y, r, r, tint, outlined=False)
    return (0.0, 0.42, 0.18)


def _rocket(pen: Pen, body: Colour, tint: Colour) -> tuple[float, float, float]:
    pen.smooth([(-0.2, 0.6), (0.2, 0.6), (0.14, 0.86), (0.0, 1.06), (-0.14, 0.86)], (252, 176, 60))
    for side in (-1, 1):
        pen.polygon([(side * 0.3, 0.1), (side * 0.76, 0.52), (side * 0.72, 0.8), (side * 0.3, 0.6)], tint)
    pen.smooth(
        [(0.0, -1.0), (0.3, -0.6), (0.42, 0.0), (0.34, 0.64), (0.0, 0.68), (-0.34, 0.64), (-0.42, 0.0), (-0.3, -0.6)],
        body,
    )
    pen.ellipse(0.0, -0.56, 0.15, 0.15, tint)
    return (0.0, 0.02, 0.19)


def _flower(pen: Pen, body: Colour, tint: Colour) -> tuple[float, float, float]:
    pen.stroke([(0.0, 0.2), (0.0, 0.98)], 0.12, (70, 150, 70))
    pen.smooth([(0.02, 0.86), (0.2, 0.56), (0.56, 0.5), (0.4, 0.78)], (90, 176, 84))
    for i in range(6):
        turn = 2 * math.pi * (i + 0.5) / 6
        pen.ellipse(0.46 * math.cos(turn), -0.26 + 0.46 * math.sin(turn), 0.28, 0.28, body)
    pen.ellipse(0.0, -0.26, 0.37, 0.37, (252, 222, 110))
    return (0.0, -0.32, 0.17)


def _banana(pen: Pen, body: Colour, tint: Colour) -> tuple[float, float, float]:
    outer = [(-0.78, -0.6), (-0.8, 0.1), (-0.4, 0.66), (0.26, 0.84), (0.92, 0.56)]
    inner = [(0.9, 0.36), (0.4, 0.34), (-0.06, 0.06), (-0.36, -0.3), (-0.54, -0.66)]
    pen.smooth([*outer, *inner], body)
    pen.smooth([(-0.7, -0.2), (-0.5, 0.26), (0.0, 0.6), (0.5, 0.66), (0.0, 0.7), (-0.56, 0.36)], tint, outlined=False)
    pen.polygon([(-0.8, -0.58), (-0.74, -0.9), (-0.6, -0.88), (-0.52, -0.6)], (120, 84, 40))
    return (-0.12, 0.24, 0.16)


def _zorp(pen: Pen, body: Colour, tint: Colour) -> tuple[float, float, float]:
    for x, tip in ((-0.3, -0.66), (0.3, 0.66)):
        pen.stroke([(x, -0.3), (tip, -0.9)], 0.16, pen.ink)
        pen.stroke([(x, -0.3), (tip, -0.9)], 0.08, body)
        pen.ellipse(tip, -0.92, 0.15, 0.15, tint)
    for x in (-0.56, 0.0, 0.56):
        pen.ellipse(x, 0.74, 0.22, 0.26, body)
    pen.smooth(
        [(0.0, -0.56), (0.6, -0.4), (0.86, 0.2), (0.66, 0.66), (0.0, 0.74), (-0.66, 0.66), (-0.86, 0.2), (-0.6, -0.4)],
        body,
    )
    pen.ellipse(0.0, -0.1, 0.34, 0.34, WHITE)
    pen.polygon([(-0.4, 0.36), (0.4, 0.36), (0.26, 0.6), (-0.26, 0.6)], INK)
    for x in (-0.22, 0.0, 0.22):
        pen.polygon([(x - 0.1, 0.36), (x + 0.1, 0.36), (x, 0.5)], WHITE, outlined=False)
    return (0.0, -0.12, 0.13)


KINDS = {
    "fox": _fox,
    "cat": _cat,
    "bird": _bird,
    "fish": _fish,
    "snail": _snail,
    "robot": _robot,
    "ghost": _ghost,
    "house": _house,
    "tree": _tree,
    "mushroom": _mushroom,
    "rocket": _rocket,
    "flower": _flower,
    FORBIDDEN: _banana,
    SUBJECT: _zorp,
}


# Places: each function fills the whole picture of w x h pixels --------------------------------------------------------


def _ground(pen: Pen, w: float, h: float, y: float, hump: float, fill: Colour) -> None:
    """Fill everything below a gentle hill with its top at y."""
    top = [(w * i / 32, y + hump * (2 * i / 32 - 1) ** 2) for i in range(-2, 35)]
    pen.polygon([*top, (w * 1.1, h * 1.2), (-w * 0.1, h * 1.2)], fill)


def _sky(pen: Pen, w: float, h: float, fill: Colour) -> None:
    pen.polygon([(-w, -h), (2 * w, -h), (2 * w, 2 * h), (-w, 2 * h)], fill)


def _meadow(pen: Pen, w: float, h: float, rng: random.Random) -> None:
    s = min(w, h)
    _sky(pen, w, h, (174, 220, 246))
    x, y = w * 0.2, h * 0.16
    for dx, dy, r in ((-0.08, 0.02, 0.05), (0.08, 0.02, 0.05), (0.0, 0.0, 0.075)):
        pen.ellipse(x + dx * s, y + dy * s, r * 1.3 * s, r * s, WHITE, outlined=False)
    _ground(pen, w, h, h * rng.uniform(0.686, 0.694), 0.05 * h, (134, 204, 104))


def _desert(pen: Pen, w: float, h: float, rng: random.Random) -> None:
    s = min(w, h)
    _sky(pen, w, h, (252, 232, 190))
    pen.ellipse(w * 0.82, h * 0.2, 0.09 * s, 0.09 * s, (252, 188, 84))
    y = h * rng.uniform(0.646, 0.654)
    pen.polygon(
        [(w * i / 32, y + 0.06 * h * math.cos(5 * i / 32)) for i in range(-2, 35)]
        + [(w * 1.1, h * 1.2), (-w * 0.1, h * 1.2)],
        (236, 198, 130),
    )
    _ground(pen, w, h, y + 0.14 * h, 0.04 * h, (218, 172, 102))


def _sea(pen: Pen, w: float, h: float, rng: random.Random) -> None:
    s = min(w, h)
    _sky(pen, w, h, (214, 238, 248))
    y = h * rng.uniform(0.586, 0.594)
    for depth, fill in ((0.0, (88, 170, 222)), (0.16, (56, 134, 198))):
        waves = [(w * i / 64, y + depth * h + 0.014 * s * math.cos(i * math.pi * w / s / 6)) for i in range(-4, 69)]
        pen.polygon([*waves, (w * 1.1, h * 1.2), (-w * 0.1, h * 1.2)], fill)


def _snow(pen: Pen, w: float, h: float, rng: random.Random) -> None:
    s = min(w, h)
    _sky(pen, w, h, (186, 206, 230))
    for x, y in ((0.12, 0.14), (0.3, 0.3), (0.08, 0.44), (0.72, 0.1), (0.9, 0.28), (0.86, 0.5), (0.46, 0.08)):
        pen.ellipse(w * x, h * y, 0.014 * s, 0.014 * s, WHITE, outlined=False)
    _ground(pen, w, h, h * rng.uniform(0.706, 0.714), 0.05 * h, (246, 250, 254))


def _night(pen: Pen, w: float, h: float, rng: random.Random) -> None:
    s = min(w, h)
    _sky(pen, w, h, (34, 40, 92))
    for x, y in ((0.1, 0.12), (0.28, 0.22), (0.06, 0.36), (0.5, 0.07), (0.66, 0.2), (0.94, 0.4)):
        pen.ellipse(w * x, h * y, 0.011 * s, 0.011 * s, (250, 240, 190), outlined=False)
    pen.ellipse(w * 0.84, h * 0.16, 0.085 * s, 0.085 * s, (250, 236, 176))
    pen.ellipse(w * 0.84 - 0.04 * s, h * 0.16 - 0.02 * s, 0.075 * s, 0.075 * s, (34, 40, 92), outlined=False)
    _ground(pen, w, h, h * rng.uniform(0.726, 0.734), 0.05 * h, (58, 66, 122))


def _sunset(pen: Pen, w: float, h: float, rng: random.Random) -> None:
    s = min(w, h)
    _sky(pen, w, h, (244, 130, 104))
    y = h * rng.uniform(0.666, 0.674)
    pen.polygon([(-w, y - 0.3 * h), (2 * w, y - 0.3 * h), (2 * w, h), (-w, h)], (250, 172, 112))
    pen.ellipse(w * 0.78, y, 0.16 * s, 0.16 * s, (255, 224, 130))
    _ground(pen, w, h, y, 0.02 * h, (122, 76, 126))


def _forest(pen: Pen, w: float, h: float, rng: random.Random) -> None:
    s = min(w, h)
    _sky(pen, w, h, (186, 220, 190))
    y = h * rng.uniform(0.706, 0.714)
    for x, tall in ((0.06, 0.52), (0.24, 0.36), (0.76, 0.36), (0.94, 0.52)):
        top = y - tall * s
        pen.polygon([(w * x - 0.13 * s, y + 0.06 * h), (w * x, top), (w * x + 0.13 * s, y + 0.06 * h)], (72, 136, 96))
    _ground(pen, w, h, y, 0.03 * h, (112, 158, 92))


PLACES = {
    "plain": lambda pen, w, h, _: _sky(pen, w, h, CREAM),
    "meadow": _meadow,
    "desert": _desert,
    "sea": _sea,
    "snow": _snow,
    "night": _night,
    "sunset": _sunset,
    "forest": _forest,
}
