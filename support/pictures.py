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
    dashes = ["-" * max(3, width) for width in widths]
    rule = [line[:-1] + ":" if i in right else line for i, line in enumerate(dashes)]
    lines = []
    for row in (header, rule, *rows):
        pad = [str.rjust if i in right else str.ljust for i in range(len(row))]
        cells = [pad[i](cell, widths[i]) for i, cell in enumerate(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_losses(name: str, records: list[dict]):
    """Return a matplotlib figure of a run's losses. Its title has the first and the last one."""
    from matplotlib.figure import Figure  # takes half a second, which the start need not wait for

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    plot_losses(axes, records)
    ends = [f"{r['val_loss']:.2f}" for r in records if "val_loss" in r]
    axes.set_title(f"{name}: validation loss from {ends[0]} to {ends[-1]}" if ends else name)
    return figure


def plot_losses(axes, records: list[dict]) -> None:
    """Plot losses over epochs: those of batches as a line, those of evaluations as dots."""
    steps = [r for r in records if "loss" in r]
    x, y = [r["epoch"] for r in steps], [r["loss"] for r in steps]
    axes.plot(x, y, color="tab:blue", alpha=0.5, lw=1, label="each batch")
    evaluations = [r for r in records if "val_loss" in r]
    x = [r["epoch"] for r in evaluations]
    axes.plot(x, [r["train_loss"] for r in evaluations], ".", color="tab:blue", label="training")
    axes.plot(x, [r["val_loss"] for r in evaluations], ".", color="tab:orange", label="validation")
    if evaluations:
        end = (x[-1], evaluations[-1]["val_loss"])
        style = dict(xytext=(0, 8), textcoords="offset points", ha="center")
        axes.annotate(f"{end[1]:.3f}", end, **style)
    axes.set(xlabel="epochs (passes over the training text)", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")


def save_figure(figure, path: Path) -> None:
    """Write a matplotlib figure as a PNG file, completely or not at all."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
