"""A loss or gradient that is not finite ends the run, and the error names the cause."""

import math
from configurator import UserError
from pathlib import Path

import pytest
import torch
from conftest import logged, weights

import train
from support.checkpoint import load_checkpoint


def before_step(monkeypatch, step_to_change: int, change) -> None:
    """Have training runs call change(trainer) before a step."""
    train_step = train.Trainer.train_step

    def changed(trainer, step, *args):
        if step == step_to_change:
            with torch.no_grad():
                change(trainer)
        return train_step(trainer, step, *args)

    monkeypatch.setattr(train.Trainer, "train_step", changed)


def error_after(tiny_run, monkeypatch, poison, **changed) -> str:
    """Return the error of a run that is poisoned before step 8, after checking what is kept."""
    before_step(monkeypatch, 8, poison)
    # Every evaluation saves, however fast this machine is.
    monkeypatch.setattr(train.Trainer, "save_is_due", lambda _, interval: interval == 0)
    with pytest.raises(UserError) as error:
        tiny_run(**changed)
    kept = load_checkpoint(Path("out/tiny/ckpt.pt"))[1]
    assert kept["step"] == 6 and all(p.isfinite().all() for p in kept["model"].values())
    assert logged(Path("out/tiny"))[-1]["step"] == 8
    message = str(error.value)
    assert "\n" not in message and "step 8: the loss is " in message
    assert "at learning rate 0.00" in message and "ckpt.pt is unchanged" in message
    norms = message.split("after gradient norms of ")[1].split(";")[0]
    assert all(0 < float(norm) < 100 for norm in norms.split(", ")) and norms.count(", ") == 4
    return message


def poison_a_bias(trainer) -> None:
    trainer.model.transformer.h[1].mlp.c_fc.weight[3, 3] = math.nan


def test_weights_that_are_not_finite_are_named(tiny_run, monkeypatch):
    message = error_after(tiny_run, monkeypatch, poison_a_bias)
    assert "first not finite: the output of transformer.h.1.mlp.c_fc" in message
    assert "cause: the weights, 1 values of transformer.h.1.mlp.c_fc.weight are not" in message


def test_a_batch_that_alone_overflows_is_named(tiny_run, monkeypatch):
    """The embedding of a token that only this batch has is too large for sums in float32."""

    def poison(trainer):
        trainer.model.transformer.wte.weight[0] = 3e38
        micro_batch = trainer.micro_batch

        def token_0_in_step_8_only(step, micro):
            x, y = micro_batch(step, micro)
            x[x == 0] = 5
            x[0, 3] = 0 if step == 8 else 5
            return x, y

        trainer.micro_batch = token_0_in_step_8_only

    message = error_after(tiny_run, monkeypatch, poison, tie_weights=False)
    assert "also in float32; cause: this batch, another one has a loss of" in message


def test_weights_that_are_too_large_are_named(tiny_run, monkeypatch):
    def poison(trainer):
        trainer.model.transformer.h[0].attn.c_proj.weight.fill_(3e38)

    message = error_after(tiny_run, monkeypatch, poison)
    assert "cause: the weights are too large for any batch" in message


def test_a_dtype_that_overflows_is_named(tiny_run, monkeypatch):
    def poison(trainer):
        trainer.model.transformer.h[0].mlp.c_fc.weight.mul_(1e7)
        trainer.model.transformer.h[0].mlp.c_proj.weight.mul_(1e-7)

    message = error_after(tiny_run, monkeypatch, poison, dtype="float16")
    assert "first not finite: the output of transformer.h.0.mlp.c_fc" in message
    assert "cause: float16, because with --dtype=float32 the loss is 2." in message


def nan_gradient(module, inputs, _outputs):
    return (torch.full_like(inputs[0], math.nan),)


def test_a_gradient_that_is_not_finite_is_named(tiny_run, monkeypatch):
    def poison(trainer):
        trainer.model.transformer.h[0].ln_1.register_full_backward_hook(nan_gradient)

    message = error_after(tiny_run, monkeypatch, poison)
    assert "the loss is 2." in message and "the gradient norm nan" in message
    assert "first not finite: the gradient of transformer." in message


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_that_the_float16_scaler_skips_are_no_errors(tiny_run, monkeypatch, optimizer):
    before_step(monkeypatch, 3, lambda trainer: trainer.scaler.update(new_scale=2.0**40))
    out_dir = tiny_run(dtype="float16", optimizer=optimizer)
    norms = [r["grad_norm"] for r in logged(out_dir) if "loss" in r]
    assert norms[2] is not None and norms[3] is None
    assert all(p.isfinite().all() for p in weights(out_dir).values())


@pytest.mark.parametrize("name", ["wpe", "h.0.mlp.c_fc"])
def test_one_gradient_that_overflows_in_float16_skips_the_step_of_both_optimizers(
    tiny_trainer, name
):
    """AdamW has the positions and Muon the matrix of the MLP."""
    trainer = tiny_trainer(dtype="float16", optimizer="muon")

    def state_after(step: int) -> list[torch.Tensor]:
        trainer.train_step(step, lr=0.01)
        moments = [s for o in trainer.optimizers for s in o.state.values()]
        return [p.detach().clone() for p in trainer.model.parameters()] + [
            value.clone() for each in moments for value in each.values()
        ]

    before = state_after(0)
    weight = trainer.model.transformer.get_submodule(name).weight
    hook = weight.register_hook(lambda gradient: gradient * math.inf)
    assert all(map(torch.equal, before, state_after(1)))
    hook.remove()
    after = state_after(2)
    assert all(value.isfinite().all() for value in after)
    assert not any(map(torch.equal, before, after))


def test_gradients_that_no_scale_of_float16_makes_finite_end_the_run(tiny_run, monkeypatch):
    def poison(trainer):
        trainer.model.transformer.h[0].ln_1.register_full_backward_hook(nan_gradient)

    before_step(monkeypatch, 0, poison)
    with pytest.raises(UserError, match=r"the loss is 2\..* the gradient norm nan"):
        tiny_run(dtype="float16", max_iters=100)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_weight_changes_until_a_loss_that_is_not_finite_is_read(tiny_trainer, optimizer):
    """On a GPU the figures of a step are read at the next log line, after more steps."""
    trainer = tiny_trainer(optimizer=optimizer)
    embedding = trainer.model.transformer.wpe.weight
    for step in range(7):
        if step == 3:
            sound = embedding[3, 3].item()
            embedding.data[3, 3] = math.inf
        if step == 5:  # from here on the loss is finite again
            embedding.data[3, 3] = sound
        before = {name: p.clone() for name, p in trainer.model.named_parameters()}
        figures = trainer.train_step(step, lr=0.01)
        assert figures[0].isfinite().item() is (step not in (3, 4))
        after = dict(trainer.model.named_parameters())
        moved = [name for name, p in before.items() if not torch.equal(p, after[name])]
        assert moved == (list(before) if step < 3 else [])
    with pytest.raises(UserError, match=r"step 3: the loss is nan and .* after gradient norms of"):
        trainer.read(figures)
