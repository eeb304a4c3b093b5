"""Muon against torch's own, and which optimizer gets which parameters."""

import pytest
import torch

from support.optimizers import Muon, orthogonalize


@pytest.mark.parametrize("momentum", [0.95, 0.8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_takes_the_steps_of_torchs_muon(dtype, momentum):
    """In float32 as close as the rounding of torch's bfloat16 allows.

    In bfloat16 closer: only the norm of a matrix may be rounded to the next value.
    """
    torch.manual_seed(0)
    shapes = [(48, 16), (16, 16), (48, 16), (16, 64), (64, 16), (16, 16)]
    start = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    optimizers = (
        Muon(ours, lr=0.1, weight_decay=0.2, momentum=momentum, dtype=dtype),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, momentum=momentum),
    )
    for _ in range(10):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, w in zip(ours, theirs, start, strict=True):
        assert (b - w).abs().max() > 0.3
        tolerance = 0.005 if dtype == torch.bfloat16 else 0.03
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


class OnGpu(torch.Tensor):
    """A tensor with values that says it is on a GPU."""

    device = torch.device("cuda")


@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_on_a_gpu_muon_chooses_between_old_and_new_without_reading_found_inf(skip):
    muon = Muon([torch.nn.Parameter(torch.zeros(2, 2))], 0.1, 0.0, 0.95, torch.float32)
    muon.found_inf = torch.tensor(skip).as_subclass(OnGpu)
    old, new = torch.zeros(2, 2), torch.ones(2, 2)
    chosen = muon.unless_skipped(new, old)
    assert torch.equal(chosen.as_subclass(torch.Tensor), old if skip else new)


def test_orthogonalize_moves_all_singular_values_close_to_1():
    x = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(x))
    assert values.min() > 0.6 and values.max() < 1.25
    assert torch.linalg.svdvals(x).max() > 4


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest_at_proportional_rates(
    tiny_trainer,
):
    rates = dict(muon_lr=0.5, muon_momentum=0.8, learning_rate=0.1, weight_decay=0.3)
    trainer = tiny_trainer(optimizer="muon", **rates)
    muon, adamw = trainer.optimizers
    assert type(muon) is Muon and type(adamw) is torch.optim.AdamW
    in_muon = {p for group in muon.param_groups for p in group["params"]}
    assert in_muon == {p for p in trainer.model.transformer.h.parameters() if p.dim() == 2}
    assert muon.param_groups[0]["momentum"] == 0.8
    groups = muon.param_groups + adamw.param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.3, 0.0]
    trainer.train_step(0, lr=0.02)
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 0.02, 0.02])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_exactly_one_group(tiny_trainer, optimizer):
    trainer = tiny_trainer(optimizer=optimizer, tie_weights=False)
    found = [p for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
    assert len(found) == len(set(found)) and set(found) == set(trainer.model.parameters())
