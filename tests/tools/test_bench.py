"""bench.py compares like with like: every way computes the same losses, every loader makes the same batches."""

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import model as gpt
from configurator import UserError, read_options
from tools import bench


@pytest.fixture
def config(tiny_run, monkeypatch, tmp_path) -> bench.BenchConfig:
    """Tiny, measured in this process, which is as it was afterwards."""
    monkeypatch.setattr(gpt, "attention", gpt.attention)
    monkeypatch.setattr(gpt, "gelu", gpt.gelu)
    monkeypatch.setattr(bench, "in_child", lambda function, *args: function(*args))
    return bench.BenchConfig(
        **tiny_run.options, rounds=1, seconds=0.0, to=str(tmp_path / "bench"), new_tokens=5
    )


def losses(way: bench.Way, config: bench.BenchConfig) -> list[float]:
    trainer = bench.trainer_in(way, config)
    assert "not compiled" in trainer.prepare() or way.compile
    return [trainer.read(trainer.train_step(step, config.learning_rate))[0] for step in range(20)]


def test_every_way_to_compute_gives_the_losses_of_the_naive_one_over_20_steps(config):
    naive = losses(bench.NAIVE, config)
    assert naive[-1] < naive[0] - 0.3
    ways = list(dict.fromkeys(way for _, _, way in bench.rungs()))
    assert ways[0] == bench.NAIVE and ways[-1] == bench.Way()
    for way in ways[1:]:
        in_float32 = losses(replace(way, dtype="float32"), config)
        assert in_float32 == pytest.approx(naive, rel=1e-4), way
    assert losses(replace(ways[-1], dtype="bfloat16", compile=False), config) == pytest.approx(
        naive, rel=5e-3
    )


def test_each_rung_changes_one_thing():
    rungs = [(load, *vars(way).values()) for _, load, way in bench.rungs()]
    for before, after in itertools.pairwise(rungs):
        assert sum(a is not b for a, b in zip(before, after, strict=True)) == 1


def test_every_loader_makes_the_batch_that_the_offsets_name(config, tmp_path):
    trainer = bench.make_trainer(config)
    loader, offsets = bench.Loader(trainer, tmp_path), np.array([5, 0, 300])
    ids = torch.from_numpy(trainer.data.train.open().astype(np.int64))
    for load in dict.fromkeys(load for _, load, _ in bench.rungs()):
        x, y = load(loader, offsets)
        assert x.shape == y.shape == (3, config.block_size) and x.dtype == y.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1])
        if load is bench.from_text:  # which finds its own places
            assert all(trainer.tokenizer.decode(row.tolist()) in loader.text for row in x)
        else:
            assert all(
                torch.equal(row, ids[o : o + config.block_size])
                for row, o in zip(x, offsets, strict=True)
            )


def test_the_flops_of_a_token_are_those_that_torch_counts(config):
    model = bench.make_trainer(config).model
    x = torch.zeros(3, config.block_size, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(x, x)[1].backward()
    no_product = (
        sum(p.numel() for p in model.parameters() if p.dim() < 2)
        + model.transformer.wpe.weight.numel()
    )
    counted = counter.get_total_flops() / x.numel()
    assert model.flops_per_token(config.block_size) - 6 * no_product == counted


def shown(config: bench.BenchConfig, capsys) -> list[dict]:
    """The rows of the JSON lines; the table and the picture are there too."""
    bench.main(config)
    printed, folder = capsys.readouterr().out, bench.Path(config.to)
    about, *rows = map(
        json.loads, (folder / f"{config.show}.jsonl").read_text(encoding="utf-8").splitlines()
    )
    assert about["versions"].endswith(torch.__version__) and all(
        value in printed for value in about.values()
    )
    assert (folder / f"{config.show}.png").read_bytes().startswith(b"\x89PNG")
    assert sum(line.startswith("|") for line in printed.splitlines()) == len(rows) + 2
    return rows


def test_the_ladder_multiplies_its_factors(config, capsys, monkeypatch):
    monkeypatch.setattr(bench.Trainer, "prepare", lambda _: "")  # not compiled: that takes long
    rows = shown(replace(config, show="ladder"), capsys)
    assert len(rows) == len(bench.rungs())
    for i, row in enumerate(rows):
        assert row["step_ms"] == pytest.approx(row["batch_ms"] + row["compute_ms"])
        assert row["product"] == pytest.approx(rows[0]["step_ms"] / row["step_ms"])
        assert row["product"] == pytest.approx(math.prod(r["factor"] for r in rows[: i + 1]))
        assert row["tokens_per_second"] == pytest.approx(1e3 * 2 * 4 * 16 / row["step_ms"])


def test_throughput_has_shares_of_the_peaks(config, capsys):
    ours, bf16, fp32 = shown(replace(config, show="throughput", vocab_size=20), capsys)
    assert ours["tokens_per_second"] == pytest.approx(1e3 * 2 * 4 * 16 / ours["step_ms"])
    assert ours["of_bfloat16"] == pytest.approx(ours["gflops"] / bf16["gflops"])
    assert ours["of_float32"] == pytest.approx(ours["gflops"] / fp32["gflops"])
    shares = [ours[f"{part}_share"] for part in ("data", "forward", "backward", "optimizer")]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0
    assert bf16["gflops"] == pytest.approx(2 * 2048**3 / bf16["step_ms"] / 1e6)


def test_generation_is_told_against_the_reading_of_the_weights(config, capsys):
    rows = shown(replace(config, show="generate", transformers=True), capsys)
    sides = {(r["side"], r["dtype"], r["batch_size"]): r for r in rows}
    assert {"ours", "transformers", "ours, without cache", "reading the weights"} == {
        side for side, _, _ in sides
    }
    bound = sides["reading the weights", "float32", 1]
    for (_, dtype, batch_size), r in sides.items():
        if dtype == "float32":
            share = r["tokens_per_second"] / batch_size / bound["tokens_per_second"]
            assert r["of_bound"] == pytest.approx(share)


def test_growth_has_every_axis_and_the_arithmetic_of_the_model(config, capsys, monkeypatch):
    values = {"context": [8, 16], "batch": [2, 4], "width": [16, 32], "processes": [1, 2]}
    for name, axis in (("CONTEXTS", "context"), ("BATCHES", "batch"), ("WIDTHS", "width")):
        monkeypatch.setattr(bench, name, values[axis])
    rows = shown(replace(config, show="growth"), capsys)
    assert {axis: [r["value"] for r in rows if r["axis"] == axis] for axis in values} == values
    assert all(
        r["gflops"] == pytest.approx(1e3 * r["mflop_per_token"] / r["us_per_token"]) for r in rows
    )


def test_sides_take_turns_in_processes_of_their_own(monkeypatch):
    called = []
    real = bench.in_child
    monkeypatch.setattr(bench, "in_child", lambda *call: called.append(call[1]) or real(*call))
    sides = {name: (process_id, name) for name in ("a", "b")}
    results = bench.alternate(bench.BenchConfig(rounds=3), sides)
    assert called == ["a", "b"] * 3
    pids = [r["seconds"] for result in results.values() for r in result["rounds"]]
    assert len({*pids, os.getpid()}) == 7
    for result in results.values():
        assert result["seconds"] == np.median([r["seconds"] for r in result["rounds"]])


def process_id(_: str) -> float:
    return float(os.getpid())


def test_the_command_takes_its_first_word_and_a_config_file(tmp_path):
    (tmp_path / "small.py").write_text(
        "n_layer, n_head, n_embd, block_size, batch_size = 1, 2, 8, 8, 2\n", encoding="utf-8"
    )
    command = [
        sys.executable,
        "-m",
        "tools.bench",
        "throughput",
        "small.py",
        "--vocab_size=30",
        "--compile=False",
    ]
    command += ["--gradient_accumulation_steps=1", "--rounds=1", "--seconds=0.01", "--device=cpu"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert "| ours " in done.stdout and (tmp_path / "out/bench/throughput.png").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--show=speed"], "show is 'speed' but must be one of ladder, throughput"),
        (["--rounds=0"], "rounds is 0 but must be at least 1"),
        (["--vocab_size=70000"], "vocab_size is 70000 but must be at least 0 and at most 65,536"),
        (["--n_embd=10", "--n_head=3"], "n_embd=10 can not be split"),
    ],
)
def test_a_mistake_is_named(changed, words):
    with pytest.raises(UserError, match=words):
        read_options(bench.BenchConfig, changed)


def test_a_folder_without_nanogpt_is_named(config):
    with pytest.raises(
        UserError, match=r"model\.py: no such file; nanogpt is the folder of a copy of nanoGPT"
    ):
        bench.main(replace(config, show="throughput", vocab_size=20, nanogpt="nowhere"))
