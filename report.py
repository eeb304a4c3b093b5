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
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from configurator import UserError, configure, run
from data import atomic_write, free_bytes


@dataclass(frozen=True)
class ReportConfig:
    """Draw loss.png and write samples.md from the log of a run."""

    out_dir: str = "out/phase1_char"  # the run's folder


class Log:
    """Every figure of a run passes here: to log.jsonl, to the console and, if asked for, to wandb and TensorBoard."""

    def __init__(self, trainer) -> None:
        self.config, self.step = trainer.config, trainer.start_step
        self.tokens_per_step, self.steps_per_epoch = trainer.tokens_per_step, trainer.steps_per_epoch
        self.is_first = trainer.processes.is_first  # the other processes log nothing
        self.watchers, self.seconds_before = [], 0.0
        shown = self.is_first and sys.stderr.isatty()
        self.bar = tqdm(total=self.config.max_iters, initial=self.step, unit="step", disable=not shown)
        if self.is_first:
            self.path = trainer.out_dir / "log.jsonl"
            if not trainer.resumed:
                self._set_aside(trainer.out_dir)
            # A resumed run goes on behind its checkpoint: what was logged after that is done again.
            earlier = read_log(self.path) if self.path.exists() else []
            evaluated = trainer.evaluated_step == self.step
            earlier = [
                r for r in earlier if r["step"] < self.step or (r["step"] == self.step and ("loss" in r or evaluated))
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
            out_dir = out_dir.absolute() if out_dir.name in ("", "..") else out_dir  # "." has no name to add to
            numbered = (out_dir.with_name(f"{out_dir.name}.{n}") for n in itertools.count(1))
            aside = next(path for path in numbered if not path.exists())
            try:
                out_dir.rename(aside)
            except OSError as error:
                raise UserError(
                    f"{out_dir} has a run and can not be moved aside ({error.strerror}); choose another out_dir"
                ) from error
            self.say(f"the earlier run in {out_dir} is now in {aside}; to go on with it, --init_from=resume")

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
        norm = grad_norm if math.isfinite(grad_norm) else None  # a step that float16's scaler left out
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
        record = {"step": step, "epoch": step / self.steps_per_epoch, "seconds": round(seconds, 3), **figures}
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
            raise UserError("wandb_log=True, but the package is missing: pip install wandb") from None
        self.run = wandb.init(project=config.wandb_project, name=config.wandb_run_name, config=asdict(config))

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
            raise UserError("tensorboard_log=True, but the package is missing: pip install tensorboard") from None
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
            raise UserError(f"{path}: line {number} is no record of a run; remove the line") from None
    return records


def table(records: list[dict]) -> str:
    """Epoch, losses and the first lines of what the model said, of each evaluation with a sample."""
    lines = [
        "epoch | training loss | validation loss | the model says",
        "----: | ------------: | --------------: | ---",
    ]
    for r in records:
        if "sample" in r:
            said = " / ".join(line for line in r["sample"].splitlines() if line)
            said = said if len(said) <= 90 else said[:90].rsplit(" ", 1)[0] + " ..."
            lines.append(f"{r['epoch']:5.3g} | {r['train_loss']:13.4f} | {r['val_loss']:15.4f} | {said}")
    return "\n".join(lines)


def write_samples(out_dir: Path, records: list[dict]) -> None:
    parts = ["# What the model said\n", table(records)]
    for r in records:
        if "sample" in r:
            parts.append(
                f"\n## Epoch {r['epoch']:.3g}, validation loss {r['val_loss']:.4f}\n\n```text\n{r['sample']}\n```"
            )
    with atomic_write(out_dir / "samples.md") as file:
        file.write(("\n".join(parts) + "\n").encode())


def draw_losses(out_dir: Path, records: list[dict]) -> None:
    from matplotlib.figure import Figure  # half a second that a short run need not wait for at its start

    steps = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "val_loss" in r]
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot([r["epoch"] for r in steps], [r["loss"] for r in steps], color="0.8", lw=0.8, label="each batch")
    for key, color, label in (("train_loss", "tab:blue", "training"), ("val_loss", "tab:orange", "validation")):
        x, y = [r["epoch"] for r in evaluations], [r[key] for r in evaluations]
        axes.plot(x, y, color=color, marker=".", label=label)
    if evaluations:
        end = evaluations[-1]
        axes.annotate(
            f"{end['val_loss']:.3f}",
            (end["epoch"], end["val_loss"]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
        )
    axes.set(xlabel="epoch", ylabel="loss (nats per token)", title=f"{out_dir.name}: training and validation loss")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(out_dir / "loss.png") as file:
        figure.savefig(file, format="png")


def main(config: ReportConfig) -> None:
    """Write loss.png and samples.md, and print the table."""
    out_dir = Path(config.out_dir)
    records = read_log(out_dir / "log.jsonl")
    draw_losses(out_dir, records)
    write_samples(out_dir, records)
    print(table(records))


if __name__ == "__main__":
    run(main, configure(ReportConfig))
