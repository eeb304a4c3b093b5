"""Draw loss.png and write samples.md from the log of a run, also while it trains.

python -m tools.report --out_dir=out/phase1_char
"""

from configurator import configure, run
from dataclasses import dataclass
from pathlib import Path

from support.pictures import write_report


@dataclass(frozen=True)
class ReportConfig:
    """Draw loss.png and write samples.md from the log of a run."""

    out_dir: str = "out/phase1_char"  # the run's folder


def main(config: ReportConfig) -> None:
    """Write loss.png and samples.md, and print the table."""
    print(write_report(Path(config.out_dir)) or "this run has no samples")


if __name__ == "__main__":
    run(main, configure(ReportConfig))
