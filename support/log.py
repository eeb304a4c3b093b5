"""The log of a run: to log.jsonl, to the console and, on demand, to wandb and TensorBoard.

log.jsonl has a JSON object per line, of three kinds. `step` counts finished updates:

    {"step", "epoch", "seconds", "loss", "grad_norm", "lr", "tokens_per_second"}
    {"step", "epoch", "seconds", "train_loss", "val_loss"}
    {"step", "epoch", "seconds", "sample"}

A resumed run repeats some steps, so the file has their records twice: see `read_log`.
"""

import json
import math
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from configurator import UserError, one_line
from support.files import progress_bar


class Log:
    """Writes down every figure of a run. In all processes but the first, nothing happens."""

    def __init__(
        self, config, first_step: int, tokens: int, tokens_per_step: int, n_tokens: int, is_first
    ) -> None:
        """`tokens` were read before first_step, and train.bin has n_tokens: an epoch."""
        self.last_step, self.log_interval = config.max_iters, config.log_interval
        self.first_step, self.first_tokens = first_step, tokens
        self.tokens_per_step, self.n_tokens = tokens_per_step, n_tokens
        self.path, self.is_first = Path(config.out_dir) / "log.jsonl", is_first
        self.trackers = [Wandb(config)] if config.wandb_log and is_first else []
        if config.tensorboard_log and is_first:
            self.trackers.append(TensorBoard(config, first_step))
        self.bar = progress_bar(self.last_step, first_step, "step", hidden=not is_first)
        earlier = []
        if is_first and self.path.exists():
            earlier = [r["seconds"] for r in read_log(self.path) if r["step"] <= first_step]
            with open(self.path, "r+b") as file:  # a kill may have cut the last line
                file.truncate(file.read().rfind(b"\n") + 1)
        self.started = time.perf_counter() - max(earlier, default=0.0)
        self.interval_step, self.interval_started = first_step, time.perf_counter()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        self._tell_trackers(lambda tracker: tracker.close())

    def epoch(self, step: int) -> float:
        """Return how often the training data was read in `step` updates."""
        new = (step - self.first_step) * self.tokens_per_step
        return (self.first_tokens + new) / self.n_tokens

    def training(self, step: int, loss: float, grad_norm: float, lr: float) -> None:
        """Log the update number `step` if it is a multiple of log_interval."""
        self.bar.update(step - self.bar.n)
        if step % self.log_interval or not self.is_first:
            return
        now = time.perf_counter()
        speed = (step - self.interval_step) * self.tokens_per_step / (now - self.interval_started)
        self.interval_started, self.interval_step = now, step
        norm = grad_norm if math.isfinite(grad_norm) else None  # float16's scaler skipped this step
        self._record(step, loss=loss, grad_norm=norm, lr=lr, tokens_per_second=round(speed))
        if self.bar.disable:
            left = tqdm.format_interval((self.last_step - step) * self.tokens_per_step / speed)
            self._say_at(step, f"loss {loss:.4f} | {speed:,.0f} tokens/s | {left} left")
        else:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")

    def evaluation(self, step: int, train_loss: float, val_loss: float) -> None:
        """Log the losses after `step` updates."""
        self._record(step, train_loss=train_loss, val_loss=val_loss)
        self._say_at(step, f"training loss {train_loss:.4f} | validation loss {val_loss:.4f}")
        self.pause(step)

    def sample(self, step: int, text: str) -> None:
        """Log a text that the model wrote after `step` updates."""
        self._record(step, sample=text)
        self._say_at(step, shorten(text))
        self.pause(step)

    def status(self, words: str) -> None:
        """Show what the program is doing, behind the progress bar or, before step 1, as a line."""
        if not self.bar.disable:
            self.bar.set_postfix_str(words)
        elif self.interval_step == 0:
            self.say(words)

    def say(self, line: str) -> None:
        """Print a line above the progress bar. If nobody reads stdout any more, end the run."""
        try:
            if self.is_first:
                self.bar.write(line, file=sys.stdout)
                sys.stdout.flush()
        except OSError:  # the terminal is gone, or `| tee log`, which Ctrl-C ends before this run
            signal.raise_signal(signal.SIGTERM)  # which train.py answers by saving
            for other in (sys.stderr.fileno(), os.open(os.devnull, os.O_WRONLY)):
                os.dup2(other, sys.stdout.fileno())
                with suppress(OSError):
                    return sys.stdout.flush()  # the line is still in its buffer

    def _say_at(self, step: int, words: str) -> None:
        self.say(f"step {step:6,} | epoch {self.epoch(step):5.2f} | {words}")

    def pause(self, step: int) -> float:
        """Return the time. What passed since the last log line will not count as training."""
        self.bar.unpause()
        self.interval_started, self.interval_step = time.perf_counter(), step
        return self.interval_started

    def _record(self, step: int, **figures) -> None:
        if not self.is_first:
            return
        seconds = round(time.perf_counter() - self.started, 3)
        record = {"step": step, "epoch": self.epoch(step), "seconds": seconds, **figures}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._tell_trackers(lambda tracker: tracker.log(figures, step=step))

    def _tell_trackers(self, tell: Callable) -> None:
        """Call tell(tracker) for each tracker. One that fails is left out from then on."""
        for tracker in list(self.trackers):
            try:
                tell(tracker)
            except Exception as error:  # of a package or its server: no reason to end a long run
                self.trackers.remove(tracker)
                reason = one_line(error)[:200]
                self.say(f"{type(tracker).__name__} failed ({reason}); it gets no more figures")


class Wandb:
    """Weights & Biases. A file in out_dir keeps the id, so that a resumed run is one run there."""

    def __init__(self, config) -> None:
        id_file = Path(config.out_dir) / "wandb_id.txt"
        try:
            import wandb  # only needed if asked for

            if not id_file.exists():
                id_file.write_text(secrets.token_hex(4), "utf-8")
            same = {"id": id_file.read_text("utf-8"), "resume": "allow"}  # allow: or begin it
            names = {"project": config.wandb_project, "name": config.wandb_run_name}
            run = wandb.init(config=asdict(config), **names, **same)
        except ImportError:
            raise UserError("wandb_log=True needs: pip install wandb") from None
        except Exception as error:  # no key, no network, ...
            raise UserError(f"wandb: {one_line(error)[:200]}; or use --wandb_log=False") from error
        self.log, self.close = run.log, run.finish


class TensorBoard:
    """Event files in out_dir, for `tensorboard --logdir=out`."""

    def __init__(self, config, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # only needed if asked for
        except ImportError:
            raise UserError("tensorboard_log=True needs: pip install tensorboard") from None
        # Hides what an interrupted run logged after the checkpoint: it is computed again.
        self.writer = SummaryWriter(config.out_dir, purge_step=first_step + 1)
        self.close = self.writer.close

    def log(self, figures: dict, step: int) -> None:
        for name, value in figures.items():
            if isinstance(value, str):
                self.writer.add_text(name, value, step)
            elif value is not None:
                self.writer.add_scalar(name, value, step)


def shorten(text: str, width: int = 44) -> str:
    """Return the beginning of a text as one line of at most `width` characters."""
    line = " / ".join(line for line in text.splitlines() if line)
    return line if len(line) <= width else line[: width - 3].rsplit(" ", 1)[0] + " ..."


def read_log(path: Path) -> list[dict]:
    """Return the records of a log.jsonl in the order of their steps. Damaged lines are left out.

    A record replaces those before it with the same step and kind, and all with a later step: the
    run was resumed there.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; name the folder of a run with --out_dir")
    records, last = {}, 0
    for line in path.read_bytes().split(b"\n")[:-1]:  # the last line may be cut
        with suppress(ValueError, TypeError, KeyError, StopIteration):
            record = {"epoch": 0, "seconds": 0} | json.loads(line)
            kind = next(k for k in ("loss", "val_loss", "sample") if k in record)
            if record["step"] < last:
                records = {key: r for key, r in records.items() if r["step"] <= record["step"]}
            last = record["step"]
            records[last, kind] = record
    return list(records.values())
