"""Checkpoints and data sets that an earlier version wrote still work (see tests/old/README.md)."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import sample
import train
from configurator import read_options
from support.checkpoint import load_checkpoint
from support.log import read_log

TEXT = "3 timesit863s s15e8175mstset e7434t5.t s7 44m63\n"  # printed by the earlier version


@pytest.fixture
def old_run(place) -> Path:
    shutil.copytree(ROOT / "tests" / "old", place, dirs_exist_ok=True)
    return place / "out"


# without MKL, torch draws other random numbers
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs MKL")
def test_an_old_checkpoint_writes_the_text_that_it_wrote_then(old_run, capsys):
    options = dict(start="3 times", max_new_tokens=40, dtype="float32", seed=5)
    sample.main(sample.SampleConfig(out_dir=str(old_run), **options))
    assert capsys.readouterr().out == TEXT


def test_an_old_run_is_resumed_on_its_old_data(old_run):
    shape = "n_layer=1 n_head=2 n_embd=8 block_size=16 batch_size=4 gradient_accumulation_steps=2"
    rest = "dataset=tiny out_dir=out eval_interval=6 log_interval=1 warmup_iters=2 compile=False"
    rates = "optimizer=muon dtype=float32 learning_rate=1e-2 min_lr=1e-3"
    options = [f"--{option}" for option in f"{shape} {rest} {rates}".split()]
    train.main(read_options(train.TrainConfig, [*options, "--init_from=resume", "--max_iters=20"]))
    assert load_checkpoint(old_run / "ckpt.pt").step == 20
    records = read_log(old_run / "log.jsonl")
    steps = [r for r in records if "loss" in r]  # the first 12 are from the earlier version
    assert [r["step"] for r in steps] == list(range(1, 21))
    assert [r["epoch"] / r["step"] for r in steps] == pytest.approx([steps[0]["epoch"]] * 20)
