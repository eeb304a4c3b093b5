"""Explain why a loss or a gradient is not finite. Called once, when a run must stop for it."""

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from support import runtime

Batch = tuple[Tensor, Tensor]  # inputs and targets, (B, T) each


def explain(model: nn.Module, batch: Batch, another: Batch, dtype: torch.dtype) -> str:
    """Return where a pass over `batch` is first not finite and why, or "" if all of it is finite.

    The cause is the weights, the dtype or the batch: `another` batch, and float32, show which. Each
    pass draws the same dropout, that of torch's random state at the call.
    """
    device = batch[0].device
    loss, where = first_not_finite(model, batch, runtime.autocast(device, dtype))
    if math.isfinite(loss) and not where:
        return ""
    where = f"first not finite: {where or 'the loss itself'}"
    for name, p in model.named_parameters():
        if bad := int((~p.isfinite()).sum()):
            return f"{where}; cause: the weights, {bad:,} values of {name} are not finite"
    loss, place = first_not_finite(model, batch, nullcontext())
    if math.isfinite(loss) and not place:
        name = runtime.dtype_name(dtype)
        return f"{where}; cause: {name}, because with --dtype=float32 the loss is {loss:.4f}"
    loss, place = first_not_finite(model, another, nullcontext())
    if math.isfinite(loss) and not place:
        return f"{where}, also in float32; cause: this batch, another one has a loss of {loss:.4f}"
    return f"{where}, also in float32; cause: the weights are too large for any batch"


def first_not_finite(model: nn.Module, batch: Batch, precision) -> tuple[float, str]:
    """Return the loss of a batch and the first output or gradient that is not finite, or ""."""
    found = []

    def watch(name: str):
        def hook(_module, _inputs, output) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(f"the output of {name}")

        return hook

    model.zero_grad(set_to_none=True)
    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    with precision, torch.random.fork_rng([batch[0].device] * batch[0].is_cuda):
        loss = model(*batch)[1]
    for hook in hooks:
        hook.remove()
    if not found and math.isfinite(loss.item()):
        loss.backward()
        # in the order of the backward pass
        for name, p in reversed(list(model.named_parameters())):
            if p.grad is not None and not p.grad.isfinite().all():
                found.append(f"the gradient of {name}")
        model.zero_grad(set_to_none=True)
    return loss.item(), (found or [""])[0]
