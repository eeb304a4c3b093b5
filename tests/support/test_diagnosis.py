"""The error of a run whose loss or gradient is not finite names the cause."""

import math
from configurator import UserError
from pathlib import Path

import pytest
import torch
from conftest import logged

from model import GPT, GPTConfig
from support.diagnosis import explain

SHAPE = GPTConfig(vocab_size=9, block_size=8, n_layer=2, n_head=2, n_embd=8, tie_weights=False)


def explanation(poison, dtype: torch.dtype = torch.float32) -> str:
    """Return the explanation for a model that was poisoned; only one batch has the token 0."""
    torch.manual_seed(0)
    model = GPT(SHAPE)
    batch = torch.arange(16).view(2, 8) % 8
    with torch.no_grad():
        poison(model)
    before = [p.detach().clone() for p in model.parameters()]
    text = explain(model, (batch, batch), (batch + 1, batch + 1), dtype)
    assert "\n" not in text and all(p.grad is None for p in model.parameters())
    for a, b in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    return text


def test_nothing_is_explained_where_all_is_finite():
    assert explanation(lambda model: None) == ""


def test_weights_that_are_not_finite_are_named():
    def poison(model):
        model.transformer.h[1].mlp.c_fc.weight[3, 3] = math.nan

    text = explanation(poison)
    assert text.startswith("first not finite: the output of transformer.h.1.mlp.c_fc;")
    assert text.endswith(
        "cause: the weights, 1 values of transformer.h.1.mlp.c_fc.weight are not finite"
    )


def test_a_batch_that_alone_overflows_is_named():
    """The embedding of a token that only this batch has is too large for sums in float32."""

    def poison(model):
        model.transformer.wte.weight[0] = 3e38

    text = explanation(poison)
    assert "first not finite: the output of transformer.h.0.ln_1, also in float32" in text
    assert "cause: this batch, another one has a loss of 2." in text


def test_weights_that_are_too_large_are_named():
    text = explanation(lambda model: model.transformer.h[0].attn.c_proj.weight.fill_(3e38))
    assert "cause: the weights are too large for any batch" in text


def test_a_dtype_that_overflows_is_named():
    def poison(model):
        model.transformer.h[0].mlp.c_fc.weight.mul_(1e8)
        model.transformer.h[0].mlp.c_proj.weight.mul_(1e-8)

    text = explanation(poison, torch.float16)
    assert text.startswith(
        "first not finite: the output of transformer.h.0.mlp.c_fc; cause: float16"
    )
    assert "because with --dtype=float32 the loss is 2." in text


@pytest.mark.parametrize("layer", [0, 1])
def test_a_gradient_that_is_not_finite_is_named(layer):
    """The backward pass goes from the last layer to the first."""

    def poison(model):
        hook = lambda _module, inputs, _outputs: (inputs[0] * math.nan,)  # noqa: E731
        model.transformer.h[layer].mlp.register_full_backward_hook(hook)

    text = explanation(poison)
    name = f"transformer.h.{layer}.ln_2.bias"
    assert text.startswith(
        f"first not finite: the gradient of {name}, also in float32; cause: the w"
    )


def test_a_run_says_why_with_the_batch_and_dropout_of_the_failed_step(
    tiny_run, before_update, monkeypatch
):
    def poison(step, model, _):
        if step == 8:
            model.transformer.wpe.weight.data[3, 3] = math.inf

    before_update(poison)
    with pytest.raises(
        UserError, match=r"step 8: .*cause: the weights, 1 values of transformer\.wpe"
    ):
        tiny_run(dropout=0.1)
    assert logged(Path("out/tiny"))[-1]["step"] == 8


def test_a_loss_that_is_finite_the_second_time_blames_the_compiler(tiny_run, before_update):
    passes = []

    def once(_module, _inputs, output):
        passes.append(output[1])
        return (None, output[1] * math.nan) if len(passes) == 1 else output

    before_update(lambda step, model, _: step == 8 and model.register_forward_hook(once))
    with pytest.raises(UserError, match=r"step 8: .* happen again: try --compile=False"):
        tiny_run(dropout=0.5, dtype="float32", max_iters=12, eval_interval=100)
    # the first pass is repeated exactly, with the same batch and the same dropout
    assert passes[0].item() == pytest.approx(passes[2].item(), rel=1e-6)
