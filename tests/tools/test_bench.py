"""The benchmark compares like with like: all ways compute the same, all loaders load the same."""

import itertools
import json
import os
import subprocess
import sys
from configurator import UserError, read_options
from pathlib import Path

import numpy as np
import pytest
import torch

import model as gpt
from tools import bench
from train import TrainConfig

ROOT = Path(__file__).parent.parent.parent
NANOGPT = """
from dataclasses import dataclass
import torch
from torch.nn import functional as F

@dataclass
class GPTConfig:
    vocab_size: int; block_size: int; n_layer: int; n_head: int; n_embd: int
    dropout: float; bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, x, y=None):
        logits = self.lm_head(self.wte(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas)

    def generate(self, idx, max_new_tokens):
        return torch.cat((idx, idx[:, :1].expand(-1, max_new_tokens)), dim=1)
"""


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Measure without starting processes; leave model.py and torch as they were."""
    monkeypatch.setattr(gpt, "attention", gpt.attention)
    monkeypatch.setattr(gpt, "gelu", gpt.gelu)
    monkeypatch.setattr(bench, "in_child", lambda function, *args: function(*args))
    monkeypatch.chdir(ROOT)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def options(tiny_run, dataset, monkeypatch) -> TrainConfig:
    monkeypatch.chdir(dataset.parent.parent)
    return TrainConfig(**tiny_run.options)


def measure(tmp_path, capsys, what: str, **changed) -> tuple[dict, dict[str, dict]]:
    """Run a tiny benchmark. Returns the first JSON line and the others by name."""
    changed = dict(rounds=1, seconds=0.001, new_tokens=5, vocab_size=30) | changed
    config = bench.BenchConfig(
        what=what, tiny=True, device="cpu", to=str(tmp_path / "bench"), **changed
    )
    bench.main(config)
    printed = capsys.readouterr().out
    lines = (tmp_path / "bench" / f"{what}.jsonl").read_text(encoding="utf-8").splitlines()
    about, *rows = map(json.loads, lines)
    assert (tmp_path / "bench" / f"{what}.png").read_bytes().startswith(b"\x89PNG")
    assert about["versions"].endswith(torch.__version__)
    assert all(value in printed for value in about.values())
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) == len(rows) + 2 and all(row["what"] in printed for row in rows)
    return about, {row["what"]: row for row in rows}


def ways() -> list[dict]:
    return list(itertools.accumulate(bench.RUNGS.values(), lambda way, change: way | change))


def losses(way: dict, options: TrainConfig, **changed) -> list[float]:
    trainer = bench.make_trainer(options, **(way | changed))
    figures = [trainer.train_step(step, options.learning_rate) for step in range(15)]
    return [trainer.read(f)[0] for f in figures]


def test_every_rung_computes_the_losses_of_the_naive_one(options):
    naive = losses(ways()[0], options)
    assert naive[-1] < naive[0] - 0.3
    for way in ways()[1:]:
        assert losses(way, options, dtype="float32") == pytest.approx(naive, rel=1e-4), way
    in_bfloat16 = losses(ways()[-1], options, dtype="bfloat16")
    assert in_bfloat16 != naive and in_bfloat16 == pytest.approx(naive, rel=5e-3)


def test_each_rung_changes_one_thing_and_the_last_one_is_what_train_py_does():
    for before, after in itertools.pairwise(ways()):
        assert sum(before[key] != after[key] for key in before) == 1
    assert bench.FAST.items() <= ways()[-1].items()
    assert ways()[-1]["dtype"] is None and ways()[-1]["compile"] is None
    assert not ways()[0].items() & ways()[-1].items()


def test_every_loader_loads_the_sequences_at_the_offsets(options, tmp_path):
    source, offsets, T = bench.Source(options, tmp_path), np.array([5, 0, 300]), options.block_size
    ids = torch.from_numpy(source.tokens.open().astype(np.int64))
    expected = torch.stack([ids[o : o + T + 1] for o in offsets])
    for name in bench.LOADERS:
        loaded = bench.load(name, source, offsets)
        assert all(part.dtype == torch.int64 for part in loaded)
        windows = loaded[0]
        if len(loaded) == 2:  # inputs and targets
            windows = torch.cat((loaded[0], loaded[1][:, -1:]), dim=1)
            assert torch.equal(loaded[0][:, 1:], loaded[1][:, :-1])
        assert windows.shape == expected.shape
        if name.startswith("text"):  # which finds its own places
            assert all(source.tokenizer.decode(row.tolist()) in source.text for row in windows)
        else:
            assert torch.equal(windows, expected), name


def test_prefetching_returns_the_batch_that_was_asked_for_one_call_before(options, tmp_path):
    source = bench.Source(options, tmp_path)
    first, second = (np.array([at]) for at in (0, 7))
    bench.prefetch(source, first)
    x, _ = bench.prefetch(source, second)
    assert np.array_equal(x, bench.gather(source.tokens, first, options.block_size)[0])


def test_the_ladder_multiplies_its_factors(tmp_path, capsys):
    _, rows = measure(tmp_path, capsys, "ladder")
    assert list(rows) == list(bench.RUNGS)
    for row in rows.values():
        tokens = 2 * 2 * 16  # two forward passes, as in config/phase2_bpe.py, of two sequences
        assert row["tokens_per_second"] == pytest.approx(1e3 * tokens / row["ms"])
        assert row["speedup"] == pytest.approx(rows["naive"]["ms"] / row["ms"])
        assert not any(key.startswith("of_") for key in row)  # no rung is a peak


def test_the_loader_says_how_many_hours_the_whole_run_would_load(tmp_path, capsys):
    about, rows = measure(tmp_path, capsys, "loader")
    assert list(rows) == list(bench.LOADERS)
    total = 21_000 * 8 * 2 * 16  # steps and sequences of config/phase3_gpt2.py, in tiny
    assert f"{total:,} tokens" in about["run"]
    for row in rows.values():
        assert row["hours"] == pytest.approx(total / row["tokens_per_second"] / 3600)


def test_throughput_has_the_parts_of_a_step_and_the_shares_of_the_peaks(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(bench.runtime, "is_slow", lambda *_: False)
    (tmp_path / "model.py").write_text(NANOGPT, encoding="utf-8")
    _, rows = measure(tmp_path, capsys, "throughput", nanogpt=str(tmp_path))
    bf16, fp32 = rows["bfloat16 product"], rows["float32 product"]
    assert bf16["gflops"] == pytest.approx(2 * 64**3 / bf16["ms"] / 1e6)
    for row in (rows["ours"], rows["nanoGPT"]):
        assert row["of_bfloat16"] == pytest.approx(row["gflops"] / bf16["gflops"])
        assert row["of_float32"] == pytest.approx(row["gflops"] / fp32["gflops"])
        assert min(row["forward_us"], row["optimizer_us"], row["data_us"], row["memory_gb"]) > 0
    flops = rows["ours"]["gflops"] / rows["ours"]["tokens_per_second"]
    assert rows["nanoGPT"]["gflops"] / rows["nanoGPT"]["tokens_per_second"] == pytest.approx(flops)
    assert rows["ours"]["speedup"] == 1


@pytest.mark.parametrize("slow", [True, False])
def test_products_that_take_minutes_are_not_measured(options, monkeypatch, slow):
    is_slow = lambda dtype, _: slow and dtype == torch.bfloat16  # noqa: E731
    monkeypatch.setattr(bench.runtime, "is_slow", is_slow)
    sides, _ = bench.throughput(bench.BenchConfig(), options)
    assert "float32 product" in sides and ("bfloat16 product" in sides) is not slow


def test_nanogpts_steps_train_nanogpts_model(options, tmp_path):
    (tmp_path / "model.py").write_text(NANOGPT, encoding="utf-8")
    trainer = bench.make_nanogpt(options, str(tmp_path))
    assert type(trainer.step_model).__module__ == "nanogpt_model"
    first, *_, last = [trainer.train_step(step, 1e-2) for step in range(15)]
    assert trainer.read(last)[0] < trainer.read(first)[0] - 0.3


def test_generation_counts_the_tokens_of_all_sequences(tmp_path, capsys):
    (tmp_path / "model.py").write_text(NANOGPT, encoding="utf-8")
    _, rows = measure(tmp_path, capsys, "generate", transformers=True, nanogpt=str(tmp_path))
    assert {name.split(",")[0] for name in rows} == {"ours", "transformers", "nanogpt"}
    for name, row in rows.items():
        B = int(name.split()[-1])
        assert row["new_tokens_per_second"] == pytest.approx(1e3 * B * 5 / row["ms"])


def test_a_new_gpu_is_measured_in_one_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench.runtime, "is_slow", lambda *_: False)
    _, rows = measure(tmp_path, capsys, "gpu")
    names = " ".join(rows)
    assert all(
        f"{model}, batch {B}" in names for model in ("phase 3", "GPT-2 124M") for B in (8, 32)
    )
    assert not [row for row in rows.values() if "failed" in row.get("result", "")]
    for name in ("adamw", "muon"):
        assert rows[f"10 steps, {name}"]["result"].endswith("a resumed step has the same bits")
    step = rows["phase 3, batch 8"]
    assert "speedup" not in step  # the rows measure different things
    assert step["of_bfloat16"] == pytest.approx(step["gflops"] / rows["bfloat16 product"]["gflops"])
    total, flops = 21_000 * 8 * 2 * 16, 1e9 * step["gflops"] / step["tokens_per_second"]
    hours = rows["estimate of preflight, A100"]["hours"]
    assert hours == pytest.approx(total * flops / (0.4 * 312e12) / 3600)


def fail() -> dict:
    raise MemoryError("out of memory at\nbatch_size=64")


def test_with_a_time_limit_a_failure_is_a_row_and_the_rest_is_measured():
    sides = {"large": (fail,), "small": (dict, {"ms": 1.0})}
    large, small = bench.measure(sides, rounds=1, minutes=7)
    assert large == {"what": "large", "result": "failed: out of memory at batch_size=64"}
    assert small == {"what": "small", "ms": 1.0}
    (late,) = bench.measure({"late": (fail,)}, rounds=1, minutes=-1)
    assert late["result"] == "failed: not started, -1 minutes are over"
    with pytest.raises(MemoryError):
        bench.measure(sides, rounds=1)


def test_a_picture_without_a_single_measurement_is_drawn():
    assert bench.draw_bars("nothing", [], ["ms"], "ms").axes[0].patches[:] == []


def test_sides_are_measured_in_turn_and_each_time_in_a_new_process(monkeypatch):
    monkeypatch.undo()
    called, pids, real = [], [], bench.in_child

    def watched(function, side: str) -> dict:
        called.append(side[-1])
        pids.append(real(function, side)["ms"])
        return {"ms": pids[-1]}

    monkeypatch.setattr(bench, "in_child", watched)
    process_id = "{'ms': __import__('os').getpid()}"  # evaluated there without importing torch
    rows = bench.measure({side: (eval, f"{process_id}  # {side}") for side in "ab"}, rounds=3)
    assert called == ["a", "b"] * 3
    assert len({*pids, os.getpid()}) == 7
    assert [row["ms"] for row in rows] == [np.median(pids[0::2]), np.median(pids[1::2])]


def test_the_command_takes_its_first_word_a_config_file_and_options_of_the_run(tmp_path):
    shape = "n_layer, n_head, n_embd, block_size, gradient_accumulation_steps = 1, 2, 8, 8, 1\n"
    (tmp_path / "small.py").write_text(shape, encoding="utf-8")
    words = "generate --config=small.py --batch_size=4 --dtype=float32 --device=cpu"
    command = [sys.executable, "-m", "tools.bench", *words.split(), "--rounds=1", "--seconds=0.01"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert "1 x 4 x 8 tokens per step" in done.stdout and "ours, float32, batch 8" in done.stdout
    assert (tmp_path / "out/bench/generate.png").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("--what=speed", "what is 'speed' but must be 'ladder' or 'loader'"),
        ("--rounds=0", "rounds=0 must be at least 1"),
        ("--vocab_size=70000", "vocab_size=70000 must be at least 0 and at most 65,536"),
        ("--seconds=0", "seconds=0.0 must be at least 0.001"),
    ],
)
def test_a_mistake_is_named(changed, words):
    with pytest.raises(UserError, match=words):
        read_options(bench.BenchConfig, [changed])


def test_a_mistake_in_an_option_of_the_run_is_named(tmp_path, capsys):
    with pytest.raises(UserError, match="optimizer is 'sgd' but must be 'adamw' or 'muon'"):
        measure(tmp_path, capsys, "throughput", optimizer="sgd")


def test_a_folder_without_nanogpt_is_named(tmp_path, capsys):
    with pytest.raises(UserError, match=r"model\.py: no such file; nanogpt is the folder"):
        measure(tmp_path, capsys, "throughput", nanogpt="nowhere")
