"""T5 replayed is T5 called, to the bit; what was not recorded runs as it was."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from engine.replay import cuda_graph, replay, replaying
from flux import TEXT_TOKENS, Flux
from request import Request
from service.measure import Stopwatch
from settings import Settings
from tests.support.models import write_models

CPU = torch.device("cpu")
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

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        output = work()

        def again() -> None:
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
def test_a_recording_that_fails_leaves_torch_as_it_was() -> None:
    numbers, stream = torch.arange(4, device="cuda"), torch.cuda.current_stream()
    torch.cuda.manual_seed(3)
    expected = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(3)
    with pytest.raises(RuntimeError):
        cuda_graph(lambda: numbers[numbers > numbers.sum().item()])  # it waits for the device
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.rand(4, device="cuda"), expected)
    torch.cuda.empty_cache()
    graph, output = cuda_graph(lambda: numbers + 1)
    graph()
    assert output.tolist() == [1, 2, 3, 4]
