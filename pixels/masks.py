"""A mask in greys → how much of each pixel is drawn. Knows numpy and Pillow; arrays are [H, W].

A hard mask means black or white; a soft one means its greys too. A mask is hard if its greys lie along its edges alone,
where programs smooth them and JPEG leaves its noise.
"""

import numpy as np
from PIL import Image

from service.device_thread import check_cancelled

# A grey up to here counts as black: JPEG's noise, far from edges.
TRACE = 8
# A grey up to here may be JPEG's noise near an edge.
NOISE = 64
# A grey up to here may be the rest of such noise, in a JPEG that was enlarged and saved without loss. A line of one
# pixel, shrunk to a quarter, leaves more.
FAINT = 24
# How far JPEG's noise reaches from an edge: as far as its blocks.
BLOCK = 8
# A mask is soft if more squares than this, of 3x3 pixels, are full of greys that no edge explains. Hard masks have 0:
# with smoothed edges, as JPEG of quality 5 to 95, as WEBP or AVIF. A disc blurred by two pixels has a hundred.
SQUARES = 9
# Rows handled together.
BAND = 1024


def strengths(grey: Image.Image, size: tuple[int, int], *, lossy: bool) -> Image.Image:
    """How much of each pixel is drawn, as L from 0 (nothing) to 255, at `size`.

    A hard mask draws each pixel that it covers any part of, with a seam inside its edges; the greys of strokes so thin
    that a program smoothed all of them blend. In a soft mask all greys above TRACE blend.
    `size` is (width, height), of the mask's aspect; `lossy` files may have added noise.
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
        # Noise makes ripples; a painted grey fills squares.
        black |= (values <= NOISE) & ~_spread(~_spread(black))
    return Image.fromarray(_blended(grey, ~black, white, size))


def _blended(grey: Image.Image, where: np.ndarray, white: int, size: tuple[int, int]) -> np.ndarray:
    """The greys at a size, [h, w]: 0 where `where` touches no part, 255 where every part is as light as `white`."""
    averaged = grey.resize(size, Image.Resampling.BOX if size < grey.size else Image.Resampling.BILINEAR)
    soft = np.where(cover(np.asarray(grey) < white, size), averaged, 255)
    return np.where(cover(where, size) & (soft > TRACE), soft, 0).astype(np.uint8)


def cover(painted: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which pixels of another size a painted area touches: bool [H, W] to [h, w], for a `size` of (w, h)."""
    for axis, length in ((0, size[1]), (1, size[0])):
        had = painted.shape[axis]
        edges = np.arange(length + 1) * had
        starts, ends = edges[:-1] // length, -(-edges[1:] // length)
        # Every second span is from a start to its end; those from an end to the next start are left out.
        margin = [(0, int(side == axis)) for side in (0, 1)]  # the last end lies one beyond the pixels
        spans = np.logical_or.reduceat(np.pad(painted, margin), np.stack((starts, ends), 1).ravel(), axis=axis)
        painted = spans[::2] if axis == 0 else spans[:, ::2]
    return painted


def thin_strokes(values: np.ndarray, *, lossy: bool) -> np.ndarray | None:
    """The dark greys of a hard mask that neither an edge nor noise explains, bool [H, W]; None for a soft mask.

    They are thin strokes that a program smoothed. A soft mask has too many squares full of greys, see SQUARES.
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
    """Whether each grey may belong to an edge: a middle grey next to dark and light, others near the opposite."""
    dark, light = values <= NOISE, values >= 255 - NOISE
    smoothed = _spread(dark) & _spread(light)
    noise = np.where(values < 128, _near(values >= 128, BLOCK), _near(values < 128, BLOCK))
    return np.where(dark | light, noise, smoothed)


def _seamed(painted: np.ndarray) -> np.ndarray:
    """Soft seams, 1/128 of the shorter side wide, inside the painted areas: bool to 0 ... 255.

    In areas too thin for that, seams are narrower, so that the middle of a thin line has full strength too.
    """
    seam = max(1, min(painted.shape) // 128)  # pixels
    # The distance to the nearest pixel that is kept, up to `seam`; pixels outside the picture count as painted.
    inside = painted
    depth = painted.astype(np.uint8)
    for _ in range(seam - 1):
        inside = ~_spread(~inside)
        depth += inside
    deepest = depth
    for _ in range(seam):
        deepest = np.where(painted, _spread(deepest), 0)  # not across gaps, behind which are other lines
    return np.rint(255 * (depth / np.maximum(deepest, 1))).astype(np.uint8)


def _near(marked: np.ndarray, radius: int) -> np.ndarray:
    """The pixels up to `radius` from a marked one, in each direction."""
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
