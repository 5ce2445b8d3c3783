"""Which candidates make a step faster: A/B on a reduced FLUX of full width.  Writes JSON lines.

PYTHONPATH=. python3 bench/candidates/candidates.py --out FILE.jsonl --seconds 200        (--small: on a CPU, to try it)
"""
import time

BEGUN = time.perf_counter()
import argparse, contextlib, copy, faulthandler, io, json, os, platform, shutil, sys, tempfile, threading, traceback, types
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))
parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--seconds", type=float, default=200)
parser.add_argument("--small", action="store_true")
parser.add_argument("--only", nargs="+", help="names of experiments, or their first letters")
OPTIONS = parser.parse_args()
CACHE = tempfile.mkdtemp(prefix="candidates-")
os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"] = CACHE, CACHE + "/triton"
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = os.environ.get("TORCHINDUCTOR_AUTOGRAD_CACHE", "1")
SMALL = OPTIONS.small
LOCK, FILE = threading.Lock(), OPTIONS.out.open("a")
CURRENT = ["imports"]


def left():
    return OPTIONS.seconds - (time.perf_counter() - BEGUN)


def write(name, **values):
    with LOCK:
        line = {"name": name, "at_s": round(time.perf_counter() - BEGUN, 2), **values}
        FILE.write(json.dumps(line, default=str) + "\n")
        FILE.flush()
        os.fsync(FILE.fileno())
        print(json.dumps(line, default=str)[:400], flush=True)


def end():
    try:
        LOCK.acquire(timeout=2)
        FILE.write(json.dumps({"name": CURRENT[0], "error": "the time was up", "at_s": OPTIONS.seconds}) + "\n")
        FILE.flush()
        os.fsync(FILE.fileno())
        shutil.rmtree(CACHE, ignore_errors=True)
    finally:
        os._exit(3)


TIMER = threading.Timer(max(1.0, left()), end)
TIMER.daemon = True
TIMER.start()
faulthandler.dump_traceback_later(max(1.0, left()) + 10, exit=True)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

import candidate_kernels as hand
import diffusers, transformers
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from bench.gpu.context import Marks, relative_error
from bench.gpu.models import FULL, SMALL as TINY, T5, bfloat16_on, make_safety, make_transformer
from engine.acceleration import choose_attention, compiler_settings
from engine.architecture import is_block_linear
from engine.fp8 import Fp8Linear, quantize_rows
from engine.live import Live

CUDA = torch.cuda.is_available()
DEV = torch.device("cuda" if CUDA else "cpu")
if not CUDA and not SMALL:
    sys.exit("No CUDA device; --small tries it on a CPU.")
OPS = torch.ops.cand
# Full width, and a fifth of the depth: 4 + 8 of 19 + 38 blocks, the same ratio.
DOUBLES, SINGLES = (3, 3) if SMALL else (4, 8)
SCALE = 57 / (DOUBLES + SINGLES)
CONFIG = {"num_layers": DOUBLES, "num_single_layers": SINGLES}
if SMALL:
    CONFIG = TINY["transformer"] | CONFIG | {"num_attention_heads": 24, "attention_head_dim": 16}
TEXT, IMAGE, SIDE = (16, 64, 8) if SMALL else (512, 4096, 64)
ROWS = TEXT + IMAGE
torch._dynamo.config.recompile_limit = 64
torch._dynamo.config.accumulated_recompile_limit = 4096


def sync():
    if CUDA:
        torch.cuda.synchronize()


def wall(work):
    sync()
    start = time.perf_counter()
    work()
    sync()
    return time.perf_counter() - start


def us(*calls, rounds=5, reps=None):
    """Microseconds of a call, by events, the calls (on different buffers) in turn; median of rounds."""
    for call in calls:
        call()
    if not CUDA:
        return 1e6 * wall(calls[0])
    if reps is None:  # about 8 ms a round
        once = wall(lambda: [calls[0]() for _ in range(5)]) / 5
        reps = int(min(200, max(4, 8e-3 / max(once, 1e-6))))
    times = []
    for _ in range(rounds):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        for n in range(reps):
            calls[n % len(calls)]()
        b.record()
        b.synchronize()
        times.append(1e3 * a.elapsed_time(b) / reps)
    return round(median(times), 2)


def attempt(work):
    """A number, or what went wrong, where one line of a row may fail by itself."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]


def rand(*shape, scale=1.0):
    return scale * torch.randn(shape, device=DEV, dtype=torch.bfloat16)


# --------------------------------------------------------------------------------------------------- micro measurements
def sdpa():
    heads, size = (4, 16) if SMALL else (24, 128)
    n = ROWS
    sets = 2
    made = {}
    seen = [rand(3, 1, n, heads, size) for _ in range(sets)]
    made["transposed"] = [[x.transpose(1, 2) for x in it] for it in seen]
    made["contiguous"] = [[x.transpose(1, 2).contiguous() for x in it] for it in seen]
    fused = [rand(1, n, 3, heads, size) for _ in range(sets)]
    made["views_of_qkv"] = [[x.transpose(1, 2) for x in it.unbind(2)] for it in fused]
    wide = [rand(1, n, 7 * heads * size) for _ in range(sets)]
    made["views_of_qkv_mlp"] = [
        [x.transpose(1, 2) for x in it[..., : 3 * heads * size].unflatten(-1, (3, heads, size)).unbind(2)] for it in wide]
    kernels = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION} if CUDA else {"math": SDPBackend.MATH}
    values = {}
    for name, kernel in kernels.items():
        with sdpa_kernel([kernel]):
            for layout, inputs in made.items():
                def run(q, k, v):
                    y = F.scaled_dot_product_attention(q, k, v)
                    return y
                values[f"{name}_{layout}_us"] = attempt(lambda: us(*[partial(run, *it) for it in inputs]))
                values[f"{name}_{layout}_out_flat"] = attempt(lambda: run(*inputs[0]).transpose(1, 2).is_contiguous())
    return values


def products():
    """Each linear layer alone, in the shapes of a step, against what would stand in its place."""
    d = 384 if SMALL else 3072
    values = {}
    gen = torch.Generator(DEV).manual_seed(0)

    def layer(n, k):
        return torch.randn(n, k, device=DEV, generator=gen).bfloat16() / k**0.5, rand(n)

    for rows, tag in ((ROWS, "joint"), (IMAGE, "image"), (TEXT, "text")):
        x = [rand(rows, d) for _ in range(2)]
        for times in (1, 3, 4, 7):
            w, b = layer(times * d, d)
            values[f"bf16_{tag}_{times}d_us"] = us(*[partial(F.linear, it, w, b) for it in x])
            if times == 4:
                gelu = [partial(torch._addmm_activation, b, it, w.t(), use_gelu=True) for it in x]
                values[f"bf16_{tag}_4d_gelu_epilogue_us"] = us(*gelu)
                values[f"bf16_{tag}_gelu_epilogue_error"] = relative_error(
                    gelu[0](), F.gelu(F.linear(x[0], w, b), approximate="tanh"))
            if CUDA:
                q = [quantize_rows(it) for it in x]
                v, s = quantize_rows(w)
                mm = [partial(torch._scaled_mm, a, v.t(), c, s.t(), out_dtype=torch.bfloat16, use_fast_accum=True) for a, c in q]
                values[f"fp8_{tag}_{times}d_us"] = us(*mm)
                values[f"fp8_{tag}_{times}d_bias_us"] = attempt(lambda: us(*[partial(it, bias=b) for it in mm]))
        if tag == "joint":
            w, b = layer(d, 5 * d)
            wide, h = rand(rows, 5 * d), rand(rows, 4 * d)
            values["bf16_joint_out_5d_us"] = us(partial(F.linear, wide, w, b))
            values["bf16_joint_out_split_us"] = us(
                lambda: torch.addmm(torch.addmm(b, x[0], w[:, :d].t()), h, w[:, d:].t()))
            values["bf16_cat_5d_us"] = us(lambda: torch.cat([x[0], h], 1))
    return values


def modulation():
    """The norm linears of a step, one timestep at a time; and the table for a whole schedule."""
    d = 384 if SMALL else 3072
    w = [[rand(n * d, d, scale=0.02), rand(n * d)] for n in [6] * (2 * DOUBLES) + [3] * SINGLES]
    bytes_ = sum(it.nbytes for it, _ in w)
    values = {"weights_gb_full": SCALE * bytes_ / 1e9}
    for steps in (1, 4, 28, 50):
        temb = rand(steps, d)
        out = us(lambda: [F.linear(F.silu(temb), a, b) for a, b in w], reps=6)
        values[f"{steps}_timesteps_ms_full"] = SCALE * out / 1e3
    values["gb_per_s_one"] = bytes_ / 1e6 / (values["1_timesteps_ms_full"] / SCALE) if CUDA else 0
    total = int(SCALE * sum(len(a) for a, _ in w))
    table, row = rand(28, total), rand(1, total)
    values["copy_of_a_row_us"] = us(lambda: row.copy_(table[7:8]))
    values["table_mb_28"] = table.nbytes / 1e6
    return values


def hand_kernels():
    """Hand-written kernels alone; their results against torch's."""
    d, heads = (384, 24) if SMALL else (3072, 24)
    size = d // heads
    values = {}
    mlp, attn, bias = [rand(ROWS, 4 * d) for _ in range(3)], [rand(ROWS, d) for _ in range(3)], rand(4 * d)
    wide = [rand(ROWS, 7 * d) for _ in range(2)]
    factor, shift = rand(d, scale=0.3), rand(d, scale=0.3)
    norms = [1 + rand(size, scale=0.1) for _ in range(2)]
    angle = torch.rand(ROWS, size // 2, device=DEV) * 6
    cos, sin = (f(angle).repeat_interleave(2, 1).contiguous() for f in (torch.cos, torch.sin))

    def dequantized(pair):
        return pair[0].float() * pair[1]

    checks = {
        "gelu_quant_joint": (hand.gelu_quant(attn[0], mlp[0], bias), hand.plain_gelu_quant(attn[0], mlp[0], bias)),
        "gelu_quant_strided": (hand.gelu_quant(attn[0], wide[0][:, 3 * d :], bias),
                               hand.plain_gelu_quant(attn[0], wide[0][:, 3 * d :], bias)),
        "gelu_quant_alone": (hand.gelu_quant(None, mlp[0], None), hand.plain_gelu_quant(None, mlp[0], None)),
        "norm_quant": (hand.norm_quant(attn[0], factor, shift), hand.plain_norm_quant(attn[0], factor, shift)),
    }
    for name, (ours, theirs) in checks.items():
        values[f"{name}_error"] = relative_error(dequantized(ours), dequantized(theirs))
    for name, b in (("bias", rand(7 * d)), ("no_bias", None)):
        q, k, v = hand.qk_rope(None, wide[0], None, b, *norms, *norms, cos, sin, heads, True)
        theirs = hand.plain_rope(wide[0], b, *norms, cos, sin, heads, 0)
        values[f"qk_rope_{name}_errors"] = [relative_error(a, c) for a, c in zip((q, k, v), theirs, strict=True)]
    for warps in (4, 8, 16) if CUDA else (8,):
        hand.WARPS["gelu"] = warps
        values[f"gelu_quant_joint_{warps}w_us"] = us(*[partial(hand.gelu_quant, a, m, bias) for a, m in zip(attn, mlp)])
        values[f"gelu_quant_alone_{warps}w_us"] = us(*[partial(hand.gelu_quant, None, m, bias) for m in mlp])
    for warps in (2, 4, 8) if CUDA else (4,):
        hand.WARPS["norm"] = hand.WARPS["rope"] = warps
        values[f"norm_quant_{warps}w_us"] = us(*[partial(hand.norm_quant, a, factor, shift) for a in attn])
        values[f"qk_rope_{warps}w_us"] = us(
            *[partial(hand.qk_rope, None, w, None, None, *norms, *norms, cos, sin, heads, False) for w in wide])
        values[f"qkv_rope_bias_{warps}w_us"] = us(
            *[partial(hand.qk_rope, None, w, None, bias, *norms, *norms, cos, sin, heads, True) for w in wide])
    if CUDA:
        def best(stem, options):
            return min(options, key=lambda w: values[f"{stem}_{w}w_us"])
        hand.WARPS |= {"gelu": best("gelu_quant_joint", (4, 8, 16)), "norm": best("norm_quant", (2, 4, 8)),
                       "rope": best("qk_rope", (2, 4, 8))}
    return values | {"warps": dict(hand.WARPS)}


def inductor_kernels():
    """What inductor makes of the same, standing alone: static sizes."""
    d = 384 if SMALL else 3072
    mlp, attn, bias = [rand(ROWS, 4 * d) for _ in range(3)], [rand(ROWS, d) for _ in range(3)], rand(4 * d)
    factor, shift = rand(d, scale=0.3), rand(d, scale=0.3)

    def gelu_quant(m):
        return quantize_rows(F.gelu(m + bias, approximate="tanh"))

    def cat_gelu_quant(a, m):
        return quantize_rows(torch.cat([a, F.gelu(m + bias, approximate="tanh")], 1))

    def norm_quant(a):
        return quantize_rows(F.layer_norm(a, (d,), eps=1e-6) * (1 + factor) + shift)

    values = {}
    for function, inputs in ((gelu_quant, zip(mlp)), (cat_gelu_quant, zip(attn, mlp)), (norm_quant, zip(attn))):
        compiled = torch.compile(function, dynamic=False, fullgraph=True)
        calls = [partial(compiled, *it) for it in inputs]
        values[f"{function.__name__}_compile_s"] = round(wall(calls[0]), 2)
        values[f"{function.__name__}_us"] = us(*calls)
        values[f"{function.__name__}_kernels"] = attempt(lambda: top(calls[0], 6))
    return values


def top(work, count):
    """The kernels of some work that take most of its time: [name, milliseconds, calls]."""
    if not CUDA:
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        work()
        sync()
    events = sorted(recorded.key_averages(), key=lambda it: -it.self_device_time_total)
    return [[it.key[:110], round(it.self_device_time_total / 1e3, 4), it.count] for it in events[:count]]


def rope():
    """What a step spends before and after its blocks, in eager code: RoPE's tables, embeddings."""
    model = PRISTINE
    ids = torch.zeros(ROWS, 3, device=DEV)
    ids[TEXT:, 1] = torch.arange(IMAGE, device=DEV) // SIDE
    ids[TEXT:, 2] = torch.arange(IMAGE, device=DEV) % SIDE
    pooled, t = rand(1, model.config.pooled_projection_dim), torch.full((1,), 500.0, device=DEV)
    noise, words = rand(1, IMAGE, 64 if not SMALL else model.config.in_channels), rand(1, TEXT, model.config.joint_attention_dim)
    out = rand(1, IMAGE, model.inner_dim)
    temb = model.time_text_embed(t, t, pooled)
    calls = {
        "pos_embed": lambda: model.pos_embed(ids),
        "time_text_embed": lambda: model.time_text_embed(t, t, pooled),
        "embedders": lambda: (model.x_embedder(noise), model.context_embedder(words)),
        "norm_out_proj_out": lambda: model.proj_out(model.norm_out(out, temb)),
    }
    values = {}
    for name, call in calls.items():
        values[f"{name}_us"] = us(call)  # by events: waits of the device for the processor included
        start = time.perf_counter()
        for _ in range(20):
            call()
        values[f"{name}_host_us"] = round(1e6 * (time.perf_counter() - start) / 20, 1)
        sync()
        recorded = attempt(lambda: top(call, 100))
        values[f"{name}_kernels_us"] = round(1e3 * sum(it[1] for it in recorded), 1) if isinstance(recorded, list) else recorded
        values[f"{name}_launches"] = sum(it[2] for it in recorded) if isinstance(recorded, list) else 0
    return values


def webp():
    """Encoding a picture: a thousand shapes, soft light, and grain, which is about what a photograph has."""
    side = 256 if SMALL else 1024
    gen = np.random.default_rng(0)
    total = np.zeros((side, side, 3), np.float32)
    cells = 4
    while cells <= side:  # 1 / f noise in octaves
        small = Image.fromarray(gen.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += (np.asarray(small.resize((side, side), Image.BICUBIC), np.float32) - 127.5) * (1.6 / (cells / 4) ** 0.9)
        cells *= 2
    total += gen.normal(0, 2.0, total.shape)
    picture = Image.fromarray(np.clip(total + 127.5, 0, 255).astype(np.uint8))
    values = {"pillow": __import__("PIL").__version__, "webp": attempt(lambda: __import__("PIL.features", fromlist=["x"]).version("webp"))}
    exact = np.asarray(picture, np.float32)
    for name, how in {f"webp_m{m}": {"format": "WEBP", "quality": 80, "method": m} for m in (4, 0, 1, 2, 3, 5, 6)} .items():
        if name in ("webp_m5", "webp_m6") and SMALL:
            continue
        times = []
        for _ in range(3 if how["method"] < 5 else 1):
            buffer = io.BytesIO()
            start = time.perf_counter()
            picture.save(buffer, **how)
            times.append(time.perf_counter() - start)
        error = np.asarray(Image.open(buffer).convert("RGB"), np.float32) - exact
        values[name] = {"ms": round(1e3 * min(times), 1), "bytes": buffer.tell(), "psnr": round(float(10 * np.log10(255**2 / (error**2).mean())), 2)}
    for name, how in {"jpg_80": {"format": "JPEG", "quality": 80}, "png": {"format": "PNG"}}.items():
        buffer = io.BytesIO()
        start = time.perf_counter()
        picture.save(buffer, **how)
        values[name] = {"ms": round(1e3 * (time.perf_counter() - start), 1), "bytes": buffer.tell()}
    return values


@torch.inference_mode()
def safety():
    sizes = {k: (TINY if SMALL else FULL)[k] for k in ("checker", "classifier")}
    start = time.perf_counter()
    checker = make_safety(DEV, sizes)
    sync()
    values = {"make_s": round(time.perf_counter() - start, 2), "batch": checker._batch}
    side = 256 if SMALL else 1024
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))

    def ms(work, n=3):
        work()
        return round(1e3 * median(wall(work) for _ in range(n)), 2)

    values["whole_ms"] = ms(lambda: checker.check([picture]))
    pixels = {}
    for name, model, processor in (("checker", checker._checker, checker._checker_processor),
                                   ("classifier", checker._classifier, checker._classifier_processor)):
        values[f"{name}_processor_ms"] = ms(lambda: processor([picture], return_tensors="pt").pixel_values)
        values[f"{name}_pixels_ms"] = ms(lambda: checker._pixels(processor, model, [picture]))
        pixels[name] = checker._pixels(processor, model, [picture])
        values[f"{name}_resize"] = str(getattr(processor, "size", None)) + str(getattr(processor, "resample", None))
    vision = checker._checker.vision_model
    runs = {"checker": vision, "classifier": checker._classifier}
    for name, model in runs.items():
        values[f"{name}_model_ms"] = ms(lambda: model(pixels[name]))
        values[f"{name}_model_one_ms"] = ms(lambda: model(pixels[name][:1]))
        if CUDA:
            torch.backends.cuda.matmul.allow_tf32 = True
            values[f"{name}_model_tf32_ms"] = ms(lambda: model(pixels[name]))
            torch.backends.cuda.matmul.allow_tf32 = False
    for size, how in (((224, 224), Image.BICUBIC), ((224, 224), Image.BILINEAR)):
        values[f"pil_resize_{int(how)}_ms"] = ms(lambda: picture.resize(size, how))
    for name, model in runs.items():
        model.bfloat16()
        values[f"{name}_model_bf16_ms"] = attempt(lambda: ms(lambda: model(pixels[name].bfloat16())))
    return values


@torch.no_grad()
def t5_graph():
    """T5 as a CUDA graph of eager code; late, since a capture that fails can spoil torch's random numbers."""
    if not CUDA:
        return {"skipped": "needs CUDA"}
    call = T5_CALL[0]
    exact = call()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    start = time.perf_counter()
    with torch.cuda.graph(graph):
        out = call()
    took = time.perf_counter() - start
    graph.replay()
    times = [wall(graph.replay) for _ in range(8)]
    return {"graph_ms": round(1e3 * median(times), 2), "capture_s": round(took, 3), "error": relative_error(out, exact)}


T5_CALL = []


@torch.no_grad()
def t5():
    """T5 over 512 tokens: eager, as a CUDA graph, its blocks compiled."""
    from transformers import T5Config, T5EncoderModel

    sizes = (TINY if SMALL else FULL)["t5"]
    with bfloat16_on(DEV):
        model = T5EncoderModel(T5Config(**T5 | sizes)).eval().requires_grad_(False)
    tokens = torch.randint(0, sizes["vocab_size"], (1, 32 if SMALL else 512), device=DEV)
    values = {}

    def call():
        return model(tokens, output_hidden_states=False)[0]

    def ms(work):
        work()
        return round(1e3 * median(wall(work) for _ in range(6)), 2)

    exact = call()
    values["eager_ms"] = ms(call)
    values["eager_host_ms"] = None
    start = time.perf_counter()
    for _ in range(3):
        call()
    values["eager_host_ms"] = round(1e3 * (time.perf_counter() - start) / 3, 2)
    sync()
    T5_CALL.append(call)
    values["eager_kernels_ms"] = attempt(lambda: round(sum(it[1] for it in top(call, 10**6)), 2))
    values["eager_top"] = attempt(lambda: top(call, 8))
    write("T5, eager", **values)
    need = 25 if CUDA else 0
    if left() < need:
        return values | {"compiled": f"skipped, {left():.0f} s left"}
    for block in model.encoder.block:
        arguments = {"backend": os.environ["CANDIDATES_BACKEND"]} if os.environ.get("CANDIDATES_BACKEND") else {}
        block.compile(dynamic=False, **arguments)
    before = counters["stats"]["unique_graphs"]
    values["compile_s"] = round(wall(call), 2)
    values["compiled_ms"] = ms(call)
    values["compiled_error"] = relative_error(call(), exact)
    values["graphs"] = counters["stats"]["unique_graphs"] - before
    values["compiled_top"] = attempt(lambda: top(call, 8))
    for block in model.encoder.block:
        block._compiled_call_impl = None  # eager again
    return values


# ------------------------------------------------------------------------------------------------- blocks made otherwise
def scaled(layer, values, scale):
    return torch._scaled_mm(values, layer.weight.t(), scale, layer.scale.t(), out_dtype=torch.bfloat16,
                            use_fast_accum=values.is_cuda)


def modulated(f, norm, x, factor, shift, *layers):
    """Norm, modulation and products over it: [rows, N] each; without their biases where `hand`."""
    width = x.shape[-1]
    if f.hand:
        values, scale = OPS.norm_quant(x.reshape(-1, width), factor.reshape(-1), shift.reshape(-1))
        return [scaled(layer, values, scale) for layer in layers]
    y = norm(x) * (1 + factor[:, None]) + shift[:, None]
    return [layer(y).view(-1, layer.weight.shape[0]) for layer in layers]


def turned(x, rope):
    cos, sin = (it[None, :, None, :] for it in rope)
    re, im = x.unflatten(-1, (-1, 2)).unbind(-1)
    return (x.float() * cos + torch.stack([-im, re], -1).flatten(-2).float() * sin).to(x.dtype)


def attend(f, attn, txt, img, txt_bias, img_bias, rope):
    """[rows, 3 x inner] of text (None in single blocks) and image -> [1, rows, inner]; biases that are still to be added."""
    heads, size = attn.heads, attn.head_dim
    inner = heads * size
    txt_norms = (attn.norm_q, attn.norm_k) if txt is None else (attn.norm_added_q, attn.norm_added_k)
    if f.rope:
        values = txt is not None or img_bias is not None
        q, k, v = OPS.qk_rope(txt, img, txt_bias, img_bias, txt_norms[0].weight, txt_norms[1].weight,
                              attn.norm_q.weight, attn.norm_k.weight, rope[0], rope[1], heads, values)
        if not values:
            v = img[:, 2 * inner : 3 * inner].unflatten(-1, (heads, size))
        q, k, v = q[None], k[None], v[None]
    else:
        def split(x, bias, norms):
            x = x[:, : 3 * inner]
            x = x if bias is None else x + bias[: 3 * inner]
            q, k, v = x.unflatten(-1, (3, heads, size))[None].unbind(2)
            return norms[0](q), norms[1](k), v
        q, k, v = split(img, img_bias, (attn.norm_q, attn.norm_k))
        if txt is not None:
            q, k, v = (torch.cat([a, b], 1) for a, b in zip(split(txt, txt_bias, txt_norms), (q, k, v)))
        q, k = turned(q, rope), turned(k, rope)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return y.transpose(1, 2).flatten(2)


def feed_forward(f, ff, norm, x, factor, shift):
    first, second = ff.net[0].proj, ff.net[2]
    if f.hand:
        (h,) = modulated(f, norm, x, factor, shift, first)
        values, scale = OPS.gelu_quant(None, h, first.bias)
        return (scaled(second, values, scale) + second.bias)[None]
    if f.gelu:
        y = norm(x) * (1 + factor[:, None]) + shift[:, None]
        return second(OPS.linear_gelu(y.view(-1, y.shape[-1]), first.weight, first.bias))[None]
    (h,) = modulated(f, norm, x, factor, shift, first)
    return second(F.gelu(h, approximate="tanh"))[None]


def my_double(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
    f, attn, img, txt = self.f, self.attn, hidden_states, encoder_hidden_states
    mods = [n.linear(n.silu(temb)).chunk(6, dim=1) for n in (self.norm1, self.norm1_context)]
    (a, b, gate, c, d, gate2), (ta, tb, tgate, tc, td, tgate2) = mods
    (x,) = modulated(f, self.norm1.norm, img, b, a, attn.to_qkv)
    (t,) = modulated(f, self.norm1_context.norm, txt, tb, ta, attn.to_added_qkv)
    biases = (attn.to_added_qkv.bias, attn.to_qkv.bias) if f.hand else (None, None)
    y = attend(f, attn, t, x, *biases, image_rotary_emb)
    text = txt.shape[1]
    img = img + gate[:, None] * attn.to_out[0](y[:, text:])
    txt = txt + tgate[:, None] * attn.to_add_out(y[:, :text])
    img = img + gate2[:, None] * feed_forward(f, self.ff, self.norm2, img, d, c)
    txt = txt + tgate2[:, None] * feed_forward(f, self.ff_context, self.norm2_context, txt, td, tc)
    return txt, img


def my_single(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
    """Text and image in one tensor, which is where single blocks want them: no cat, no split."""
    f, x, attn = self.f, hidden_states, self.attn
    shift, factor, gate = self.norm.linear(self.norm.silu(temb)).chunk(3, dim=1)
    inner = attn.heads * attn.head_dim
    qkv_bias, mlp_bias = None, None
    if f.mlp:
        (qkv,) = modulated(f, self.norm.norm, x, factor, shift, self.to_all)
        mlp = qkv[:, 3 * inner :]
        if f.hand:
            qkv_bias, mlp_bias = self.to_all.bias[: 3 * inner], self.to_all.bias[3 * inner :]
    elif f.gelu:
        y = self.norm.norm(x) * (1 + factor[:, None]) + shift[:, None]
        y = y.view(-1, y.shape[-1])
        qkv = attn.to_qkv(y)
        mlp = OPS.linear_gelu(y, self.proj_mlp.weight, self.proj_mlp.bias)
    else:
        qkv, mlp = modulated(f, self.norm.norm, x, factor, shift, attn.to_qkv, self.proj_mlp)
        if f.hand:
            qkv_bias, mlp_bias = attn.to_qkv.bias, self.proj_mlp.bias
    y = attend(f, attn, None, qkv, None, qkv_bias, image_rotary_emb)[0]
    out = self.proj_out
    if f.hand:
        values, scale = OPS.gelu_quant(y, mlp, mlp_bias)
        z = scaled(out, values, scale) + out.bias
    elif f.gelu:
        z = torch.addmm(torch.addmm(out.bias, y, out.weight[:, :inner].t()), mlp, out.weight[:, inner:].t())
    else:
        z = out(torch.cat([y, F.gelu(mlp, approximate="tanh")], 1))
    return None, x + gate[:, None] * z[None]


def joined(*layers):
    """One linear layer for several over the same input."""
    first = layers[0]
    bias = nn.Parameter(torch.cat([it.bias.data for it in layers]), requires_grad=False)
    new = nn.utils.skip_init(nn.Linear, first.weight.shape[1], len(bias), device="meta", dtype=torch.bfloat16)
    if isinstance(first, Fp8Linear):
        made = copy.copy(first)
        made._buffers, made._parameters = dict(first._buffers), dict(first._parameters)
        made.weight = torch.cat([it.weight.view(torch.uint8) for it in layers]).view(first.weight.dtype)
        made.scale = torch.cat([it.scale for it in layers])
        made.bias = bias
        return made
    new.weight = nn.Parameter(torch.cat([it.weight.data for it in layers]), requires_grad=False)
    new.bias = bias
    return new


class Row(nn.Module):
    """Stands for a norm's linear layer: its result of this timestep, which lies at a fixed address."""

    def __init__(self, row):
        super().__init__()
        self.register_buffer("row", row)

    def forward(self, _):
        return self.row


class Variant:
    """Blocks that share the weights of others, but compute in another way, in code of their own."""

    made = 0

    def __init__(self, base, flags=(), dynamic=False, modulation=False, options=None):
        f = types.SimpleNamespace(**{name: name in flags for name in ("qkv", "mlp", "gelu", "hand", "rope")})
        mine = bool(set(flags) - {"qkv"})
        memo = {id(it): it for block in base for it in (*block.parameters(), *block.buffers())}
        self.blocks = [copy.deepcopy(block, memo) for block in base]
        self.joint, self.row, self.linears, classes = mine, None, [], {}
        for block in self.blocks:
            single, attn = isinstance(block, FluxSingleTransformerBlock), block.attn
            if flags:
                if single and f.mlp:
                    block.to_all = joined(attn.to_q, attn.to_k, attn.to_v, block.proj_mlp)
                else:
                    attn.to_qkv = joined(attn.to_q, attn.to_k, attn.to_v)
                if not single:
                    attn.to_added_qkv = joined(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
                attn.fused_projections = True
            if modulation:
                self.linears += [(block.norm, "linear")] if single else [(block.norm1, "linear"), (block.norm1_context, "linear")]
            kind = type(block)
            if kind not in classes:  # code of their own, hence graphs of their own
                source = kind.forward if not mine else my_single if single else my_double
                code = source.__code__.replace(co_name="forward", co_firstlineno=10_000 * (1 + Variant.made) + 1 + len(classes))
                forward = types.FunctionType(code, source.__globals__, "forward", source.__defaults__, source.__closure__)
                classes[kind] = type(f"{kind.__name__}{Variant.made}", (kind,), {"forward": forward, "f": f})
            block.__class__ = classes[kind]
        Variant.made += 1
        if modulation:
            self.built = [norm.linear for norm, _ in self.linears]
            widths = [len(it.bias) for it in self.built]
            self.row = torch.empty(1, sum(widths), device=DEV, dtype=torch.bfloat16)
            self.table = torch.cat([it(F.silu(INPUT.tembs)) for it in self.built], 1)
            parts = self.row.split(widths, dim=1)
            for (norm, name), part in zip(self.linears, parts, strict=True):
                setattr(norm, name, Row(part))
        arguments = {"fullgraph": True, "dynamic": dynamic} | ({"options": options} if options else {})
        if os.environ.get("CANDIDATES_BACKEND"):  # to try the script quickly
            arguments = {"fullgraph": True, "dynamic": dynamic, "backend": os.environ["CANDIDATES_BACKEND"]}
        for block in self.blocks:
            block.compile(**arguments)

    def step(self, number=0):
        if self.row is not None:
            self.row.copy_(self.table[number : number + 1])
        temb = INPUT.tembs[number : number + 1]
        img, txt = INPUT.img, INPUT.txt
        for block in self.blocks[:DOUBLES]:
            txt, img = block(hidden_states=img, encoder_hidden_states=txt, temb=temb, image_rotary_emb=INPUT.rope)
        x = torch.cat([txt, img], 1)
        if not self.joint:
            txt, img = x[:, :TEXT], x[:, TEXT:]
        for block in self.blocks[DOUBLES:]:
            if self.joint:
                x = block(hidden_states=x, encoder_hidden_states=None, temb=temb, image_rotary_emb=INPUT.rope)[1]
            else:
                txt, img = block(hidden_states=img, encoder_hidden_states=txt, temb=temb, image_rotary_emb=INPUT.rope)
        return x[:, TEXT:] if self.joint else img


class Input:
    """What blocks are given."""

    def __init__(self, model):
        torch.manual_seed(1)
        ids = torch.zeros(ROWS, 3, device=DEV)
        ids[TEXT:, 1] = torch.arange(IMAGE, device=DEV) // SIDE
        ids[TEXT:, 2] = torch.arange(IMAGE, device=DEV) % SIDE
        self.rope = tuple(it.contiguous() for it in model.pos_embed(ids))
        t = torch.linspace(1000, 30, 28, device=DEV)
        self.tembs = model.time_text_embed(t, torch.full_like(t, 3500.0), rand(1, model.config.pooled_projection_dim).expand(28, -1))
        self.img, self.txt = rand(1, IMAGE, model.inner_dim), rand(1, TEXT, model.inner_dim)


def steps(variant, count=8):
    """Milliseconds of each step but the first two, one queued behind the other; and of the host to queue one."""
    marks = Marks(DEV)
    start = time.perf_counter()
    for n in range(count):
        variant.step(n % 28)
        marks()
    host = 1e3 * (time.perf_counter() - start) / count
    return [1e3 * it for it in marks.seconds()][1:], host


BASES, MADE, COST = {}, {}, {"static": 12.0, "dynamic": 24.0}
SPENT = {}
OUT = {}


def base(precision):
    if precision not in BASES:
        source = PRISTINE
        if precision == "fp8":
            live = Live(make_transformer(DEV, CONFIG), {"dev": dict(PRISTINE.state_dict())}).quantized(is_block_linear)
            live.hold("dev", [])
            source = live.module
            source.set_attention_backend("native")
        BASES[precision] = [*source.transformer_blocks, *source.single_transformer_blocks]
    return BASES[precision]


def variant(precision, name, profile=False, **how):
    """Make, compile and time one; against the product's way of the same precision, in turn."""
    values = {}
    made = Variant(base(precision), **how)
    dynamic = how.get("dynamic", False)
    before, kept = counters["stats"]["unique_graphs"], {}
    values["compile_s"] = round(wall(lambda: kept.update(y=made.step())), 2)
    # A pass without compiling, on the same object, tells what of it was the step.
    values["graphs"] = counters["stats"]["unique_graphs"] - before
    values["second_s"] = round(wall(made.step), 3)
    values["graphs_after"] = counters["stats"]["unique_graphs"] - before
    kind = "dynamic" if dynamic else "static"
    if "options" not in how:
        SPENT.setdefault(kind, []).append(values["compile_s"] + 4)
        COST[kind] = max(SPENT[kind][1:] or SPENT[kind])
    out = kept["y"].float()
    key = (precision, "product")
    if how.get("dynamic"):
        MADE[precision], OUT[precision] = made, out
    else:
        write(f"{precision}, {name}: compiled", **values)
    if precision in OUT:
        values["error"] = relative_error(out, OUT[precision], INPUT.img.float())
    if "bf16" in OUT and precision == "fp8":
        values["error_against_bf16"] = relative_error(out, OUT["bf16"], INPUT.img.float())
    if not out.isfinite().all():
        values["not_finite"] = True
    turns = {"product": MADE.get(precision), "candidate": made}
    times, hosts = {it: [] for it in turns}, {it: [] for it in turns}
    for _ in range(1 if SMALL else 3):
        for it, each in turns.items():
            if each is not None and not (it == "product" and each is made):
                got, host = steps(each, 3 if SMALL else 11)
                times[it] += got
                hosts[it].append(host)
    for it in turns:
        if times[it]:
            values[f"{it}_ms"] = round(median(times[it]), 4)
            values[f"{it}_least_ms"] = round(min(times[it]), 4)
            values[f"{it}_host_ms"] = round(median(hosts[it]), 3)
    values["candidate_full_ms"] = round(SCALE * values["candidate_ms"], 2)
    if "product_ms" in values:
        values["saves_full_ms"] = round(SCALE * (values["product_ms"] - values["candidate_ms"]), 3)
        values["faster"] = round(values["product_ms"] / values["candidate_ms"] - 1, 4)
    if CUDA:
        values["clock_mhz"] = attempt(torch.cuda.clock_rate)
    write(f"{precision}, {name}", **values)
    if profile:
        write(f"{precision}, {name}: kernels", scale=SCALE, kernels=attempt(lambda: top(made.step, 22)))
    made.blocks = made.blocks if MADE.get(precision) is made else None
    return None


# ----------------------------------------------------------------------------------------------------------------- run
EXPERIMENTS = [  # name, seconds, work
    ("SDPA alone", 2, sdpa),
    ("products alone", 5, products),
    ("modulation alone", 2, modulation),
    ("hand kernels alone", 14, hand_kernels),
    ("RoPE and embeddings alone", 2, rope),
    ("webp", 4, webp),
    ("fp8, product (dynamic)", "dynamic", partial(variant, "fp8", "product (dynamic)", dynamic=True, profile=True)),
    ("fp8, all by hand", "static", partial(variant, "fp8", "all by hand", flags=("qkv", "mlp", "hand", "rope"), modulation=True, profile=True)),
    ("bf16, product (dynamic)", "dynamic", partial(variant, "bf16", "product (dynamic)", dynamic=True)),
    ("bf16, all", "static", partial(variant, "bf16", "all", flags=("qkv", "gelu", "rope"), modulation=True, profile=True)),
    ("bf16, static", "static", partial(variant, "bf16", "static")),
    ("fp8, static", "static", partial(variant, "fp8", "static", profile=True)),
    ("safety", 6, safety),
    ("T5", 14, t5),
    ("bf16, modulation", "static", partial(variant, "bf16", "modulation", modulation=True)),
    ("fp8, hand quantising, qkv", "static", partial(variant, "fp8", "hand quantising, qkv", flags=("qkv", "hand"))),
    ("fp8, qkv", "static", partial(variant, "fp8", "qkv", flags=("qkv",))),
    ("bf16, GELU epilogue, qkv", "static", partial(variant, "bf16", "GELU epilogue, qkv", flags=("qkv", "gelu"))),
    ("bf16, qkv", "static", partial(variant, "bf16", "qkv", flags=("qkv",))),
    ("bf16, qkv + mlp in one", "static", partial(variant, "bf16", "qkv + mlp in one", flags=("qkv", "mlp"))),
    ("inductor kernels alone", 12, inductor_kernels),
    ("fp8, hand RoPE, qkv", "static", partial(variant, "fp8", "hand RoPE, qkv", flags=("qkv", "rope"))),
    ("T5, CUDA graph", 3, t5_graph),
    ("fp8, coordinate descent", 40, partial(variant, "fp8", "coordinate descent", options={"coordinate_descent_tuning": True})),
    ("bf16, coordinate descent", 40, partial(variant, "bf16", "coordinate descent", options={"coordinate_descent_tuning": True})),
]


def describe():
    values = {"small": SMALL, "python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__,
              "transformers": transformers.__version__, "triton": getattr(hand.triton, "__version__", None), "cpus": os.cpu_count(),
              "blocks": [DOUBLES, SINGLES], "scale": SCALE, "rows": ROWS, "imports_s": round(time.perf_counter() - BEGUN, 1)}
    if CUDA:
        values |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
                   "cublaslt": attempt(lambda: torch._C._cuda_getCurrentBlasHandle and torch.version.cuda)}
    return values


def main():
    global PRISTINE, INPUT
    write("versions", **describe())

    def warm():  # the compiler's workers start while other things are measured
        from torch._inductor.async_compile import AsyncCompile

        AsyncCompile.warm_pool()
        return "started"

    if CUDA:
        write("compile workers", value=attempt(warm))
    CURRENT[0] = "models"
    torch.manual_seed(0)
    PRISTINE = make_transformer(DEV, CONFIG)
    with torch.no_grad():
        for it in PRISTINE.modules():  # norms of queries and keys that are not all ones
            if isinstance(it, nn.RMSNorm):
                it.weight.uniform_(0.8, 1.2)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        chosen = choose_attention([PRISTINE], DEV)
    PRISTINE.set_attention_backend(chosen)
    with torch.no_grad():
        INPUT = Input(PRISTINE)
        sync()
        write("models", attention=chosen, said=said.getvalue().strip(), cudnn=torch.backends.cuda.cudnn_sdp_enabled())
        with compiler_settings(16):
            for name, estimate, work in EXPERIMENTS:
                if OPTIONS.only and not any(name.startswith(it) for it in OPTIONS.only):
                    continue
                need = COST[estimate] if isinstance(estimate, str) else estimate
                if not SMALL and need + 2 > left():
                    write(name, skipped=f"it takes about {need:.0f} s, and {left():.0f} s are left")
                    continue
                CURRENT[0] = name
                start = time.perf_counter()
                try:
                    values = work()
                    took = round(time.perf_counter() - start, 2)
                    write(name if values else f"{name}: done", took_s=took, **(values or {}))
                except Exception as error:
                    lines = traceback.format_exc().strip().splitlines()
                    write(name, error=f"{type(error).__name__}: {error}"[:600], traceback=[it.strip()[:160] for it in lines[-14:]],
                          took_s=round(time.perf_counter() - start, 2))
                    del error
                if CUDA:
                    attempt(sync)
                    attempt(torch.cuda.empty_cache)
    write("end", seconds=round(time.perf_counter() - BEGUN, 1))
    TIMER.cancel()
    shutil.rmtree(CACHE, ignore_errors=True)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
