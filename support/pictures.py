"""The picture and the table of a run: loss.png and samples.md, from log.jsonl."""

from pathlib import Path

from support.files import atomic_write
from support.log import read_log


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
            lines.append(
                f"{r['epoch']:5.3g} | {r['train_loss']:13.4f} | {r['val_loss']:15.4f} | {said}"
            )
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
    from matplotlib.figure import (
        Figure,  # half a second that a short run need not wait for at its start
    )

    steps = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "val_loss" in r]
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [r["epoch"] for r in steps],
        [r["loss"] for r in steps],
        color="0.8",
        lw=0.8,
        label="each batch",
    )
    for key, color, label in (
        ("train_loss", "tab:blue", "training"),
        ("val_loss", "tab:orange", "validation"),
    ):
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
    axes.set(
        xlabel="epoch",
        ylabel="loss (nats per token)",
        title=f"{out_dir.name}: training and validation loss",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(out_dir / "loss.png") as file:
        figure.savefig(file, format="png")


def write_report(out_dir: Path) -> None:
    """Write loss.png and samples.md, and print the table."""
    records = read_log(out_dir / "log.jsonl")
    draw_losses(out_dir, records)
    write_samples(out_dir, records)
    print(table(records))
