"""Put a newcomer's mistakes into phase 1, one at a time, and see what becomes of it.

    python prepare_shakespeare.py
    python lessons.py                   # everything that LESSONS.md shows
    python lessons.py --only=mask       # one lesson

A mistake is a line of the real code with another in its place, or an option, for as long as a run takes. The
run is train.py's, with the options of config/phase1_char.py, for one epoch. Before it, preflight is asked. Writes

    out/lessons/<mistake>/      the run, as train.py leaves it, and said.json: the words of preflight and of the end
    assets/lessons_*.png        the figures
"""

from dataclasses import dataclass, replace
from typing import Literal

from configurator import UserError, configure, one_line, read_options, run


@dataclass(frozen=True)
class LessonsConfig:
    """Train phase 1 with a newcomer's mistakes, and draw what becomes of it."""

    only: Literal[
        "", "shapes", "mask", "positions", "targets", "heads", "rate", "nan", "dtype", "loader"
    ] = ""  # lesson
    max_iters: int = 245  # steps of each run; 245 are an epoch
    out_dir: str = "out/lessons"  # the runs; an earlier run with the same mistake is deleted
    assets: str = "assets"  # the figures

    def __post_init__(self) -> None:
        if self.max_iters < 5:
            raise UserError(f"max_iters is {self.max_iters} but must be at least 5")


if __name__ == "__main__":  # before torch is imported, so that --help and mistakes answer at once
    config = configure(LessonsConfig)

import contextlib
import inspect
import io
import json
import math
import shutil
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import model
import train
from support import data
from support.files import atomic_write
from support.log import read_log


@dataclass(frozen=True)
class Mistake:
    """`right`, a line of `function`, becomes `wrong`; or the run gets `options`. `test` is one that would fail."""

    name: str
    function: Callable | None = None
    right: str = ""
    wrong: str = ""
    options: tuple[str, ...] = ()
    test: str = ""


SOUND = Mistake("sound")
LESSONS = {
    "mask": [
        Mistake(
            "no_mask",
            model.attention,
            "mask = torch.full((T, S), -math.inf, dtype=q.dtype).triu(S - T + 1)",
            "mask = torch.zeros(T, S, dtype=q.dtype)",
            test="tests/test_model.py::test_logits_do_not_change_when_a_later_token_changes",
        )
    ],
    "positions": [
        Mistake(
            "no_positions",
            model.GPT.forward,
            "positions = torch.arange(past, past + T, device=idx.device)  # (T,)",
            "positions = torch.zeros(T, dtype=torch.int64, device=idx.device)  # (T,)",
            test="tests/test_model.py::test_without_positions_order_is_invisible_and_with_them_it_is_not",
        )
    ],
    "targets": [
        Mistake(
            "same_targets",
            data.gather,
            "return np.ascontiguousarray(windows[:, :-1]), np.where(positions[:, 1:] <= last, windows[:, 1:], -1)",
            "return np.ascontiguousarray(windows[:, :-1]), np.where(positions[:, 1:] <= last, windows[:, :-1], -1)",
            test="tests/test_data.py::test_batch_has_the_text_and_its_next_characters",
        )
    ],
    "heads": [
        Mistake(
            "swapped_heads",
            model.CausalSelfAttention.forward,
            "q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, nh, T, hs)",
            "q, k, v = (t.reshape(B, self.n_head, T, C // self.n_head) for t in (q, k, v))  # (B, nh, T, hs)",
            test="tests/test_model.py::test_logits_and_gradients_equal_transformers",
        )
    ],
    "rate": [
        Mistake("rate_too_high", options=("--learning_rate=0.04", "--muon_lr=0.3")),
        Mistake("rate_too_low", options=("--learning_rate=4e-4", "--muon_lr=0.003")),
    ],
    "nan": [
        Mistake(
            "masked_row",
            model.attention,
            "mask = torch.full((T, S), -math.inf, dtype=q.dtype).triu(S - T + 1)",
            "mask = torch.full((T, S), -math.inf, dtype=q.dtype).triu(S - T)",
            test="tests/test_model.py::test_attention_equals_scaled_dot_product_attention",
        ),
        Mistake(
            "softmax_by_hand",
            model.attention,
            "weights = F.dropout(scores.softmax(dim=-1), dropout)",
            "weights = scores.half().exp()\n"
            "weights = F.dropout((weights / weights.sum(dim=-1, keepdim=True)).to(v.dtype), dropout)",
            test="tests/test_model.py::test_attention_equals_scaled_dot_product_attention",
        ),
    ],
    "dtype": [
        Mistake(
            "int32_targets",
            data.gather,
            "windows = tokens.open()[np.minimum(positions, last)].astype(np.int64)",
            "windows = tokens.open()[np.minimum(positions, last)].astype(np.int32)",
            test="tests/test_data.py::test_batch_has_the_text_and_its_next_characters",
        ),
        Mistake(
            "read_as_bytes",
            data.Tokens.__init__,
            "self.array = np.fromfile(path, dtype=TOKEN) if self.in_memory else None",
            "self.array = np.fromfile(path, dtype=np.uint8) if self.in_memory else None",
            test="tests/test_data.py::test_batch_has_the_text_and_its_next_characters",
        ),
    ],
    "loader": [
        Mistake(
            "slow_loader",
            train.Trainer.micro_batch,
            "n_sequences = c.gradient_accumulation_steps * c.batch_size",
            "text = self.tokenizer.decode(self.data.train.open().tolist())\n"
            "self.data.train.array = np.array(self.tokenizer.encode(text), dtype=np.uint16)\n"
            "n_sequences = c.gradient_accumulation_steps * c.batch_size",
        )
    ],
}


# Runs


@contextlib.contextmanager
def put_in(mistake: Mistake) -> Iterator[None]:
    """While this lasts, the function has the wrong line where it had the right one, wherever it was imported."""
    if not mistake.function:
        yield
        return
    function, sound = mistake.function, mistake.function.__code__
    source = textwrap.dedent(inspect.getsource(function))
    (line,) = (line for line in source.splitlines() if line.strip() == mistake.right)
    indent, made = line.removesuffix(mistake.right), {}
    exec(source.replace(line, textwrap.indent(mistake.wrong, indent)), function.__globals__, made)
    function.__code__ = made[function.__name__].__code__
    try:
        yield
    finally:
        function.__code__ = sound


def run_options(mistake: Mistake, config: LessonsConfig) -> train.TrainConfig:
    """Phase 1's options, for fewer steps, with five evaluations and a sample at the end."""
    phase1, every = Path(__file__).parent / "config" / "phase1_char.py", config.max_iters // 5
    options = [
        f"--out_dir={config.out_dir}/{mistake.name}",
        f"--max_iters={config.max_iters}",
        "--compile=False",
    ]
    options += [f"--eval_interval={every}", f"--sample_interval={5 * every}", "--log_interval=7"]
    return read_options(train.TrainConfig, [str(phase1), *options, *mistake.options])


def last_words(options: train.TrainConfig) -> str:
    """Call train.py; returns "" or, if it ends in an error, the line that is the last one on the screen."""
    try:
        train.main(options)
    except Exception as error:  # whatever the mistake leads to
        return f"{'error' if isinstance(error, UserError) else type(error).__name__}: {one_line(error)}"
    return ""


def train_with(mistake: Mistake, config: LessonsConfig) -> None:
    """Preflight and a run with `mistake` put in, and said.json beside what the run leaves."""
    options = run_options(mistake, config)
    out_dir = Path(options.out_dir)
    shutil.rmtree(out_dir, ignore_errors=True)
    print(f"\n{mistake.name}\n", flush=True)
    with put_in(mistake):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            error = last_words(replace(options, preflight=True))
        checks = printed.getvalue().splitlines() + [error] * bool(error)
        print("\n".join(checks), flush=True)
        ended = last_words(options)
        print(ended, flush=True)
    with atomic_write(out_dir / "said.json") as file:
        file.write(
            json.dumps({"preflight": checks, "ended": ended}, indent=2, ensure_ascii=False).encode()
        )


def is_trained(mistake: Mistake, config: LessonsConfig) -> bool:
    out_dir = Path(config.out_dir) / mistake.name
    return (out_dir / "said.json").exists() and read_log(out_dir / "log.jsonl")[-1][
        "step"
    ] == config.max_iters


# Figures


def save(figure: Figure, name: str, config: LessonsConfig) -> None:
    with atomic_write(Path(config.assets) / f"lessons_{name}.png") as file:
        figure.savefig(file, format="png")


def levels(dataset: str) -> dict[str, float]:
    """The losses, in nats per token, of those who know of the training text only how often its parts occur."""
    folder = data.Dataset(Path("data") / dataset, block_size=1)
    V, ids = folder.meta["vocab_size"], folder.train.open().astype(np.int64)
    ones, pairs = np.bincount(ids) / len(ids), np.bincount(ids[:-1] * V + ids[1:]) / (len(ids) - 1)
    one, two = (-(p[p > 0] * np.log(p[p > 0])).sum() for p in (ones, pairs))
    return {"knows nothing": math.log(V), "knows letters": one, "knows pairs": two - one}


def draw_run(axes: Axes, out_dir: Path, colors: tuple[str, str], label: str, against: str) -> dict:
    """The losses of a run `against` its steps or seconds; returns the last record of a batch."""
    records = read_log(out_dir / "log.jsonl")
    for key, color, line, name in (
        ("loss", colors[0], "-", "each batch"),
        ("val_loss", colors[1], "o", "validation"),
    ):
        shown = [r for r in records if key in r]
        axes.plot(
            [r[against] for r in shown],
            [r[key] for r in shown],
            line,
            color=color,
            ms=4.5,
            label=name + label,
        )
    return [r for r in records if "loss" in r][-1]


def draw_lesson(lesson: str, config: LessonsConfig) -> None:
    """The runs of a lesson, each beside the sound one."""
    runs, against = Path(config.out_dir), "seconds" if lesson == "loader" else "step"
    mistakes = [
        m for m in LESSONS[lesson] if read_log(runs / m.name / "log.jsonl")
    ]  # others ended before a step
    figure = Figure(figsize=(8, 2.8), dpi=200, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(mistakes), sharey=True))
    for axes, mistake in zip(panels, mistakes, strict=True):
        draw_run(axes, runs / "sound", ("0.8", "0.6"), ", sound run", against)
        end = draw_run(axes, runs / mistake.name, ("tab:blue", "tab:orange"), "", against)
        if end["step"] < config.max_iters - config.max_iters % 7:  # the last step that is logged
            place = (end[against], end["loss"])
            axes.plot(*place, "x", color="tab:red", ms=8, mew=2)
            axes.annotate("NaN", place, xytext=(7, 5), textcoords="offset points", color="tab:red")
        for loss in levels(run_options(SOUND, config).dataset).values():
            axes.axhline(loss, color="0.3", lw=0.8, ls=":", zorder=1)
        axes.set(xlabel=against, title=mistake.name, ylim=(-0.15, 4.65))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss (nats per token)")
    for name, loss in levels(run_options(SOUND, config).dataset).items():
        place, at = (1, loss), ("axes fraction", "data")
        options = dict(
            xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color="0.3"
        )
        panels[-1].annotate(f"{name} {loss:.2f}", place, xycoords=at, **options)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=4,
        fontsize=8,
        frameon=False,
    )
    save(figure, lesson, config)


# What happens to a batch, as model.py says it; the name under which `record_shapes` finds it; in how many parts.
STEPS = [
    ("idx", "idx", 1),
    ("wte(idx)", "transformer.wte", 1),
    ("wpe(positions)", "transformer.wpe", 1),
    ("x = wte(idx) + wpe(positions)", "transformer.drop", 1),
    ("ln_1(x)", "transformer.h.0.ln_1", 1),
    ("c_attn(ln_1(x))", "transformer.h.0.attn.c_attn", 3),
    ("q, and so k and v", "q", "nh"),
    ("scores = q @ k.transpose(1, 2), masked", "scores", "nh"),
    ("y = scores.softmax(dim=-1) @ v", "y", "nh"),
    ("y.transpose(1, 2).reshape(B, T, C)", "heads side by side", 1),
    ("x = x + attn(ln_1(x))", "transformer.h.0.attn", 1),
    ("ln_2(x)", "transformer.h.0.ln_2", 1),
    ("gelu(c_fc(ln_2(x)))", "transformer.h.0.mlp.c_fc", 1),
    ("x = x + mlp(ln_2(x))", "transformer.h.0", 1),
    ("ln_f(x)", "transformer.ln_f", 1),
    ("logits = lm_head(ln_f(x))", "lm_head", 1),
    ("loss = cross_entropy(logits, targets)", "loss", 1),
]


def record_shapes(gpt: model.GPT, B: int, T: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a forward pass of B sequences of T tokens: of each module's output, and those in attention."""
    idx, shapes = torch.zeros(B, T, dtype=torch.int64), {}
    attend, add_product = model.attention, torch.baddbmm

    def keep(name: str, tensor: torch.Tensor) -> torch.Tensor:
        shapes[name] = tuple(tensor.shape)
        return tensor

    def attention(q: torch.Tensor, *others) -> torch.Tensor:
        return keep("y", attend(keep("q", q), *others))

    def baddbmm(*args, **options) -> torch.Tensor:
        return keep("scores", add_product(*args, **options))

    def keep_output(name: str) -> Callable:
        return lambda _module, _inputs, output: (
            keep(name, output) if name else None
        )  # the whole model returns a pair

    hooks = [
        module.register_forward_hook(keep_output(name)) for name, module in gpt.named_modules()
    ]
    hooks.append(
        gpt.transformer.h[0].attn.c_proj.register_forward_pre_hook(
            lambda _module, inputs: (keep("heads side by side", inputs[0]),)
        )
    )
    with patch.object(model, "attention", attention), patch.object(torch, "baddbmm", baddbmm):
        keep("loss", gpt(keep("idx", idx), idx)[1])
    for hook in hooks:
        hook.remove()
    return shapes


def in_letters(c: model.GPTConfig) -> dict[str, tuple[str, ...]]:
    """The same in the letters of model.py: found in a pass in which no two of them are the same number."""
    B, T, C, nh = 3, c.block_size - 1, c.n_embd, c.n_head
    letters = {B: "B", T: "T", C: "C", nh: "nh", C // nh: "hs", c.vocab_size: "V"}
    letters |= {B * nh: "B·nh", 3 * C: "3C", 4 * C: "4C"}
    assert len(letters) == 9, "two letters are the same number"
    return {
        name: tuple(letters[n] for n in shape)
        for name, shape in record_shapes(model.GPT(c), B, T).items()
    }


def draw_shapes(config: LessonsConfig) -> None:
    """One forward pass of phase 1 from top to bottom: what is computed, and how wide a token is in it."""
    options = run_options(SOUND, config)
    gpt = train.Trainer(options, train.Processes(options)).model
    letters, numbers = (
        in_letters(gpt.config),
        record_shapes(gpt, options.batch_size, options.block_size),
    )
    figure = Figure(figsize=(8, 5.4), dpi=200)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 8), ylim=(len(STEPS) + 0.8, -0.8))  # x in inches
    axes.axis("off")
    columns = {"in model.py": 0.2, "one token, to scale": 3.15, "shape": 5.3, "in phase 1": 6.5}
    for name, x in columns.items():
        axes.text(x, 0, name, va="center", fontsize=9, weight="bold")
    names = [name for _, name, _ in STEPS]
    top, bottom = names.index("transformer.h.0.ln_1") + 0.5, names.index("transformer.h.0") + 1.5
    axes.add_patch(Rectangle((0.1, top), 7.8, bottom - top, color="0.94", lw=0))
    label = f"one block of {gpt.config.n_layer}"
    axes.text(
        7.8,
        (top + bottom) / 2,
        label,
        rotation=270,
        ha="center",
        va="center",
        fontsize=8,
        color="0.3",
    )
    _, bars, shape, sizes = columns.values()
    scale = 1.95 / (4 * gpt.config.n_embd)  # inches for a number
    for row, (code, name, n) in enumerate(STEPS, start=1):
        axes.text(0.2, row, code, va="center", fontsize=8, family="monospace")
        axes.text(shape, row, f"({', '.join(letters[name])})", va="center", fontsize=9)
        axes.text(
            sizes,
            row,
            f"({', '.join(map(str, numbers[name]))})",
            va="center",
            fontsize=9,
            color="0.3",
        )
        last = (
            8 if name in ("idx", "loss") else numbers[name][-1]
        )  # one number would be too thin to see
        n, width = (gpt.config.n_head, gpt.config.n_head * last) if n == "nh" else (n, last)
        for i in range(n):
            bar = Rectangle(
                (bars + i * width / n * scale, row - 0.28), width / n * scale - 0.02, 0.56, lw=0
            )
            bar.set_color("tab:orange" if name == "scores" else "tab:blue")
            axes.add_patch(bar)
    save(figure, "shapes", config)


# The table


def table(config: LessonsConfig) -> str:
    """What became of each run that is there, as Markdown."""
    lines = [
        "| mistake | training loss | validation loss | tokens/s | preflight; the end, if it came early |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for mistake in (SOUND, *(m for mistakes in LESSONS.values() for m in mistakes)):
        out_dir = Path(config.out_dir) / mistake.name
        if not (out_dir / "said.json").exists():
            continue
        said, records = (
            json.loads((out_dir / "said.json").read_bytes()),
            read_log(out_dir / "log.jsonl"),
        )
        failed = [line[5:].split(":")[0] for line in said["preflight"] if line.startswith("FAIL ")]
        warned = [line.split(",")[0] for line in said["preflight"] if line.startswith("warning: ")]
        words = (
            [f"FAIL {'; '.join(failed)}"] * bool(failed)
            + warned
            + [textwrap.shorten(said["ended"], 70, placeholder=" ...")]
        )
        speeds = [r["tokens_per_second"] for r in records if "loss" in r]
        end = records[-1] if not said["ended"] else {}
        figures = [f"{end[key]:.4f}" if end else "" for key in ("train_loss", "val_loss")]
        figures.append(f"{np.median(speeds):,.0f}" if speeds else "")
        lines.append(f"| {' | '.join([mistake.name, *figures, ' / '.join(filter(None, words))])} |")
    return "\n".join(lines)


def main(config: LessonsConfig) -> None:
    """Train, draw, and print the table."""
    if config.only in ("", "shapes"):
        draw_shapes(config)
    for lesson, mistakes in LESSONS.items():
        if config.only in ("", lesson):
            for mistake in ([] if is_trained(SOUND, config) else [SOUND]) + mistakes:
                train_with(mistake, config)
            draw_lesson(lesson, config)
    print(table(config))


if __name__ == "__main__":
    run(main, config)
