"""Where a run starts: anew, at its checkpoint, pretrained; and what is refused or said."""

import os
from pathlib import Path

import pytest
import torch
from conftest import TEXT, assert_same_run

import prepare_shakespeare
import train
from configurator import UserError
from support import data, start
from support.checkpoint import build_model, load_checkpoint
from support.processes import Processes


def find(tiny_run, **changed):
    config = train.TrainConfig(**tiny_run.options | changed)
    meta, tokenizer = data.open_dataset(Path("data") / config.dataset)[:2]
    return start.find_start(config, meta, tokenizer, Processes("cpu"))


def test_a_new_run_has_the_shape_of_its_options(tiny_run):
    changed = {"bias": False, "tie_weights": False, "pad_vocab_to": 32, "gelu": "exact"}
    state = find(tiny_run, dropout=0.1, **changed)
    size = {"vocab_size": 18, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}
    assert vars(state.shape) == {**size, "dropout": 0.1, **changed}
    assert not state.weights and (state.step, state.evaluated_step) == (0, -1)
    assert find(tiny_run, pad_vocab_to=18).shape.pad_vocab_to == 18


def test_auto_starts_anew_without_a_checkpoint_and_continues_with_one(tiny_run):
    whole = tiny_run(out_dir="out/whole", max_iters=4)
    tiny_run(out_dir="out/parts", init_from="auto", max_iters=3, lr_decay_iters=4)
    for _ in range(2):  # the second time nothing is left to do
        parts = tiny_run(out_dir="out/parts", init_from="auto", max_iters=4)
    a, b = (load_checkpoint(run / "ckpt.pt") for run in (whole, parts))
    assert b.step == 4
    torch.testing.assert_close(a.weights, b.weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"n_embd": 32}, "n_embd=16 and this run has n_embd=32; set it back to continue"),
        ({"block_size": 8}, "block_size=16 and this run has block_size=8"),
        ({"tie_weights": False}, "tie_weights=True and this run has tie_weights=False"),
        ({"optimizer": "muon"}, "optimizer=adamw and this run has optimizer=muon"),
        ({"max_iters": 1}, "is at step 2, after max_iters=1; raise it"),
    ],
    ids=str,
)
def test_an_option_that_contradicts_the_checkpoint_is_named(tiny_run, changed, words):
    tiny_run(max_iters=2)
    with pytest.raises(UserError, match=words):
        find(tiny_run, init_from="resume", **{"max_iters": 2, **changed})


def test_options_of_the_shape_that_have_their_default_come_from_the_checkpoint(
    tiny_run, monkeypatch
):
    changed = {"bias": False, "tie_weights": False, "pad_vocab_to": 32, "gelu": "exact"}
    out_dir = tiny_run(max_iters=1, **changed)
    shape = load_checkpoint(out_dir / "ckpt.pt").shape
    for name in ("n_layer", "n_head", "n_embd", "block_size"):
        del tiny_run.options[name]  # the options are then those of GPT-2 Small
    assert find(tiny_run, init_from="resume").shape == shape
    assert load_checkpoint(tiny_run(init_from="resume") / "ckpt.pt").shape == shape
    monkeypatch.setattr(train.TrainConfig.__dataclass_fields__["block_size"], "default", 8)
    assert find(tiny_run, init_from="resume", block_size=8).shape == shape  # a longer context


def test_dropout_and_options_of_a_resumed_run_are_its_own(tiny_run):
    tiny_run(max_iters=1, dropout=0.5, seed=1)
    state = find(tiny_run, init_from="resume", dropout=0.1, seed=2)
    assert state.shape.dropout == state.train_config["dropout"] == 0.1
    assert (state.train_config["seed"], state.train_config["init_from"]) == (2, "scratch")
    assert (state.step, state.evaluated_step) == (1, 1) and state.best_val_loss < 3


def test_other_data_is_refused(tiny_run):
    tiny_run(max_iters=1)
    Path("tiny.txt").write_text(TEXT.replace("times", "emits"), encoding="utf-8")
    prepare_shakespeare.main(prepare_shakespeare.PrepareConfig(input="tiny.txt", dataset="tiny"))
    with pytest.raises(UserError, match=r"was made with train\.bin="):
        tiny_run(init_from="resume")


def test_processes_that_start_at_different_steps_are_refused(tiny_run, monkeypatch):
    monkeypatch.setattr(Processes, "gather", lambda _, value: [value, "12"])
    with pytest.raises(UserError, match=r"different steps \(0, 12\); out_dir=out/tiny must be"):
        find(tiny_run)


def test_a_pretrained_run_has_its_own_shape_a_shorter_context_and_can_be_resumed(
    tiny_run, monkeypatch
):
    source = load_checkpoint(tiny_run(max_iters=3, pad_vocab_to=32, out_dir="out/a") / "ckpt.pt")
    model = build_model(source.shape, source.weights)
    tokenizer = data.open_dataset(Path("data/tiny"))[1]
    monkeypatch.setattr(start, "load_model", lambda name: (model, tokenizer, None))
    options = {"init_from": "some/name", "n_layer": 5, "block_size": 8, "dropout": 0.2}
    state = find(tiny_run, **options)
    shape = state.shape
    assert (shape.n_layer, shape.block_size, shape.dropout, shape.pad_vocab_to) == (2, 8, 0.2, 32)
    whole = source.weights["transformer.wpe.weight"]
    assert torch.equal(state.weights["transformer.wpe.weight"], whole[:8])
    assert find(tiny_run, init_from="some/name", block_size=99).shape.block_size == 16
    out_dir = tiny_run(**options, max_iters=1, learning_rate=1e-12, min_lr=0.0)
    moved = load_checkpoint(out_dir / "ckpt.pt")
    torch.testing.assert_close(moved.weights, state.weights, rtol=1e-4, atol=1e-6)
    assert moved.train_config["init_from"] == "some/name"
    for origin in ("resume", "auto"):  # with the options of the run, which are not its shape
        state = find(tiny_run, **options | {"init_from": origin, "max_iters": 2})
        assert state.shape == shape and state.train_config["init_from"] == "some/name"
    tokenizer = type(tokenizer)("abc")
    with pytest.raises(UserError, match="data/tiny was not made with the tokenizer of init_from=s"):
        find(tiny_run, **options)


# The folder of a run


def test_a_new_run_keeps_an_earlier_one(tiny_run, capsys):
    for seed in range(3):
        tiny_run(seed=seed, max_iters=0)
    assert f"the earlier run is now in {Path('out/tiny.2').resolve()}" in capsys.readouterr().out
    Path("out/tiny/ckpt.pt").unlink()  # the best weights alone are worth keeping, too
    tiny_run(seed=3, max_iters=0)
    for seed, name in enumerate(("tiny.1", "tiny.2", "tiny.3", "tiny")):
        assert load_checkpoint(Path(f"out/{name}/best.pt")).train_config["seed"] == seed


def test_a_new_run_removes_the_log_of_one_that_saved_nothing(tiny_run):
    whole = tiny_run(out_dir="out/whole", max_iters=2)
    Path("out/tiny").mkdir()
    Path("out/tiny/log.jsonl").write_text('{"step": 0, "loss": 1.0}\n', encoding="utf-8")
    assert_same_run(tiny_run(max_iters=2), whole)
    assert not Path("out/tiny.1").exists()


def test_a_folder_with_other_runs_or_the_current_folder_is_not_renamed(tiny_run):
    first = (tiny_run(out_dir=".", max_iters=0) / "ckpt.pt").read_bytes()
    tiny_run(out_dir="out", max_iters=0)
    tiny_run(out_dir="out/tiny", max_iters=0)
    for out_dir in (".", str(Path().resolve()), "out"):
        with pytest.raises(UserError, match="contains other runs or the folder that you are in"):
            tiny_run(out_dir=out_dir, max_iters=1)
    assert Path("ckpt.pt").read_bytes() == first
    with pytest.raises(UserError, match="out_dir is empty; name a folder"):  # an unset $OUT
        tiny_run(out_dir="")


@pytest.mark.skipif(os.name == "nt", reason="Windows lets only administrators make links")
def test_a_run_folder_may_be_a_link(tiny_run):
    for name in ("drive", "out"):
        Path(name).mkdir()
    Path("out/link").symlink_to(Path("drive").resolve(), target_is_directory=True)
    for seed in (0, 1):
        tiny_run(seed=seed, max_iters=0, out_dir="out/link")
    assert load_checkpoint(Path("drive.1/best.pt")).train_config["seed"] == 0
    assert load_checkpoint(Path("drive/best.pt")).train_config["seed"] == 1
