"""The report of a run, made again from its log."""

from support.log import read_log
from support.pictures import samples_table
from tools import report


def test_the_table_is_printed_and_the_files_are_written_again(tiny_run, capsys):
    out_dir = tiny_run(sample_interval=6, sample_start="1")
    table = samples_table(read_log(out_dir / "log.jsonl"))
    for name in ("loss.png", "samples.md"):
        (out_dir / name).unlink()
    capsys.readouterr()
    report.main(report.ReportConfig(out_dir=str(out_dir)))
    assert capsys.readouterr().out == table + "\n"
    assert (out_dir / "loss.png").exists() and table in (out_dir / "samples.md").read_text("utf-8")


def test_a_run_without_samples_is_said(tiny_run, capsys):
    out_dir = tiny_run()
    capsys.readouterr()
    report.main(report.ReportConfig(out_dir=str(out_dir)))
    assert capsys.readouterr().out == "this run has no samples\n"
