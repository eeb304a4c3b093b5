"""Explain why a loss or a gradient is not finite. Called once, when a run must stop for it."""

import math
from configurator import UserError
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from support import runtime


def explain_step(trainer, step: int) -> BaseException:
    """Return the error that ends a run because the loss or gradient of `step` was not finite.

    It names the first module with such an output or gradient, and what causes it: the weights, the
    batch or the dtype. In all processes but the first it is a silent SystemExit.
    """
    lr, loss, grad_norm = next(figures for at, *figures in trainer.recent if at == step)
    trainer.model.zero_grad(set_to_none=True)
    reasons = trainer.processes.gather(
        next(filter(None, (explain_pass(trainer, step, micro) for micro in trainer.micros)), "")
    )
    if not trainer.processes.is_first:
        return SystemExit(1)
    norms = [f"{norm:.3g}" for at, _, _, norm in trainer.recent if step - 5 <= at < step]
    reason = next(filter(None, reasons), "it does not happen again: try --compile=False")
    return UserError(
        f"step {step}: the loss is {loss:.4g} and the gradient norm {grad_norm:.4g}, at learning "
        f"rate {lr:.3g}, after gradient norms of {', '.join(norms) or 'none'}; {reason}; the step "
        f"was not taken and {trainer.out_dir / 'ckpt.pt'} is unchanged"
    )


def explain_pass(trainer, step: int, micro: int) -> str:
    """Return where forward pass `micro` of `step` is first not finite and why, or ""."""
    model, batch = trainer.model, trainer.micro_batch(step, micro)
    trainer.seed_dropout(step, micro)
    loss, where = first_not_finite(model, *batch, runtime.autocast(trainer.device, trainer.dtype))
    if math.isfinite(loss) and not where:
        return ""
    where = f"first not finite: {where or 'the loss itself'}"
    for name, p in model.named_parameters():
        if bad := int((~p.isfinite()).sum()):
            return f"{where}; cause: the weights, {bad:,} values of {name} are not finite"
    trainer.seed_dropout(step, micro)
    loss, place = first_not_finite(model, *batch, nullcontext())
    if math.isfinite(loss) and not place:
        dtype = runtime.dtype_name(trainer.dtype)
        return f"{where}; cause: {dtype}, because with --dtype=float32 the loss is {loss:.4f}"
    other = trainer.micro_batch(step - 1 if step else 1, micro)
    loss, place = first_not_finite(model, *other, nullcontext())
    if math.isfinite(loss) and not place:
        return f"{where}, also in float32; cause: this batch, another one has a loss of {loss:.4f}"
    return f"{where}, also in float32; cause: the weights are too large for any batch"


def first_not_finite(
    model: nn.Module, x: Tensor, y: Tensor, autocast: AbstractContextManager
) -> tuple[float, str]:
    """Return the loss of a batch and the first output or gradient that is not finite, or ""."""
    found = []

    def watch(name: str):
        def hook(_module, _inputs, output) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(f"the output of {name}")

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    with autocast:
        loss = model(x, y)[1]
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
