"""The Triton kernels of engine/block_operators.py, which says what each computes; importing this needs Triton.

One program works on one token and keeps its row in registers, so each number is read once and written once. Triton's
blocks are powers of two, and the widths of FLUX three times one (3072, 12288): a row is three blocks. Tiles are fixed:
with autotuning, the first request of each new size would pay for trials. By `do_not_specialize` Triton compiles no
kernel anew for numbers of tokens that are multiples of 16.
"""

import triton
import triton.language as tl

from engine import fp8

# Of all norms in FLUX's blocks.
EPS = tl.constexpr(1e-6)
LARGEST, SMALLEST = tl.constexpr(fp8.LARGEST), tl.constexpr(fp8.SMALLEST)


@triton.jit
def _load(start: tl.tensor, SIZE: tl.constexpr) -> tl.tuple:
    """A row of 3 * SIZE numbers as three float32 blocks."""
    i = tl.arange(0, SIZE)
    first, second, third = tl.load(start + i), tl.load(start + SIZE + i), tl.load(start + 2 * SIZE + i)
    return first.to(tl.float32), second.to(tl.float32), third.to(tl.float32)


@triton.jit
def _store(start: tl.tensor, a: tl.tensor, b: tl.tensor, c: tl.tensor, SIZE: tl.constexpr) -> None:
    """The reverse. e4m3 has no infinity: a number that rounds to 448 is 448, and NaN stays NaN."""
    i = tl.arange(0, SIZE)
    tl.store(start + i, a.to(start.dtype.element_ty))
    tl.store(start + SIZE + i, b.to(start.dtype.element_ty))
    tl.store(start + 2 * SIZE + i, c.to(start.dtype.element_ty))


@triton.jit
def _largest(a: tl.tensor, b: tl.tensor, c: tl.tensor) -> tl.tensor:
    """The largest magnitude of a row."""
    return tl.max(tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.abs(c)), 0)


@triton.jit
def _gelu(x: tl.tensor) -> tl.tensor:
    """The tanh form of GELU, written by a sigmoid: x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 x^3))."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit(do_not_specialize=["tokens"])
def norm_quantize(  # noqa: D103
    x: tl.tensor,  # [B * N, C]
    factor: tl.tensor,  # [B, C]
    shift: tl.tensor,  # [B, C]
    values: tl.tensor,  # [B * N, C]
    scales: tl.tensor,  # [B * N]
    tokens: tl.tensor,  # N
    x_stride: tl.tensor,
    factor_stride: tl.tensor,
    shift_stride: tl.tensor,
    SIZE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    batch = row // tokens
    a, b, c = _load(x + row * x_stride, SIZE)
    mean = tl.sum(a + b + c, 0) / (3 * SIZE)
    a, b, c = a - mean, b - mean, c - mean
    inverse = 1.0 / tl.sqrt(tl.sum(a * a + b * b + c * c, 0) / (3 * SIZE) + EPS)
    f, g, h = _load(factor + batch * factor_stride, SIZE)
    r, s, t = _load(shift + batch * shift_stride, SIZE)
    a = a * inverse * (1.0 + f) + r
    b = b * inverse * (1.0 + g) + s
    c = c * inverse * (1.0 + h) + t
    scale = tl.maximum(_largest(a, b, c), SMALLEST) / LARGEST
    inverse = 1.0 / scale
    tl.store(scales + row, scale)
    _store(values + row * (3 * SIZE), a * inverse, b * inverse, c * inverse, SIZE)


@triton.jit
def gelu_quantize(  # noqa: D103
    attention: tl.tensor,  # [M, A]; not read where A is 0
    hidden: tl.tensor,  # [M, H]
    bias: tl.tensor,  # [H]
    values: tl.tensor,  # [M, A + H]
    scales: tl.tensor,  # [M]
    attention_stride: tl.tensor,
    hidden_stride: tl.tensor,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    a, b, c = _load(hidden + row * hidden_stride, SIZE)
    f, g, h = _load(bias, SIZE)
    a, b, c = _gelu(a + f), _gelu(b + g), _gelu(c + h)
    most = _largest(a, b, c)
    start = values + row * (3 * FIRST + 3 * SIZE)
    if FIRST > 0:
        r, s, t = _load(attention + row * attention_stride, FIRST)
        most = tl.maximum(most, _largest(r, s, t))
    scale = tl.maximum(most, SMALLEST) / LARGEST
    inverse = 1.0 / scale
    tl.store(scales + row, scale)
    if FIRST > 0:
        _store(start, r * inverse, s * inverse, t * inverse, FIRST)
    _store(start + 3 * FIRST, a * inverse, b * inverse, c * inverse, SIZE)


@triton.jit(do_not_specialize=["tokens", "offset", "total"])
def rotate_heads(  # noqa: D103
    query: tl.tensor,  # [B * N, HEADS * D] of one stream, as are key and value
    key: tl.tensor,
    value: tl.tensor,
    query_bias: tl.tensor,  # [HEADS * D]
    key_bias: tl.tensor,
    value_bias: tl.tensor,
    query_norm: tl.tensor,  # [D]
    key_norm: tl.tensor,
    cos: tl.tensor,  # [all tokens, D], float32
    sin: tl.tensor,
    q: tl.tensor,  # [B * all tokens, HEADS * D], as are k and v
    k: tl.tensor,
    v: tl.tensor,
    stride: tl.tensor,  # of query, key and value
    tokens: tl.tensor,  # N
    offset: tl.tensor,  # of this stream's first token
    total: tl.tensor,  # all tokens
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
) -> None:
    row, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = offset + row % tokens
    source = (query if which == 0 else (key if which == 1 else value)) + row * stride
    bias = query_bias if which == 0 else (key_bias if which == 1 else value_bias)
    target = (q if which == 0 else (k if which == 1 else v)) + (row // tokens * total + token) * (HEADS * D)
    d = tl.arange(0, D)
    weight = tl.load((query_norm if which == 0 else key_norm) + d).to(tl.float32)[None, :]
    # Each pair of numbers is turned by one angle, which cos and sin have twice.
    pair = token * D + 2 * tl.arange(0, D // 2)
    c, s = tl.load(cos + pair)[None, :], tl.load(sin + pair)[None, :]
    for start in tl.static_range(0, HEADS, CHUNK):
        at = (start + tl.arange(0, CHUNK))[:, None] * D + d[None, :]
        x = tl.load(source + at).to(tl.float32) + tl.load(bias + at).to(tl.float32)
        if which < 2:
            x = x / tl.sqrt(tl.sum(x * x, 1) / D + EPS)[:, None] * weight
            real, imaginary = tl.split(tl.reshape(x, [CHUNK, D // 2, 2]))
            x = tl.reshape(tl.join(real * c - imaginary * s, imaginary * c + real * s), [CHUNK, D])
        tl.store(target + at, x.to(target.dtype.element_ty))
