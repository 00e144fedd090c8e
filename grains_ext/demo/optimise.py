"""The training loop of the embedded models."""

from collections.abc import Callable, Iterable

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn


def optimise(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[], Tensor],
    *,
    steps: int,
    learning_rate: float,
    warmup_steps: int,
    weight_decay: float,
    title: str,
    console: Console | None = None,
) -> list[tuple[int, float]]:
    """AdamW with warm-up and cosine decay, gradients clipped to a norm of 1, under a progress bar.

    loss: draws the next batch and returns its loss; called once for each step.

    Returns the loss curve: (step, mean loss of the steps since the last entry), every 50 steps.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay
    )
    warmup = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1 / warmup_steps, total_iters=warmup_steps
    )
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=max(1, steps - warmup_steps)
    )
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer, [warmup, decay], milestones=[warmup_steps]
    )
    curve: list[tuple[int, float]] = []
    recent: list[float] = []
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps, loss=float("nan"))
        for step in range(1, steps + 1):
            value = loss()
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            recent.append(value.item())
            if step % 50 == 0 or step == steps:
                curve.append((step, round(sum(recent) / len(recent), 4)))
                recent.clear()
            progress.update(task, advance=1, loss=value.item())
    return curve
