"""Draw pictures of runs from their logs, also while they train.

    python -m tools.pictures --out_dir=out/phase1_char            # its loss.png and samples.md
    python -m tools.pictures --out_dir=out/phase1_char --movie    # learning.gif, too
    python -m tools.pictures --out_dir=out/phase1_char,out/phase2_bpe --compare=compute

The last command draws the loss of several runs over the compute that they spend. The loss is in
bits per byte, which can be compared between vocabularies. It needs each run's ckpt.pt, and its data
set's meta.json. With eval_iters a run evaluates a part of val.bin, so its last value differs a
little from that of tools.evaluate.
"""

import io
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from matplotlib.figure import Figure
from PIL import Image  # matplotlib needs it, too

from configurator import UserError, configure, run
from support.checkpoint import build_model, load_checkpoint
from support.data import read_meta
from support.files import atomic_write
from support.log import read_log
from support.pictures import plot_losses, save_figure, write_report


@dataclass(frozen=True)
class PicturesConfig:
    """Draw loss.png and write samples.md of each run, or draw one picture that compares runs."""

    out_dir: str = "out/phase1_char"  # folder of a run, or of several: out/a,out/b
    compare: Literal["", "compute"] = ""  # empty: loss.png and samples.md of each run
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
    flops_per_epoch = model.flops_per_token(checkpoint.shape.block_size) * meta["train_tokens"]
    evaluations = [r for r in read_log(out_dir / "log.jsonl") if "val_loss" in r and r["step"]]
    if not evaluations:
        raise UserError(f"{out_dir}: has no evaluation after step 0 yet; train longer")
    flops = [r["epoch"] * flops_per_epoch for r in evaluations]  # steps may differ in their batch
    bits_per_nat = meta["val_tokens"] / meta["val_bytes"] / math.log(2)
    bits = [r["val_loss"] * bits_per_nat for r in evaluations]
    return Curve(out_dir.name, model.num_params() / 1e6, flops, bits)


def draw_curves(curves: list[Curve], title: str) -> Figure:
    """Return a figure of bits per byte over compute: a line per run, and its last value."""
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_xlabel("training compute (floating-point operations)")
    axes.set(ylabel="validation loss (bits per byte)", title=title)
    axes.grid(alpha=0.3)
    for name, parameters, flops, bits in curves:
        [line] = axes.plot(flops, bits, marker=".", label=f"{name}: {parameters:.1f} million")
        style = dict(textcoords="offset points", color=line.get_color())
        axes.annotate(f"{bits[-1]:.2f}", (flops[-1], bits[-1]), (0, 8), **style)
    axes.legend(title="run and parameters")
    return figure


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
    for name, parameters, flops, bits in curves:
        end = f"{bits[-1]:.4f} bits per byte after {flops[-1]:.2e} operations"
        print(f"{name}: {parameters:.1f} million parameters: {end}")
    save_figure(draw_curves(curves, config.title), Path(config.picture))
    print(f"drawn in {config.picture}")


if __name__ == "__main__":
    run(main, configure(PicturesConfig))
