"""The optimizers: AdamW, or Muon for the matrices of the blocks and AdamW for the rest.

Muon (https://kellerjordan.github.io/posts/muon/) computes the same as `torch.optim.Muon`, but takes
all matrices of one shape in one batch, and in float32 where a processor has no bfloat16: there
torch's own takes 25 times as long.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor

from model import GPT


def make_optimizers(model: GPT, config, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Return the optimizers that config.optimizer names. `dtype` is for Muon's matrix products.

    Every parameter group has its peak learning rate as "initial_lr".
    """
    hidden = [p for p in model.transformer.h.parameters() if p.dim() == 2]  # of the blocks
    outside = [p for p in model.parameters() if p.dim() == 2 and p not in set(hidden)]
    vectors = [p for p in model.parameters() if p.dim() == 1]  # biases and LayerNorms: no decay
    rates = (config.muon_lr, config.weight_decay, config.muon_momentum)
    muon = [Muon(hidden, *rates, dtype)] if config.optimizer == "muon" else []
    matrices = outside if muon else hidden + outside
    adamw_groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    rates = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}
    optimizers = [*muon, torch.optim.AdamW(adamw_groups, **rates, fused=True)]
    all_groups = [group for o in optimizers for group in o.param_groups]
    assert {p for g in all_groups for p in g["params"]} == set(model.parameters())
    for group in all_groups:
        group["initial_lr"] = group["lr"]
    return optimizers


def load_optimizers(optimizers: list[torch.optim.Optimizer], saved: list[dict]) -> None:
    """Restore the optimizers' states, but keep this run's rates, weight decays and momenta."""
    for optimizer, before in zip(optimizers, saved, strict=True):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": before["state"], "param_groups": groups})


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: a step changes all directions of a matrix equally."""

    # GradScaler would look for infinities itself, which waits for the GPU. train.py has looked.
    _step_supports_amp_scaling = True

    def __init__(
        self, params, lr: float, weight_decay: float, momentum: float, dtype: torch.dtype
    ) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype  # of the matrix products

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            batches = defaultdict(list)  # shape -> parameters of that shape and their updates
            for p in group["params"]:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum_buffer"]
                buffer.lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(buffer, momentum)  # Nesterov momentum
                wide = update if update.size(0) <= update.size(1) else update.mT
                batches[wide.shape].append((p, wide))
            for batch in batches.values():
                updates = orthogonalize(torch.stack([wide for _, wide in batch]).to(self.dtype))
                for (p, _), update in zip(batch, updates, strict=True):
                    rows, columns = p.size()
                    scale = -lr * math.sqrt(max(1, rows / columns))
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(update if rows <= columns else update.mT, alpha=scale)


def orthogonalize(x: Tensor) -> Tensor:
    """Return the matrices x (N, rows, columns), rows <= columns, with singular values close to 1.

    Five Newton-Schulz steps with Jordan's coefficients: an odd polynomial of the singular values
    that moves all but tiny ones to between 0.7 and 1.2.
    """
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]  # no singular value above 1
    for _ in range(5):
        gram = x @ x.mT  # (N, rows, rows)
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x
