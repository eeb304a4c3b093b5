"""Kill a training run with SIGKILL at random moments, go on each time, and compare with a run left alone.

    python tests/kill_training.py --kills=50

Each attempt is a forked process, so that a kill meets training and not the import of torch.
"""

import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from conftest import TEXT

import prepare_shakespeare
import train
from configurator import configure, run
from support import log as report
from support.checkpoint import load_checkpoint


@dataclass(frozen=True)
class KillConfig:
    """Kill a training run at random moments and compare it with one that was left alone."""

    kills: int = 50  # how many
    seed: int = 0  # of the moments


def attempt(config: train.TrainConfig, seconds: float | None, in_training: bool = False) -> bool:
    """Run in a process of its own, killed after `seconds`, in all or of training. Returns whether it ended."""
    log = Path(config.out_dir) / "log.jsonl"  # which is written anew before the first step
    before = log.stat().st_mtime_ns if log.exists() else None
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            train.main(config)
            os._exit(0)
        finally:  # whatever happens, the folder is the parent's to remove
            os._exit(1)
    if seconds is not None:
        while in_training and (log.stat().st_mtime_ns if log.exists() else None) == before:
            time.sleep(0.005)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, "the run failed by itself"
    return status == 0


def main(config: KillConfig) -> None:
    random.seed(config.seed)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("tiny.txt").write_text(TEXT, encoding="utf-8")
        prepare_shakespeare.main(
            prepare_shakespeare.PrepareConfig(input="tiny.txt", dataset="tiny")
        )
        options = dict(
            dataset="tiny", n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4, dropout=0.1
        )
        options |= dict(
            gradient_accumulation_steps=2,
            max_iters=max(400, 50 * config.kills),
            eval_interval=30,
            eval_iters=2,
        )
        options |= dict(
            checkpoint_interval=0.01,
            learning_rate=1e-2,
            compile=False,
            init_from="auto",
            optimizer="muon",
        )
        started = time.perf_counter()
        assert attempt(train.TrainConfig(out_dir="out/whole", **options), None)
        seconds = time.perf_counter() - started
        in_save, steps = 0, []
        for n in range(config.kills):
            moment = random.uniform(0, 1.2 * seconds / config.kills)
            ended = attempt(
                train.TrainConfig(out_dir="out/killed", **options), moment, in_training=n % 2 == 0
            )
            assert not ended, "the run was over before it was killed so often; raise max_iters"
            in_save += any(Path("out/killed").glob("*.tmp"))
            if Path("out/killed/ckpt.pt").exists():
                steps.append(load_checkpoint(Path("out/killed/ckpt.pt"))[1]["step"])
        assert attempt(train.TrainConfig(out_dir="out/killed", **options), None)
        whole, killed = (
            load_checkpoint(Path(f"out/{name}/ckpt.pt"))[1] for name in ("whole", "killed")
        )
        for name in ("model", "optimizers", "step", "best_val_loss"):
            torch.testing.assert_close(whole[name], killed[name], rtol=0, atol=0)
        logs = [
            [
                (r["step"], r.get("loss"), r.get("val_loss"))
                for r in report.read_log(Path(f"out/{name}/log.jsonl"))
            ]
            for name in ("whole", "killed")
        ]
        assert logs[0] == logs[1]
    print(
        f"killed {config.kills} times, {in_save} times while a file was being written, at checkpoints from step "
        f"{steps[0]} to {steps[-1]} of {options['max_iters']}: weights, optimizer and log equal to the last bit"
    )


if __name__ == "__main__":
    run(main, configure(KillConfig))
