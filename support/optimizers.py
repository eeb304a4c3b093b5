"""The optimizers: AdamW, or Muon for the matrices of the blocks and AdamW for the rest.

Muon (https://kellerjordan.github.io/posts/muon/) computes the same as `torch.optim.Muon`, but takes
all matrices of one shape in one batch, and in float32 where a processor has no bfloat16: there
torch's own takes 25 times as long.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from model import GPT


def make_optimizers(model: GPT, config, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Return the optimizers that config.optimizer names. `dtype` is for Muon's matrix products.

    Every parameter group has its peak learning rate as "initial_lr".
    """
    groups, optimizers = param_groups(model), []
    matrices = groups["hidden"] + groups["embedding"]
    if config.optimizer == "muon":
        rates = (config.muon_lr, config.weight_decay, config.muon_momentum)
        optimizers.append(Muon(groups["hidden"], *rates, dtype))
        matrices = groups["embedding"]
    adamw_groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": groups["vector"], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    optimizers.append(
        torch.optim.AdamW(adamw_groups, lr=config.learning_rate, betas=betas, fused=True)
    )
    for o in optimizers:
        for group in o.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def param_groups(model: GPT) -> dict[str, list[nn.Parameter]]:
    """Return every parameter in exactly one of three groups.

    "hidden": the matrices of the blocks. "embedding": token and position embeddings and the head.
    "vector": biases and LayerNorms, which get no weight decay.
    """
    groups: dict[str, list[nn.Parameter]] = {"hidden": [], "embedding": [], "vector": []}
    for name, p in model.named_parameters():
        in_block = name.startswith("transformer.h.")
        groups["vector" if p.dim() < 2 else "hidden" if in_block else "embedding"].append(p)
    return groups


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: a step moves all directions of a matrix by the same amount."""

    found_inf: Tensor | None = None  # 1: step() changes nothing, as in torch's fused AdamW

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
                average = buffer.lerp(p.grad, 1 - momentum)
                buffer.copy_(self.unless_skipped(average, buffer))
                update = p.grad.lerp(average, momentum)  # Nesterov momentum
                wide = update if update.size(0) <= update.size(1) else update.mT
                batches[wide.shape].append((p, wide))
            for batch in batches.values():
                updates = orthogonalize(torch.stack([wide for _, wide in batch]).to(self.dtype))
                for (p, _), update in zip(batch, updates, strict=True):
                    rows, columns = p.size()
                    new = p * (1 - lr * group["weight_decay"])
                    scale = -lr * math.sqrt(max(1, rows / columns))
                    new.add_(update if rows <= columns else update.mT, alpha=scale)
                    p.copy_(self.unless_skipped(new, p))

    def unless_skipped(self, new: Tensor, old: Tensor) -> Tensor:
        """Return `new`, or `old` in a step that found_inf skips."""
        skip = self.found_inf
        if skip is None or skip.device.type == "cpu":  # nothing to wait for
            return old if skip else new
        return torch.where(skip > 0, old, new)


def orthogonalize(x: Tensor) -> Tensor:
    """Return the matrices x (N, rows, columns), rows <= columns, with singular values close to 1.

    Five Newton-Schulz steps with Jordan's coefficients: an odd polynomial of the singular values
    that moves all but tiny ones to between 0.7 and 1.2.
    """
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]  # no singular value above 1
    for _ in range(5):
        gram = x @ x.mT  # (N, rows, rows)
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445
        )
    return x
