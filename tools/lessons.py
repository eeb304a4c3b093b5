"""Put a beginner's mistakes into phase 1, one at a time, and record what happens.

    python prepare_shakespeare.py
    python -m tools.lessons                # everything that docs/lessons.md shows (6 to 13 minutes)
    python -m tools.lessons --only=mask    # one lesson

A mistake is a diff in tools/mistakes/, or a few options. A copy of the code gets the diff, runs its
--preflight, and trains phase 1 for one epoch on the CPU. Each run goes to out/lessons/<mistake>/,
with what it printed in output.json; the figures go to docs/pictures/.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from configurator import UserError, check_range, configure, run
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from support.broken_copy import MISTAKES as DIFFS
from support.broken_copy import ROOT, apply_diff, copy_code
from support.files import atomic_write, read_text
from support.log import read_log
from support.pictures import markdown_table, save_figure


@dataclass(frozen=True)
class LessonsConfig:
    """Train phase 1 with beginners' mistakes and draw what happens."""

    only: str = ""  # one lesson, such as mask or nan; '': all
    max_iters: int = 245  # steps of each run; 245 are one epoch
    out_dir: str = "out/lessons"  # folder of the runs; earlier runs are deleted
    pictures: str = "docs/pictures"  # folder of the figures

    def __post_init__(self) -> None:
        check_range(self, 7, 1 << 31, "max_iters")


@dataclass(frozen=True)
class Mistake:
    """The change in tools/mistakes/<name>.diff or, if there are `options`, in those alone."""

    lesson: str
    name: str
    title: str = ""  # of its curve: what the reader should see
    options: str = ""


CORRECT = Mistake("", "correct")
MISTAKES = [
    Mistake("mask", "no_mask", "No mask: the loss collapses"),
    Mistake("positions", "no_positions", "No positions: the loss falls, but not far enough"),
    Mistake("targets", "same_targets", "Targets not shifted: copying is enough"),
    Mistake("heads", "swapped_heads", "reshape instead of transpose: the future leaks in"),
    Mistake("rate", "rate_too_high", "Too high: stuck", "--learning_rate=0.04 --muon_lr=0.3"),
    Mistake("rate", "rate_too_low", "Too low: slow", "--learning_rate=4e-4 --muon_lr=0.003"),
    Mistake("nan", "masked_row", "A row of -inf alone: NaN at once"),
    Mistake("nan", "softmax_by_hand", "Overflow in float16: NaN after a good start"),
    Mistake("dtype", "int32_targets", "int32 targets: torch refuses them"),
    Mistake("dtype", "read_as_bytes", "Ids read as bytes: every second target is known"),
    Mistake("loader", "slow_loader", "Tokenizing in every step: the same curve, later"),
]


def run_train(folder: str, options: list[str]) -> tuple[str, str]:
    """Run the train.py in `folder`. Returns what it printed and, if it failed, its last line."""
    command = [sys.executable, f"{folder}/train.py", str(ROOT / "config/phase1_char.py"), *options]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    error = done.stderr.strip().split("\n")[-1] if done.returncode else ""
    print(done.stdout + error, flush=True)
    return done.stdout, error


def train_with(mistake: Mistake, config: LessonsConfig) -> None:
    """Copy the code, make the mistake there, run it, and write output.json to the run's folder."""
    out_dir, every = Path(config.out_dir) / mistake.name, config.max_iters // 5
    options = f"--device=cpu --compile=False --max_iters={config.max_iters} --log_interval=7 "
    options += f"--eval_interval={every} --sample_interval={5 * every} {mistake.options}"
    options = [f"--out_dir={out_dir}", *options.split()]
    shutil.rmtree(out_dir, ignore_errors=True)
    print(f"\n{mistake.name}: preflight and {config.max_iters} steps (about 40 s) ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code"
        copy_code(ROOT, code)
        if mistake != CORRECT and not mistake.options:
            apply_diff(DIFFS / f"{mistake.name}.diff", code)
        preflight, _ = run_train(str(code), [*options, "--preflight"])
        training, error = run_train(str(code), options)
    output = {"preflight": preflight, "training": training, "error": error}
    with atomic_write(out_dir / "output.json") as file:
        file.write(json.dumps(output, indent=2, ensure_ascii=False).encode())


def read_run(mistake: Mistake, config: LessonsConfig) -> tuple[dict, list[dict]]:
    """Return output.json and the log of a run."""
    out_dir = Path(config.out_dir) / mistake.name
    return json.loads(read_text(out_dir / "output.json")), read_log(out_dir / "log.jsonl")


# Losses on phase 1's text, in nats per token, of simple guesses; docs/lessons.md computes them.
BASELINES = {"all equally likely": 4.17, "frequencies": 3.31, "pairs": 2.45}


def draw_lesson(lesson: str, config: LessonsConfig) -> None:
    """Draw the losses of a lesson's runs, each over those of the correct run."""
    trained = [m for m in MISTAKES if m.lesson == lesson and read_run(m, config)[1]]
    figure = Figure(figsize=(8, 2.8), dpi=200, layout="constrained")
    panels = figure.subplots(1, len(trained), sharey=True, squeeze=False)[0]
    for axes, mistake in zip(panels, trained, strict=True):
        x = "seconds" if lesson == "loader" else "step"
        draw_run(axes, x, CORRECT, ("0.8", "0.6"), config)
        draw_run(axes, x, mistake, ("tab:blue", "tab:orange"), config)
        for loss in BASELINES.values():
            axes.axhline(loss, color="0.3", lw=0.8, ls=":", zorder=0)
        axes.set(xlabel=x, title=mistake.title, ylim=(-0.15, 4.65))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss (nats per token)")
    labels = [f"{name}: {loss}" for name, loss in BASELINES.items()]
    panels[-1].secondary_yaxis("right").set_yticks(list(BASELINES.values()), labels, fontsize=8)
    legend = panels[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    save_figure(figure, Path(config.pictures) / f"lessons_{lesson}.png")


def draw_run(axes, x: str, mistake: Mistake, colors: tuple, config: LessonsConfig) -> None:
    """Draw the losses of one run over `x`, with a cross where it ended in an error."""
    output, records = read_run(mistake, config)
    suffix = ", correct run" * (mistake == CORRECT)
    steps = [(r[x], r["loss"]) for r in records if "loss" in r]
    axes.plot(*zip(*steps, strict=True), color=colors[0], label="each batch" + suffix)
    evaluations = [(r[x], r["val_loss"]) for r in records if "val_loss" in r]
    axes.scatter(*zip(*evaluations, strict=True), 20, colors[1], label="validation" + suffix)
    if output["error"]:
        axes.scatter(*steps[-1], 60, "tab:red", marker="x")
        axes.annotate(" NaN", steps[-1], va="bottom", color="tab:red")


# A forward pass: the code in model.py and the shape of its result.
SHAPES = {
    "idx": "B, T",
    "wte(idx)": "B, T, C",
    "wpe(positions)": "T, C",
    "x = wte(idx) + wpe(positions)": "B, T, C",
    "c_attn(ln_1(x))": "B, T, 3C",
    "q, k and v, each": "B, T, nh, hs",
    "q.transpose(1, 2)": "B, nh, T, hs",
    "scores = q @ k.transpose(1, 2)": "B·nh, T, T",
    "y = scores.softmax(dim=-1) @ v": "B, nh, T, hs",
    "y.transpose(1, 2).reshape(B, T, C)": "B, T, C",
    "x = x + attn(ln_1(x))": "B, T, C",
    "c_fc(ln_2(x))": "B, T, 4C",
    "x = x + mlp(ln_2(x))": "B, T, C",
    "logits = lm_head(ln_f(x))": "B, T, V",
    "loss = cross_entropy(logits, targets)": "",
}
# Phase 1's model on 6 sequences of 100 characters: no two sizes are equal.
SIZES = {"B": 6, "T": 100, "C": 128, "nh": 4, "hs": 32, "V": 65, "B·nh": 24, "3C": 384, "4C": 512}


def draw_shapes(config: LessonsConfig) -> None:
    """Draw a forward pass from top to bottom: the code, the numbers of one token, the shape."""
    figure = Figure(figsize=(8, 5), dpi=200)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 8), ylim=(len(SHAPES) + 0.8, -0.8))  # x in inches
    axes.axis("off")
    axes.axhspan(4.5, 13.5, color="0.94", lw=0)
    axes.text(7.7, 9, "one block of 2", rotation=270, va="center", fontsize=8)
    for x, title in ((0.2, "in model.py"), (3.1, "one token"), (5.3, "shape"), (6.4, "example")):
        axes.text(x, 0, title, va="center", fontsize=9, weight="bold")
    for row, (code, shape) in enumerate(SHAPES.items(), start=1):
        sizes = [SIZES[letter] for letter in shape.split(", ") if letter]
        for x, text in ((0.2, code), (5.3, f"({shape})"), (6.4, tuple(sizes))):
            axes.text(x, row, text, va="center", fontsize=8, family="monospace")
        parts = 4 if "nh" in shape else 3 if "3C" in shape else 1  # heads; q, k and v
        numbers = 8 if shape in ("", "B, T") else sizes[-1] * (parts if "nh" in shape else 1)
        width = numbers / parts / 262  # inches
        spans = [(3.1 + part * width, width - 0.02) for part in range(parts)]
        color = "tab:orange" if "T, T" in shape else "tab:blue"
        axes.broken_barh(spans, (row - 0.28, 0.56), color=color, lw=0)
    save_figure(figure, Path(config.pictures) / "lessons_shapes.png")


def make_table(mistakes: list[Mistake], config: LessonsConfig) -> str:
    """Return a Markdown table of what happened in each run."""
    rows = []
    for mistake in mistakes:
        output, records = read_run(mistake, config)
        notes = re.findall(r"^(?:FAIL [^:]+|warning: [^;]+)", output["preflight"], re.MULTILINE)
        notes += [re.split(", at |;", output["error"])[0]] * bool(output["error"])
        evaluations = [r for r in records if "val_loss" in r]
        end = {} if output["error"] else evaluations[-1]
        figures = [f"{end[key]:.4f}" if end else "" for key in ("train_loss", "val_loss")]
        speeds = [r["tokens_per_second"] for r in records if "loss" in r]
        figures.append(f"{median(speeds):,.0f}" if speeds else "")
        rows.append([mistake.name, *figures, "; ".join(notes)])
    header = ["run", "training loss", "validation loss", "tokens/s", "preflight / the end"]
    return markdown_table(header, rows, right={1, 2, 3})


def main(config: LessonsConfig) -> None:
    """Train, draw, and print the table."""
    chosen = [m for m in MISTAKES if config.only in ("", m.lesson)]
    lessons = dict.fromkeys(m.lesson for m in chosen or MISTAKES)
    if not chosen:
        raise UserError(f"only={config.only} is not a lesson; choose one of {', '.join(lessons)}")
    draw_shapes(config)
    for mistake in (CORRECT, *chosen):
        train_with(mistake, config)
    for lesson in lessons:
        draw_lesson(lesson, config)
    print(make_table([CORRECT, *chosen], config))


if __name__ == "__main__":
    run(main, configure(LessonsConfig))
