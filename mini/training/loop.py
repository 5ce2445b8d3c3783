"""A training loop that continues where it was stopped: it computes in bfloat16 and keeps float32 master weights.

Each step draws its batch from a generator seeded by the step's number, so no random state needs saving.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

SAVE_SECONDS = 60
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(
    name: str,
    model: nn.Module,
    steps: int,
    loss_of: Callable[[np.random.Generator, float], Tensor],
    *,
    work: Path,
    rate: float,
    matrices: float = 0.0,
    warm_up: int = 50,
    ema: float = 0.0,
) -> None:
    """Train `model` in place; its trainable parameters end as averaged weights.

    Args:
        name: of the stage, and of its checkpoint in `work`.
        model: in the dtype it computes in.
        steps: how many.
        loss_of: returns the loss, given a random generator and the finished share of the training.
        work: the folder of checkpoints.
        rate: AdamW's highest learning rate; it rises over `warm_up` steps and falls along a cosine.
        matrices: if above 0, the learning rate of Muon, which then trains the matrices inside blocks.
        warm_up: steps.
        ema: the share of the average that a step keeps; 0 for no averaging.
    """
    done, checkpoint = work / f"{name}.done.pt", work / f"{name}.pt"
    live = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    if done.exists():
        _write(live, torch.load(done, map_location=DEVICE))
        return
    # Convolutions as matrices [out, in * height * width].
    masters = {key: _matrix(parameter.detach().float()).clone() for key, parameter in live.items()}
    average = {key: master.clone() for key, master in masters.items()}
    optimizers = _optimizers(masters, rate, matrices)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=DEVICE)
        first = state["step"]
        _write(masters, state["masters"])
        _write(average, state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        _write(live, masters)
    started = saved_at = time.monotonic()
    recent = []
    for step in range(first, steps):
        torch.manual_seed(step)
        loss = loss_of(np.random.default_rng((len(name), step)), step / steps)
        loss.backward()
        for key, parameter in live.items():
            masters[key].grad = None if parameter.grad is None else _matrix(parameter.grad.float())
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        factor = min(1, (step + 1) / warm_up) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["highest"] * factor
            optimizer.step()
        _write(live, masters)
        keep = min(ema, (step + 1) / (step + 10))
        for key, master in masters.items():
            average[key].lerp_(master, 1 - keep)
        recent.append(loss.item())
        if step % 25 == 24 or step == steps - 1:
            speed = (time.monotonic() - started) / (step + 1 - first)
            print(f"{name} {step + 1}/{steps} loss {np.mean(recent):.4f} {speed:.2f} s/step", flush=True)
            recent = []
        if time.monotonic() - saved_at > SAVE_SECONDS:
            saved_at = time.monotonic()
            _save(
                {
                    "step": step + 1,
                    "masters": masters,
                    "average": average,
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                },
                checkpoint,
            )
    _save(average, done)
    _write(live, average)


def _optimizers(masters: dict[str, Tensor], rate: float, matrices: float) -> list[torch.optim.Optimizer]:
    muon = {key: m for key, m in masters.items() if matrices and m.dim() == 2 and "blocks." in key}
    rest = [master for key, master in masters.items() if key not in muon]
    groups = [{"params": rest, "highest": rate}]
    optimizers = [torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)]
    if muon:
        groups = [{"params": list(muon.values()), "highest": matrices}]
        optimizers.append(torch.optim.Muon(groups, lr=matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.dim() > 2 else tensor


@torch.no_grad()
def _write(to: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for key, parameter in to.items():
        parameter.copy_(values[key].view_as(parameter))


def _save(state: dict, path: Path) -> None:
    """Write beside the file and rename, so that stopping the training leaves no half checkpoint."""
    aside = path.with_suffix(".part")
    torch.save(state, aside)
    aside.rename(path)
