"""The log of a run: to log.jsonl, to the console and, on demand, to wandb and TensorBoard.

log.jsonl has a JSON object per line, of three kinds. `step` counts finished updates:

    {"step", "epoch", "seconds", "loss", "grad_norm", "lr", "tokens_per_second"}
    {"step", "epoch", "seconds", "train_loss", "val_loss"}
    {"step", "epoch", "seconds", "sample"}
"""

import itertools
import json
import math
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from configurator import UserError, one_line
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from support.files import atomic_write, free_bytes, lock_path
from support.runtime import dtype_name, is_slow


class Log:
    """Write down every figure of a run. Only the first process logs; in the others nothing happens.

    Of a resumed run, the records after its checkpoint are removed: they are made again.
    """

    def __init__(self, trainer) -> None:
        config, start_step = trainer.config, trainer.start_step
        self.config, self.is_first = config, trainer.processes.is_first
        self.tokens_per_step = trainer.tokens_per_step
        self.steps_per_epoch = trainer.steps_per_epoch
        self.path = Path(config.out_dir) / "log.jsonl"
        self.trackers, self.seconds_before = [], 0.0
        self.interval_step, self.sampled_step = start_step, -1  # step of the last line and sample
        hidden = not (self.is_first and sys.stderr.isatty())
        self.bar = tqdm(total=config.max_iters, initial=start_step, unit="step", disable=hidden)
        if self.is_first:
            evaluated_step = trainer.evaluated_step
            resumed = evaluated_step >= 0 and self.path.exists()
            earlier = read_log(self.path) if resumed else []
            earlier = [r for r in earlier if not is_made_again(r, start_step, evaluated_step)]
            self.sampled_step = max((r["step"] for r in earlier if "sample" in r), default=-1)
            self.seconds_before = earlier[-1]["seconds"] if earlier else 0.0
            with atomic_write(self.path) as file:
                file.writelines(json.dumps(r).encode() + b"\n" for r in earlier)
            self.trackers += [Wandb(config)] if config.wandb_log else []
            self.trackers += [TensorBoard(config, start_step)] if config.tensorboard_log else []

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        self._tell_trackers(lambda tracker: tracker.close())

    def start_clock(self) -> None:
        """Count the time from now on: call this when training itself begins."""
        self.bar.unpause()
        self.started = self.interval_started = time.perf_counter()

    def training(self, step: int, loss: float, grad_norm: float, lr: float) -> None:
        """Log the update number `step` if it is a multiple of log_interval."""
        self.bar.update(step - self.bar.n)
        if step % self.config.log_interval:
            return
        now = time.perf_counter()
        speed = (step - self.interval_step) * self.tokens_per_step / (now - self.interval_started)
        self.interval_started, self.interval_step = now, step
        norm = grad_norm if math.isfinite(grad_norm) else None  # float16's scaler skipped this step
        self._record(step, loss=loss, grad_norm=norm, lr=lr, tokens_per_second=round(speed))
        if self.bar.disable:
            left = (self.config.max_iters - step) * self.tokens_per_step / speed
            self.say(
                f"step {step:6,} | epoch {step / self.steps_per_epoch:5.2f} | loss {loss:.4f} | "
                f"{speed:,.0f} tokens/s | {tqdm.format_interval(left)} left"
            )
        else:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")

    def evaluation(self, step: int, train_loss: float, val_loss: float) -> None:
        """Log the losses after `step` updates."""
        self._record(step, train_loss=train_loss, val_loss=val_loss)
        losses = f"training loss {train_loss:.4f} | validation loss {val_loss:.4f}"
        self._say_at(step, losses)

    def sample_is_due(self, step: int, last: bool) -> bool:
        """Return whether a text is to be logged: early on, every sample_interval, and at the end.

        A young model changes fast, so its first texts come after 0, 25, 50 and 100 updates.
        """
        interval = self.config.sample_interval
        if not (self.is_first and interval) or step <= self.sampled_step:
            return False
        return step in (0, 25, 50, 100) or step % interval == 0 or last

    def sample(self, step: int, text: str) -> None:
        """Log a text that the model wrote after `step` updates."""
        self._record(step, sample=text)
        self._say_at(step, shorten(text))

    def _say_at(self, step: int, words: str) -> None:
        """Print what happened after `step` updates. Its time does not count as training."""
        self.say(f"step {step:6,} | epoch {step / self.steps_per_epoch:5.2f} | {words}")
        self.bar.unpause()
        self.interval_started, self.interval_step = time.perf_counter(), step
        self.status("")

    def status(self, words: str) -> None:
        """Show what the program is doing, behind the progress bar or, before step 1, as a line."""
        if not self.bar.disable:
            self.bar.set_postfix_str(words)
        elif words and self.interval_step == 0:
            self.say(words)

    def say(self, line: str) -> None:
        """Print a line above the progress bar. If stdout is gone, use stderr and end the run."""
        if not self.is_first:
            return
        try:
            self.bar.write(line, file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # the terminal is gone, or `| tee log`, which Ctrl-C ends before this run
            signal.raise_signal(signal.SIGTERM)
            for other in (sys.stderr.fileno(), os.open(os.devnull, os.O_WRONLY)):
                os.dup2(other, sys.stdout.fileno())
                with suppress(OSError):
                    return sys.stdout.flush()  # the line is still in its buffer

    def _record(self, step: int, **figures) -> None:
        if not self.is_first:
            return
        seconds = round(self.seconds_before + time.perf_counter() - self.started, 3)
        record = {"step": step, "epoch": step / self.steps_per_epoch, "seconds": seconds, **figures}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            free = free_bytes(self.path.parent)
            raise UserError(
                f"{self.path}: can not grow ({error.strerror}); {free:,} bytes are free there"
            ) from error
        self._tell_trackers(lambda tracker: tracker.log(figures, step))

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
        name, project = config.wandb_run_name, config.wandb_project
        id_file = Path(config.out_dir) / "wandb_id.txt"
        try:
            import wandb  # only needed if asked for

            if not id_file.exists():
                id_file.write_text(secrets.token_hex(4), "utf-8")
            same = {"id": id_file.read_text("utf-8"), "resume": "allow"}  # begins it if it is new
            self.run = wandb.init(project=project, name=name, config=asdict(config), **same)
        except ImportError:
            raise UserError("wandb_log=True needs: pip install wandb") from None
        except Exception as error:  # no key, no network, ...
            raise UserError(f"wandb: {one_line(error)[:200]}; or use --wandb_log=False") from error

    def log(self, figures: dict, step: int) -> None:
        self.run.log(figures, step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Event files in out_dir, for `tensorboard --logdir=out`."""

    def __init__(self, config, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # only needed if asked for
        except ImportError:
            raise UserError(
                "tensorboard_log=True needs a package: pip install tensorboard"
            ) from None
        # Hides what an interrupted run logged after the checkpoint: it is computed again.
        self.writer = SummaryWriter(config.out_dir, purge_step=start_step + 1)

    def log(self, figures: dict, step: int) -> None:
        for name, value in figures.items():
            if isinstance(value, str):
                self.writer.add_text(name, value, step)
            elif value is not None:
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


@contextmanager
def lock_run(config, processes) -> Iterator[None]:
    """Keep other runs out of out_dir inside the block, unless this run only checks or evaluates.

    Enter it before the checkpoint is read, because another run may still be saving one. Waits up to
    a minute under torchrun: a worker of the attempt before may still be ending. Raises UserError.
    """
    locks = processes.is_first and not (config.preflight or config.eval_only)
    seconds = 60 if processes.distributed else 0
    with lock_path(Path(config.out_dir), seconds) if locks else nullcontext():
        processes.gather("claimed")  # the others wait for the first
        yield


def move_earlier_run(out_dir: Path) -> None:
    """Rename out_dir to NAME.1, NAME.2, ... if it has an earlier run. Raises UserError."""
    if not any((out_dir / name).exists() for name in ("ckpt.pt", "best.pt")):
        return
    folder = out_dir.resolve()
    if Path.cwd().is_relative_to(folder):
        raise UserError(
            f"out_dir={out_dir} is or contains the folder that you are in, and it has an "
            "earlier run; choose another, as in --out_dir=out/mine"
        )
    aside = set_aside(folder)
    folder.mkdir(exist_ok=True)  # if out_dir is a link, it would otherwise lead nowhere
    print(f"the earlier run is now in {aside}; to continue a run, use --init_from=resume")


def set_aside(out_dir: Path) -> Path:
    """Rename a folder to NAME.1, NAME.2, ..., the first that is free. Returns the new path."""
    numbered = (out_dir.with_name(f"{out_dir.name}.{n}") for n in itertools.count(1))
    aside = next(path for path in numbered if not path.exists())
    try:
        out_dir.rename(aside)
    except OSError as error:
        raise UserError(
            f"{out_dir} has an earlier run and can not be renamed ({error.strerror}); "
            "choose another out_dir"
        ) from error
    return aside


def describe(trainer) -> str:
    """Return three lines about a run: its model, its data, its machine."""
    c, epochs = trainer.config, trainer.config.max_iters / trainer.steps_per_epoch
    dtype = dtype_name(trainer.dtype)
    if trainer.device.type == "cuda" and dtype == "float32" and c.dtype == "auto":
        dtype = "float32 (this GPU has no bfloat16; --dtype=float16 is faster)"
    if is_slow(trainer.dtype, trainer.device):
        dtype += " (float32 is faster on this CPU; use --dtype=auto)"
    return (
        f"{trainer.model.num_params():,} parameters: {c.n_layer} layers, {c.n_head} heads, "
        f"{c.n_embd} wide, context {c.block_size}, vocabulary {trainer.tokenizer.vocab_size:,}\n"
        f"{trainer.tokens_per_step:,} tokens per step, {trainer.steps_per_epoch:,.1f} steps per "
        f"epoch, {c.max_iters:,} steps = {epochs:.1f} epochs of data/{c.dataset}\n"
        f"{trainer.device} x {trainer.processes.count}, {dtype}, {c.optimizer}"
    )


def is_made_again(record: dict, start_step: int, evaluated_step: int) -> bool:
    """Return whether a run that resumes at start_step makes this record of its log once more.

    Such a run begins with the evaluation and the sample of start_step, unless it was saved after
    this evaluation.
    """
    step = record["step"]
    if "loss" in record:
        return step > start_step
    return step > start_step or (step == start_step != evaluated_step)


def shorten(text: str, width: int = 44) -> str:
    """Return the beginning of a text as one line of at most `width` characters."""
    line = " / ".join(line for line in text.splitlines() if line)
    return line if len(line) <= width else line[: width - 3].rsplit(" ", 1)[0] + " ..."


def given_out_dirs(otherwise: str) -> list[str]:
    """Return each run's folder that the command line names, once, or `otherwise`.

    A config keeps only the last of several --out_dir options; tools that compare runs need all.
    """
    given = [arg.removeprefix("--out_dir=") for arg in sys.argv if arg.startswith("--out_dir=")]
    return list(dict.fromkeys(Path(out_dir).as_posix() for out_dir in given or [otherwise]))


def read_log(path: Path) -> list[dict]:
    """Return the records of a log.jsonl. Damaged lines are left out, and stderr says so."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; name the folder of a run with --out_dir")
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):  # a cut last line
        try:
            record = {"epoch": 0, "seconds": 0} | json.loads(line)
            names = {"step", "epoch", "seconds", "loss", "train_loss", "val_loss"} & record.keys()
            assert {"loss", "sample"} & record.keys() or names >= {"train_loss", "val_loss"}
            assert type(record["step"]) is int and isinstance(record.get("sample", ""), str)
            assert all(type(record[n]) in (int, float) and abs(record[n]) < 1e15 for n in names)
            records.append(record)
        except (ValueError, TypeError, KeyError, AssertionError, RecursionError):
            print(f"{path}: line {number} is damaged and was left out", file=sys.stderr)
    return records
