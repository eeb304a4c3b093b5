"""Put a beginner's mistakes into phase 1, one at a time, and record what happens.

    python prepare_shakespeare.py
    python -m tools.lessons                # section 7 of docs/lessons.md (6 to 13 minutes)
    python -m tools.lessons --only=1       # one of them

A mistake is a diff in tools/mistakes/, or a few options. A copy of the code gets the diff, goes
through the preflight, and trains phase 1 for one epoch on the CPU, to out/lessons/<mistake>/.
"""

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from matplotlib.figure import Figure

from configurator import check_range, configure, run
from support.log import read_log
from support.pictures import markdown_table, save_figure
from tools import hunt


@dataclass(frozen=True)
class LessonsConfig:
    """Train phase 1 with beginners' mistakes and draw what happens."""

    only: int = 0  # the lesson of one mistake: 1 to 8; 0: all
    max_iters: int = 245  # steps of each run; 245 are one epoch
    pictures: str = "out/lessons"  # folder of the figures


class Mistake(NamedTuple):
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
    log, every = Path("out/lessons", mistake.name, "log.jsonl"), max(1, config.max_iters // 5)
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
    if not trained:  # an error before the first evaluation
        return
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
    if one.error and steps:
        axes.scatter(*steps[-1], 60, "tab:red", marker="x")
        words = " NaN" if "nan" in one.error else " error"
        axes.annotate(words, steps[-1], va="bottom", color="tab:red")


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
    check_range(config, 0, MISTAKES[-1].lesson, "only")
    chosen = [m for m in MISTAKES if config.only in (0, m.lesson)]
    runs = [train_with(mistake, config) for mistake in (CORRECT, *chosen)]
    for lesson in dict.fromkeys(mistake.lesson for mistake in chosen):
        draw_lesson(lesson, runs, config)
    print(make_table(runs))


if __name__ == "__main__":
    run(main, configure(LessonsConfig))
