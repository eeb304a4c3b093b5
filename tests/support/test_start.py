"""Where a run starts: anew, at its checkpoint, and what is refused or said on the way."""

from configurator import UserError
from pathlib import Path

import pytest
import torch
from conftest import TEXT, assert_same_run, logged, weights

import prepare_shakespeare
import train
from support.checkpoint import load_checkpoint

CHANGED = "changed since the checkpoint, so this is another run: "


def test_auto_starts_anew_without_a_checkpoint_and_continues_with_one(tiny_run):
    whole = tiny_run(out_dir="out/whole")
    tiny_run(out_dir="out/parts", init_from="auto", max_iters=7, lr_decay_iters=12)
    for _ in range(2):  # the second time nothing is left to do
        parts = tiny_run(out_dir="out/parts", init_from="auto", lr_decay_iters=12)
        assert load_checkpoint(parts / "ckpt.pt")[1]["step"] == 12
    torch.testing.assert_close(weights(whole), weights(parts), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"n_embd": 32}, "n_embd=16 and this run has n_embd=32; set it back to continue"),
        ({"n_layer": 3}, "n_layer=2 and this run has n_layer=3"),
        ({"block_size": 8}, "block_size=16 and this run has block_size=8"),
        ({"optimizer": "muon"}, "optimizer=adamw and this run has optimizer=muon"),
        ({"out_dir": "out/none"}, "no such checkpoint"),
        ({"max_iters": 5}, "is at step 12, after max_iters=5; raise it"),
    ],
    ids=str,
)
def test_an_option_that_contradicts_the_checkpoint_is_named(tiny_run, changed, words):
    tiny_run()
    with pytest.raises(UserError, match=words):
        tiny_run(init_from="resume", **changed)


def test_options_of_the_shape_that_have_their_default_come_from_the_checkpoint(
    tiny_run, monkeypatch
):
    changed = {"bias": False, "tie_weights": False, "pad_vocab_to": 32, "gelu": "exact"}
    whole = tiny_run(out_dir="out/whole", max_iters=8, eval_interval=4, **changed)
    out_dir = tiny_run(max_iters=4, eval_interval=4, lr_decay_iters=8, **changed)
    for name in ("n_layer", "n_head", "n_embd", "block_size"):
        del tiny_run.options[name]  # the options are then those of GPT-2 Small
    tiny_run(init_from="resume", max_iters=8, eval_interval=4, lr_decay_iters=8)
    model = load_checkpoint(out_dir / "ckpt.pt")[0]
    assert (model.config.n_layer, model.config.n_embd, model.config.bias) == (2, 16, False)
    assert_same_run(whole, out_dir)


def test_a_context_longer_than_the_default_comes_from_the_checkpoint(tiny_run, monkeypatch):
    tiny_run(max_iters=1)
    monkeypatch.setattr(train.TrainConfig.__dataclass_fields__["block_size"], "default", 8)
    resumed = tiny_run(init_from="resume", max_iters=2, block_size=8)
    assert load_checkpoint(resumed / "ckpt.pt")[1]["train_config"]["block_size"] == 16


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 1}, "seed: 1337 -> 1"),
        ({"batch_size": 2}, "batch_size: 4 -> 2"),
        ({"learning_rate": 0.02, "beta2": 0.9}, "learning_rate: 0.01 -> 0.02, beta2: 0.95 -> 0.9"),
        ({"dropout": 0.1}, "dropout: 0.0 -> 0.1"),
        ({"max_iters": 8, "log_interval": 2, "sample_interval": 4, "eval_iters": 1}, None),
        ({"max_iters": 8, "lr_decay_iters": 0}, "max_iters: 4 -> 8, lr_decay_iters: 12 -> 0"),
    ],
    ids=str,
)
def test_a_change_that_makes_another_run_is_said_in_one_line(tiny_run, capsys, changed, said):
    run = {"max_iters": 4, "eval_interval": 4, "lr_decay_iters": 12}
    tiny_run(**run)
    capsys.readouterr()
    out_dir = tiny_run(**{**run, "max_iters": 6, **changed}, init_from="resume")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(CHANGED)]
    assert lines == ([CHANGED + said] if said else [])
    assert logged(out_dir)[-1]["step"] == changed.get("max_iters", 6)


def test_dropout_of_a_resumed_run_is_that_of_its_options(tiny_run, tiny_trainer):
    tiny_run(max_iters=4, dropout=0.5)
    trainer = tiny_trainer(init_from="resume", dropout=0.1)
    assert trainer.model.transformer.h[0].attn.dropout == 0.1
    assert trainer.model.config.dropout == 0.1


def test_other_data_is_refused(tiny_run):
    tiny_run()
    Path("tiny.txt").write_text(TEXT.replace("times", "emits"), encoding="utf-8")
    prepare_shakespeare.main(prepare_shakespeare.PrepareConfig(input="tiny.txt", dataset="tiny"))
    with pytest.raises(UserError, match=r"was made with train\.bin="):
        tiny_run(init_from="resume")


def test_processes_that_start_at_different_steps_are_refused(tiny_trainer, monkeypatch):
    monkeypatch.setattr(train.Processes, "gather", lambda _, value: [value, "12"])
    with pytest.raises(UserError, match=r"different steps \(0, 12\); out_dir=out/tiny must be"):
        tiny_trainer()
