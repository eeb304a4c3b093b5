"""The pictures of runs: each run's own, and the loss of several runs over compute."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image, ImageSequence

from configurator import UserError
from model import GPT, GPTConfig
from support.checkpoint import Checkpoint, save_checkpoint
from support.data import write_dataset
from support.tokenizer import CharTokenizer
from tools import pictures
from tools.pictures import Curve, PicturesConfig, draw_curves

MODEL = GPT(GPTConfig(vocab_size=3, block_size=8, n_layer=1, n_head=2, n_embd=8))
EPOCHS = [(0, 0), (4, 2.5), (8, 7.5)]  # at a step: the run was resumed with twice the batch
EVALUATIONS = [{"step": n, "epoch": e, "train_loss": 3.0, "val_loss": 3 - n / 4} for n, e in EPOCHS]


@pytest.fixture
def run(place) -> Path:
    """The folder of a run with three evaluations. 2 of its 3 characters have 2 bytes."""
    write_dataset(Path("data/tiny"), CharTokenizer("aéö"), [0, 1], [0, 1, 2], 5, {})
    dataset = json.loads(Path("data/tiny/meta.json").read_text(encoding="utf-8"))["sha256"]
    state = dict(tokenizer={}, train_config={"dataset": "tiny"}, dataset=dataset, step=8)
    save_checkpoint(Path("out/a/ckpt.pt"), Checkpoint(MODEL.config, MODEL.state_dict(), **state))
    Path("out/a/log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in EVALUATIONS))
    return Path("out/a")


def test_a_curve_has_the_operations_and_the_bits_per_byte_of_each_evaluation(run):
    curve = pictures.read_curve(run)
    assert curve.flops == [n * MODEL.flops_per_token(8) for n in (5, 15)]  # an epoch has 2 tokens
    assert curve.bits == pytest.approx([loss / math.log(2) * 3 / 5 for loss in (2, 1)])
    assert curve.name == "a"
    assert curve.parameters == sum(p.numel() for p in MODEL.parameters()) / 1e6


def test_a_run_without_an_evaluation_or_with_another_data_set_is_refused(run):
    log = run / "log.jsonl"
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    with pytest.raises(UserError, match="no evaluation after step 0 yet; train longer"):
        pictures.read_curve(run)
    write_dataset(Path("data/tiny"), CharTokenizer("aéö"), [0, 2], [0, 1, 2], 5, {})
    with pytest.raises(UserError, match="data/tiny was prepared again since this run"):
        pictures.read_curve(run)


def test_every_run_gets_its_own_pictures_and_its_table_is_printed(run, capsys):
    Path("out/b").mkdir()
    sample = {"step": 9, "epoch": 2, "sample": "To be"}
    Path("out/b/log.jsonl").write_text(json.dumps(sample) + "\n")
    pictures.main(PicturesConfig(out_dir="out/a,out/b"))
    first, *table = capsys.readouterr().out.splitlines()
    assert first == "out/a: this run has no samples"
    assert table[-1] == "|     2 |          |            | To be |"
    for name in ("loss.png", "samples.md"):
        assert (run / name).exists() and Path("out/b", name).exists()


def test_a_movie_has_a_frame_per_sample_and_stays_small(run, monkeypatch):
    texts = ["x$ $y\\frac", "\n".join(["word " * 30] * 3)]
    records = [{"step": 4 * n, "epoch": n, "sample": text} for n, text in enumerate(texts)]
    with open(run / "log.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)
    drawn, plot = [], pictures.plot_losses
    monkeypatch.setattr(pictures, "plot_losses", lambda axes, r: (drawn.append(r), plot(axes, r)))
    pictures.main(PicturesConfig(out_dir="out/a", movie=True))
    assert [max(r["step"] for r in until) for until in drawn] == [0, 4]  # nothing from later steps
    with Image.open(run / "learning.gif") as movie:
        frames = [frame.info["duration"] for frame in ImageSequence.Iterator(movie)]
        assert frames == [600, 4000] and movie.size == (830, 310)
    assert (run / "learning.gif").stat().st_size < 100_000


def test_runs_are_compared_in_one_picture(run, capsys):
    run.with_name("b").symlink_to("a")
    pictures.main(PicturesConfig(out_dir="out/a,out/b", compare="compute", picture="runs.png"))
    a, b, drawn = capsys.readouterr().out.splitlines()
    assert "million parameters: 0.8656 bits per byte after " in a and b[0] == "b"
    assert drawn == "drawn in runs.png" and Path("runs.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_has_the_evaluations_of_a_run():
    curves = [Curve("a", 1, [1e13, 2e13], [3, 2.5]), Curve("b", 3, [2e13, 4e13], [2.5, 2])]
    lines = draw_curves(curves, "a title").axes[0].get_lines()
    points = [line.get_xydata().tolist() for line in lines]
    assert points == [[[1e13, 3], [2e13, 2.5]], [[2e13, 2.5], [4e13, 2]]]
