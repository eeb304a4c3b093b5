"""Kills at any moment, and any argument on the command line."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, assert_same_run, options
from hypothesis import given
from hypothesis import strategies as st

import train
from configurator import UserError, one_line, read_options

KILLS, STEPS_PER_KILL = int(os.environ.get("KILLS", 10)), 40


def last_step(log: Path) -> int:
    """Return the step of the last complete line of a log."""
    lines = log.read_bytes()[-1000:].split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def kill(process: subprocess.Popen, out_dir: Path, step: int, in_write: bool) -> bool:
    """Kill the run after `step`. Returns whether a file was being written."""
    log = out_dir / "log.jsonl"
    before = log.stat().st_size if log.exists() else 0

    def running() -> bool:
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.0005)
        return True

    # A resumed run first cuts off half a line, then appends.
    while running() and (not log.exists() or log.stat().st_size <= before):
        pass
    while running() and last_step(log) < step:
        pass
    if in_write:
        while running() and not any(out_dir.glob("*.tmp")) and last_step(log) < step + 35:
            pass
    else:
        time.sleep(random.uniform(0, 0.01))
    process.kill()
    process.wait()
    return any(out_dir.glob("*.tmp"))


@pytest.mark.slow
def test_a_run_killed_many_times_ends_with_the_bits_of_the_uninterrupted_run(tiny_run):
    """Half of the kills come at a random moment, the others as soon as a file is being written."""
    random.seed(0)
    steps = {"max_iters": STEPS_PER_KILL * (KILLS + 1), "eval_interval": 10, "eval_iters": 2}
    rates = {"muon_lr": 0.002, "learning_rate": 1e-4, "min_lr": 0, "lr_schedule": "linear"}
    saves = {"checkpoint_interval": 0.01, "init_from": "auto"}
    changed = {"n_embd": 32, "dropout": 0.1, "optimizer": "muon", **steps, **rates, **saves}

    def start(out_dir: str) -> subprocess.Popen:
        args = options(tiny_run, out_dir=out_dir, **changed)
        command = [sys.executable, ROOT / "train.py", *args]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    assert start("out/whole").wait() == 0
    killed, in_writes = Path("out/killed"), 0
    for n in range(KILLS):
        step = STEPS_PER_KILL * n + random.randint(1, STEPS_PER_KILL - 1)
        in_writes += kill(start("out/killed"), killed, step, in_write=n % 2 == 0)
    assert start("out/killed").wait() == 0
    assert_same_run(Path("out/whole"), killed)
    assert not list(killed.glob("*.tmp"))
    print(f"killed {KILLS} times, {in_writes} times while a file was being written")
    # Every second kill waits for a write, which is over in milliseconds, so some come too late.
    assert in_writes >= KILLS // 5, "too few kills met a write"


@given(st.text(), st.text())
def test_any_argument_is_refused_in_one_line_or_read(name, value):
    known = random.Random(value).choice(list(train.TrainConfig.__dataclass_fields__))
    for argument in (f"--{name}={value}", f"--{known}={value}"):
        try:
            read_options(train.TrainConfig, [argument])
        except UserError as error:
            assert one_line(error)
