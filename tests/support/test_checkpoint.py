"""Checkpoints: what is written, and what is refused, fast and in one line."""

import math
import os
import pickle
import subprocess
import sys
import time
from configurator import UserError
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    assert_same_run,
    damaged,
    damages,
    many_examples,
    odd_values,
    options,
    or_user_error,
)
from hypothesis import given
from hypothesis import strategies as st

import sample
import train
from model import GPT
from support.checkpoint import load_checkpoint, tensor_bytes


@pytest.fixture
def path(tiny_run) -> Path:
    return tiny_run(max_iters=2, eval_interval=2) / "ckpt.pt"


def test_bytes_of_nested_tensors_count_shared_memory_once():
    x = torch.zeros(10)
    assert tensor_bytes([x, {"a": x, "b": (torch.zeros(3, dtype=torch.int64), "text")}]) == 40 + 24


def test_a_checkpoint_has_plain_values_and_names_without_a_prefix(path):
    checkpoint = torch.load(path, weights_only=True)
    assert not any("module" in name or "_orig" in name for name in checkpoint["model"])
    assert checkpoint["step"] == 2 and checkpoint["tokenizer"]["kind"] == "char"


def test_a_model_is_loaded_in_float32_with_its_head_tied(path):
    checkpoint = torch.load(path, weights_only=True)
    half = {name: p.bfloat16() for name, p in checkpoint["model"].items()}
    torch.save({**checkpoint, "model": half}, path)
    model = load_checkpoint(path)[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight


# Files that are not what they should be


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("was-run",)


def test_code_in_a_checkpoint_is_not_run(path):
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "step": Malicious()}, path)
    with pytest.raises(UserError, match=r"ckpt\.pt: can not be read as a checkpoint"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(UserError, match=r"ckpt\.pt: can not be read as a checkpoint"):
        load_checkpoint(path)
    assert not Path("was-run").exists()


def test_a_cut_or_foreign_checkpoint_is_refused(path):
    content = path.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"ckpt\.pt: can not be read") as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)
    torch.save({"model": {}}, path)
    with pytest.raises(UserError, match=r"ckpt\.pt: not a checkpoint of this program"):
        load_checkpoint(path)


@many_examples
def test_a_damaged_checkpoint_is_refused_or_the_same(path, fuzz):
    original, expected = path.read_bytes(), load_checkpoint(path)[1]

    @fuzz
    @given(damages)
    def load(damage):
        path.write_bytes(damaged(original, damage))
        loaded = or_user_error(lambda: load_checkpoint(path))
        if loaded is not None:  # the damage is in bytes without a meaning: padding, dates
            for key, value in expected.items():
                if key in ("model", "optimizers"):
                    torch.testing.assert_close(loaded[1][key], value, rtol=0, atol=0)
                else:
                    assert loaded[1][key] == value

    load()


@many_examples
def test_a_checkpoint_with_odd_values_is_refused_or_resumed(path, tiny_run, fuzz):
    """Any key of the checkpoint or of its dicts is replaced by any value."""
    good = torch.load(path, weights_only=True)
    inner = [(key, k) for key, value in good.items() if isinstance(value, dict) for k in value]
    state = [("optimizers", 0, key) for key in ("state", "param_groups")]
    places = [(key,) for key in good] + inner + state

    def replaced(value, keys, new):
        if not keys:
            return new
        copy = dict(value) if isinstance(value, dict) else list(value)
        copy[keys[0]] = replaced(value[keys[0]], keys[1:], new)
        return copy

    config = train.TrainConfig(**{**tiny_run.options, "init_from": "resume", "max_iters": 2})

    @fuzz
    @given(st.sampled_from(places), odd_values)
    def load(place, value):
        torch.save(replaced(good, place, value), path)
        if or_user_error(lambda: load_checkpoint(path)) is not None:
            or_user_error(lambda: train.Trainer(config, train.Processes("cpu")))

    load()


def nan_weight(checkpoint):
    return {"model": {**checkpoint["model"], "lm_head.weight": torch.full((18, 16), math.nan)}}


def int64_weight(checkpoint):
    zeros = torch.zeros(18, 16, dtype=torch.int64)
    return {"model": {**checkpoint["model"], "lm_head.weight": zeros}}


def missing_weight(checkpoint):
    weights = dict(checkpoint["model"])
    del weights["transformer.wpe.weight"]
    return {"model": weights}


def shape(**changed):
    return lambda checkpoint: {"model_config": {**checkpoint["model_config"], **changed}}


MISTAKES = {
    "a missing step": (lambda _: {"step": None}, "step is 'None', not int"),
    "a negative step": (lambda _: {"step": -1}, "step or best_val_loss is out of range"),
    "a step of True": (lambda _: {"step": True}, "step is 'True', not int"),
    "a dict as loss": (lambda _: {"best_val_loss": {}}, "best_val_loss is '{}', not float"),
    "a loss of NaN": (lambda _: {"best_val_loss": math.nan}, "best_val_loss is out of range"),
    "no tokenizer": (lambda _: {"tokenizer": None}, "tokenizer is 'None', not dict"),
    "no weights": (lambda _: {"model": None}, "model is 'None', not dict"),
    "no shape": (lambda _: {"model_config": None}, "do not fit the shape"),
    "NaN weights": (nan_weight, "lm_head.weight has values that are not finite"),
    "int64 weights": (int64_weight, "lm_head.weight has values that are not finite floating"),
    "a missing weight": (missing_weight, "transformer.wpe.weight has shape None"),
    "another width": (shape(n_embd=32), "has shape"),
    "heads that do not divide": (shape(n_head=3), "do not fit the shape"),
    "an unknown option": (shape(unknown=1), "do not fit the shape"),
    "a billion layers": (shape(n_layer=10**9), "do not fit the shape"),
    "a huge width": (shape(n_embd=20_000), "has shape"),
    "a huge context": (shape(block_size=1 << 50), "has shape"),
    "a list of optimizers": (lambda _: {"optimizers": 3}, "optimizers is '3', not list"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_checkpoint_is_named_also_by_sample(path, mistake):
    change, words = MISTAKES[mistake]
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, **change(checkpoint)}, path)
    started = time.perf_counter()
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert time.perf_counter() - started < 2
    assert words in str(error.value) and str(error.value).startswith(f"{path}: ")
    with pytest.raises(UserError) as error_of_sample:
        sample.main(sample.SampleConfig(out_dir=str(path.parent), start="3", max_new_tokens=1))
    assert str(error_of_sample.value) == str(error.value)


@pytest.mark.skipif(os.name == "nt", reason="Windows sets no limit on memory")
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS ignores the limit on memory")
def test_a_huge_shape_is_refused_with_little_memory(path):
    checkpoint = torch.load(path, weights_only=True)
    for name, changed in (("a.pt", {"n_layer": 10**9}), ("b.pt", {"n_embd": 20_000})):
        torch.save({**checkpoint, **shape(**changed)(checkpoint)}, name)
    code = """
import sys
from pathlib import Path
import torch
from configurator import UserError
from support.checkpoint import load_checkpoint
from support.runtime import peak_memory
before = peak_memory(torch.device("cpu"))
for name in ("a.pt", "b.pt"):
    try:
        load_checkpoint(Path(name))
    except UserError:
        print(peak_memory(torch.device("cpu")) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    first, second = map(int, done.stdout.split())
    assert first <= second < 200e6


def change_state(key: str, value):
    """Return a change of one value in the state of the first optimizer."""

    def change(saved):
        saved[0]["state"][0] = {**saved[0]["state"][0], key: value}

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved.clear(),
        lambda saved: saved[0].pop("state"),
        lambda saved: saved[0]["state"].pop(0),
        lambda saved: saved[0]["state"][0].pop("exp_avg"),
        change_state("exp_avg", torch.zeros(3)),
        change_state("exp_avg", "text"),
        lambda saved: saved.append(saved[0]),
    ],
    ids=["none", "no state", "a missing one", "no moment", "another shape", "text", "too many"],
)
def test_a_malformed_optimizer_state_is_named(path, tiny_run, change):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint["optimizers"])
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=r"ckpt\.pt: the optimizer's state does not fit the model"):
        tiny_run(init_from="resume", max_iters=4)


# Failed writes


def test_weights_that_are_not_finite_are_not_saved(tiny_run, monkeypatch):
    train_step = train.Trainer.train_step

    def then_poison(trainer, step, *args):
        figures = train_step(trainer, step, *args)
        if step == 8:
            with torch.no_grad():
                trainer.model.transformer.wpe.weight[3, 3] = math.inf
        return figures

    monkeypatch.setattr(train.Trainer, "train_step", then_poison)
    monkeypatch.setattr(train.Trainer, "save_is_due", lambda *_: True)
    with pytest.raises(UserError, match="not saved, the weights are not finite"):
        tiny_run()
    assert load_checkpoint(Path("out/tiny/ckpt.pt"))[1]["step"] == 8


@pytest.mark.skipif(os.name == "nt", reason="Windows sets no limit on the size of files")
def test_a_checkpoint_that_does_not_fit_the_disk_leaves_the_old_one(tiny_run):
    """A limit on the size of files makes writes fail as on a full disk."""
    out_dir = tiny_run(lr_decay_iters=24)
    before = (out_dir / "ckpt.pt").read_bytes()
    args = options(tiny_run, init_from="resume", max_iters=24, lr_decay_iters=24)
    code = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = [sys.executable, "-c", code, ROOT / "train.py", *args]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    needed = tensor_bytes(load_checkpoint(out_dir / "best.pt")[1])
    for words in ("best.pt: can not be written (File too large)", f"{needed:,} bytes", "are free"):
        assert words in done.stderr
    assert (out_dir / "ckpt.pt").read_bytes() == before and not list(out_dir.glob("*.tmp"))
    resumed = tiny_run(init_from="resume", max_iters=24, lr_decay_iters=24)
    assert_same_run(resumed, tiny_run(out_dir="out/whole", max_iters=24))


def test_weights_alone_can_not_be_resumed_but_sampled(tiny_run, capsys):
    out_dir = tiny_run()
    (out_dir / "best.pt").replace(out_dir / "ckpt.pt")
    with pytest.raises(UserError, match="has no optimizer state, so it can be sampled from but"):
        tiny_run(init_from="resume")
    sample.main(sample.SampleConfig(out_dir=str(out_dir), start="3", max_new_tokens=4))
    assert "\n3" in capsys.readouterr().out


def test_shapes_are_compared_before_weights_are_copied(path, monkeypatch):
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, **shape(n_embd=32)(checkpoint)}, path)
    monkeypatch.setattr(GPT, "load_state_dict", lambda *_, **__: pytest.fail("was called"))
    with pytest.raises(UserError, match="has shape"):
        load_checkpoint(path)
