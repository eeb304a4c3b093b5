"""The benchmark compares like with like, and its figures follow from what was measured."""

import json
import os
import subprocess
import sys
from configurator import UserError, read_options
from pathlib import Path

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig
from tools import bench

# Programs that stand in for nanoGPT's. The first one leaves a note of what it was given.
TRAIN = """
import json, pickle, sys
exec(open(sys.argv[1]).read())
rows = pickle.load(open(f"{dataset}/meta.pkl", "rb"))["vocab_size"]
seen = open(f"{dataset}/train.bin", "rb").read().hex(), rows, device, dtype, compile, n_layer
json.dump(seen, open("../seen.json", "w"))
for i, ms in enumerate((900, 20, 30, 25)): print(f"iter {i}: loss 4.2654, time {ms:.2f}ms, mfu 1%")
"""
MODEL = """
from torch.nn import Linear
GPT, GPTConfig = lambda shape: Linear(1, shape["block_size"]), dict
Linear.generate = lambda self, idx, max_new_tokens: ["nanoGPT"] * max_new_tokens
"""


@pytest.fixture
def nanogpt(tmp_path) -> Path:
    (tmp_path / "nanoGPT").mkdir()
    (tmp_path / "nanoGPT/train.py").write_text(TRAIN, encoding="utf-8")
    (tmp_path / "nanoGPT/model.py").write_text(MODEL, encoding="utf-8")
    return tmp_path / "nanoGPT"


@pytest.fixture
def calls(monkeypatch) -> list:
    """Let every call that is timed take two seconds. Returns what the calls return."""
    done = []
    monkeypatch.setattr(bench, "median_seconds", lambda call, device: done.append(call()) or 2.0)
    return done


def measure(tiny_run, capsys, what: str, **changed) -> dict[str, dict]:
    """Run a tiny benchmark, once unless changed, and return its rows by name."""
    bench.main(bench.BenchConfig(**tiny_run.options | {"what": what, "rounds": 1} | changed))
    printed = capsys.readouterr().out
    about, *rows = map(json.loads, Path(f"out/bench/{what}.jsonl").read_text("utf-8").splitlines())
    assert Path(f"out/bench/{what}.png").read_bytes().startswith(b"\x89PNG")
    assert all(words in printed for words in (*about.values(), *(row["what"] for row in rows)))
    return {row["what"]: row for row in rows}


def test_both_programs_train_the_same_model_and_data(tiny_run, nanogpt, capsys, monkeypatch):
    monkeypatch.setattr(bench, "time_product", lambda dtype, *_: {"f": 1e6, "b": 4e6}[dtype[0]])
    changed = dict(pad_vocab_to=24, wandb_log=True, target_val_loss=9.0, init_from="gpt2")
    changed |= dict(nanogpt=str(nanogpt), steps=20, dtype="bfloat16", sample_interval=1)
    rows = measure(tiny_run, capsys, "throughput", **changed)
    theirs, speed = rows["nanoGPT"], 2 * 4 * 16 / 0.025  # the first step has an evaluation in it
    flops = GPT(GPTConfig(24, n_layer=2, n_head=2, n_embd=16)).flops_per_token(16)
    assert theirs["tokens_per_second"] == speed and rows["ours"]["tokens_per_second"] > 0
    assert theirs["gflops"] == pytest.approx(flops * speed / 1e9, abs=0.05)
    assert theirs["share_of_bfloat16_product"] == pytest.approx(speed / 4e6, abs=1e-3)
    assert list(rows) == ["ours", "nanoGPT", "bfloat16 product", "float32 product"]
    ids = Path("data/tiny/train.bin").read_bytes().hex()
    assert json.loads(Path("seen.json").read_text()) == [ids, 24, "cpu", "bfloat16", False, 2]
    assert sorted(os.listdir(nanogpt)) == ["model.py", "train.py"]
    assert os.listdir("out") == ["bench"] and os.listdir("data") == ["tiny"]


@pytest.mark.parametrize("option", ["auto", True, False])
def test_a_speed_is_the_median_of_all_steps_but_the_first(tiny_run, tmp_path, monkeypatch, option):
    def run(command, cwd, **_) -> subprocess.CompletedProcess:
        exec(Path(command[2]).read_text("utf-8"), seen := {})
        asked.append((seen["compile"], seen["log_interval"], seen["max_iters"]))
        lines = [f'{{"step": {i}, "loss": 1, "tokens_per_second": {9 - i}}}\n' for i in range(4)]
        Path(seen["out_dir"], "log.jsonl").write_text("".join(lines), encoding="utf-8")
        printed = "".join(f"iter {i}: loss 1, time {9 - i}ms, mfu\n" for i in range(4))
        return subprocess.CompletedProcess(command, 0, printed, "")

    asked = []
    monkeypatch.setattr(bench.subprocess, "run", run)
    config = bench.BenchConfig(**tiny_run.options | {"compile": option, "steps": 60})
    assert bench.time_training(bench.ROOT, config, 18) == 7
    assert bench.time_training(tmp_path, config, 18) == 1e3 * 2 * 4 * 16 / 7
    assert asked == [(option is not False, 6, 60), (option is True, 1, 60)]


def test_a_program_that_fails_is_named_with_its_error(tiny_run, nanogpt):
    (nanogpt / "train.py").write_text("raise SystemExit('no such GPU')", encoding="utf-8")
    with pytest.raises(UserError, match=r"nanoGPT.train\.py failed: no such GPU"):
        bench.time_training(nanogpt, bench.BenchConfig(**tiny_run.options), 18)


def test_a_product_bounds_the_tokens_of_training(calls):
    assert bench.time_product("float32", torch.device("cpu"), flops=1000) == 2048**3 / 1000


def test_every_loader_loads_the_same_sequences(tiny_run, dataset, calls, capsys):
    rows = measure(tiny_run, capsys, "loader")
    text, slices, (x, y) = calls
    assert slices.shape == (4, 17) and slices.dtype == np.int64 and np.array_equal(text, slices)
    assert np.array_equal(x, slices[:, :-1]) and np.array_equal(y, slices[:, 1:])
    assert {row["tokens_per_second"] for row in rows.values()} == {4 * 16 / 2, 205_000, 440_000}


def test_generation_counts_the_tokens_of_all_texts(tiny_run, nanogpt, calls, capsys):
    changed = dict(transformers=True, nanogpt=str(nanogpt), dtype="bfloat16")
    rows = measure(tiny_run, capsys, "generate", **changed)
    cases = [f"{dtype}, batch {B}" for dtype in ("float32", "bfloat16") for B in (1, 8)]
    sides = ["ours", "transformers", "nanoGPT"]
    assert list(rows) == [f"{side}, {case}" for case in cases for side in sides]
    assert [row["tokens_per_second"] for row in rows.values()] == [8, 8, 8, 60, 60, 60] * 2
    assert torch.cat(calls[3], dim=1).shape == (8, 15) and torch.stack(calls[4]).shape == (8, 16)
    assert calls[5] == ["nanoGPT"] * 15


def test_sides_are_measured_in_turn(tiny_run, monkeypatch, capsys):
    order, speeds = [], iter((5, 10, 1, 30, 3, 20))
    sides = {name: lambda name=name: order.append(name) or next(speeds) for name in "ab"}
    monkeypatch.setitem(bench.BENCHMARKS, "generate", lambda config: (sides, 0))
    rows = measure(tiny_run, capsys, "generate", rounds=3)
    assert order == ["a", "b"] * 3 and [rows[name]["tokens_per_second"] for name in "ab"] == [3, 20]


@pytest.mark.parametrize("durations", [[1, 4, 2, 3, 3], [4, 7]])
def test_a_call_is_repeated_five_times_or_until_time_is_up(monkeypatch, durations):
    clock = [0, *durations]
    monkeypatch.setattr(bench, "now", lambda device: clock[0])
    sum_up = lambda: clock.insert(0, clock.pop(0) + clock.pop(0))  # noqa: E731
    assert bench.median_seconds(sum_up, None, at_most=10.5) == np.median(durations)
    assert clock == [sum(durations)]


def test_the_command_takes_its_first_word_a_config_file_and_options_of_the_run(dataset):
    Path("small.py").write_text("block_size = 8; dataset = 'tiny'; batch_size = 99", "utf-8")
    command = [sys.executable, "-m", "tools.bench", "loader", "--config=small.py", "--batch_size=4"]
    printed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert "one gather (train.py)" in printed


@pytest.mark.parametrize("option", ["--what=speed", "--rounds=0", "--steps=1", "--optimizer=sgd"])
def test_a_mistake_is_named(option):
    with pytest.raises(UserError, match=option[2:].split("=")[0]):
        read_options(bench.BenchConfig, [option])
