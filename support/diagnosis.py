"""Why is the loss, or the gradient, not finite? Asked once, when a run has to stop for it."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from support import runtime


def first_not_finite(
    model: nn.Module, x: Tensor, y: Tensor, autocast: AbstractContextManager
) -> tuple[float, str]:
    """Loss of the batch x, y, (B, T) each, and the first module whose output or gradient is not finite, or ""."""
    found = []

    def look_at(name: str):
        def hook(_module, _inputs, output) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(f"the output of {name}")

        return hook

    hooks = [module.register_forward_hook(look_at(name)) for name, module in model.named_modules()]
    with autocast:
        loss = model(x, y)[1]
    for hook in hooks:
        hook.remove()
    if not found and math.isfinite(loss.item()):
        loss.backward()
        # The backward pass goes from the last module to the first.
        for name, p in reversed(list(model.named_parameters())):
            if p.grad is not None and not p.grad.isfinite().all():
                found.append(f"the gradient of {name}")
        model.zero_grad(set_to_none=True)
    return loss.item(), (found or [""])[0]


def explain(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    other_batch: tuple[Tensor, Tensor],
    autocast: AbstractContextManager,
    dtype: torch.dtype,
    reseed: Callable[[], None],
) -> str:
    """In a line: where `batch` first gives what is not finite, and whether the weights, the batch or dtype is to blame.

    `other_batch` is one that the model could compute before; `reseed` repeats what dropout drops.
    Returns "" if `batch` is finite.
    """
    reseed()
    loss, where = first_not_finite(model, *batch, autocast)
    if math.isfinite(loss) and not where:
        return ""
    where = f"{where or 'the loss itself'} is the first that is not finite"
    for name, p in model.named_parameters():
        if bad := int((~p.isfinite()).sum()):
            return f"{where}; to blame are the weights: {bad:,} values of {name} are not finite themselves"
    reseed()
    again, again_where = first_not_finite(model, *batch, nullcontext())
    if math.isfinite(again) and not again_where:
        blame = f"to blame is {runtime.dtype_name(dtype)}: in float32 the same batch gives a loss of {again:.4f}"
        return f"{where}; {blame} (--dtype=float32)"
    other, other_where = first_not_finite(model, *other_batch, nullcontext())
    if math.isfinite(other) and not other_where:
        return f"{where}, in float32 too; to blame is the batch: another one gives a loss of {other:.4f}"
    return f"{where}, in float32 too; to blame are the weights, which have grown: no batch is finite with them"
