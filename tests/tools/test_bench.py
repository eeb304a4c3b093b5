"""The benchmark compares like with like, and its figures follow from what was measured."""

import json
import os
import subprocess
import sys
import time
import tomllib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from configurator import UserError, read_options
from model import GPT, GPTConfig
from tools import bench

# Programs that stand in for nanoGPT's train.py. Each leaves a note of what it was given.
TRAIN = """
import itertools, json, pickle, sys, time
exec(open(sys.argv[1]).read())
rows = pickle.load(open(f"{dataset}/meta.pkl", "rb"))["vocab_size"]
seen = open(f"{dataset}/train.bin", "rb").read().hex(), rows, device, dtype, compile, n_layer
json.dump(seen, open("../seen.json", "w"))
for i in itertools.count(step=log_interval):
    print(f"iter {i}: loss 4.2654, time 20.00ms, mfu 1%")
    time.sleep(0.02 * log_interval)
"""
RACER = """
import sys, time
exec(open(sys.argv[1]).read())
for step in range(eval_interval, max_iters + 1, eval_interval):
    open(f"{out_dir}/ckpt.pt", "w").write(f"{step} {lr_decay_iters} {n_layer}")
    time.sleep(0.5)
"""


@pytest.fixture
def nanogpt(tmp_path) -> Path:
    (tmp_path / "nanoGPT").mkdir()
    (tmp_path / "nanoGPT/train.py").write_text(TRAIN, encoding="utf-8")
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
    changed |= dict(nanogpt=str(nanogpt), seconds=1, dtype="bfloat16", sample_interval=1)
    rows = measure(tiny_run, capsys, "throughput", **changed)
    theirs, speed = rows["nanoGPT"], rows["nanoGPT"]["tokens_per_second"]
    flops = GPT(GPTConfig(24, n_layer=2, n_head=2, n_embd=16)).flops_per_token(16)
    assert 0 < speed < 1.1 * 2 * 4 * 16 / 0.02 and rows["ours"]["tokens_per_second"] > 0
    assert theirs["gflops"] == pytest.approx(flops * speed / 1e9, abs=0.05)
    assert theirs["share_of_bfloat16_product"] == pytest.approx(speed / 4e6, abs=1e-3)
    assert list(rows) == ["ours", "nanoGPT", "bfloat16 product", "float32 product"]
    ids = Path("data/tiny/train.bin").read_bytes().hex()
    assert json.loads(Path("seen.json").read_text()) == [ids, 24, "cpu", "bfloat16", False, 2]
    assert os.listdir(nanogpt) == ["train.py"]
    assert os.listdir("out") == ["bench"] and os.listdir("data") == ["tiny"]


@pytest.mark.parametrize(
    "line", ["step {} | epoch 0.1 | loss 4.2 | 99 tokens/s", "iter {}: loss 4"]
)
def test_a_speed_leaves_out_the_start_and_the_first_steps(monkeypatch, tmp_path, line):
    class Process:
        @property
        def stdout(self):
            yield "compiling the model ..."
            for step, seconds in ((0, 30), (5, 36), (1_000, 1_038), (1_010, 1_058), (1_015, 1_068)):
                clock[0] = seconds
                yield line.format(f"{step:,}")

        def kill(self) -> None:
            clock.append("killed")

    clock = [0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(bench, "start_training", lambda *_: nullcontext(Process()))
    options = dict(gradient_accumulation_steps=1, batch_size=4, block_size=16)
    assert bench.time_steps(tmp_path, options, 18, at_least=20) == (1_038 - 2_000, 2)
    assert clock == [1_068, "killed"]


@pytest.mark.parametrize("option", ["auto", True, False])
def test_nanogpt_is_compiled_on_request_alone(tiny_run, tmp_path, monkeypatch, option):
    seen = []
    monkeypatch.setattr(bench, "time_steps", lambda *args: seen.append(args) or (0, 0.5))
    config = bench.BenchConfig(**tiny_run.options | {"compile": option, "seconds": 7})
    assert bench.time_training(bench.ROOT, config, 18) == 2 * 4 * 16 / 0.5
    bench.time_training(tmp_path, config, 18)
    assert [options["compile"] for _, options, *_ in seen] == [option is not False, option is True]
    assert [(folder, *rest) for folder, _, *rest in seen] == [
        (bench.ROOT, 18, 7),
        (tmp_path, 18, 7),
    ]


def test_a_program_that_fails_is_named_with_its_error(tiny_run, nanogpt):
    (nanogpt / "train.py").write_text("raise SystemExit('no such GPU')", encoding="utf-8")
    with pytest.raises(UserError, match=r"nanoGPT.train\.py ended: no such GPU"):
        bench.time_training(nanogpt, bench.BenchConfig(**tiny_run.options), 18)


def test_a_product_bounds_the_tokens_of_training(calls):
    assert bench.time_product("float32", torch.device("cpu"), flops=1000) == 2048**3 / 1000


def test_generation_counts_the_tokens_of_all_texts(tiny_run, calls, capsys):
    rows = measure(tiny_run, capsys, "generate", transformers=True, dtype="bfloat16")
    cases = [f"{dtype}, batch {B}" for dtype in ("float32", "bfloat16") for B in (1, 8)]
    assert list(rows) == [f"{side}, {case}" for case in cases for side in ("ours", "transformers")]
    assert [row["tokens_per_second"] for row in rows.values()] == [8, 8, 60, 60] * 2
    assert torch.cat(calls[2], dim=1).shape == (8, 15) and torch.stack(calls[3]).shape == (8, 16)


def test_sides_are_measured_in_turn(tiny_run, monkeypatch, capsys):
    order, speeds = [], iter((5, 10, 1, 30, 3, 20))
    sides = {name: lambda name=name: order.append(name) or next(speeds) for name in "ab"}
    monkeypatch.setattr(bench, "generate", lambda config: (sides, 0))
    rows = measure(tiny_run, capsys, "generate", rounds=3)
    assert order == ["a", "b"] * 3 and [rows[name]["tokens_per_second"] for name in "ab"] == [3, 20]


@pytest.mark.parametrize("durations", [[1, 4, 2, 3, 3], [4, 7]])
def test_a_call_is_repeated_five_times_or_until_time_is_up(monkeypatch, durations):
    clock = [0, *durations]
    monkeypatch.setattr(bench, "now", lambda device: clock[0])
    sum_up = lambda: clock.insert(0, clock.pop(0) + clock.pop(0))  # noqa: E731
    assert bench.median_seconds(sum_up, None, at_most=10.5) == np.median(durations)
    assert clock == [sum(durations)]


@pytest.fixture
def enter(monkeypatch, tmp_path, dataset, nanogpt, capsys):
    """A function: run a race whose only side has these values, and return its printed table."""
    monkeypatch.setattr(bench, "RACES", tmp_path / "races.toml")
    monkeypatch.setattr(bench, "SAVES", 2)
    (nanogpt / "train.py").write_text(RACER, encoding="utf-8")
    config = bench.BenchConfig(what="race", dataset="tiny", nanogpt=str(nanogpt), device="cpu")

    def run(**side) -> str:
        values = {
            "name": "A B",
            "program": "nanoGPT",
            "options": "--n_layer=3",
            "minutes": 1,
        } | side
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        bench.RACES.write_text("\n".join(["[[tiny]]", *lines]), encoding="utf-8")
        bench.main(config)
        return capsys.readouterr().out

    return run


def test_a_race_scores_each_checkpoint_and_keeps_the_result(enter, nanogpt, monkeypatch):
    def score(path: Path, is_ours: bool) -> dict:
        scored.append(path.read_text("utf-8"))
        return {"loss": 0.1 * len(scored), "bits_per_byte": 2.5, "is_ours": is_ours}

    scored = []
    monkeypatch.setattr(bench, "score", score)
    monkeypatch.setattr(bench, "WHOLE", 0.2)
    monkeypatch.setattr(bench, "time_steps", lambda *_: (6.0, 0.1))
    assert "480 steps" in enter()  # 0.9 minutes, without 6 seconds
    assert scored == ["240 480 3", "480 480 3"]
    curve = json.loads(Path("out/bench/race/tiny/A_B.json").read_bytes())["curve"]
    assert [point["loss"] for point in curve] == [0.1, 0.2] and not curve[0]["is_ours"]
    assert 0 < curve[0]["minutes"] < curve[1]["minutes"] < 0.2
    assert Path("out/bench/race/tiny.png").read_bytes().startswith(b"\x89PNG")
    (nanogpt / "train.py").unlink()  # the result is known, so nothing trains
    assert "| A B  |     0.0 | 0.2000 | 2.5000 |" in enter() and len(scored) == 2
    with pytest.raises(UserError, match="wrote no checkpoint"):
        enter(steps=20)


def test_a_race_ends_with_its_minutes(enter, nanogpt, monkeypatch):
    (nanogpt / "train.py").write_text("import time; time.sleep(99)", encoding="utf-8")
    started = time.time()
    with pytest.raises(UserError, match="wrote no checkpoint"):
        enter(minutes=0.02, steps=20)
    assert time.time() < started + 20


def test_every_side_of_a_race_has_options_of_train(monkeypatch):
    monkeypatch.chdir(ROOT)
    for dataset, sides in tomllib.loads(bench.RACES.read_text("utf-8")).items():
        for side in sides:
            options = read_options(bench.TrainConfig, side["options"].split())
            assert options.dataset == dataset and side["program"] in ("ours", "nanoGPT")


@pytest.mark.slow
def test_our_side_of_a_race_trains_and_is_scored(enter, tiny_run):
    options = " ".join(f"--{name}={value}" for name, value in tiny_run.options.items())
    table = enter(program="ours", options=options, steps=20)
    [point, *_] = json.loads(Path("out/bench/race/tiny/A_B.json").read_bytes())["curve"]
    assert f"{point['loss']:.4f}" in table and point["tokens"] > 0 and 0 < point["loss"] < 4


def test_the_command_takes_its_first_word_a_config_file_and_options_of_the_run(dataset):
    Path("small.py").write_text("dataset = 'tiny'; batch_size = 99", "utf-8")
    command = [sys.executable, "-m", "tools.bench", "race", "--config=small.py", "--batch_size=4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "dataset=tiny is not in" in done.stderr


@pytest.mark.parametrize("option", ["--what=speed", "--rounds=0", "--seconds=0", "--optimizer=sgd"])
def test_a_mistake_is_named(option):
    with pytest.raises(UserError, match=option[2:].split("=")[0]):
        read_options(bench.BenchConfig, [option])
