"""Hand-written Triton kernels of the experiment, as opaque operators with fallbacks in torch where there is no CUDA."""
import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

E4M3, LARGEST = torch.float8_e4m3fn, 448.0
SMALLEST = torch.finfo(torch.float32).tiny * LARGEST
WARPS = {"gelu": 8, "norm": 4, "rope": 4}

if triton is not None:

    @triton.jit
    def _gelu(x):
        # tanh form: x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 x^3))
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))

    @triton.jit
    def gelu_quant_kernel(attn, mlp, bias, out, scales, attn_stride, mlp_stride, out_stride,
                          HAS_ATTN: tl.constexpr, HAS_BIAS: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        i = tl.arange(0, B)
        start = mlp + row * mlp_stride
        h0 = tl.load(start + i).to(tl.float32)
        h1 = tl.load(start + B + i).to(tl.float32)
        h2 = tl.load(start + 2 * B + i).to(tl.float32)
        if HAS_BIAS:
            h0 += tl.load(bias + i).to(tl.float32)
            h1 += tl.load(bias + B + i).to(tl.float32)
            h2 += tl.load(bias + 2 * B + i).to(tl.float32)
        h0 = _gelu(h0)
        h1 = _gelu(h1)
        h2 = _gelu(h2)
        most = tl.maximum(tl.max(tl.abs(h0), 0), tl.maximum(tl.max(tl.abs(h1), 0), tl.max(tl.abs(h2), 0)))
        first = out + row * out_stride
        if HAS_ATTN:
            j = tl.arange(0, A)
            begin = attn + row * attn_stride
            a0 = tl.load(begin + j).to(tl.float32)
            a1 = tl.load(begin + A + j).to(tl.float32)
            a2 = tl.load(begin + 2 * A + j).to(tl.float32)
            other = tl.maximum(tl.max(tl.abs(a0), 0), tl.maximum(tl.max(tl.abs(a1), 0), tl.max(tl.abs(a2), 0)))
            most = tl.maximum(most, other)
        scale = tl.maximum(most, 5.3e-36) / 448.0
        inverse = 1.0 / scale
        tl.store(scales + row, scale)
        if HAS_ATTN:
            tl.store(first + j, tl.clamp(a0 * inverse, -448.0, 448.0).to(tl.float8e4nv))
            tl.store(first + A + j, tl.clamp(a1 * inverse, -448.0, 448.0).to(tl.float8e4nv))
            tl.store(first + 2 * A + j, tl.clamp(a2 * inverse, -448.0, 448.0).to(tl.float8e4nv))
            first += 3 * A
        tl.store(first + i, tl.clamp(h0 * inverse, -448.0, 448.0).to(tl.float8e4nv))
        tl.store(first + B + i, tl.clamp(h1 * inverse, -448.0, 448.0).to(tl.float8e4nv))
        tl.store(first + 2 * B + i, tl.clamp(h2 * inverse, -448.0, 448.0).to(tl.float8e4nv))

    @triton.jit
    def norm_quant_kernel(x, factor, shift, out, scales, x_stride, A: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        i = tl.arange(0, A)
        start = x + row * x_stride
        x0 = tl.load(start + i).to(tl.float32)
        x1 = tl.load(start + A + i).to(tl.float32)
        x2 = tl.load(start + 2 * A + i).to(tl.float32)
        mean = (tl.sum(x0, 0) + tl.sum(x1, 0) + tl.sum(x2, 0)) / (3 * A)
        x0 -= mean
        x1 -= mean
        x2 -= mean
        variance = (tl.sum(x0 * x0, 0) + tl.sum(x1 * x1, 0) + tl.sum(x2 * x2, 0)) / (3 * A)
        r = 1.0 / tl.sqrt(variance + 1e-6)
        x0 = x0 * r * (1.0 + tl.load(factor + i).to(tl.float32)) + tl.load(shift + i).to(tl.float32)
        x1 = x1 * r * (1.0 + tl.load(factor + A + i).to(tl.float32)) + tl.load(shift + A + i).to(tl.float32)
        x2 = x2 * r * (1.0 + tl.load(factor + 2 * A + i).to(tl.float32)) + tl.load(shift + 2 * A + i).to(tl.float32)
        most = tl.maximum(tl.max(tl.abs(x0), 0), tl.maximum(tl.max(tl.abs(x1), 0), tl.max(tl.abs(x2), 0)))
        scale = tl.maximum(most, 5.3e-36) / 448.0
        inverse = 1.0 / scale
        tl.store(scales + row, scale)
        first = out + row * (3 * A)
        tl.store(first + i, tl.clamp(x0 * inverse, -448.0, 448.0).to(tl.float8e4nv))
        tl.store(first + A + i, tl.clamp(x1 * inverse, -448.0, 448.0).to(tl.float8e4nv))
        tl.store(first + 2 * A + i, tl.clamp(x2 * inverse, -448.0, 448.0).to(tl.float8e4nv))

    @triton.jit
    def qk_rope_kernel(qkv, bias, q_weight, k_weight, cos, sin, q, k, v, qkv_stride, offset,
                       HAS_BIAS: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        which = tl.program_id(1)
        d = tl.arange(0, D)
        pair = tl.arange(0, D // 2)
        place = row + offset
        inner: tl.constexpr = HEADS * D
        c = tl.load(cos + place * D + 2 * pair)[None, :]
        s = tl.load(sin + place * D + 2 * pair)[None, :]
        weight = tl.load((q_weight if which == 0 else k_weight) + d).to(tl.float32)[None, :]
        target = q if which == 0 else k
        if which == 2:
            target = v
        for chunk in tl.static_range(0, HEADS, CHUNK):
            at = (chunk + tl.arange(0, CHUNK))[:, None] * D + d[None, :]
            x = tl.load(qkv + row * qkv_stride + which * inner + at).to(tl.float32)
            if HAS_BIAS:
                x += tl.load(bias + which * inner + at).to(tl.float32)
            if which < 2:
                r = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + 1e-6)
                y = x * r[:, None] * weight
                re, im = tl.split(tl.reshape(y, [CHUNK, D // 2, 2]))
                x = tl.reshape(tl.join(re * c - im * s, im * c + re * s), [CHUNK, D])
            tl.store(target + place * inner + at, x.to(tl.bfloat16))


def quantize(x):
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / LARGEST
    return (x / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def plain_gelu_quant(attn, mlp, bias):
    h = F.gelu(mlp.float() + (0 if bias is None else bias.float()), approximate="tanh")
    return quantize(h if attn is None else torch.cat([attn.float(), h], 1))


def gelu_quant(attn, mlp, bias):
    if not mlp.is_cuda:
        return plain_gelu_quant(attn, mlp, bias)
    rows, width = mlp.shape
    head = 0 if attn is None else attn.shape[1]
    assert mlp.stride(1) == 1 and width % 3 == 0 and (attn is None or attn.stride(1) == 1)
    out = torch.empty(rows, head + width, dtype=E4M3, device=mlp.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=mlp.device)
    gelu_quant_kernel[(rows,)](
        mlp if attn is None else attn, mlp, mlp if bias is None else bias, out, scales,
        0 if attn is None else attn.stride(0), mlp.stride(0), out.stride(0),
        HAS_ATTN=attn is not None, HAS_BIAS=bias is not None, A=max(head // 3, 16), B=width // 3,
        num_warps=WARPS["gelu"])
    return out, scales


def plain_norm_quant(x, factor, shift):
    y = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + factor.float()) + shift.float()
    return quantize(y)


def norm_quant(x, factor, shift):
    if not x.is_cuda:
        return plain_norm_quant(x, factor, shift)
    rows, width = x.shape
    assert x.stride(1) == 1 and width % 3 == 0 and factor.stride(-1) == 1 and shift.stride(-1) == 1
    out = torch.empty(rows, width, dtype=E4M3, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    norm_quant_kernel[(rows,)](x, factor, shift, out, scales, x.stride(0), A=width // 3, num_warps=WARPS["norm"])
    return out, scales


def plain_rope(qkv, bias, q_weight, k_weight, cos, sin, heads, offset):
    size = q_weight.shape[0]
    x = qkv[:, : 3 * heads * size].float() + (0 if bias is None else bias[: 3 * heads * size].float())
    parts = list(x.view(len(x), 3, heads, size).unbind(1))
    cos, sin = (it[offset : offset + len(x), None].float() for it in (cos, sin))
    for n, weight in enumerate((q_weight, k_weight)):
        y = F.rms_norm(parts[n], (size,), weight.float(), 1e-6)
        re, im = y.unflatten(-1, (-1, 2)).unbind(-1)
        parts[n] = y * cos + torch.stack([-im, re], -1).flatten(-2) * sin
    return [part.bfloat16() for part in parts]


def qk_rope(txt, img, txt_bias, img_bias, txt_q, txt_k, img_q, img_k, cos, sin, heads, values):
    size, text = img_q.shape[0], 0 if txt is None else txt.shape[0]
    rows = text + img.shape[0]
    sources = [] if txt is None else [(txt, txt_bias, txt_q, txt_k, 0)]
    sources.append((img, img_bias, img_q, img_k, text))
    if not img.is_cuda:
        made = [plain_rope(x, b, q, k, cos, sin, heads, at) for x, b, q, k, at in sources]
        q, k, v = (torch.cat(parts).contiguous() for parts in zip(*made, strict=True))
        return q, k, v if values else v[:0].clone()
    q, k, v = (torch.empty(n, heads, size, dtype=torch.bfloat16, device=img.device)
               for n in (rows, rows, rows if values else 0))
    assert cos.is_contiguous() and sin.is_contiguous() and cos.dtype == torch.float32 and heads % 8 == 0
    for x, b, wq, wk, at in sources:
        assert x.stride(1) == 1
        qk_rope_kernel[(x.shape[0], 3 if values else 2)](
            x, x if b is None else b, wq, wk, cos, sin, q, k, v if values else q, x.stride(0), at,
            HAS_BIAS=b is not None, HEADS=heads, CHUNK=8, D=size, num_warps=WARPS["rope"])
    return q, k, v


def linear_gelu(x, weight, bias):
    if not x.is_cuda:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


LIB = torch.library.Library("cand", "DEF")
LIB.define("gelu_quant(Tensor? attn, Tensor mlp, Tensor? bias) -> (Tensor, Tensor)")
LIB.define("norm_quant(Tensor x, Tensor factor, Tensor shift) -> (Tensor, Tensor)")
LIB.define("qk_rope(Tensor? txt, Tensor img, Tensor? txt_bias, Tensor? img_bias, Tensor txt_q, Tensor txt_k, "
           "Tensor img_q, Tensor img_k, Tensor cos, Tensor sin, int heads, bool values) -> (Tensor, Tensor, Tensor)")
LIB.define("linear_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor")
for _function in (gelu_quant, norm_quant, qk_rope, linear_gelu):
    LIB.impl(_function.__name__, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("cand::gelu_quant", lib=LIB)
def _(attn, mlp, bias):
    width = mlp.shape[1] + (0 if attn is None else attn.shape[1])
    return mlp.new_empty((mlp.shape[0], width), dtype=E4M3), mlp.new_empty((mlp.shape[0], 1), dtype=torch.float32)


@torch.library.register_fake("cand::norm_quant", lib=LIB)
def _(x, factor, shift):
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@torch.library.register_fake("cand::qk_rope", lib=LIB)
def _(txt, img, txt_bias, img_bias, txt_q, txt_k, img_q, img_k, cos, sin, heads, values):
    rows, size = img.shape[0] + (0 if txt is None else txt.shape[0]), img_q.shape[0]
    made = [img.new_empty((n, heads, size), dtype=torch.bfloat16) for n in (rows, rows, rows if values else 0)]
    return made[0], made[1], made[2]


@torch.library.register_fake("cand::linear_gelu", lib=LIB)
def _(x, weight, bias):
    return x.new_empty((x.shape[0], weight.shape[0]))
