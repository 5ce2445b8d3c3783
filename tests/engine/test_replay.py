"""T5 and steps replayed are T5 and steps called, to the bit; what was not recorded runs as it was."""

import errno
import random
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import T5Config, T5EncoderModel

from engine.acceleration import COMPILE, compiler_settings
from engine.blocks import fuse
from engine.placement import GRAPHS as GRAPHS_BYTES
from engine.replay import FAILURES, GRAPHS, Record, Steps, cuda_graph, replay, replaying
from flux import TEXT_TOKENS, Flux
from request import LoraChoice, LoraFile, Request
from service.device_thread import CancelledError
from service.measure import Stopwatch
from settings import Settings
from tests.support import lora_files
from tests.support.models import POOLED, TEXT, transformer, write_models

CPU = torch.device("cpu")
# Torch's error when the host's memory is full, not the GPU's.
HOST_IS_FULL = [
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("can't start new thread"),
]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")


def make_t5() -> T5EncoderModel:
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval().requires_grad_(False)


def texts(length: int, count: int = 1) -> Tensor:
    return torch.randint(0, 64, (count, length))


class Recorder:
    """A graph's manners on a CPU: it reads and writes at fixed addresses, and counts how often."""

    def __init__(self) -> None:
        self.replays: Counter[int] = Counter()  # by length
        self.outputs: list[weakref.ref[Tensor]] = []

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        with torch.compiler.set_stance("fail_on_recompile"):  # as a recording does
            output = work()
        self.outputs.append(weakref.ref(output))

        def again() -> None:
            with torch.compiler.set_stance("fail_on_recompile"):
                output.copy_(work())
            self.replays[output.shape[1]] += 1

        return again, output


@torch.no_grad()
def test_each_length_is_replayed_and_keeps_the_bits() -> None:
    plain, t5, recorder = make_t5(), make_t5(), Recorder()
    replay(t5, (5, 9, 9), recorder)
    given = [texts(length) for length in (5, 9, 5, 9, 5)]
    results = [t5(ids, output_hidden_states=False)[0] for ids in given]
    assert recorder.replays == {5: 3, 9: 2}
    # Compared after all of them: a later replay overwrites no earlier result.
    for ids, result in zip(given, results, strict=True):
        assert torch.equal(result, plain(ids, output_hidden_states=False)[0])


@torch.no_grad()
def test_what_was_not_recorded_runs_as_it_was() -> None:
    plain, t5, recorder = make_t5(), make_t5(), Recorder()
    replay(t5, (5,), recorder)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    others = [
        ((texts(6),), {"output_hidden_states": False}),
        ((texts(5, 2),), {"output_hidden_states": False}),
        ((texts(5)[0, None, :4],), {}),
        ((texts(5),), {"output_hidden_states": True}),
        ((texts(5), mask), {"output_hidden_states": False}),
        ((texts(5),), {"output_hidden_states": False, "attention_mask": mask}),
        ((), {"inputs_embeds": torch.randn(1, 5, 16)}),
    ]
    for inputs, options in others:
        ours, theirs = t5(*inputs, **options), plain(*inputs, **options)
        assert ours.keys() == theirs.keys()
        assert torch.equal(ours[0], theirs[0])
    assert not recorder.replays


@torch.no_grad()
def test_where_recording_fails_t5_runs_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    plain, t5, ids = make_t5(), make_t5(), texts(5)
    replay(t5, (5,), fail)
    said = capsys.readouterr().out
    why = "RuntimeError: operation not permitted when stream is capturing"
    assert said == f"T5 is launched kernel by kernel, since a CUDA graph of it failed: {why}.\n"
    assert torch.equal(t5(ids, output_hidden_states=False)[0], plain(ids)[0])


def test_every_prompt_is_replayed(tmp_path: Path) -> None:
    flux = Flux.load(Settings(models=write_models(tmp_path), cache_dir=tmp_path / "cache"), CPU)
    t5, recorder = flux.components["text_encoder_2"], Recorder()

    def embeddings() -> list[Tensor]:
        flux._embeddings.clear()  # so that they are made anew
        requests = [Request(prompt=prompt, model=model) for model in TEXT_TOKENS for prompt in ("", "a fox " * 500)]
        return [flux.prepare(it, (), Stopwatch(CPU)).embeddings["prompt_embeds"] for it in requests]

    flux.components["tokenizer_2"].model_max_length = 300  # schnell reads fewer tokens than that
    before = embeddings()
    replay(t5, map(flux.text_tokens, TEXT_TOKENS), recorder)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(embeddings(), before, strict=True))
    assert recorder.replays == {300: 2, 256: 2}


# ---------------------------------------------------------------------------------------------------------------------
# Steps

MOST = 100  # bytes that graphs may keep


def pool(record: Record, kept: Callable[[], int] = lambda: 0) -> Callable[[], SimpleNamespace]:
    """A maker of pools that record with this function."""
    return lambda: SimpleNamespace(record=record, bytes=kept)


def inputs(text: int, image: int, number: int = 0, *, guidance: bool = True) -> dict[str, object]:
    """A transformer's arguments as diffusers' pipelines pass them."""
    generator = torch.Generator().manual_seed(number)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "hidden_states": random(1, image, 16),
        "timestep": torch.rand(1, generator=generator),
        "guidance": 5 * torch.rand(1, generator=generator) if guidance else None,
        "pooled_projections": random(1, POOLED),
        "encoder_hidden_states": random(1, text, TEXT),
        "txt_ids": torch.zeros(text, 3),
        "img_ids": torch.randint(0, 9, (image, 3), generator=generator).float(),
        "joint_attention_kwargs": {},
        "return_dict": False,
    }


def plain(module: FluxTransformer2DModel, given: dict[str, object]) -> Tensor:
    return FluxTransformer2DModel.forward(module, **given)[0]


@torch.no_grad()
def test_a_step_is_replayed_from_the_second_of_its_kind_on_and_keeps_the_bits() -> None:
    module, other, recorder = transformer(), transformer(seed=1), Recorder()
    Steps([module, other], MOST).start(pool(recorder))
    sizes = [(5, 9), (5, 12), (7, 12), (5, 9), (5, 9), (7, 12), (5, 12), (5, 9)]
    given = [inputs(*size, number) for number, size in enumerate(sizes)]
    results = [(module(**it)[0], it) for it in given]
    assert recorder.replays == {9: 3, 12: 2}
    # Compared after all of them: a later replay overwrites no earlier result.
    assert all(torch.equal(result, plain(module, it)) for result, it in results)
    results = [(other(**it)[0], it) for it in given[:1] * 2]  # of the same inputs, but of other weights
    assert recorder.replays == {9: 4, 12: 2}
    assert all(torch.equal(result, plain(other, it)) for result, it in results)
    assert not torch.equal(results[0][0], plain(module, given[0]))


@torch.no_grad()
def test_a_replayed_step_computes_with_what_the_weights_are_now() -> None:
    module, recorder = transformer(), Recorder()
    Steps([module], MOST).start(pool(recorder))
    before = [module(**inputs(5, 9))[0] for _ in range(3)][-1]
    weight = module.transformer_blocks[0].attn.to_q.weight
    own = weight.clone()
    weight.mul_(2)
    after = module(**inputs(5, 9))[0]
    assert torch.equal(after, plain(module, inputs(5, 9)))
    assert not torch.equal(after, before)
    weight.copy_(own)
    assert torch.equal(module(**inputs(5, 9))[0], before)
    assert recorder.replays == {9: 4}


@torch.no_grad()
def test_a_step_of_another_form_runs_as_it_was() -> None:
    module, recorder = transformer(guidance=False), Recorder()
    Steps([module], MOST).start(pool(recorder))
    given = inputs(5, 9, guidance=False)
    hidden = given["hidden_states"]
    without = {name: it for name, it in given.items() if name != "hidden_states"}
    for _ in range(3):
        assert torch.equal(module(**given | {"return_dict": True}).sample, plain(module, given))
        assert torch.equal(module(hidden, **without)[0], plain(module, given))
        assert torch.equal(module(**given | {"joint_attention_kwargs": {"scale": 1.0}})[0], plain(module, given))
        assert torch.equal(
            module(**given | {"controlnet_block_samples": [hidden.new_ones(1)]})[0],
            plain(module, given | {"controlnet_block_samples": [hidden.new_ones(1)]}),
        )
    assert not recorder.replays


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@torch.no_grad()
def test_options_are_recorded_as_they_came_and_to_a_compiled_transformer_nothing_is_not_none(fused: bool) -> None:
    module, recorder = transformer(), Recorder()
    if fused:
        fuse(module)
    module.compile_repeated_blocks(**COMPILE | {"backend": "eager"})
    Steps([module], MOST).start(pool(recorder))
    given = inputs(5, 9)
    with compiler_settings(1):
        for nothing in ({}, {}, None, {}, None, None):
            with_it = given | {"joint_attention_kwargs": nothing}
            assert torch.equal(module(**with_it)[0], plain(module, with_it))
    assert len(recorder.outputs) == 2
    assert recorder.replays == {9: 4}


@torch.no_grad()
def test_of_a_recording_that_was_interrupted_nothing_is_left() -> None:
    module, recorder = transformer(), Recorder()

    def interrupt(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        made = recorder(work)
        if len(recorder.outputs) == 1:
            raise CancelledError
        return made

    Steps([module], MOST).start(pool(interrupt))
    module(**inputs(5, 9))
    with pytest.raises(CancelledError):
        module(**inputs(5, 9, 1))
    assert recorder.outputs[0]() is None
    for number in (2, 3):
        assert torch.equal(module(**inputs(5, 9, number))[0], plain(module, inputs(5, 9, number)))
    assert recorder.replays == {9: 2}
    assert len(recorder.outputs) == 2


@torch.no_grad()
def test_where_recording_fails_steps_run_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    module, other, recorder = transformer(), transformer(seed=1), Recorder()

    def fail_later(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if recorder.outputs:
            raise RuntimeError("operation not permitted when stream is capturing")
        return recorder(work)

    Steps([module, other], MOST).start(pool(fail_later))
    for image in (9, 9, 9, 12, 12, 12, 12, 9, 12, 12, 9):
        assert torch.equal(module(**inputs(5, image))[0], plain(module, inputs(5, image)))
    assert recorder.replays == {9: 3}
    assert recorder.outputs[0]() is None
    assert not {"forward"} & {*vars(module), *vars(other)}
    why = "RuntimeError: operation not permitted when stream is capturing"
    *again, last = capsys.readouterr().out.splitlines()
    assert again == [f"A CUDA graph of a step failed, and will be tried again: {why}."] * (FAILURES - 1)
    assert last == f"From now on steps are launched kernel by kernel, since a CUDA graph of one failed: {why}."


@pytest.mark.parametrize("error", [RuntimeError("recompiled"), *HOST_IS_FULL])
@torch.no_grad()
def test_a_recording_that_failed_once_is_made_after_one_more_call(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    module, recorder, fails = transformer(), Recorder(), [True]

    def fail_once(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if fails:
            fails.clear()
            raise error
        return recorder(work)

    Steps([module], MOST).start(pool(fail_once))
    calls = []
    for _ in range(5):
        assert torch.equal(module(**inputs(5, 9))[0], plain(module, inputs(5, 9)))
        calls.append(recorder.replays[9])
    assert calls == [0, 0, 0, 1, 2]
    assert capsys.readouterr().out.count("will be tried again") == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
@torch.no_grad()
def test_too_little_memory_to_record_ends_it_at_once(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    module = transformer()

    def fail(_: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        raise error

    Steps([module], MOST).start(pool(fail))
    for _ in range(2):
        assert torch.equal(module(**inputs(5, 9))[0], plain(module, inputs(5, 9)))
    assert "forward" not in vars(module)
    assert capsys.readouterr().out.startswith("From now on steps are launched kernel by kernel, since ")


@torch.no_grad()
def test_what_is_recorded_keeps_no_more_than_it_may() -> None:
    module, recorder, pools = transformer(), Recorder(), []

    def make_pool() -> SimpleNamespace:
        pools.append(None)
        begun = len(recorder.outputs)  # each keeps 10 bytes for a token

        def kept() -> int:
            return sum(10 * output().shape[1] for output in recorder.outputs[begun:] if output() is not None)

        return SimpleNamespace(record=recorder, bytes=kept)

    Steps([module], MOST).start(make_pool)
    for image, outputs in ((3, [3]), (4, [3, 4]), (5, [5]), (4, [5, 4]), (12, [12]), (12, [12]), (3, [3])):
        for number in range(4):
            given = inputs(5, image, number)
            assert torch.equal(module(**given)[0], plain(module, given))
        assert [it().shape[1] for it in recorder.outputs if it() is not None] == outputs
    assert len(pools) == 4


@torch.no_grad()
def test_the_latest_graphs_are_kept_and_all_given_up_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    module, recorder = transformer(), Recorder()
    steps = Steps([module], MOST)
    steps.stop("it was never started")
    steps.start(pool(recorder))
    for image in range(1, GRAPHS + 1):
        for _ in range(2):
            module(**inputs(5, image))
    module(**inputs(5, 1))  # the oldest one is the latest now
    for _ in range(2):
        module(**inputs(5, GRAPHS + 1))
    assert [image + 1 for image, output in enumerate(recorder.outputs) if output() is None] == [2]
    for _ in range(2):
        assert torch.equal(module(**inputs(5, 2))[0], plain(module, inputs(5, 2)))
    assert recorder.replays[2] == 3
    of_the_host = (MemoryError(), OSError(errno.ENOMEM, "of the host"), *HOST_IS_FULL)
    for error in (ValueError("nothing of the kind"), *of_the_host):
        steps.give_back(error)
    assert any(output() is not None for output in recorder.outputs)
    steps.give_back(torch.OutOfMemoryError("CUDA out of memory."))
    assert not any(output() is not None for output in recorder.outputs)
    assert torch.equal(module(**inputs(5, 1))[0], plain(module, inputs(5, 1)))
    assert recorder.replays[1] == 2
    assert capsys.readouterr().out == "From now on steps are launched kernel by kernel, since memory was short.\n"


def test_requests_draw_the_same_from_replayed_steps(tmp_path: Path) -> None:
    flux = Flux.load(Settings(models=write_models(tmp_path), cache_dir=tmp_path / "cache"), CPU)
    recorder, image = Recorder(), tmp_path / "grey.png"
    Image.new("RGB", (48, 64), "grey").save(image)

    def draw_all() -> list[list]:
        wanted = [
            Request(prompt="a fox", image=image, mask=mask, model=model, go_fast=fast, num_inference_steps=5, seed=1)
            for mask in (None, image)
            for model in TEXT_TOKENS
            for fast in (False, True)
        ]
        return [np.asarray(flux.generate(it, (), Stopwatch(CPU)).images[0]).tolist() for it in wanted]

    before = draw_all()
    flux.steps.start(pool(recorder))
    assert draw_all() == before
    assert len(recorder.outputs) == len(flux._transformers) * len({flux.text_tokens(model) for model in TEXT_TOKENS})
    assert recorder.replays.total() > 20


@pytest.mark.usefixtures("forgetful")
def test_steps_of_compiled_transformers_are_recorded_and_compile_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In service: any mode, model, precision and mix after any other, each drawn by pipelines of diffusers."""
    flux = Flux.load(Settings(models=write_models(tmp_path), cache_dir=tmp_path / "cache"), CPU)
    flux.compile(backend="eager")
    recorder, rng, image = Recorder(), random.Random(2), tmp_path / "grey.png"
    changes = lora_files.changes(flux._transformers[0], seed=1)
    file = lora_files.write(tmp_path / "lora.safetensors", lora_files.EXACT["kohya"](changes))
    loras = [LoraFile(file, "lora", "lora")]

    def draw(number: int) -> np.ndarray:
        rng.seed(number)
        Image.new("RGB", rng.choice([(48, 64), (64, 48), (32, 32), (16, 16)]), "grey").save(image)
        mixed = rng.random() < 0.4
        wanted = Request(
            prompt="a fox",
            image=image,
            mask=rng.choice([None, image]),
            prompt_strength=rng.choice([0.7, 1]),
            model=rng.choice(list(TEXT_TOKENS)),
            go_fast=rng.random() < 0.5,
            num_inference_steps=3,
            seed=number,
            loras=(LoraChoice("lora", rng.choice([0.5, 1])),) if mixed else (),
        )
        return np.asarray(flux.generate(wanted, loras if mixed else (), Stopwatch(CPU)).images[0])

    graphs, before = counters["stats"]["unique_graphs"], [draw(number) for number in range(40)]
    flux.steps.start(pool(recorder))
    assert all(np.array_equal(draw(number), it) for number, it in enumerate(before))
    assert recorder.replays.total() > 40
    assert all("forward" in vars(it) for it in flux._transformers)
    assert counters["stats"]["unique_graphs"] == graphs
    assert "CUDA graph" not in capsys.readouterr().out


def test_steps_are_replayed_on_a_gpu_with_room_for_what_that_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flux = Flux.load(Settings(models=write_models(tmp_path), cache_dir=tmp_path / "cache"), CPU)

    def replays() -> bool:
        flux.replay_steps()
        return "forward" in vars(flux._transformers[0])

    assert not replays()
    flux.device = torch.device("cuda")
    capsys.readouterr()
    flux.placement = replace(flux.placement, left=GRAPHS_BYTES - 1)
    assert not replays()
    said = capsys.readouterr().out
    assert said.startswith("Steps are launched kernel by kernel, since CUDA graphs of them may take 2.0 GB, and ")
    flux.placement = replace(flux.placement, left=GRAPHS_BYTES)
    assert replays()
    assert not capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@needs_cuda
@torch.no_grad()
def test_cuda_graphs_of_steps_share_memory_keep_the_bits_and_give_it_back() -> None:
    module = transformer(attention_head_dim=64, num_attention_heads=8, axes_dims_rope=(16, 24, 24))
    module = module.to("cuda", torch.bfloat16).requires_grad_(False)

    def there(image: int, number: int) -> dict[str, object]:
        given = inputs(64, image, number).items()
        return {
            name: it.to("cuda", torch.float32 if name.endswith("ids") else torch.bfloat16)
            if isinstance(it, Tensor)
            else it
            for name, it in given
        }

    def kept() -> int:
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    steps, keeps = Steps([module], GRAPHS_BYTES), []
    for image in (2048, 1024, 1536):
        module(**there(image, 0))
    before = kept()
    steps.start()
    for image in (2048, 1024, 1536):
        for number in range(3):
            assert torch.equal(module(**there(image, number))[0], plain(module, there(image, number)))
        keeps.append(kept() - before)
    assert 0 < keeps[0] <= keeps[2] < 2 * keeps[0]  # not one beside another
    module.proj_out.weight.mul_(2)
    for image in (1536, 2048):
        assert torch.equal(module(**there(image, 4))[0], plain(module, there(image, 4)))
    assert "forward" in vars(module)
    steps.stop("this test ends")
    assert kept() < before + keeps[0]


@needs_cuda
@torch.no_grad()
def test_a_cuda_graph_keeps_the_bits_in_every_thread() -> None:
    t5 = make_t5().to("cuda", torch.bfloat16)
    replayed, texts_there = replaying(t5, (5, 9)), [texts(length).cuda() for length in (5, 9, 5)]

    def all_of_them() -> list[Tensor]:
        with torch.no_grad():
            return [replayed(ids, output_hidden_states=False)[0] for ids in texts_there]

    with ThreadPoolExecutor(1) as thread:
        results = [*all_of_them(), *thread.submit(all_of_them).result()]
    assert all(torch.equal(it, t5(ids)[0]) for it, ids in zip(results, texts_there * 2, strict=True))


@needs_cuda
def test_a_replay_is_queued_behind_one_other_at_most() -> None:
    numbers = torch.arange(4, device="cuda")

    def work() -> Tensor:
        torch.cuda._sleep(10**8)  # tens of milliseconds
        return numbers + 1

    work()
    graph, _ = cuda_graph(work)
    graph()
    first = torch.cuda.Event()
    first.record()
    graph()
    graph()
    assert first.query()
    torch.cuda.synchronize()


@needs_cuda
def test_a_recording_that_fails_leaves_torch_as_it_was() -> None:
    numbers, stream = torch.arange(4, device="cuda"), torch.cuda.current_stream()
    torch.cuda.manual_seed(3)
    expected = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(3)
    with pytest.raises(RuntimeError, match="capturing"):  # not that it could not be ended
        cuda_graph(lambda: numbers[numbers > numbers.sum().item()])  # it waits for the device
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.rand(4, device="cuda"), expected)
    torch.cuda.empty_cache()
    assert (numbers + 1).tolist() == [1, 2, 3, 4]
    graph, output = cuda_graph(lambda: numbers + 1)
    graph()
    assert output.tolist() == [1, 2, 3, 4]
