"""Tables, figures, and the report of a run."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest

from support.pictures import draw_losses, markdown_table, samples_table, save_figure, write_report


def test_a_table_is_aligned_and_its_last_column_is_not_padded():
    table = markdown_table(["n", "name", "note"], [["1", "a", "x"], ["1234", "b", "long"]], {0})
    rows = ("|    n | name | note |", "| ---: | ---- | --- |")
    assert table.splitlines() == [*rows, "|    1 | a    | x |", "| 1234 | b    | long |"]
    with pytest.raises(ValueError, match=r"zip\(\)"):  # a row of another length
        markdown_table(["a", "b"], [["1"]])


def test_a_row_has_the_losses_of_its_step_and_one_line_and_fits_80_columns():
    texts = ("a | b\n\nsecond line", "word " * 40)
    records = [{"step": 490 * i, "epoch": 2.0 * i, "sample": text} for i, text in enumerate(texts)]
    records.append({"step": 490, "epoch": 2.0, "train_loss": 1.0, "val_loss": 1.25})
    first, second = samples_table(records).splitlines()[2:]
    assert first == "|     0 |          |            | a \\| b / second line |"
    assert second.startswith("|     2 |   1.0000 |     1.2500 | word word ")
    assert second.endswith("word word ... |") and len(second) <= 80


def write_log(folder: Path, records: list[dict]) -> None:
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_a_report_has_the_table_and_all_samples(tmp_path):
    records = [{"step": n, "epoch": n / 400, "sample": f"text\n\n{n}"} for n in (0, 1000)]
    write_log(tmp_path, records)
    assert (table := write_report(tmp_path)) == samples_table(records)
    assert (tmp_path / "samples.md").read_text(encoding="utf-8") == (
        f"# Samples\n\n{table}\n\n## Step 0, epoch 0\n\n```text\ntext\n\n0\n```\n"
        "\n## Step 1,000, epoch 2.5\n\n```text\ntext\n\n1000\n```\n"
    )


def test_the_figure_has_the_losses_of_the_log():
    records = [{"step": n, "epoch": n / 2, "loss": 9.0 - n} for n in range(1, 7)]
    records += [{"step": n, "epoch": n / 2, "train_loss": 7.0, "val_loss": 8.0 - n} for n in (3, 6)]
    axes = draw_losses("a run", records).axes[0]
    assert axes.get_title() == "a run: validation loss from 5.00 to 2.00"
    # A straight line from one evaluation to the next would look like the curve of the run.
    styles = {line.get_label(): line.get_linestyle() for line in axes.get_lines()}
    assert styles == {"each batch": "-", "training": "None", "validation": "None"}
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines == {
        "each batch": [[n / 2, 9.0 - n] for n in range(1, 7)],
        "training": [[1.5, 7.0], [3.0, 7.0]],
        "validation": [[1.5, 5.0], [3.0, 2.0]],
    }
    assert [text.get_text() for text in axes.texts] == ["2.000"]


@pytest.mark.parametrize("records", [[], [{"step": 1, "epoch": 3.5, "loss": 2.0}]], ids=len)
def test_a_run_that_ended_early_or_has_no_samples_is_drawn(tmp_path, records):
    write_log(tmp_path, records)
    assert write_report(tmp_path) == ""
    assert "This run has none" in (tmp_path / "samples.md").read_text(encoding="utf-8")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_is_written_completely_or_not_at_all(tmp_path):
    (tmp_path / "loss.png").write_bytes(b"old")
    figure = Mock(savefig=Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(ValueError, match="No space left"):
        save_figure(figure, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes() == b"old"
