"""Put a beginner's mistakes into phase 1, one at a time, and record what happens.

    python prepare_shakespeare.py
    python -m tools.lessons                # everything that docs/lessons.md shows (6 to 13 minutes)
    python -m tools.lessons --only=1       # one of them

A mistake is a diff in tools/mistakes/, or a few options. A copy of the code gets the diff, goes
through the preflight, and trains phase 1 for one epoch on the CPU: in out/lessons/<mistake>/.
"""

import re
import shutil
import tempfile
from configurator import UserError, configure, run
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from matplotlib.figure import Figure

from support.log import read_log
from support.pictures import markdown_table, save_figure
from tools import hunt


@dataclass(frozen=True)
class LessonsConfig:
    """Train phase 1 with beginners' mistakes and draw what happens."""

    only: int = 0  # the lesson of one mistake: 1 to 8; 0: all
    max_iters: int = 245  # steps of each run; 245 are one epoch
    pictures: str = "out/lessons"  # folder of the figures


@dataclass(frozen=True)
class Mistake:
    """The change in tools/mistakes/<name>.diff or, if there are `options`, in those alone."""

    lesson: int
    name: str
    title: str = ""  # of its curve: what the reader should see, not why it happens
    options: str = ""


class Run(NamedTuple):  # what happened with a mistake
    mistake: Mistake
    preflight: str  # what it printed
    error: str  # the last line of a training that failed
    records: list[dict]  # of log.jsonl


CORRECT = Mistake(0, "correct")
MISTAKES = [
    Mistake(1, "mistake_1", "Mistake 1: almost 0 after 100 steps"),
    Mistake(2, "mistake_2", "Mistake 2: the loss falls, but not far enough"),
    Mistake(3, "mistake_3", "Mistake 3: almost 0 after 50 steps"),
    Mistake(4, "mistake_4", "Mistake 4: one epoch beats twenty correct ones"),
    Mistake(5, "mistake_5a", "Mistake 5a: stuck", "--learning_rate=0.04 --muon_lr=0.3"),
    Mistake(5, "mistake_5b", "Mistake 5b: slow", "--learning_rate=4e-4 --muon_lr=0.003"),
    Mistake(6, "mistake_6a", "Mistake 6a: NaN at once"),
    Mistake(6, "mistake_6b", "Mistake 6b: NaN after a good start"),
    Mistake(7, "mistake_7a", "Mistake 7a: an error"),
    Mistake(7, "mistake_7b", "Mistake 7b: about half the correct loss"),
    Mistake(8, "mistake_8", "Mistake 8: the same curve, later"),
]


def train_with(mistake: Mistake, config: LessonsConfig) -> Run:
    """Copy the code, make the mistake there, and run the preflight and the training."""
    log, every = Path("out/lessons", mistake.name, "log.jsonl"), config.max_iters // 5
    options = f"--device=cpu --compile=False --max_iters={config.max_iters} --log_interval=7 "
    options += f"--eval_interval={every} --sample_interval={5 * every} {mistake.options}"
    options = [hunt.ROOT / "config/phase1_char.py", f"--out_dir={log.parent}", *options.split()]
    shutil.rmtree(log.parent, ignore_errors=True)
    print(f"\n{mistake.name}: preflight and {config.max_iters} steps (about 40 s) ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code"
        hunt.copy_code(hunt.ROOT, code)
        if mistake != CORRECT and not mistake.options:
            hunt.apply_diff(hunt.MISTAKES / f"{mistake.name}.diff", code)
        preflight = hunt.run_with(code, "tools.preflight", *options).stdout
        training = hunt.run_with(code, "train", *options)
    error = training.stderr.strip().split("\n")[-1] if training.returncode else ""
    print(preflight + training.stdout + error, flush=True)
    return Run(mistake, preflight, error, read_log(log) if log.exists() else [])


# Losses on phase 1's text, in nats per token, of simple guesses; docs/lessons.md computes them.
BASELINES = {"all equally likely": 4.17, "frequencies": 3.31, "pairs": 2.45}


def draw_lesson(lesson: int, runs: list[Run], config: LessonsConfig) -> None:
    """Draw the losses of a lesson's runs, each over those of the correct run, the first."""
    trained = [run for run in runs if run.mistake.lesson == lesson and run.records]
    figure = Figure(figsize=(8, 2.8), dpi=200, layout="constrained")
    panels = figure.subplots(1, len(trained), sharey=True, squeeze=False)[0]
    for axes, one in zip(panels, trained, strict=True):
        x = "seconds" if lesson == 8 else "step"
        draw_run(axes, x, runs[0], ("0.8", "0.6"), ", correct run")
        draw_run(axes, x, one, ("tab:blue", "tab:orange"), "")
        for loss in BASELINES.values():
            axes.axhline(loss, color="0.3", lw=0.8, ls=":", zorder=0)
        axes.set(xlabel=x, title=one.mistake.title, ylim=(-0.15, 4.65))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss (nats per token)")
    labels = [f"{name}: {loss}" for name, loss in BASELINES.items()]
    panels[-1].secondary_yaxis("right").set_yticks(list(BASELINES.values()), labels, fontsize=8)
    legend = panels[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    save_figure(figure, Path(config.pictures) / f"lessons_{lesson}.png")


def draw_run(axes, x: str, one: Run, colors: tuple, suffix: str) -> None:
    """Draw the losses of one run over `x`, with a cross where it ended in an error."""
    steps = [(r[x], r["loss"]) for r in one.records if "loss" in r]
    axes.plot(*zip(*steps, strict=True), color=colors[0], label="each batch" + suffix)
    evaluations = [(r[x], r["val_loss"]) for r in one.records if "val_loss" in r]
    size = 45 if suffix else 15  # a dot of the correct run stays visible behind another one
    axes.scatter(*zip(*evaluations, strict=True), size, colors[1], label="validation" + suffix)
    if one.error:
        end = int(re.search(r"step (\d+)", one.error)[1]), steps[-1][1]
        axes.scatter(*end, 60, "tab:red", marker="x")
        axes.annotate(" NaN", end, va="bottom", color="tab:red")


# A forward pass: the code in model.py, the shape of its result, and the numbers of one token in it.
SHAPES = {
    "idx": ("B, T", [8]),  # one number; 8 can be seen
    "wte(idx)": ("B, T, C", [128]),
    "wpe(positions)": ("T, C", [128]),
    "x = wte(idx) + wpe(positions)": ("B, T, C", [128]),
    "c_attn(ln_1(x))": ("B, T, 3C", [128] * 3),
    "q, k and v, each": ("B, T, nh, hs", [32] * 4),
    "q.transpose(1, 2)": ("B, nh, T, hs", [32] * 4),
    "scores = q / sqrt(hs) @ k.mT + mask": ("B, nh, T, T", [100] * 4),
    "weights = scores.softmax(dim=-1)": ("B, nh, T, T", [100] * 4),
    "y = weights @ v": ("B, nh, T, hs", [32] * 4),
    "y.transpose(1, 2).reshape(B, T, C)": ("B, T, C", [128]),
    "x = x + attn(ln_1(x))": ("B, T, C", [128]),
    "c_fc(ln_2(x))": ("B, T, 4C", [512]),
    "x = x + mlp(ln_2(x))": ("B, T, C", [128]),
    "logits = lm_head(ln_f(x))": ("B, T, V", [65]),
    "loss = cross_entropy(logits, targets)": ("", [8]),
}
# Phase 1's model on 6 sequences of 100 characters: no two sizes are equal.
SIZES = {"B": 6, "T": 100, "C": 128, "nh": 4, "hs": 32, "V": 65, "3C": 384, "4C": 512}


def draw_shapes(config: LessonsConfig) -> None:
    """Draw a forward pass from top to bottom: the code, the numbers of one token, the shape."""
    figure = Figure(figsize=(8, 5), dpi=200)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 8), ylim=(len(SHAPES) + 0.8, -0.8))  # x in inches
    axes.axis("off")
    axes.axhspan(4.5, 14.5, color="0.94", lw=0)
    axes.text(7.7, 9.5, "one block of 2", rotation=270, va="center", fontsize=8)
    for x, title in ((0.2, "in model.py"), (3.1, "one token"), (5.3, "shape"), (6.4, "example")):
        axes.text(x, 0, title, va="center", fontsize=9, weight="bold")
    for row, (code, (shape, parts)) in enumerate(SHAPES.items(), start=1):
        sizes = tuple(SIZES[letter] for letter in shape.split(", ") if letter)
        for x, text in ((0.2, code), (5.3, f"({shape})"), (6.4, sizes)):
            axes.text(x, row, text, va="center", fontsize=8, family="monospace")
        spans = [(3.1 + i * n / 262, n / 262 - 0.02) for i, n in enumerate(parts)]
        color = "tab:orange" if "T, T" in shape else "tab:blue"
        axes.broken_barh(spans, (row - 0.28, 0.56), color=color, lw=0)
    save_figure(figure, Path(config.pictures) / "lessons_shapes.png")


def make_table(runs: list[Run]) -> str:
    """Return a Markdown table of what happened in each run."""
    rows = []
    for mistake, preflight, error, records in runs:
        notes = re.findall(r"^(?:FAIL [^:]+|warning: [^;\n]+)", preflight, re.MULTILINE)
        notes += [re.split(", at |;", error)[0]] * bool(error)
        end = {} if error else [r for r in records if "val_loss" in r][-1]
        figures = [f"{end[key]:.4f}" if end else "" for key in ("train_loss", "val_loss")]
        speeds = [r["tokens_per_second"] for r in records if "loss" in r]
        figures.append(f"{median(speeds):,.0f}" if speeds else "")
        rows.append([mistake.name, *figures, "; ".join(notes)])
    header = ["run", "training loss", "validation loss", "tokens/s", "preflight / the end"]
    return markdown_table(header, rows, right={1, 2, 3})


def main(config: LessonsConfig) -> None:
    """Train, draw, and print the table."""
    chosen = [m for m in MISTAKES if config.only in (0, m.lesson)]
    if not chosen:
        raise UserError(f"only={config.only} must be 0 or one of 1 to {MISTAKES[-1].lesson}")
    draw_shapes(config)
    runs = [train_with(mistake, config) for mistake in (CORRECT, *chosen)]
    for lesson in dict.fromkeys(mistake.lesson for mistake in chosen):
        draw_lesson(lesson, runs, config)
    print(make_table(runs))


if __name__ == "__main__":
    run(main, configure(LessonsConfig))
