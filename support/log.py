"""The log of a run: write it while training, read it, and turn it into pictures and tables.

    python report.py --out_dir=out/phase1_char     # also while it trains, in another terminal

`log.jsonl` holds two kinds of records, a JSON object a line. `step` counts finished updates:

    {"step", "epoch", "seconds", "loss", "grad_norm", "lr", "tokens_per_second"}
    {"step", "epoch", "seconds", "train_loss", "val_loss"}, at times with a "sample"
"""

import itertools
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from configurator import UserError
from support.files import atomic_write, free_bytes


class Log:
    """Every figure of a run passes here: to log.jsonl, to the console and, if asked for, to wandb and TensorBoard."""

    def __init__(self, trainer) -> None:
        self.config, self.step = trainer.config, trainer.start_step
        self.tokens_per_step, self.steps_per_epoch = (
            trainer.tokens_per_step,
            trainer.steps_per_epoch,
        )
        self.is_first = trainer.processes.is_first  # the other processes log nothing
        self.watchers, self.seconds_before = [], 0.0
        shown = self.is_first and sys.stderr.isatty()
        self.bar = tqdm(
            total=self.config.max_iters, initial=self.step, unit="step", disable=not shown
        )
        if self.is_first:
            self.path = trainer.out_dir / "log.jsonl"
            if not trainer.resumed:
                self._set_aside(trainer.out_dir)
            # A resumed run goes on behind its checkpoint: what was logged after that is done again.
            earlier = read_log(self.path) if self.path.exists() else []
            evaluated = trainer.evaluated_step == self.step
            earlier = [
                r
                for r in earlier
                if r["step"] < self.step or (r["step"] == self.step and ("loss" in r or evaluated))
            ]
            if earlier:
                self.seconds_before = earlier[-1]["seconds"]
            with atomic_write(self.path) as file:
                file.writelines(json.dumps(r).encode() + b"\n" for r in earlier)
            if self.config.wandb_log:
                self.watchers.append(Wandb(self.config))
            if self.config.tensorboard_log:
                self.watchers.append(TensorBoard(self.config))
        self.start_clock()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        for watcher in self.watchers:
            watcher.close()

    def _set_aside(self, out_dir: Path) -> None:
        """A run that starts anew does not cost an earlier one: its folder gets a number."""
        if (out_dir / "ckpt.pt").exists():
            out_dir = (
                out_dir.absolute() if out_dir.name in ("", "..") else out_dir
            )  # "." has no name to add to
            numbered = (out_dir.with_name(f"{out_dir.name}.{n}") for n in itertools.count(1))
            aside = next(path for path in numbered if not path.exists())
            try:
                out_dir.rename(aside)
            except OSError as error:
                raise UserError(
                    f"{out_dir} has a run and can not be moved aside ({error.strerror}); choose another out_dir"
                ) from error
            self.say(
                f"the earlier run in {out_dir} is now in {aside}; to go on with it, --init_from=resume"
            )

    def start_clock(self) -> None:
        self.started = self.interval_started = time.perf_counter()
        self.interval_step = self.step

    def update(self, step: int, loss: float, grad_norm: float, lr: float) -> None:
        """The update number `step` is done; every `log_interval`-th is logged."""
        if step % self.config.log_interval:
            return
        now = time.perf_counter()
        speed = (step - self.interval_step) * self.tokens_per_step / (now - self.interval_started)
        self.interval_started, self.interval_step = now, step
        norm = (
            grad_norm if math.isfinite(grad_norm) else None
        )  # a step that float16's scaler left out
        self._record(step, loss=loss, grad_norm=norm, lr=lr, tokens_per_second=round(speed))
        if self.bar.disable:
            left = (self.config.max_iters - step) * self.tokens_per_step / speed
            self.say(
                f"step {step:6,} | epoch {step / self.steps_per_epoch:5.2f} | loss {loss:.4f} | "
                f"{speed:,.0f} tokens/s | {tqdm.format_interval(left)} left"
            )
        else:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")

    def evaluation(self, step: int, train_loss: float, val_loss: float, **sample: str) -> None:
        """The losses after `step` updates, and what the model then says, if `sample=` has it."""
        self._record(step, train_loss=train_loss, val_loss=val_loss, **sample)
        self.say(
            f"step {step:6,} | epoch {step / self.steps_per_epoch:5.2f} | "
            f"training loss {train_loss:.4f} | validation loss {val_loss:.4f}"
        )
        self.interval_started, self.interval_step = time.perf_counter(), step

    def say(self, line: str) -> None:
        """Print a line; the progress bar stays below it."""
        if self.is_first:
            self.bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def _record(self, step: int, **figures) -> None:
        if not self.is_first:
            return
        seconds = self.seconds_before + time.perf_counter() - self.started
        record = {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "seconds": round(seconds, 3),
            **figures,
        }
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path}: can not grow ({error.strerror}); {free_bytes(self.path.parent):,} bytes are free there"
            ) from error
        for watcher in self.watchers:
            watcher.log(figures, step)


class Wandb:
    """Weights & Biases."""

    def __init__(self, config) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "wandb_log=True, but the package is missing: pip install wandb"
            ) from None
        self.run = wandb.init(
            project=config.wandb_project, name=config.wandb_run_name, config=asdict(config)
        )

    def log(self, figures: dict, step: int) -> None:
        self.run.log(figures, step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Event files in out_dir, to be seen with `tensorboard --logdir=out`."""

    def __init__(self, config) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "tensorboard_log=True, but the package is missing: pip install tensorboard"
            ) from None
        self.writer = SummaryWriter(config.out_dir)

    def log(self, figures: dict, step: int) -> None:
        for name, value in figures.items():
            if isinstance(value, str):
                self.writer.add_text(name, value, step)
            elif value is not None:
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


def read_log(path: Path) -> list[dict]:
    """The records of a log.jsonl; a last line that a kill cut short is left out."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; name the folder of a run with --out_dir")
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            records.append({"step": 0, "epoch": 0, "seconds": 0} | json.loads(line))
        except (ValueError, TypeError, RecursionError):
            raise UserError(
                f"{path}: line {number} is no record of a run; remove the line"
            ) from None
    return records
