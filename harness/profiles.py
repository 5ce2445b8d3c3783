"""Colour profiles made from their published numbers, by the form of ICC.1:2022 (profile version 4)."""

import struct


def numbers(*values: float) -> bytes:
    """Numbers as profiles store them: in 65536ths."""
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc(space: bytes, tags: dict[bytes, bytes], between: bytes = b"XYZ ") -> bytes:
    """A profile of version 4 from its tags, with the other required tags."""
    text = "test".encode("utf-16-be")
    named = b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(text), 28) + text
    tags = {b"desc": named, b"cprt": named, b"wtpt": b"XYZ \0\0\0\0" + numbers(0.9642, 1, 0.8249), **tags}
    table, content = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        table += name + struct.pack(">II", start + len(content), len(tag))
        content += tag + bytes(-len(tag) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s28x", start + len(content), 4 << 24, b"mntr", space, between, b"acsp")
    return (head + numbers(0.9642, 1, 0.8249)).ljust(128, b"\0") + table + content


def of_primaries(red: tuple, green: tuple, blue: tuple, curve: bytes) -> bytes:
    """A profile of three primaries, given as XYZ relative to the profiles' white."""
    columns = zip((b"rXYZ", b"gXYZ", b"bXYZ"), (red, green, blue), strict=True)
    primaries = {name: b"XYZ \0\0\0\0" + numbers(*column) for name, column in columns}
    return icc(b"RGB ", primaries | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def of_inks() -> bytes:
    """A CMYK profile: paper is white, cyan a blue, and everything with black half as light as paper."""
    paper, cyan, black = (255, 128, 128), (153, 108, 98), (128, 128, 128)  # L, a, b as bytes
    corners = [black if key else (cyan if inks >= 4 else paper) for inks in range(8) for key in (0, 1)]
    ramp = bytes(range(256))
    table = b"mft1\0\0\0\0\x04\x03\x02\0" + numbers(1, 0, 0, 0, 1, 0, 0, 0, 1) + 4 * ramp
    return icc(b"CMYK", {b"A2B0": table + bytes(sum(corners, ())) + 3 * ramp}, between=b"Lab ")


def of_elements(count: int) -> bytes:
    """A small profile of many processing elements that share one matrix."""
    element = b"matf\0\0\0\0" + struct.pack(">HH12f", 3, 3, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0)
    places = struct.pack(">II", 16 + 8 * count, len(element)) * count
    return icc(b"RGB ", {b"D2B0": b"mpet\0\0\0\0" + struct.pack(">HHI", 3, 3, count) + places + element}, b"Lab ")


SRGB_CURVE = b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + numbers(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
ADOBE_CURVE = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, 563)
SRGB = of_primaries((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141), SRGB_CURVE)
P3 = of_primaries((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407), SRGB_CURVE)
ADOBE = of_primaries((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457), ADOBE_CURVE)
LINEAR_GREY = icc(b"GRAY", {b"kTRC": b"curv" + bytes(8)})
