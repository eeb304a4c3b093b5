"""Draw pictures of runs from their logs, also while they train.

    python -m tools.pictures --out_dir=out/phase1_char            # its loss.png and samples.md
    python -m tools.pictures --out_dir=out/phase1_char --movie    # learning.gif, too
    python -m tools.pictures --out_dir=out/phase1_char,out/phase2_bpe --compare=compute

The last command draws the loss of several runs over the compute that they spend. The loss is in
bits per byte, which can be compared between vocabularies. --compare=optimizers draws only the last
values: a line per optimizer joins the best runs of each size. Both need each run's ckpt.pt, and its
data set's meta.json. With eval_iters a run evaluates a part of val.bin, so its last value differs a
little from that of tools.evaluate.
"""

import io
import math
import textwrap
from configurator import UserError, configure, run
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from matplotlib.figure import Figure
from PIL import Image  # matplotlib needs it, too

from support.checkpoint import build_model, load_checkpoint
from support.data import read_meta
from support.files import atomic_write
from support.log import read_log
from support.pictures import plot_losses, save_figure, write_report


@dataclass(frozen=True)
class PicturesConfig:
    """Draw loss.png and write samples.md of each run, or draw one picture that compares runs."""

    out_dir: str = "out/phase1_char"  # folder of a run, or of several: out/a,out/b
    compare: Literal["", "compute", "optimizers"] = ""  # empty: loss.png and samples.md of each run
    picture: str = "out/scaling.png"  # file to draw a comparison in
    title: str = "The loss falls with compute"  # of a comparison
    movie: bool = False  # also draw learning.gif: losses and texts while a run learns


def write_movie(records: list[dict], path: Path) -> None:
    """Write a GIF with a frame for each sample in a log: the losses until then, and the sample."""
    losses = [r[key] for r in records for key in ("loss", "val_loss") if key in r]
    end, frames = records[-1]["epoch"], []
    for sample in (r for r in records if "sample" in r):
        figure = Figure(figsize=(8.3, 3.1), dpi=100)
        axes = figure.add_axes((0.07, 0.16, 0.4, 0.74))
        plot_losses(axes, [r for r in records if r["step"] <= sample["step"]])
        axes.set(xlim=(-0.1 * end, 1.1 * end), ylim=(min(losses) - 0.2, max(losses) + 0.4))
        time = f"{sample['step']:,} steps, {sample['seconds'] / 60:.1f} minutes"
        text = "\n".join(textwrap.fill(line, 45) for line in sample["sample"].splitlines())
        figure.text(0.49, 0.93, f"after {time}", fontsize=12)
        figure.text(0.49, 0.88, text, va="top", family="monospace", fontsize=11, parse_math=False)
        figure.savefig(png := io.BytesIO())
        frames.append(Image.open(png).convert("RGB"))
    palette = frames[-1].quantize(64, Image.Quantize.MAXCOVERAGE)  # this frame has all colors
    first, *rest = (f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames)
    times = [600] * len(rest) + [4000]  # ms
    with atomic_write(path) as file:
        first.save(file, "GIF", save_all=True, append_images=rest, duration=times, loop=0)


class Curve(NamedTuple):
    """The evaluations of a run after its first step."""

    name: str
    parameters: float  # in millions
    optimizer: str
    flops: list[float]  # floating-point operations of the training so far
    bits: list[float]  # bits per byte of val.bin


def read_curve(out_dir: Path) -> Curve:
    """Return the curve of a run. Raises UserError if it has no evaluation after a step yet."""
    checkpoint = load_checkpoint(out_dir / "ckpt.pt")
    model, options = build_model(checkpoint.shape, checkpoint.weights), checkpoint.train_config
    meta = read_meta(Path("data") / options["dataset"] / "meta.json")
    if checkpoint.dataset and checkpoint.dataset != meta["sha256"]:
        again = f"data/{options['dataset']} was prepared again since this run"
        raise UserError(f"{out_dir}: {again}; prepare it as for the run")
    T, accumulation = checkpoint.shape.block_size, options["gradient_accumulation_steps"]
    flops_per_step = model.flops_per_token(T) * T * accumulation * options["batch_size"]
    evaluations = [r for r in read_log(out_dir / "log.jsonl") if "val_loss" in r and r["step"]]
    if not evaluations:
        raise UserError(f"{out_dir}: has no evaluation after step 0 yet; train longer")
    flops = [r["step"] * flops_per_step for r in evaluations]
    bits_per_nat = meta["val_tokens"] / meta["val_bytes"] / math.log(2)
    bits = [r["val_loss"] * bits_per_nat for r in evaluations]
    return Curve(out_dir.name, model.num_params() / 1e6, options["optimizer"], flops, bits)


def draw_curves(curves: list[Curve], title: str) -> Figure:
    """Return a figure with a line per run and its last value."""
    figure, axes = draw_axes(title)
    for name, parameters, _, flops, bits in curves:
        [line] = axes.plot(flops, bits, marker=".", label=f"{name}: {parameters:.1f} million")
        style = dict(textcoords="offset points", color=line.get_color())
        axes.annotate(f"{bits[-1]:.2f}", (flops[-1], bits[-1]), (0, 8), **style)
    axes.legend(title="run and parameters")
    return figure


def draw_optimizers(curves: list[Curve], title: str) -> Figure:
    """Return a figure with a line per optimizer through the best run of each size.

    A pale dot is the last value of a run, also of one that is not the best of its size.
    """
    figure, axes = draw_axes(title)
    for optimizer in sorted({curve.optimizer for curve in curves}):
        runs = sorted((c for c in curves if c.optimizer == optimizer), key=lambda c: -c.bits[-1])
        best = {curve.parameters: curve for curve in runs}  # the last of a size is its best
        best = [best[size] for size in sorted(best)]
        ends = [(curve.flops[-1], curve.bits[-1]) for curve in best]
        [line] = axes.plot(*zip(*ends, strict=True), marker="o", label=optimizer)
        dots = [c.flops[-1] for c in runs], [c.bits[-1] for c in runs]
        axes.plot(*dots, ".", color=line.get_color(), alpha=0.4)
        style = dict(textcoords="offset points", color=line.get_color())
        for curve, end in zip(best, ends, strict=True):
            axes.annotate(f"{curve.parameters:.1f} million: {end[1]:.2f}", end, (6, 4), **style)
    axes.margins(x=0.3)  # for the words
    axes.legend(title="optimizer", loc="lower left")
    return figure


def draw_axes(title: str) -> tuple:
    """Return an empty figure and its axes: bits per byte over compute."""
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set(
        xlabel="training compute (floating-point operations)",
        ylabel="validation loss (bits per byte)",
        title=title,
    )
    axes.grid(alpha=0.3)
    return figure, axes


def main(config: PicturesConfig) -> None:
    """Draw the pictures. Print the table of a run's samples, or the last point of each curve."""
    out_dirs = [Path(name) for name in config.out_dir.split(",")]
    if not config.compare:
        for out_dir in out_dirs:
            print(write_report(out_dir) or f"{out_dir}: this run has no samples")
            records = read_log(out_dir / "log.jsonl")
            if config.movie and any("sample" in r for r in records):
                write_movie(records, out_dir / "learning.gif")
        return
    curves = [read_curve(out_dir) for out_dir in out_dirs]
    for name, parameters, optimizer, flops, bits in curves:
        print(
            f"{name}: {parameters:.1f} million parameters, {optimizer}: {bits[-1]:.4f} bits per "
            f"byte after {flops[-1]:.2e} operations"
        )
    draw = {"compute": draw_curves, "optimizers": draw_optimizers}[config.compare]
    save_figure(draw(curves, config.title), Path(config.picture))
    print(f"drawn in {config.picture}")


if __name__ == "__main__":
    run(main, configure(PicturesConfig))
