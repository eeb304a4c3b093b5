"""Show a run: loss.png and samples.md from its log, and the writers of figures and tables."""

from pathlib import Path

from support.files import atomic_write
from support.log import read_log, shorten


def write_report(out_dir: Path) -> str:
    """Write loss.png and samples.md of a run. Returns the table of its samples, or ""."""
    records = read_log(out_dir / "log.jsonl")
    save_figure(draw_losses(out_dir.name, records), out_dir / "loss.png")
    table = samples_table(records)
    parts = ["# Samples\n", table or "This run has none; train with --sample_interval."]
    for r in records:
        if "sample" in r:
            title = f"Step {r['step']:,}, epoch {r['epoch']:.3g}"
            parts.append(f"\n## {title}\n\n```text\n{r['sample']}\n```")
    with atomic_write(out_dir / "samples.md") as file:
        file.write(("\n".join(parts) + "\n").encode("utf-8", "backslashreplace"))
    return table


def samples_table(records: list[dict]) -> str:
    """Return a Markdown table of the samples in a log: when, with which losses, how they begin.

    It fits 80 columns. The losses are empty where the run made no evaluation. "" if no samples.
    """
    losses = {r["step"]: (r["train_loss"], r["val_loss"]) for r in records if "val_loss" in r}
    rows = []
    for r in records:
        if "sample" in r:
            cells = [f"{loss:.4f}" for loss in losses.get(r["step"], ())] or ["", ""]
            rows.append([f"{r['epoch']:.3g}", *cells, shorten(r["sample"]).replace("|", "\\|")])
    header = ["epoch", "training", "validation", "sample"]
    return markdown_table(header, rows, right={0, 1, 2}) if rows else ""


def markdown_table(header: list[str], rows: list[list[str]], right: set[int] = frozenset()) -> str:
    """Return a Markdown table; the columns in `right` are aligned to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(3, *map(len, column)) for column in columns[:-1]] + [0]  # the last is not padded
    rule = [
        "-" * max(2, w - 1) + ":" if i in right else "-" * max(3, w) for i, w in enumerate(widths)
    ]
    lines = []
    for row in (header, rule, *rows):
        pad = [str.rjust if i in right else str.ljust for i in range(len(row))]
        cells = [pad[i](cell, widths[i]) for i, cell in enumerate(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_losses(name: str, records: list[dict]):
    """Return a matplotlib figure of a run's training and validation losses over its epochs."""
    from matplotlib.figure import Figure  # takes half a second, which the start need not wait for

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    steps = [r for r in records if "loss" in r]
    x, y = [r["epoch"] for r in steps], [r["loss"] for r in steps]
    axes.plot(x, y, color="0.8", lw=0.8, label="each batch")
    evaluations = [r for r in records if "val_loss" in r]
    x = [r["epoch"] for r in evaluations]
    for key, color, label in (
        ("train_loss", "tab:blue", "training"),
        ("val_loss", "tab:orange", "validation"),
    ):
        axes.plot(x, [r[key] for r in evaluations], color=color, marker=".", label=label)
    if evaluations:
        end = (x[-1], evaluations[-1]["val_loss"])
        style = dict(xytext=(0, 8), textcoords="offset points", ha="center")
        axes.annotate(f"{end[1]:.3f}", end, **style)
    if records and records[-1]["epoch"] > 2:  # most is learned in the first epoch: show it wide
        ticks = [t for t in (0, 0.5, 1, 2, 5, 10, 20, 50, 100) if t <= records[-1]["epoch"] + 0.1]
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    title = f"{name}: training and validation loss"
    axes.set(xlabel="epoch", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def save_figure(figure, path: Path) -> None:
    """Write a matplotlib figure as a PNG file, completely or not at all."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
