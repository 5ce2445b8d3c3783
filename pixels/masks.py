"""A mask in greys → how much of each pixel is drawn. Knows numpy and Pillow; arrays are [H, W].

A hard mask says yes or no; a soft one says how much. Which one somebody means is told from what its greys look like:
those of a hard mask lie along its edges, where programs smooth them and JPEG leaves its noise.
"""

import numpy as np
from PIL import Image

from service.device_thread import check_cancelled

# Up to here a grey counts as black: JPEG's noise, far from edges.
TRACE = 8
# Up to here it may be JPEG's noise near an edge.
NOISE = 64
# Up to here it may be what is left of it where a program enlarged a JPEG and saved it without loss. Of a line of one
# pixel that a program shrank to a quarter, more is left.
FAINT = 24
# How far JPEG's noise reaches from an edge: as far as its blocks.
BLOCK = 8
# A mask is soft if more squares than this, of 3x3 pixels, are full of greys that no edge explains. Hard masks have
# none: as JPEG of quality 5 to 95, as WEBP or AVIF, with smoothed edges. A disc that is blurred by two pixels has a
# hundred.
SQUARES = 9
# Rows that are looked at together.
BAND = 1024


def strengths(grey: Image.Image, size: tuple[int, int], *, lossy: bool) -> Image.Image:
    """How much of each pixel is drawn, as L from 0 (nothing) to 255, at `size`.

    A hard mask paints what it covers any part of, with a seam inside its edges; of a stroke so thin that a program
    smoothed all of it, the greys blend. Of a soft one all greys do, down to a trace; what is black or white all over
    stays that.

    Args:
        grey: the mask, as L.
        size: (width, height), of the mask's aspect.
        lossy: whether its file may have added noise.
    """
    values = np.asarray(grey)
    white = 255 - TRACE * lossy
    thin = thin_strokes(values, lossy=lossy)
    if thin is not None:
        drawn = _seamed(cover(values >= 128, size))
        if thin.any():
            drawn = np.maximum(drawn, _blended(grey, thin, white, size))
        return Image.fromarray(drawn)
    black = values <= TRACE
    if lossy:
        # Noise is ripples; a grey that somebody painted fills squares.
        black |= (values <= NOISE) & ~_spread(~_spread(black))
    return Image.fromarray(_blended(grey, ~black, white, size))


def _blended(grey: Image.Image, where: np.ndarray, white: int, size: tuple[int, int]) -> np.ndarray:
    """The greys at a size, 0 but for the pixels that `where` touches, 255 where all is as light as `white`: [h, w]."""
    averaged = grey.resize(size, Image.Resampling.BOX if size < grey.size else Image.Resampling.BILINEAR)
    soft = np.where(cover(np.asarray(grey) < white, size), averaged, 255)
    return np.where(cover(where, size) & (soft > TRACE), soft, 0).astype(np.uint8)


def cover(painted: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which pixels of another size a painted area touches: bool [H, W] to [h, w], for a `size` of (w, h)."""
    for axis, length in ((0, size[1]), (1, size[0])):
        had = painted.shape[axis]
        edges = np.arange(length + 1) * had
        starts, ends = edges[:-1] // length, -(-edges[1:] // length)
        # From each start to its end; what the reduction gives between an end and the next start is left out.
        margin = [(0, int(side == axis)) for side in (0, 1)]  # the last end is none of the pixels
        spans = np.logical_or.reduceat(np.pad(painted, margin), np.stack((starts, ends), 1).ravel(), axis=axis)
        painted = spans[::2] if axis == 0 else spans[:, ::2]
    return painted


def thin_strokes(values: np.ndarray, *, lossy: bool) -> np.ndarray | None:
    """Where a hard mask has dark greys that neither an edge nor noise explains: a program smoothed thin strokes there.

    Returns:
        bool [H, W]; None of a soft mask: too many squares of 3x3 pixels are full of greys that no edge explains.
    """
    thin, squares = np.zeros(values.shape, bool), 0
    for top in range(0, len(values), BAND):
        check_cancelled()
        above = min(top, BLOCK)
        band = values[top - above : top + BAND + BLOCK]
        grey = (band > TRACE) & (band < 255 - TRACE)  # [H, W] of the band
        if not grey.any():
            continue
        strays = grey & ~_along_edges(band)
        squares += np.count_nonzero(~_spread(~strays)[above : above + BAND])
        if squares > SQUARES:
            return None
        if lossy:
            strays &= (band > NOISE) & ~_near(band >= 255 - NOISE, BLOCK)
        else:
            strays &= band > FAINT
        thin[top : top + BAND] = (strays & (band < 128))[above : above + BAND]
    return thin


def _along_edges(values: np.ndarray) -> np.ndarray:
    """Where a grey may be an edge's: a middle one between dark and light, others not far from the opposite."""
    dark, light = values <= NOISE, values >= 255 - NOISE
    smoothed = _spread(dark) & _spread(light)
    noise = np.where(values < 128, _near(values >= 128, BLOCK), _near(values < 128, BLOCK))
    return np.where(dark | light, noise, smoothed)


def _seamed(painted: np.ndarray) -> np.ndarray:
    """A seam as wide as 1/128 of the shorter side, inside what is painted: bool to 0 ... 255.

    Where that is too thin for it, the seam is as deep as it is, so that the middle of a thin line is painted at full
    strength too.
    """
    seam = max(1, min(painted.shape) // 128)  # pixels
    # How far each pixel lies from the nearest one that is kept, at most `seam`; beyond the picture nothing is kept.
    inside = painted
    depth = painted.astype(np.uint8)
    for _ in range(seam - 1):
        inside = ~_spread(~inside)
        depth += inside
    deepest = depth
    for _ in range(seam):
        deepest = np.where(painted, _spread(deepest), 0)  # not across a gap: what lies beyond is another line
    return np.rint(255 * (depth / np.maximum(deepest, 1))).astype(np.uint8)


def _near(marked: np.ndarray, radius: int) -> np.ndarray:
    """What lies within a square of so many pixels around something marked."""
    reach = 0
    while reach < radius:
        step = min(2 * reach + 1, radius - reach)
        marked, reach = _spread(marked, step), reach + step
    return marked


def _spread(values: np.ndarray, step: int = 1) -> np.ndarray:
    """The largest of each pixel and the eight that lie `step` away: [H, W] to [H, W]."""
    padded = np.pad(values, step, mode="edge")
    rows = np.maximum(np.maximum(padded[: -2 * step], padded[step:-step]), padded[2 * step :])
    return np.maximum(np.maximum(rows[:, : -2 * step], rows[:, step:-step]), rows[:, 2 * step :])
