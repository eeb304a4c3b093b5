"""Put a beginner's mistakes into phase 1, one at a time, and record what happens.

    python prepare_shakespeare.py
    python -m tools.lessons                # everything that docs/lessons.md shows (6 minutes)
    python -m tools.lessons --only=mask    # one lesson

A mistake is a diff in tools/mistakes/, or a few options. A copy of the code gets the diff, runs its
--preflight, and trains phase 1 for one epoch on the CPU. Writes

    out/lessons/<mistake>/         the run as train.py leaves it; output.json: what it printed
    docs/pictures/lessons_*.png    the figures
"""

import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from configurator import UserError, check_range, configure, run
from support.data import Dataset
from support.files import atomic_write, read_text
from support.log import read_log
from support.pictures import markdown_table, save_figure

ROOT = Path(__file__).parent.parent
PHASE1 = ROOT / "config" / "phase1_char.py"


@dataclass(frozen=True)
class LessonsConfig:
    """Train phase 1 with beginners' mistakes and draw what happens."""

    only: Literal[
        "", "shapes", "mask", "positions", "targets", "heads", "rate", "nan", "dtype", "loader"
    ] = ""  # one lesson; '': all of them
    max_iters: int = 245  # steps of each run; 245 are one epoch
    out_dir: str = "out/lessons"  # folder of the runs; earlier runs are deleted
    pictures: str = "docs/pictures"  # folder of the figures

    def __post_init__(self) -> None:
        check_range(self, 5, 1 << 31, "max_iters")


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
    Mistake(
        "rate", "rate_too_high", "10 times too high: stuck", "--learning_rate=0.04 --muon_lr=0.3"
    ),
    Mistake(
        "rate", "rate_too_low", "10 times too low: slow", "--learning_rate=4e-4 --muon_lr=0.003"
    ),
    Mistake("nan", "masked_row", "A row of -inf alone: NaN at once"),
    Mistake("nan", "softmax_by_hand", "Overflow in float16: NaN after a good start"),
    Mistake("dtype", "int32_targets", "int32 targets: torch refuses them"),
    Mistake("dtype", "read_as_bytes", "Ids read as bytes: every second target is known"),
    Mistake("loader", "slow_loader", "Tokenizing in every step: the same curve, later"),
]

# Runs


def apply_diff(diff: Path, folder: Path) -> None:
    """Make the change of a unified diff, of one file, in `folder`. Raises UserError if it can not."""
    header, *hunks = re.split(r"^@@ .*\n", diff.read_text(encoding="utf-8"), flags=re.MULTILINE)
    path = folder / re.search(r"^\+\+\+ b/(\S+)", header, re.MULTILINE)[1]
    text = path.read_text(encoding="utf-8")
    for hunk in hunks:
        lines = hunk.splitlines()
        before = "\n".join(line[1:] for line in lines if line[:1] != "+")
        after = "\n".join(line[1:] for line in lines if line[:1] != "-")
        if text.count(before) != 1:
            raise UserError(f"{diff}: does not apply to {path.name}; make the diff again")
        text = text.replace(before, after)
    path.write_text(text, encoding="utf-8")


def copy_code(folder: Path, mistake: Mistake) -> None:
    """Copy what train.py needs to `folder` and make the mistake there."""
    for name in ("train.py", "model.py", "configurator.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "support", folder / "support")
    if mistake != CORRECT and not mistake.options:
        apply_diff(ROOT / "tools" / "mistakes" / f"{mistake.name}.diff", folder)


def run_options(mistake: Mistake, config: LessonsConfig) -> list[str]:
    """Return the arguments of train.py: phase 1, shorter, with five evaluations and a sample."""
    every = config.max_iters // 5
    options = f"--device=cpu --compile=False --max_iters={config.max_iters} --log_interval=7 "
    options += f"--eval_interval={every} --sample_interval={5 * every} {mistake.options}"
    return [str(PHASE1), f"--out_dir={config.out_dir}/{mistake.name}", *options.split()]


def run_train(folder: Path, options: list[str]) -> tuple[list[str], str]:
    """Run the train.py in `folder`. Returns the lines of its output, and its last error line."""
    command = [sys.executable, str(folder / "train.py"), *options]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    return done.stdout.splitlines(), done.stderr.strip().split("\n")[-1] if done.returncode else ""


def train_with(mistake: Mistake, config: LessonsConfig) -> None:
    """Run preflight and the training with a mistake, and write output.json beside the run's files."""
    out_dir, options = Path(config.out_dir) / mistake.name, run_options(mistake, config)
    shutil.rmtree(out_dir, ignore_errors=True)
    print(f"\n{mistake.name}: preflight and {config.max_iters} steps (about 30 s) ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        copy_code(Path(folder), mistake)
        preflight, error = run_train(Path(folder), [*options, "--preflight"])
        preflight += [error] * bool(error)
        print("\n".join(preflight), flush=True)
        lines, error = run_train(Path(folder), options)
    print("\n".join([*lines, error]), flush=True)
    with atomic_write(out_dir / "output.json") as file:
        output = {"preflight": preflight, "training": lines, "error": error}
        file.write(json.dumps(output, indent=2, ensure_ascii=False).encode())


def read_run(mistake: Mistake, config: LessonsConfig) -> tuple[dict, list[dict]]:
    """Return output.json and the log of a run; both are empty if it has not been made."""
    out_dir = Path(config.out_dir) / mistake.name
    if not (out_dir / "output.json").exists():
        return {}, []
    return json.loads(read_text(out_dir / "output.json")), read_log(out_dir / "log.jsonl")


# Figures


def baselines() -> dict[str, float]:
    """Return the losses, in nats per token, of guessing by frequencies in the training text."""
    data = Dataset(Path("data/shakespeare_char"), block_size=1)
    V, ids = data.meta["vocab_size"], data.train.open().astype(np.int64)
    singles, pairs = np.bincount(ids), np.bincount(ids[:-1] * V + ids[1:])
    single, pair = (-sum(p * math.log(p) for p in n[n > 0] / n.sum()) for n in (singles, pairs))
    return {"knows nothing": math.log(V), "frequencies": single, "pairs": pair - single}


def draw_lesson(lesson: str, config: LessonsConfig) -> None:
    """Draw the losses of a lesson's runs, each over those of the correct run."""
    trained = [m for m in MISTAKES if m.lesson == lesson and read_run(m, config)[1]]
    figure = Figure(figsize=(8, 2.8), dpi=200, layout="constrained")
    panels = figure.subplots(1, len(trained), sharey=True, squeeze=False)[0]
    for axes, mistake in zip(panels, trained, strict=True):
        against = "seconds" if lesson == "loader" else "step"
        draw_run(axes, CORRECT, against, ("0.8", "0.6"), config)
        draw_run(axes, mistake, against, ("tab:blue", "tab:orange"), config)
        for loss in baselines().values():
            axes.axhline(loss, color="0.3", lw=0.8, ls=":", zorder=1)
        axes.set(xlabel=against, title=mistake.title, ylim=(-0.15, 4.65))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss (nats per token)")
    for name, loss in baselines().items():
        place = dict(transform=panels[-1].get_yaxis_transform(), va="center")
        panels[-1].text(1.01, loss, f"{name} {loss:.2f}", fontsize=8, color="0.3", **place)
    legend = panels[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    save_figure(figure, Path(config.pictures) / f"lessons_{lesson}.png")


def draw_run(axes, mistake: Mistake, against: str, colors: tuple, config: LessonsConfig) -> None:
    """Draw the losses of one run, with a cross where it ended in an error."""
    output, records = read_run(mistake, config)
    names = {"loss": "each batch", "val_loss": "validation"}
    for (key, name), color, style in zip(names.items(), colors, "-o", strict=True):
        x, y = zip(*((r[against], r[key]) for r in records if key in r), strict=True)
        label = name + ", correct run" * (mistake == CORRECT)
        axes.plot(x, y, style, color=color, ms=4.5, label=label)
        if key == "loss" and output["error"]:
            axes.plot(x[-1], y[-1], "x", color="tab:red", ms=8, mew=2)
            axes.text(x[-1], y[-1] + 0.15, " NaN", color="tab:red")


# Every tensor of a forward pass: the code in model.py and its shape.
SHAPES = {
    "idx": "B T",
    "wte(idx)": "B T C",
    "wpe(positions)": "T C",
    "x = wte(idx) + wpe(positions)": "B T C",
    "ln_1(x)": "B T C",
    "c_attn(ln_1(x))": "B T 3C",
    "q, k and v, each": "B T nh hs",
    "q.transpose(1, 2)": "B nh T hs",
    "scores = q @ k.transpose(1, 2)": "B·nh T T",
    "y = scores.softmax(dim=-1) @ v": "B nh T hs",
    "y.transpose(1, 2)": "B T nh hs",
    "y.transpose(1, 2).reshape(B, T, C)": "B T C",
    "x = x + attn(ln_1(x))": "B T C",
    "ln_2(x)": "B T C",
    "c_fc(ln_2(x))": "B T 4C",
    "x = x + mlp(ln_2(x))": "B T C",
    "ln_f(x)": "B T C",
    "logits = lm_head(ln_f(x))": "B T V",
    "loss = cross_entropy(logits, targets)": "",
}
# Phase 1's model on 6 sequences of 100 characters: no two sizes are equal.
SIZES = {"B": 6, "T": 100, "C": 128, "nh": 4, "hs": 32, "V": 65, "B·nh": 24, "3C": 384, "4C": 512}


def draw_shapes(config: LessonsConfig) -> None:
    """Draw a forward pass from top to bottom: the code, the numbers of one token, the shape."""
    figure = Figure(figsize=(8, 6), dpi=200)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 8), ylim=(len(SHAPES) + 0.8, -0.8))  # x in inches
    axes.axis("off")
    top, end = (list(SHAPES).index(code) + 0.5 for code in ("ln_1(x)", "ln_f(x)"))
    axes.add_patch(Rectangle((0.1, top), 7.8, end - top, color="0.94", lw=0))
    axes.text(7.7, (top + end) / 2, "one block of 2", rotation=270, va="center", fontsize=8)
    titles = ("in model.py", "one token, to scale", "shape", "example")
    for x, title in zip((0.2, 3.15, 5.3, 6.4), titles, strict=True):
        axes.text(x, 0, title, va="center", fontsize=9, weight="bold")
    for row, (code, shape) in enumerate(SHAPES.items(), start=1):
        letters = shape.split()
        sizes = [SIZES[letter] for letter in letters]
        axes.text(0.2, row, code, va="center", fontsize=8, family="monospace")
        axes.text(5.3, row, f"({', '.join(letters)})", va="center", fontsize=9)
        axes.text(6.4, row, f"({', '.join(map(str, sizes))})", va="center", fontsize=9, color="0.3")
        parts = SIZES["nh"] if "nh" in shape else 3 if "3C" in shape else 1
        width = sizes[-1] if letters[2:] or shape == "T C" else 8  # one number would be too thin
        if parts == 3:
            width //= parts
        color = "tab:orange" if code.startswith("scores") else "tab:blue"
        for part in range(parts):  # 512 numbers are 1.95 inches wide
            left, inches = 3.15 + part * width * 1.95 / 512, width * 1.95 / 512 - 0.02
            axes.add_patch(Rectangle((left, row - 0.28), inches, 0.56, color=color, lw=0))
    save_figure(figure, Path(config.pictures) / "lessons_shapes.png")


def make_table(config: LessonsConfig) -> str:
    """Return a Markdown table of every run that is in out_dir."""
    rows = []
    for mistake in (CORRECT, *MISTAKES):
        output, records = read_run(mistake, config)
        if not output:
            continue
        failed = [line[5:].split(":")[0] for line in output["preflight"] if line[:5] == "FAIL "]
        said = [f"FAIL {'; '.join(failed)}"] * bool(failed)
        said += [line.split(",")[0] for line in output["preflight"] if line[:8] == "warning:"]
        said += [output["error"].split(";")[0]] * bool(output["error"])
        speeds = [r["tokens_per_second"] for r in records if "loss" in r]
        end = {} if output["error"] else records[-1]
        figures = [f"{end[key]:.4f}" if end else "" for key in ("train_loss", "val_loss")]
        figures.append(f"{median(speeds):,.0f}" if speeds else "")
        rows.append([mistake.name, *figures, " / ".join(said)])
    header = ["mistake", "training loss", "validation loss", "tokens/s", "preflight / the end"]
    return markdown_table(header, rows, right={1, 2, 3})


def main(config: LessonsConfig) -> None:
    """Train, draw, and print the table."""
    if config.only in ("", "shapes"):
        draw_shapes(config)
    chosen = [m for m in MISTAKES if config.only in ("", m.lesson)]
    is_trained = config.max_iters in [r["step"] for r in read_run(CORRECT, config)[1]]
    for mistake in chosen and [CORRECT] * (not is_trained) + chosen:
        train_with(mistake, config)
    for lesson in dict.fromkeys(m.lesson for m in chosen):
        draw_lesson(lesson, config)
    print(make_table(config))


if __name__ == "__main__":
    run(main, configure(LessonsConfig))
