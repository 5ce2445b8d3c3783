"""The painted area of masks: hard and soft ones, shrunk, grown, and with JPEG noise."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from pixels import masks


def strengths(
    mask: Image.Image | np.ndarray, size: tuple[int, int] | None = None, *, lossy: bool = False
) -> np.ndarray:
    """How strongly each pixel is painted, 0 to 255: [H, W]."""
    mask = mask if isinstance(mask, Image.Image) else Image.fromarray(mask.astype(np.uint8))
    return np.asarray(masks.strengths(mask, size or mask.size, lossy=lossy)).astype(int)


def is_hard(mask: Image.Image, *, lossy: bool = False) -> bool:
    return masks.thin_strokes(np.asarray(mask), lossy=lossy) is not None


def shrunk(size: tuple[int, int], most: int = 1440) -> tuple[int, int]:
    """The size at which a picture of that size is drawn."""
    return tuple(max(1, round(side * min(1, most / max(size)))) for side in size)


def encoded(mask: Image.Image, format: str, quality: int) -> Image.Image:
    file = io.BytesIO()
    mask.save(file, format, quality=quality)
    return Image.open(file).convert("L")


# Hard masks


@st.composite
def scribbles(draw: st.DrawFn) -> Image.Image:
    """Strokes from one pixel wide up, discs and boxes on black, from 1 to 3000 pixels a side."""
    width, height = draw(st.integers(1, 3000)), draw(st.integers(1, 3000))
    mask = Image.new("L", (width, height))
    pen = ImageDraw.Draw(mask)
    across, down = st.integers(0, width - 1), st.integers(0, height - 1)
    for _ in range(draw(st.integers(1, 4))):
        (left, right), (top, bottom) = sorted((draw(across), draw(across))), sorted((draw(down), draw(down)))
        match draw(st.sampled_from(("line", "disc", "box"))):
            case "line":
                pen.line((left, top, right, bottom), fill=255, width=draw(st.integers(1, 6)))
            case "disc":
                pen.ellipse((left, top, right, bottom), fill=255)
            case "box":
                pen.rectangle((left, top, right, bottom), fill=255)
    return mask


def touched(painted: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which pixels of another size a painted area touches, one pixel at a time: the definition."""
    (high, wide), (width, height) = painted.shape, size
    result = np.zeros((height, width), bool)
    for y, x in np.argwhere(painted):
        rows = slice(y * height // high, -(-(y + 1) * height // high))
        columns = slice(x * width // wide, -(-(x + 1) * width // wide))
        result[rows, columns] = True
    return result


@settings(deadline=None, max_examples=50)
@given(*(st.integers(1, 40) for _ in range(4)), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_a_pixel_is_covered_if_any_part_of_it_is_painted(
    high: int, wide: int, height: int, width: int, seed: int, share: float
) -> None:
    painted = np.random.default_rng(seed).random((high, wide)) < share
    assert (masks.cover(painted, (width, height)) == touched(painted, (width, height))).all()


@settings(deadline=None, max_examples=40)
@given(scribbles())
def test_hard_masks_keep_every_stroke_and_paint_nothing_else(mask: Image.Image) -> None:
    painted, size = np.asarray(mask) == 255, shrunk(mask.size)
    drawn = strengths(mask, size)
    rows, columns = np.nonzero(painted)
    (wide, high), (width, height) = mask.size, size
    assert (drawn[rows * height // high, columns * width // wide] > masks.TRACE).all()
    if size == mask.size:
        assert ((drawn > 0) == painted).all()
    else:
        assert ((drawn > 0) == masks.cover(painted, size)).all()


@pytest.mark.parametrize(("width", "height", "thickness"), [(4032, 3024, 2), (4096, 4096, 4), (4032, 3024, 1)])
def test_a_thin_line_stays_a_line(width: int, height: int, thickness: int) -> None:
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).line((0, 1000, width, 1000), fill=255, width=thickness)
    assert (strengths(mask, shrunk(mask.size)).max(axis=0) == 255).all()


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([("JPEG", 10), ("JPEG", 30), ("JPEG", 75), ("JPEG", 95), ("WEBP", 30), ("AVIF", 40)]),
)
def test_noise_of_a_lossy_file_changes_neither_the_kind_nor_what_is_kept(seed: int, how: tuple[str, int]) -> None:
    chance = np.random.default_rng(seed)
    mask = Image.new("L", (400, 300))
    pen = ImageDraw.Draw(mask)
    for width in chance.integers(3, 40, 3).tolist():
        pen.line(chance.integers(0, 300, 4).tolist(), fill=255, width=width)
    left, top = chance.integers(0, 200, 2).tolist()
    pen.ellipse((left, top, left + 90, top + 70), fill=255)
    noisy = encoded(mask, *how)
    assert is_hard(noisy, lossy=True)
    drawn, painted = strengths(noisy, lossy=True) > 0, np.asarray(mask) == 255
    spread = np.asarray(mask.filter(ImageFilter.MaxFilter(3))) == 255  # the edge itself may move by a pixel
    core = np.asarray(mask.filter(ImageFilter.MinFilter(3))) == 255
    assert np.count_nonzero(drawn & ~spread) <= 3  # of 120,000: a JPEG of quality 10 fills the corner of two strokes
    assert np.count_nonzero(core & ~drawn) <= 3
    assert (drawn != painted).mean() < 0.02


def test_smoothed_edges_are_hard_ones() -> None:
    disc = Image.new("L", (1600, 1600))
    ImageDraw.Draw(disc).ellipse((300, 300, 1300, 1200), fill=255)
    for filter in (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS):
        smoothed = disc.resize((400, 400), filter)
        assert len(np.unique(smoothed)) > 10
        assert ((strengths(smoothed) > 0) == (np.asarray(smoothed) >= 128)).all()


@pytest.mark.parametrize("filter", [Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS])
@pytest.mark.parametrize("quality", [None, 75, 95])
@pytest.mark.parametrize("thickness", [1, 2, 3, 4])
def test_a_stroke_that_a_program_smoothed_stays_whole(filter: int, quality: int | None, thickness: int) -> None:
    """Its greys may all be dark: of two pixels shrunk to a quarter, none is lighter than the middle."""
    mask = Image.new("L", (2000, 1500))
    pen = ImageDraw.Draw(mask)
    pen.line((50, 67, 1950, 1350), fill=255, width=thickness)
    pen.ellipse((50, 1000, 450, 1400), fill=255)
    mask = mask.resize((500, 375), filter)
    noisy = mask if quality is None else encoded(mask, "JPEG", quality)
    drawn = strengths(noisy, lossy=quality is not None)
    missing = np.count_nonzero(drawn[:, 120:480].max(axis=0) == 0)  # columns of 360
    if quality is None:
        assert missing == 0
    elif thickness > 1:  # of one pixel, JPEG has no more left than its noise
        assert missing <= 10
    assert (drawn[np.asarray(mask.filter(ImageFilter.MaxFilter(5))) == 0] == 0).all()


def test_the_seam_rises_inside_the_mask_over_1_128_of_the_shorter_side() -> None:
    painted = np.zeros((1024, 1024), bool)
    painted[300:700, 400:] = True
    painting = strengths(painted * 255)
    across = painting[500, 395:420]
    assert across[:5].tolist() == [0] * 5
    assert across[5:13].tolist() == [round(255 * step / 8) for step in range(1, 9)]
    assert (painting[308:692, 408:] == 255).all()  # and no seam where the mask meets the picture's own edge


@pytest.mark.parametrize("thickness", [1, 2, 3, 4, 7, 12, 15, 16, 40])
def test_a_line_is_painted_at_full_strength_in_its_middle(thickness: int) -> None:
    painted = np.zeros((1024, 1024), bool)
    painted[500 : 500 + thickness, 200:800] = True
    assert (strengths(painted * 255)[500 + (thickness - 1) // 2, 240:760] == 255).all()


@pytest.mark.parametrize("filter", [Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS])
def test_a_smoothed_stroke_that_shrinks_is_painted_at_full_strength(filter: int) -> None:
    mask = Image.new("L", (3000, 3000))
    pen = ImageDraw.Draw(mask)
    pen.line((100, 137, 2900, 2200), fill=255, width=2)
    pen.ellipse((200, 2200, 800, 2800), fill=255)
    drawn = strengths(mask.resize((1500, 1500), filter), (720, 720))
    assert (drawn[:, 30:690].max(axis=0) == 255).all()


@pytest.mark.parametrize("grey", [130, 200, 240, 246])
def test_a_light_grey_within_white_weakens_nothing_around_it(grey: int) -> None:
    mask = np.full((1024, 1024), 255)
    mask[:100] = 0
    mask[500, 500] = grey
    assert (strengths(mask)[120:] == 255).all()


@pytest.mark.parametrize("gap", range(1, 9))
def test_a_thin_line_beside_a_thick_one_is_painted_at_full_strength_too(gap: int) -> None:
    painted = np.zeros((1024, 1024), bool)
    painted[300:600, 300:700] = painted[600 + gap, 320:680] = True
    assert (strengths(painted * 255)[600 + gap, 320:680] == 255).all()


# Soft masks


def soft_masks() -> dict[str, Image.Image]:
    disc = Image.new("L", (500, 400))
    ImageDraw.Draw(disc).ellipse((100, 80, 400, 320), fill=255)
    faint = disc.point([value * 40 // 255 for value in range(256)])
    both = disc.copy()
    both.paste(128, (0, 0, 60, 60))
    strokes = Image.new("L", (1000, 1000))
    for place in range(40, 900, 40):
        ImageDraw.Draw(strokes).line((0, place, 700, 900 - place), fill=255, width=12)
    dab = Image.new("L", strokes.size)
    ImageDraw.Draw(dab).ellipse((850, 850, 880, 880), fill=255)
    return {
        "a dab beside many strokes": ImageChops.lighter(strokes, dab.filter(ImageFilter.GaussianBlur(8))),
        "ramp": Image.linear_gradient("L").rotate(90),
        "radial": Image.radial_gradient("L"),
        "feathered": disc.filter(ImageFilter.GaussianBlur(6)),
        "blurred": disc.filter(ImageFilter.GaussianBlur(2)),
        "faint": faint,
        "grey": Image.new("L", (64, 64), 128),
        "white and grey": both,
    }


@pytest.mark.parametrize("name", soft_masks())
@pytest.mark.parametrize("quality", [None, 30, 90])
def test_greys_blend_down_to_a_trace(name: str, quality: int | None) -> None:
    mask = soft_masks()[name] if quality is None else encoded(soft_masks()[name], "JPEG", quality)
    values = np.asarray(mask).astype(int)
    assert not is_hard(mask)
    assert (strengths(mask) == np.where(values > 8, values, 0)).all()


@pytest.mark.parametrize("quality", [10, 30, 50, 75, 90])
@pytest.mark.parametrize("grey", [128, 230])
def test_noise_around_a_flat_grey_is_not_drawn(quality: int, grey: int) -> None:
    mask = Image.new("L", (500, 400))
    ImageDraw.Draw(mask).ellipse((100, 80, 400, 320), fill=grey)
    noisy = encoded(mask, "JPEG", quality)
    far = np.asarray(mask.filter(ImageFilter.MaxFilter(5))) == 0
    inside = np.asarray(mask.filter(ImageFilter.MinFilter(17))) > 0
    drawn = strengths(noisy, lossy=True)
    assert (np.asarray(noisy)[far] > masks.TRACE).sum() > 20
    assert np.count_nonzero(drawn[far]) <= 10
    assert np.abs(drawn[inside] - grey).max() <= 12


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (9, 1), (10, 1)])
def test_one_grey_all_over_blends_at_any_size(size: tuple[int, int]) -> None:
    assert (strengths(Image.new("L", size, 100)) == 100).all()


@pytest.mark.parametrize("quality", [20, 50, 90])
def test_the_white_of_a_noisy_mask_is_wholly_drawn(quality: int) -> None:
    mask = soft_masks()["feathered"]
    white = np.asarray(mask.filter(ImageFilter.MinFilter(17))) == 255
    assert (strengths(encoded(mask, "JPEG", quality), lossy=True)[white] == 255).all()


@pytest.mark.parametrize("size", [(100, 80), (333, 266), (1500, 1200)])
def test_a_soft_mask_is_averaged_and_keeps_its_black_and_its_white(size: tuple[int, int]) -> None:
    mask = soft_masks()["feathered"]
    values, drawn = np.asarray(mask), strengths(mask, size)
    assert drawn.mean() == pytest.approx(values.mean(), rel=0.02)
    assert (drawn[~masks.cover(values > 8, size)] == 0).all()
    assert (drawn[~masks.cover(values < 255, size)] == 255).all()
    smooth = np.asarray(mask.resize(size, Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(drawn - smooth).max() <= 20


def test_a_ramp_has_no_edge_at_any_size() -> None:
    ramp = np.tile(np.linspace(0, 255, 512).round(), (64, 1))
    for size in ((512, 64), (200, 25), (1024, 128)):
        steps = np.diff(strengths(ramp, size)[0])
        assert steps.min() >= 0
        assert steps.max() <= 9  # where it rises above a trace
