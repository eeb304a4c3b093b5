"""Draw how the loss of several runs falls with the compute that they spend.

    python -m tools.scaling --out_dir=out/phase1_char --out_dir=out/phase2_bpe

The picture has bits per byte, which can be compared between vocabularies, over floating-point
operations. It needs each run's log.jsonl and ckpt.pt, and its data set's meta.json. With eval_iters
a run evaluates a part of val.bin, so its last value differs a little from that of tools.evaluate.
"""

import math
from configurator import UserError, configure, run
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from support.checkpoint import load_checkpoint
from support.data import load_meta
from support.log import given_out_dirs, read_log
from support.pictures import save_figure


@dataclass(frozen=True)
class ScalingConfig:
    """Draw bits per byte over compute for one or more runs."""

    out_dir: str = "out/phase1_char"  # folder of a run; repeat the option for more runs
    compare_optimizers: bool = False  # only last values; a line joins the best of each size
    picture: str = "out/scaling.png"  # file to write

    def __post_init__(self) -> None:
        if not Path(self.picture).name:
            raise UserError(
                f"picture={self.picture!r} is not a file; use --picture=out/scaling.png"
            )


class Curve(NamedTuple):
    """The evaluations of a run after its first step."""

    name: str
    parameters: float  # in millions
    optimizer: str
    flops: list[float]  # floating-point operations of the training so far
    bits: list[float]  # bits per byte of val.bin


def read_curve(out_dir: Path) -> Curve:
    """Return the curve of a run. Raises UserError if it has no evaluation after a step yet."""
    model, checkpoint = load_checkpoint(out_dir / "ckpt.pt")
    options, T = checkpoint["train_config"], model.config.block_size
    meta = load_meta(Path("data") / options["dataset"])
    if checkpoint["dataset"] and checkpoint["dataset"] != meta["sha256"]:
        raise UserError(
            f"{out_dir}: data/{options['dataset']} was prepared again since this run; prepare it "
            "as for the run"
        )
    tokens_per_byte = meta["val_tokens"] / meta["val_bytes"]
    sequences = options["gradient_accumulation_steps"] * options["batch_size"]
    flops_per_step = model.flops_per_token(T) * sequences * T
    evaluations = [r for r in read_log(out_dir / "log.jsonl") if "val_loss" in r and r["step"]]
    if not evaluations:
        raise UserError(f"{out_dir}: has no evaluation after step 0 yet; train longer")
    flops = [r["step"] * flops_per_step for r in evaluations]
    bits = [r["val_loss"] / math.log(2) * tokens_per_byte for r in evaluations]
    return Curve(out_dir.name, model.num_params() / 1e6, options["optimizer"], flops, bits)


def draw_curves(curves: list[Curve]) -> Figure:
    """Return a figure with a line per run and its last value."""
    figure, axes = draw_axes()
    for name, parameters, _, flops, bits in curves:
        [line] = axes.plot(flops, bits, marker=".", label=f"{name}: {parameters:.1f} million")
        style = dict(xytext=(0, 8), textcoords="offset points", color=line.get_color())
        axes.annotate(f"{bits[-1]:.2f}", (flops[-1], bits[-1]), **style)
    axes.legend(title="run and parameters")
    return figure


def draw_optimizers(curves: list[Curve]) -> Figure:
    """Return a figure with a line per optimizer through the best run of each size.

    A pale dot is the last value of a run, also of one that is not the best of its size.
    """
    figure, axes = draw_axes()
    for optimizer in sorted({curve.optimizer for curve in curves}):
        runs = [curve for curve in curves if curve.optimizer == optimizer]
        sizes = sorted({curve.parameters for curve in runs})
        best = [
            min((c for c in runs if c.parameters == n), key=lambda c: c.bits[-1]) for n in sizes
        ]
        ends = [c.flops[-1] for c in best], [c.bits[-1] for c in best]
        [line] = axes.plot(*ends, marker="o", label=optimizer)
        color = line.get_color()
        axes.plot(
            [c.flops[-1] for c in runs], [c.bits[-1] for c in runs], ".", color=color, alpha=0.4
        )
        for curve, x, y in zip(best, *ends, strict=True):
            text = f"{curve.parameters:.1f} million: {y:.2f}"
            axes.annotate(text, (x, y), xytext=(6, 4), textcoords="offset points", color=color)
    axes.margins(x=0.3)  # for the words
    axes.legend(title="optimizer", loc="lower left")
    return figure


def draw_axes() -> tuple:
    """Return an empty figure and its axes: bits per byte over compute."""
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set(
        xlabel="training compute (floating-point operations)",
        ylabel="validation loss (bits per byte)",
        title="The loss falls with compute",
    )
    axes.grid(alpha=0.3)
    return figure, axes


def main(config: ScalingConfig) -> None:
    """Draw the picture and print the last point of each run."""
    curves = [read_curve(Path(out_dir)) for out_dir in given_out_dirs(config.out_dir)]
    for name, parameters, optimizer, flops, bits in curves:
        print(
            f"{name}: {parameters:.1f} million parameters, {optimizer}: {bits[-1]:.4f} bits per "
            f"byte after {flops[-1]:.2e} operations"
        )
    draw = draw_optimizers if config.compare_optimizers else draw_curves
    save_figure(draw(curves), Path(config.picture))
    print(f"drawn in {config.picture}")


if __name__ == "__main__":
    run(main, configure(ScalingConfig))
