"""The error of a run whose loss or gradient is not finite names the cause."""

import math
from pathlib import Path

import pytest
import torch
from conftest import logged

from configurator import UserError
from model import GPT, GPTConfig
from support.diagnosis import explain

SHAPE = GPTConfig(vocab_size=9, block_size=8, n_layer=2, n_head=2, n_embd=8, tie_weights=False)


def nan_weight(model):
    model.transformer.h[1].mlp.c_fc.weight[3, 3] = math.nan


def large_embedding(model):
    model.transformer.wte.weight[0] = 3e38  # of a token that only the first batch has


def large_weights(model):
    model.transformer.h[0].attn.c_proj.weight.fill_(3e38)


def large_products(model):
    model.transformer.h[0].mlp.c_fc.weight.mul_(1e8)
    model.transformer.h[0].mlp.c_proj.weight.mul_(1e-8)


def dropout(model):
    model.transformer.drop.p = 0.5  # its draws leave the random state as it was


def nan_gradients(model):
    for block in model.transformer.h:  # the backward pass meets the last one first
        hook = lambda _module, inputs, _outputs: (inputs[0] * math.nan,)  # noqa: E731
        block.mlp.register_full_backward_hook(hook)


@pytest.mark.parametrize(
    ("poison", "dtype", "where", "cause"),
    [
        (nan_weight, "float32", "output of transformer.h.1.mlp.c_fc", "the weights, 1 values of"),
        (large_embedding, "float32", "output of transformer.h.0.ln_1, also in", "this batch, ano"),
        (large_weights, "float32", "output of transformer.h.0.ln_2, also in", "the weights ar"),
        (large_products, "float16", "output of transformer.h.0.mlp.c_fc", "float16, because with"),
        (nan_gradients, "float32", "gradient of transformer.h.1.ln_2.bias, al", "the weights ar"),
        (dropout, "float16", "", ""),
    ],
)
def test_the_place_and_the_cause_are_named(poison, dtype, where, cause):
    torch.manual_seed(0)
    model = GPT(SHAPE)
    batch = torch.arange(16).view(2, 8) % 8
    with torch.no_grad():
        poison(model)
    before, random = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    text = explain(model, (batch, batch), (batch + 1, batch + 1), getattr(torch, dtype))
    if where:
        assert text.startswith(f"first not finite: the {where}") and f"; cause: {cause}" in text
    else:
        assert text == ""
    assert "\n" not in text and all(p.grad is None for p in model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    for a, b in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_a_run_says_why(tiny_run, before_update):
    def poison(step, model, _):
        if step == 8:
            model.transformer.wpe.weight.data[3, 3] = math.inf

    before_update(poison)
    with pytest.raises(UserError, match=r"step 8: .*the weights, 1 values of transformer\.wpe"):
        tiny_run(dropout=0.1)
    assert logged(Path("out/tiny"))[-1]["step"] == 8


def test_a_loss_that_is_finite_the_second_time_blames_the_compiler(tiny_run, before_update):
    passes = []

    def once(_module, _inputs, output):
        passes.append(output[1])
        return (None, output[1] * math.nan) if len(passes) == 1 else output

    before_update(lambda step, model, _: step == 8 and model.register_forward_hook(once))
    with pytest.raises(UserError, match=r"step 8: .* no cause was found: try --compile=False"):
        tiny_run(dropout=0.5, dtype="float32", max_iters=12, eval_interval=100)
    # the first pass is repeated exactly, with the same batch and the same dropout
    assert passes[0].item() == pytest.approx(passes[2].item(), rel=1e-6)
