"""Tables, figures, and the report of a run."""

import json
from pathlib import Path

import pytest
from conftest import logged

from support.pictures import draw_losses, markdown_table, samples_table, save_figure, write_report


def test_a_table_is_aligned_and_its_last_column_is_not_padded():
    table = markdown_table(["n", "name", "note"], [["1", "a", "x"], ["1234", "b", "long"]], {0})
    assert table.splitlines() == [
        "|    n | name | note |",
        "| ---: | ---- | --- |",
        "|    1 | a    | x |",
        "| 1234 | b    | long |",
    ]


def test_a_table_row_of_another_length_is_a_mistake():
    with pytest.raises(ValueError, match=r"zip\(\)"):
        markdown_table(["a", "b"], [["1"]])


def test_a_row_has_the_losses_of_its_step_and_one_line_and_fits_80_columns():
    texts = ("a | b\n\nsecond line", "word " * 40)
    records = [{"step": 490 * i, "epoch": 2.0 * i, "sample": text} for i, text in enumerate(texts)]
    records.append({"step": 490, "epoch": 2.0, "train_loss": 1.0, "val_loss": 1.25})
    first, second = samples_table(records).splitlines()[2:]
    assert first == "|     0 |          |            | a \\| b / second line |"
    assert second.startswith("|     2 |   1.0000 |     1.2500 | word word ")
    assert second.endswith("word word ... |") and len(second) <= 80


def test_a_log_with_samples_in_its_evaluations_is_read():
    """Runs logged samples in that way until November 2026."""
    record = {"step": 9, "epoch": 1.0, "train_loss": 2.0, "val_loss": 3.0, "sample": "text"}
    assert samples_table([record]).endswith("|     1 |   2.0000 |     3.0000 | text |")


def test_a_run_without_samples_has_no_table(tiny_run):
    out_dir = tiny_run()
    assert write_report(out_dir) == ""
    assert "|" not in (out_dir / "samples.md").read_text(encoding="utf-8")


def test_a_run_with_samples_has_all_of_them_in_its_report(tiny_run):
    out_dir = tiny_run(sample_interval=6, sample_start="1", sample_tokens=5)
    page = (out_dir / "samples.md").read_text(encoding="utf-8")
    assert page.count("\n| ") == 5  # header, rule and the samples after 0, 6 and 12 steps
    assert all(r["sample"] in page for r in logged(out_dir) if "sample" in r)


def test_the_figure_has_the_losses_of_the_log(tiny_run):
    out_dir = tiny_run(max_iters=4, eval_interval=2)
    axes = draw_losses("a run", logged(out_dir)).axes[0]
    lines = {line.get_label(): line.get_ydata().tolist() for line in axes.get_lines()}
    records = logged(out_dir)
    assert lines["each batch"] == [r["loss"] for r in records if "loss" in r]
    assert lines["validation"] == [r["val_loss"] for r in records if "val_loss" in r]
    assert lines["training"] == [r["train_loss"] for r in records if "val_loss" in r]


@pytest.mark.parametrize("lines", [[], [{"step": 1, "epoch": 3.5, "loss": 2.0}]], ids=len)
def test_a_run_that_ended_early_is_drawn(tmp_path, lines):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    write_report(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    class Figure:
        def savefig(self, file, format):
            file.write(b"half")
            raise OSError(28, "No space left on device")

    (tmp_path / "loss.png").write_bytes(b"old")
    with pytest.raises(ValueError, match="No space left"):
        save_figure(Figure(), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes() == b"old"
    assert [path.name for path in Path(tmp_path).iterdir()] == ["loss.png"]
