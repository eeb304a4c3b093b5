"""Muon, the optimizer for the matrices inside the blocks (https://kellerjordan.github.io/posts/muon/).

It does what `torch.optim.Muon` does, but takes matrices of one shape in one batch, and computes in
float32 where a processor has no bfloat16: there torch's own takes 25 times as long.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor


def orthogonalize(x: Tensor) -> Tensor:
    """Matrices x (N, rows, columns), rows <= columns, with all singular values brought close to 1.

    Five Newton-Schulz steps with Jordan's coefficients: an odd polynomial that is applied to the
    singular values and draws them into 0.7 ... 1.2.
    """
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]  # no singular value above 1
    for _ in range(5):
        gram = x @ x.mT  # (N, rows, rows)
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445
        )
    return x


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, so that a step moves every direction of a matrix by as much.

    `dtype` is that of the matrix products of `orthogonalize`.
    """

    def __init__(
        self, params, lr: float, weight_decay: float, dtype: torch.dtype, momentum: float = 0.95
    ) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype
        self.found_inf: Tensor | None = (
            None  # 1: step() leaves the weights alone; as torch's fused optimizers have it
        )

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            batches = defaultdict(list)  # (rows, columns) -> parameters, and updates of that shape
            for p in group["params"]:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                average = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(average, momentum)  # Nesterov's look ahead
                wide = update if update.size(0) <= update.size(1) else update.mT
                batches[wide.shape].append((p, wide))
            for batch in batches.values():
                updates = orthogonalize(torch.stack([wide for _, wide in batch]).to(self.dtype))
                for (p, _), update in zip(batch, updates, strict=True):
                    rows, columns = p.size()
                    new = p * (1 - lr * group["weight_decay"])
                    new.add_(
                        update if rows <= columns else update.mT,
                        alpha=-lr * math.sqrt(max(1, rows / columns)),
                    )
                    p.copy_(
                        new if self.found_inf is None else torch.where(self.found_inf > 0, p, new)
                    )
