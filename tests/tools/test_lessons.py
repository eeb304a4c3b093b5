"""Each mistake is in effect and is caught by what docs/lessons.md says, and the page is true."""

import doctest
import importlib.util
import inspect
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.overrides import TorchFunctionMode

import prepare_shakespeare
import train
from configurator import UserError, read_options
from model import GPT, GPTConfig, attention
from support.data import Tokens, gather
from tools import hunt, lessons

PAGE = (ROOT / "docs" / "lessons.md").read_text(encoding="utf-8")
ROWS = {line.split("|")[1].strip(): line for line in PAGE.splitlines() if line.count("|") == 6}
BY_NAME = {mistake.name: mistake for mistake in (lessons.CORRECT, *lessons.MISTAKES)}
DIFFS = {p.stem: p.read_text("utf-8") for p in hunt.MISTAKES.glob("*.diff") if p.stem in BY_NAME}


@pytest.fixture
def import_with(tmp_path, monkeypatch):
    """A function: import a module, and all that it imports, from a copy with a mistake."""
    copy, before = tmp_path / "copy", dict(sys.modules)
    hunt.copy_code(ROOT, copy)
    monkeypatch.syspath_prepend(copy)

    def forget() -> None:
        ours = {"train", "model", "configurator", "support", "tools"}
        for module in [m for m in sys.modules if m.split(".")[0] in ours]:
            del sys.modules[module]

    def import_module(mistake: str, module: str):
        if mistake in DIFFS:
            hunt.apply_diff(hunt.MISTAKES / f"{mistake}.diff", copy)
        forget()
        importlib.invalidate_caches()
        return importlib.import_module(module)

    yield import_module
    forget()
    sys.modules.update(before)


@pytest.fixture
def long_data(dataset):
    """data/shakespeare_char, from a text that is long and never repeats."""
    lines = [f"{i} times {j} is {i * j}.\n" for i in range(400) for j in range(20)]
    Path("long.txt").write_text("ROMEO:\n" + "".join(lines), encoding="utf-8")
    prepare_shakespeare.main(prepare_shakespeare.PrepareConfig(input="long.txt"))


@pytest.mark.parametrize("name", BY_NAME)
def test_the_checks_that_fail_are_those_that_the_page_names(
    name, tiny_run, long_data, import_with, capsys
):
    module, row = import_with(name, "tools.preflight"), ROWS[name]
    changed = tiny_run.options | {"dataset": "shakespeare_char", "min_lr": 0.0}
    options = [f"--{key}={value}" for key, value in changed.items()]
    options += BY_NAME[name].options.split()
    config = sys.modules["configurator"].read_options(module.PreflightConfig, options)
    if "RuntimeError" in row:
        with pytest.raises(RuntimeError, match="Long"):
            module.main(config)
        return
    named = set(re.findall(r"FAIL ([^;|]+?)(?:;| \|)", row))
    with pytest.raises(ValueError, match=r"preflight: .* failed") if named else nullcontext():
        module.main(config)
    printed = capsys.readouterr().out
    failed = set(re.findall(r"^FAIL ([^:]+):", printed, re.MULTILINE))
    assert failed <= named and bool(failed) == bool(named)  # this model is smaller than the page's
    assert "warning: batches take" in printed or name != "mistake_8"
    checks = set(re.findall(r"^(?:FAIL|ok  ) ([^:]+):", printed, re.MULTILINE))
    assert checks >= set(re.findall(r"^(?:FAIL|ok  ) ([^:]+):", PAGE, re.MULTILINE))


@pytest.mark.parametrize("name", sorted(DIFFS.keys() - {"mistake_8"}))
def test_the_test_that_the_page_names_fails_under_the_mistake(name, dataset, import_with):
    after = PAGE.partition(DIFFS[name])[2]
    file, function = re.search(r"`(tests/[\w/]+\.py)::(\w+)`", after).groups()
    known = {"dataset": dataset, "tie_weights": True, "bf16": False}

    def run_test() -> None:
        spec = importlib.util.spec_from_file_location("named_test", ROOT / file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        test = getattr(module, function)
        test(**{key: known[key] for key in inspect.signature(test).parameters})

    run_test()
    import_with(name, "train")
    with pytest.raises((AssertionError, RuntimeError)):
        run_test()


def test_the_slow_loader_gives_the_same_batches(dataset, import_with):
    slow, starts = import_with("mistake_8", "support.data"), np.arange(0, 100, 7)
    batch = slow.gather(slow.Tokens(dataset / "train.bin"), starts, 16)
    np.testing.assert_array_equal(batch, gather(Tokens(dataset / "train.bin"), starts, 16))


def test_the_softmax_by_hand_is_right_until_a_score_is_too_large(import_with):
    q, k, v = torch.randn(3, 1, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    wrong = import_with("mistake_6b", "model").attention
    torch.testing.assert_close(wrong(q, k, v), attention(q, k, v), rtol=1e-2, atol=1e-2)
    assert wrong(30 * q, k, v).isnan().any() and attention(30 * q, k, v).isfinite().all()


@pytest.mark.parametrize(("name", "factor"), [("mistake_5a", 10), ("mistake_5b", 0.1)])
def test_rates_are_ten_times_too_high_and_too_low(name, factor):
    phase1 = str(ROOT / "config" / "phase1_char.py")
    correct = read_options(train.TrainConfig, [phase1])
    changed = read_options(train.TrainConfig, [phase1, *BY_NAME[name].options.split()])
    for option in ("learning_rate", "muon_lr"):
        assert getattr(changed, option) == pytest.approx(factor * getattr(correct, option))


@pytest.mark.slow
def test_a_lesson_leaves_runs_a_figure_and_a_table(long_data, capsys):
    lessons.main(lessons.LessonsConfig(only=7, max_iters=15, pictures="pictures"))
    correct, int32, bytes_ = capsys.readouterr().out.splitlines()[-3:]
    assert correct.startswith("| correct ") and "FAIL" not in correct
    assert "RuntimeError: expected target dtype to be Long" in int32
    assert bytes_.startswith("| mistake_7b ") and "FAIL files" in bytes_
    assert Path("pictures/lessons_7.png").read_bytes().startswith(b"\x89PNG")
    assert Path("out/lessons/mistake_7b/ckpt.pt").exists()
    with pytest.raises(UserError, match="only=9 must be at least 0 and at most 8"):
        lessons.main(lessons.LessonsConfig(only=9))


@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_run_that_ends_in_any_error_is_drawn_as_far_as_it_came(tmp_path, n):
    records = [{"step": 0, "seconds": 0, "train_loss": 4.0, "val_loss": 4.0}]
    records += [{"step": step, "seconds": step, "loss": 3.0} for step in (7, 14)]
    correct = lessons.Run(lessons.CORRECT, "", "", records)
    mine = lessons.Run(lessons.Mistake(9, "mistake_9"), "", "IndexError: a bug", records[:n])
    lessons.draw_lesson(9, [correct, mine], lessons.LessonsConfig(pictures=str(tmp_path)))
    assert (tmp_path / "lessons_9.png").exists() == (n > 0)


def test_shapes_on_the_page_are_those_of_a_forward_pass():
    sizes = {"B": 6, "T": 100, "C": 128, "nh": 4, "hs": 32, "V": 65, "3C": 384, "4C": 512}
    shapes, start = [(6, 100)], 0

    class Record(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, tuple) else [output]:
                shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else ()
                # attention may compute the heads of all sequences as one batch
                shapes.append((6, 4, *shape[1:]) if shape[:1] == (6 * 4,) else shape)
            return output

    model = GPT(GPTConfig(65, block_size=100, n_layer=1, n_head=4, n_embd=128))
    with Record():
        model(torch.zeros(6, 100, dtype=torch.int64))
    table = PAGE[PAGE.index("| in `model.py` | shape |") :].split("\n\n")[0].splitlines()[2:]
    for code, shape, example in (row.strip("| ").split(" | ") for row in table):
        wanted = tuple(sizes[letter.strip("*")] for letter in shape.split(", "))
        assert example == ", ".join(map(str, wanted)) and wanted in shapes[start:], code
        start = shapes.index(wanted, start) + 1


def test_the_page_shows_every_diff_and_option_and_picture():
    assert list(ROWS)[2:] == list(BY_NAME)
    for mistake in lessons.MISTAKES:
        assert (mistake.options or f"```diff\n{DIFFS[mistake.name]}```") in PAGE, mistake.name
    pictures = re.findall(r"\]\(pictures/lessons_(\w+)\.png\)", PAGE)
    assert pictures == list(dict.fromkeys(str(m.lesson) for m in lessons.MISTAKES))


def test_what_the_page_names_exists():
    for file, function in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE):
        assert f"\ndef {function}(" in (ROOT / file).read_text(encoding="utf-8"), function
    for path in re.findall(r"`((?:\w+/)*\w+\.py)`", PAGE):
        assert (ROOT / path).is_file(), path


class NearNumbers(doctest.OutputChecker):
    """Numbers with a point may differ a little: processors add up in different orders."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        number = r"-?\d+\.\d*"
        wanted, found = ([float(n) for n in re.findall(number, text)] for text in (want, got))
        same_words = re.sub(number, "#", want).split() == re.sub(number, "#", got).split()
        return same_words and wanted == pytest.approx(found, abs=0.05)


def test_the_examples_of_the_page_print_what_it_shows():
    example = doctest.DocTestParser().get_doctest(PAGE, {}, "lessons.md", None, 0)
    assert len(example.examples) > 40
    for part in example.examples:
        part.want = part.want.replace("```\n", "")  # the end of a code block is no output
    try:
        assert doctest.DocTestRunner(NearNumbers()).run(example).failed == 0
    finally:
        torch.set_printoptions(profile="default")
