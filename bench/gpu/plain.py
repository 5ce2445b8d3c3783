"""Plain diffusers on the same weights, to compare the product with."""

from collections.abc import Callable

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

from bench.gpu.context import Bench, Marks, Values, summary


def pipeline(bench: Bench) -> FluxPipeline:
    """diffusers' own pipeline around the pristine weights."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(bench.models.schedulers["dev"])
    made = FluxPipeline(scheduler=scheduler, transformer=bench.pristine, **bench.models.components)
    made.set_progress_bar_config(disable=True)
    return made


def draw(bench: Bench, steps: int, on_step: Callable[[], object] = lambda: None) -> Tensor:
    """Latents of the picture of `Bench.request`: [1, tokens, channels]."""
    wanted = bench.request()

    def on_step_end(*_: object) -> dict[str, Tensor]:
        on_step()
        return {}

    return pipeline(bench)(
        wanted.prompt,
        width=bench.side,
        height=bench.side,
        num_inference_steps=steps,
        guidance_scale=wanted.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(wanted.seed),
        output_type="latent",
        callback_on_step_end=on_step_end,
    ).images


def one_step(bench: Bench) -> Tensor:
    """The same after a single step; drawn once."""
    if "plain" not in bench.latents:
        bench.latents["plain"] = draw(bench, 1)
    return bench.latents["plain"]


def noise(bench: Bench) -> Tensor:
    """The noise that the picture of `Bench.request` begins with: [1, tokens, channels], float32."""
    generator = torch.Generator("cpu").manual_seed(bench.request().seed)
    channels = bench.pristine.config.in_channels // 4
    size = (bench.side, bench.side)
    return pipeline(bench).prepare_latents(1, channels, *size, torch.bfloat16, bench.device, generator)[0].float()


def step_times(bench: Bench) -> Values:
    """Seconds of a step, the first one not counted, and its TFLOP."""
    marks = Marks(bench.device)
    draw(bench, bench.steps + 1, marks)
    return summary(marks.seconds()) | bench.work()
