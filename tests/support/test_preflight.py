"""Preflight passes a sound run, and catches each fault, and only that, when it is put in."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import model
import train
from configurator import UserError, read_options
from support import checkpoint, preflight
from support.data import Dataset
from support.tokenizer import CharTokenizer


@pytest.fixture
def trainer(tiny_run):
    def make(**changed) -> train.Trainer:
        options = [f"--{name}={value}" for name, value in {**tiny_run.options, **changed}.items()]
        config = read_options(train.TrainConfig, options)
        return train.Trainer(config, train.Processes(config))

    return make


def failing(trainer: train.Trainer) -> set[str]:
    results = {name: check(trainer) for name, check in preflight.CHECKS.items()}
    assert all("\n" not in measured for _, measured in results.values())
    return {name for name, (ok, _) in results.items() if not ok}


@pytest.mark.parametrize(
    "changed", [{}, {"dtype": "bfloat16", "tie_weights": False, "bias": False}], ids=str
)
def test_a_sound_run_passes(trainer, changed):
    assert failing(trainer(**changed)) == set()


def test_loss_of_an_untrained_model(trainer):
    t = trainer(tie_weights=False)
    with torch.no_grad():
        t.model.lm_head.weight.mul_(100)
    assert failing(t) == {"initial loss"}


def test_a_parameter_without_gradient(trainer):
    t = trainer()
    t.model.transformer.h[1].mlp.c_fc.bias.requires_grad_(False)
    assert failing(t) == {"gradients"}


def test_a_missing_mask(trainer, monkeypatch):
    def all_see_all(q, k, v, _dropout):
        return (q @ k.transpose(2, 3) / q.size(3) ** 0.5).softmax(dim=-1) @ v

    monkeypatch.setattr(model, "attention", all_see_all)
    assert failing(trainer()) == {"the future, by perturbation", "the future, by gradient"}


def test_missing_positions(trainer):
    t = trainer()
    with torch.no_grad():
        t.model.transformer.wpe.weight.zero_()
    assert failing(t) == {"positions"}


def test_targets_that_do_not_belong_to_the_inputs(trainer, monkeypatch):
    def shuffled(logits, targets, **options):
        return F.cross_entropy(logits, targets[torch.randperm(len(targets))], **options)

    class Functional:
        cross_entropy = staticmethod(shuffled)

        def __getattr__(self, name):
            return getattr(F, name)

    monkeypatch.setattr(model, "F", Functional())
    assert failing(trainer()) == {"one batch by heart"}


def rewrite(folder, tokenizer, train_ids, val_ids):
    from support.data import write_dataset

    write_dataset(folder, tokenizer, train_ids, val_ids, len(val_ids), {"file": "test"})


def test_validation_text_inside_the_training_text(trainer, dataset):
    data = Dataset(dataset, 16)
    ids = data.train.open().tolist()
    rewrite(dataset, data.tokenizer, ids, ids[1000:1800])
    assert failing(trainer()) == {"data"}


def test_tokens_of_something_that_is_no_text(trainer, dataset):
    ids = np.random.default_rng(0).integers(0, 32, 5000).tolist()
    rewrite(dataset, CharTokenizer("".join(map(chr, range(32)))), ids[:4000], ids[4000:])
    assert failing(trainer()) == {"text"}


def test_a_checkpoint_that_comes_back_different(trainer, monkeypatch):
    saved = torch.save

    def altered(value, file):
        value["model"]["lm_head.weight"] = value["model"]["lm_head.weight"] + 1e-3
        saved(value, file)

    monkeypatch.setattr(checkpoint.torch, "save", altered)
    assert failing(trainer()) == {"checkpoint"}


def test_a_disk_without_room_for_the_run(trainer, monkeypatch):
    monkeypatch.setattr(preflight, "free_bytes", lambda _: 10_000)
    assert failing(trainer()) == {"checkpoint"}


def test_a_dtype_that_can_not_hold_the_activations(trainer):
    t = trainer(dtype="float16")
    with torch.no_grad():
        t.model.transformer.h[0].mlp.c_fc.weight.mul_(1e7)
        t.model.transformer.h[0].mlp.c_proj.weight.mul_(1e-7)
    assert failing(t) == {"precision"}


def test_the_command_prints_a_line_a_check_and_the_bill_and_leaves_no_file(tiny_run, capsys):
    tiny_run(preflight=True, max_iters=7200)
    lines = capsys.readouterr().out.splitlines()
    from pathlib import Path

    assert [line.split(":")[0] for line in lines if line.startswith("ok ")] == [
        f"ok   {n}" for n in preflight.CHECKS
    ]
    assert any("921,600 tokens in 7,200 steps of 128" in line for line in lines)
    assert any("the whole run" in line for line in lines)
    assert "warning: not compiled: asked for" in lines
    assert not any(Path("out/tiny").iterdir())


def test_a_failed_check_ends_the_command(tiny_run, monkeypatch, capsys):
    monkeypatch.setattr(model.GPT, "init_weights", lambda self: None)
    with pytest.raises(UserError, match="a check has failed"):
        tiny_run(preflight=True)
    assert "FAIL initial loss" in capsys.readouterr().out


def test_bill_counts_flops_as_kaplan_does(trainer):
    """6 N + 12 n_layer n_embd T per token (Kaplan et al. 2020), by hand for the tiny model."""
    t = trainer(max_iters=1)
    n = t.model.num_params()
    assert f"{(6 * n + 12 * 2 * 16 * 16) * 128:.3g} floating-point" in preflight.bill(t)
