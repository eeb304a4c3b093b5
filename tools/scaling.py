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

from matplotlib.figure import Figure

from support.checkpoint import load_checkpoint
from support.data import load_meta
from support.log import given_out_dirs, read_log
from support.pictures import save_figure


@dataclass(frozen=True)
class ScalingConfig:
    """Draw bits per byte over compute for one or more runs."""

    out_dir: str = "out/phase1_char"  # folder of a run; repeat the option for more runs
    picture: str = "out/scaling.png"  # file to write


def read_curve(out_dir: Path) -> tuple[list[float], list[float], str]:
    """Return the floating-point operations and bits per byte of a run's evaluations, and a label.

    Evaluations before the first step spent nothing and are left out.
    """
    model, checkpoint = load_checkpoint(out_dir / "ckpt.pt")
    options, T = checkpoint["train_config"], model.config.block_size
    meta = load_meta(Path("data") / options["dataset"])
    tokens_per_byte = meta["val_tokens"] / meta["val_bytes"]
    sequences = options["gradient_accumulation_steps"] * options["batch_size"]
    flops_per_step = model.flops_per_token(T) * sequences * T
    evaluations = [r for r in read_log(out_dir / "log.jsonl") if "val_loss" in r and r["step"]]
    if not evaluations:
        raise UserError(f"{out_dir}: has no evaluation after step 0 yet; train longer")
    flops = [r["step"] * flops_per_step for r in evaluations]
    bits = [r["val_loss"] / math.log(2) * tokens_per_byte for r in evaluations]
    label = f"{out_dir.name}: {model.num_params() / 1e6:.1f} million parameters"
    return flops, bits, label


def draw_curves(curves: list[tuple[list[float], list[float], str]]) -> Figure:
    """Return a figure with a line per run and its last value."""
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for flops, bits, label in curves:
        [line] = axes.plot(flops, bits, marker=".", label=label)
        style = dict(xytext=(0, 8), textcoords="offset points", color=line.get_color())
        axes.annotate(f"{bits[-1]:.2f}", (flops[-1], bits[-1]), **style)
    axes.set_xscale("log")
    axes.set(
        xlabel="training compute (floating-point operations)",
        ylabel="validation loss (bits per byte)",
        title="The loss falls with compute",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main(config: ScalingConfig) -> None:
    """Draw the picture and print the last point of each run."""
    curves = [read_curve(Path(out_dir)) for out_dir in given_out_dirs(config.out_dir)]
    for flops, bits, label in curves:
        print(f"{label}: {bits[-1]:.4f} bits per byte after {flops[-1]:.2e} operations")
    save_figure(draw_curves(curves), Path(config.picture))
    print(f"drawn in {config.picture}")


if __name__ == "__main__":
    run(main, configure(ScalingConfig))
