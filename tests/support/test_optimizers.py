"""Muon against torch's own, and which optimizer gets which parameters."""

import pytest
import torch

from model import GPT, GPTConfig
from support.optimizers import Muon, load_optimizers, make_optimizers, orthogonalize
from train import TrainConfig

RATES = dict(muon_lr=0.5, muon_momentum=0.8, learning_rate=0.1, weight_decay=0.3)


def small_model(**changed) -> GPT:
    return GPT(GPTConfig(vocab_size=9, block_size=8, n_layer=2, n_head=2, n_embd=8, **changed))


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
    same = dict(lr=0.1, weight_decay=0.2, momentum=momentum)
    optimizers = Muon(ours, dtype=dtype, **same), torch.optim.Muon(theirs, **same)
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


def test_orthogonalize_moves_all_singular_values_close_to_1():
    x = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(x))
    assert values.min() > 0.6 and values.max() < 1.25
    assert torch.linalg.svdvals(x).max() > 4
    assert not orthogonalize(torch.zeros(1, 2, 3)).any()  # and no division by zero


@pytest.mark.parametrize("tie_weights", [True, False])
def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest(tie_weights):
    model = small_model(tie_weights=tie_weights)
    hidden = {p for p in model.transformer.h.parameters() if p.dim() == 2}
    matrices = {p for p in model.parameters() if p.dim() == 2}
    vectors = {p for p in model.parameters() if p.dim() == 1}
    assert len(hidden) == 4 * 2
    for name, expected in (
        ("muon", [(hidden, 0.3, 0.5), (matrices - hidden, 0.3, 0.1), (vectors, 0.0, 0.1)]),
        ("adamw", [(matrices, 0.3, 0.1), (vectors, 0.0, 0.1)]),
    ):
        config = TrainConfig(optimizer=name, beta1=0.7, beta2=0.8, **RATES)
        optimizers = make_optimizers(model, config, torch.float32)
        assert [type(o) for o in optimizers] == [Muon] * (name == "muon") + [torch.optim.AdamW]
        groups = [group for o in optimizers for group in o.param_groups]
        found = [(set(g["params"]), g["weight_decay"], g["initial_lr"]) for g in groups]
        assert found == expected and all(g["lr"] == g["initial_lr"] for g in groups)
        assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
        assert groups[-1]["betas"] == (0.7, 0.8)
        if name == "muon":
            assert (groups[0]["momentum"], optimizers[0].dtype) == (0.8, torch.float32)


def test_a_parameter_that_no_optimizer_has_is_noticed():
    model = small_model()
    model.extra = torch.nn.Parameter(torch.zeros(2, 2, 2))
    with pytest.raises(AssertionError):
        make_optimizers(model, TrainConfig(), torch.float32)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_rates_of_a_run_rise_and_fall_together(tiny_run, before_update, name):
    seen = []

    def note(_step, _model, optimizers) -> None:
        seen.append([group["lr"] for optimizer in optimizers for group in optimizer.param_groups])

    before_update(note)
    tiny_run(optimizer=name, max_iters=3, **RATES)
    peaks = [0.5, 0.1, 0.1] if name == "muon" else [0.1, 0.1]
    for rates, part in zip(seen, (1, 1 / 3, 2 / 3), strict=True):  # 2 of 3 steps of warm-up
        assert rates == pytest.approx([part * peak for peak in peaks])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_loaded_optimizers_go_on_with_their_moments_but_with_this_runs_rates(name):
    model, batch = small_model(), torch.randint(9, (2, 8))
    optimizers = make_optimizers(model, TrainConfig(optimizer=name), torch.float32)
    model(batch, batch)[1].backward()
    for optimizer in optimizers:
        optimizer.step()
    other = TrainConfig(optimizer=name, learning_rate=0.2, muon_lr=0.2, weight_decay=0.0)
    loaded = make_optimizers(model, other, torch.float32)
    load_optimizers(loaded, [optimizer.state_dict() for optimizer in optimizers])
    for a, b in zip(optimizers, loaded, strict=True):
        torch.testing.assert_close(dict(b.state), dict(a.state), rtol=0, atol=0)
    groups = [group for optimizer in loaded for group in optimizer.param_groups]
    assert all((g["lr"], g["initial_lr"], g["weight_decay"]) == (0.2, 0.2, 0.0) for g in groups)
    with pytest.raises(ValueError):
        load_optimizers(loaded, [])
