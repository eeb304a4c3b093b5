"""Kill a training run many times, continue it each time, and compare it with a run left alone.

    python tests/kill_training.py --kills=50

Both runs are started from the command line, as a user starts them. Half of the kills come at a
random moment after a step, the others as soon as a file is being written.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TEXT = "".join(f"{i} times {j} is {i * j}.\n" for i in range(40) for j in range(10))
STEPS_PER_KILL = 40
OPTIONS = (
    "dataset=tiny n_layer=2 n_head=2 n_embd=32 block_size=16 batch_size=4 dropout=0.1 "
    "gradient_accumulation_steps=2 eval_interval=10 eval_iters=2 log_interval=1 compile=False "
    "optimizer=muon muon_lr=0.002 learning_rate=1e-4 min_lr=0 lr_schedule=linear warmup_iters=2 "
    "checkpoint_interval=0.01 init_from=auto device=cpu"
).split()


def start(folder: Path, script: str, *options: str) -> subprocess.Popen:
    arguments = [f"--{option}" for option in options]
    return subprocess.Popen(
        [sys.executable, ROOT / script, *arguments], cwd=folder, stdout=subprocess.DEVNULL
    )


def finish(process: subprocess.Popen) -> None:
    assert process.wait() == 0, "a process failed by itself"


def last_step(log: Path) -> int:
    """Return the step of the last complete line of a log."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 1000))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def kill(process: subprocess.Popen, out_dir: Path, step: int, in_write: bool) -> bool:
    """Kill the run after `step`. Returns whether a file was being written."""
    log = out_dir / "log.jsonl"
    before = log.stat().st_ino if log.exists() else None

    def running() -> bool:
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.0005)
        return True

    # A resumed run writes its log anew before its first step.
    while running() and (not log.exists() or log.stat().st_ino == before):
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


def read_run(out_dir: Path) -> tuple[dict, list]:
    """Return the checkpoint of a run, and its log without what depends on the clock."""
    checkpoint = torch.load(out_dir / "ckpt.pt", weights_only=True)
    lines = (out_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return checkpoint, [(r["step"], r.get("loss"), r.get("val_loss")) for r in records]


def main(kills: int, seed: int) -> None:
    random.seed(seed)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny.txt").write_text(TEXT, encoding="utf-8")
        finish(start(folder, "prepare_shakespeare.py", "input=tiny.txt", "dataset=tiny"))
        options = [*OPTIONS, f"max_iters={STEPS_PER_KILL * (kills + 1)}"]
        finish(start(folder, "train.py", *options, "out_dir=out/whole"))
        killed, in_writes, resumed_at = folder / "out" / "killed", 0, []
        for n in range(kills):
            process = start(folder, "train.py", *options, "out_dir=out/killed")
            step = STEPS_PER_KILL * n + random.randint(1, STEPS_PER_KILL - 1)
            in_writes += kill(process, killed, step, in_write=n % 2 == 0)
            resumed_at.append(torch.load(killed / "ckpt.pt", weights_only=True)["step"])
        finish(start(folder, "train.py", *options, "out_dir=out/killed"))
        (a, log_a), (b, log_b) = (read_run(folder / "out" / name) for name in ("whole", "killed"))
        for key in ("model", "optimizers", "step", "best_val_loss", "evaluated_step"):
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)
        assert log_a == log_b, "the logs differ"
        assert not list(killed.glob("*.tmp")), "a temporary file is left"
    seconds = time.perf_counter() - started
    print(
        f"killed {kills} times in {seconds:.0f} s, {in_writes} times while a file was being written"
        f"; resumed at steps {resumed_at[0]} to {resumed_at[-1]} of {a['step']}: weights, "
        "optimizers and log are equal to the last bit"
    )
    # Every second kill waits for a write, which is over in milliseconds, so some come too late.
    assert in_writes >= kills // 5, "too few kills met a write"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    main(**vars(parser.parse_args()))
