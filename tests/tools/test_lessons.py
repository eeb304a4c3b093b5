"""Each mistake of lessons.py is in effect, and is caught by what LESSONS.md says catches it; and the page is true."""

import importlib
import inspect
import itertools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXT

import model
import train
from configurator import read_options
from support import preflight
from support.checkpoint import load_checkpoint
from tools import lessons

PAGE = (ROOT / "docs" / "lessons.md").read_text(encoding="utf-8")
MISTAKES = [mistake for mistakes in lessons.LESSONS.values() for mistake in mistakes]
ROWS = {
    line.split(" | ")[0].removeprefix("| "): line
    for line in PAGE.splitlines()
    if line.count(" | ") == 4
}

every_mistake = pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
mistakes_with_a_test = pytest.mark.parametrize(
    "mistake", [m for m in MISTAKES if m.test], ids=lambda m: m.name
)


@pytest.fixture
def trainer(tiny_run):
    def make(mistake: lessons.Mistake) -> train.Trainer:
        options = [
            f"--{name}={value}" for name, value in {**tiny_run.options, "min_lr": 0.0}.items()
        ]
        config = read_options(train.TrainConfig, [*options, *mistake.options])
        return train.Trainer(config, train.Processes(config))

    return make


def failing(trainer: train.Trainer) -> set[str]:
    return {name for name, check in preflight.CHECKS.items() if not check(trainer)[0]}


@every_mistake
def test_the_checks_that_fail_are_those_that_the_page_names(mistake, trainer):
    row = ROWS[mistake.name]
    assert failing(trainer(lessons.SOUND)) == set()
    with lessons.put_in(mistake):
        if "RuntimeError" in row:
            with pytest.raises(RuntimeError, match="expected target dtype to be Long"):
                failing(trainer(mistake))
        else:
            named = {name for name in preflight.CHECKS if name in row.rpartition("FAIL")[2]}
            found = failing(trainer(mistake))
            assert found <= named and bool(found) == bool(
                named
            )  # of a smaller model than the page's
    assert failing(trainer(lessons.SOUND)) == set()


@mistakes_with_a_test
def test_the_test_that_the_page_names_fails_under_the_mistake_alone(mistake, dataset):
    file, _, name = mistake.test.partition("::")
    test = getattr(importlib.import_module(Path(file).stem), name)
    known = {"dataset": dataset, "tie_weights": True, "bf16": False}
    arguments = {parameter: known[parameter] for parameter in inspect.signature(test).parameters}
    test(**arguments)
    with lessons.put_in(mistake), pytest.raises((AssertionError, RuntimeError)):
        test(**arguments)
    test(**arguments)


def test_preflight_warns_of_the_slow_loader_and_says_nothing_of_the_sound_one(trainer, monkeypatch):
    import prepare_shakespeare

    Path("long.txt").write_text(TEXT * 20, encoding="utf-8")
    prepare_shakespeare.main(prepare_shakespeare.PrepareConfig(input="long.txt", dataset="tiny"))
    tiny = trainer(lessons.SOUND)
    monkeypatch.setattr(preflight, "gain_of_larger_batch", lambda _: 1.0)
    (mistake,) = lessons.LESSONS["loader"]

    def said() -> list[str]:
        return [
            line
            for line in preflight.warnings(tiny, "compiled", micro_seconds=0.05)
            if "batches take" in line
        ]

    x, y = tiny.micro_batch(3, 0)
    assert said() == []
    with lessons.put_in(mistake):
        assert "though train.bin is in memory; is the machine busy?" in said()[0]
        slow_x, slow_y = tiny.micro_batch(3, 0)
    assert torch.equal(x, slow_x) and torch.equal(y, slow_y)


def test_rates_are_ten_times_too_high_and_too_low():
    config = lessons.LessonsConfig()
    sound, high, low = (
        lessons.run_options(m, config) for m in (lessons.SOUND, *lessons.LESSONS["rate"])
    )
    for name in ("learning_rate", "muon_lr"):
        assert getattr(high, name) == pytest.approx(10 * getattr(sound, name))
        assert getattr(low, name) == pytest.approx(getattr(sound, name) / 10)


def test_the_softmax_by_hand_is_right_until_a_score_is_too_large():
    q, k, v = torch.randn(3, 1, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    sound = model.attention(q, k, v)
    mistake = next(m for m in MISTAKES if m.name == "softmax_by_hand")
    with lessons.put_in(mistake):
        torch.testing.assert_close(model.attention(q, k, v), sound, rtol=1e-2, atol=1e-2)
        assert model.attention(30 * q, k, v).isnan().any()
    assert model.attention(30 * q, k, v).isfinite().all()


@pytest.fixture
def small(dataset, monkeypatch):
    """Runs of a model small enough for a test, on the tiny data set under phase 1's name."""
    shutil.copytree(dataset, dataset.parent / "shakespeare_char")
    shape = (
        "--n_layer=1",
        "--n_head=2",
        "--n_embd=16",
        "--block_size=16",
        "--batch_size=4",
        "--sample_start=3",
    )
    monkeypatch.setattr(lessons, "SOUND", replace(lessons.SOUND, options=shape))
    changed = {
        lesson: [replace(m, options=shape) for m in ms] for lesson, ms in lessons.LESSONS.items()
    }
    monkeypatch.setattr(lessons, "LESSONS", changed)
    return lessons.LessonsConfig(only="mask", max_iters=15)


def test_a_lesson_leaves_two_runs_a_figure_and_a_table(small, capsys):
    lessons.main(small)
    printed = capsys.readouterr().out
    assert "FAIL the future, by gradient" in printed and printed.count("| no_mask | ") == 1
    assert printed.splitlines()[-1].endswith(
        "| FAIL the future, by perturbation; the future, by gradient |"
    )
    assert Path("assets/lessons_mask.png").read_bytes().startswith(b"\x89PNG")
    for name in ("sound", "no_mask"):
        _, checkpoint = load_checkpoint(Path("out/lessons") / name / "ckpt.pt")
        assert checkpoint["step"] == 15
    before = Path("out/lessons/sound/ckpt.pt").stat().st_mtime_ns
    lessons.main(small)
    assert Path("out/lessons/sound/ckpt.pt").stat().st_mtime_ns == before, (
        "a sound run that is there is not repeated"
    )
    assert not Path("out/lessons/no_mask.1").exists()


def test_a_run_that_ends_at_once_is_in_the_table_with_its_last_words(small, capsys):
    lessons.main(replace(small, only="dtype"))
    table = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split(" | ")[0] for line in table] == [
        "| sound",
        "| int32_targets",
        "| read_as_bytes",
    ]
    assert "|  |  |  | RuntimeError: expected target dtype to be Long" in table[1]


def test_levels_are_those_of_a_text_counted_by_hand(small):
    found = lessons.levels("shakespeare_char")
    text = TEXT[: int(0.9 * len(TEXT))]
    p = torch.tensor([text.count(c) / len(text) for c in sorted(set(TEXT))]).double()
    one = -(p * p.log()).nansum().item()
    pairs: dict[str, int] = {}
    for a, b in itertools.pairwise(text):
        pairs[a + b] = pairs.get(a + b, 0) + 1
    p = torch.tensor(list(pairs.values())).double() / (len(text) - 1)
    two = -(p * p.log()).sum().item()
    assert list(found.values()) == pytest.approx([2.8904, one, two - one], abs=1e-4)


def test_shapes_in_the_figure_are_those_of_the_config():
    B, T, C, nh, V = 5, 7, 128, 4, 65
    config = model.GPTConfig(vocab_size=V, block_size=128, n_layer=2, n_head=nh, n_embd=C)
    sizes = {
        "B": B,
        "T": T,
        "C": C,
        "nh": nh,
        "hs": C // nh,
        "V": V,
        "B·nh": B * nh,
        "3C": 3 * C,
        "4C": 4 * C,
    }
    letters, numbers = lessons.in_letters(config), lessons.record_shapes(model.GPT(config), B, T)
    for name, shape in numbers.items():
        assert shape == tuple(sizes[letter] for letter in letters[name]), name
    drawn = [" ".join(letters[name]) for _, name, _ in lessons.STEPS]
    x = "B T C"
    block = [x, "B T 3C", "B nh T hs", "B·nh T T", "B nh T hs", x, x, x, "B T 4C", x]
    assert drawn == ["B T", x, "T C", x, *block, x, "B T V", ""]


def test_the_figure_of_shapes_is_drawn(small):
    lessons.main(replace(small, only="shapes"))
    assert Path("assets/lessons_shapes.png").read_bytes().startswith(b"\x89PNG")


def test_help_and_mistakes_do_not_import_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')", encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for arg, code, words in (
        ("--help", 0, "usage: python"),
        ("--only=maks", 2, "'mask'"),
        ("--max_iters=3", 2, "5"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "tools.lessons", arg], env=env, capture_output=True, text=True
        )
        assert done.returncode == code and words in done.stdout + done.stderr, done.stderr


# The page


def test_the_page_shows_each_mistake_as_it_is_and_each_run():
    assert list(ROWS)[2:] == ["sound", *(m.name for m in MISTAKES)]
    for mistake in MISTAKES:
        if mistake.function:
            removed = [] if mistake.right in mistake.wrong else [f"-{mistake.right}"]
            added = [f"+{line}" for line in mistake.wrong.splitlines() if line != mistake.right]
            assert "\n".join(removed + added) in PAGE, mistake.name
            assert (
                f"# {Path(mistake.function.__code__.co_filename).name}, {mistake.function.__qualname__}"
                in PAGE
            )
        assert all(option in PAGE for option in mistake.options) and mistake.test in PAGE


def test_what_the_page_names_exists():
    for file, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", PAGE):
        assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), name
    for path in re.findall(r"\]\((assets/[^)]+)\)", PAGE) + re.findall(r"`(\w+\.py)`", PAGE):
        assert (ROOT / path).is_file(), path
    pictures = re.findall(r"\]\(assets/lessons_(\w+)\.png\)", PAGE)
    assert pictures == ["shapes", *lessons.LESSONS]
