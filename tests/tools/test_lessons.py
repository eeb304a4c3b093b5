"""Each mistake is in effect and is caught by what docs/lessons.md says, and the page is true."""

import doctest
import importlib
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
from configurator import UserError, read_options
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXT
from torch.overrides import TorchFunctionMode

import prepare_shakespeare
import train
from model import GPT, GPTConfig
from support import preflight
from tools import lessons

PAGE = (ROOT / "docs" / "lessons.md").read_text(encoding="utf-8")
ROWS = {line.split("|")[1].strip(): line for line in PAGE.splitlines() if line.count("|") == 6}
WITH_DIFF = [m for m in lessons.MISTAKES if not m.options]
MODEL, DATA = "test_model.py::test_", "support/test_data.py::test_"
TESTS = {  # named by the page; each one fails under the mistake
    "no_mask": MODEL + "logits_do_not_change_when_a_later_token_changes",
    "no_positions": MODEL + "without_positions_order_is_invisible_and_with_them_it_is_not",
    "same_targets": DATA + "batch_has_the_text_and_its_next_characters",
    "swapped_heads": MODEL + "logits_and_gradients_equal_transformers",
    "masked_row": MODEL + "attention_equals_scaled_dot_product_attention",
    "softmax_by_hand": MODEL + "attention_equals_scaled_dot_product_attention",
    "int32_targets": DATA + "batch_has_the_text_and_its_next_characters",
    "read_as_bytes": DATA + "batch_has_the_text_and_its_next_characters",
}


def name(mistake: lessons.Mistake) -> str:
    return mistake.name


def diff(mistake: lessons.Mistake) -> Path:
    return ROOT / "tools" / "mistakes" / f"{mistake.name}.diff"


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the code that train.py needs."""
    folder = tmp_path / "copy"
    shutil.copytree(ROOT / "support", folder / "support")
    for script in ("train.py", "model.py", "configurator.py"):
        shutil.copy(ROOT / script, folder)
    return folder


@pytest.fixture
def import_copy(copy, monkeypatch):
    """A function: import a module from the copy with a mistake, and all that it imports."""

    def is_ours(module: str) -> bool:
        return module.split(".")[0] in ("train", "model", "configurator", "support")

    def import_with(mistake: lessons.Mistake, module: str):
        if not mistake.options and mistake != lessons.CORRECT:
            lessons.apply_diff(diff(mistake), copy)
        for ours in filter(is_ours, list(sys.modules)):
            del sys.modules[ours]
        importlib.invalidate_caches()
        return importlib.import_module(module)

    before = {module: sys.modules[module] for module in filter(is_ours, list(sys.modules))}
    monkeypatch.syspath_prepend(copy)
    yield import_with
    for ours in filter(is_ours, list(sys.modules)):
        del sys.modules[ours]
    sys.modules.update(before)


def make_trainer(module, options: dict, mistake: lessons.Mistake):
    """A Trainer of a module `train`, tiny, with the options of the mistake."""
    arguments = [f"--{key}={value}" for key, value in {**options, "min_lr": 0.0}.items()]
    configurator = sys.modules["configurator"]
    config = configurator.read_options(module.TrainConfig, arguments + mistake.options.split())
    return module.Trainer(config, module.Processes("cpu"))


# Mistakes


@pytest.mark.parametrize("mistake", WITH_DIFF, ids=name)
def test_a_diff_makes_the_change_that_git_makes(mistake, copy, tmp_path):
    git = tmp_path / "git"
    shutil.copytree(copy, git)
    lessons.apply_diff(diff(mistake), copy)
    subprocess.run(["git", "apply", str(diff(mistake))], cwd=git, check=True)
    changed = []
    for path in copy.rglob("*.py"):
        place = path.relative_to(copy)
        assert path.read_bytes() == (git / place).read_bytes()
        changed += [place] * (path.read_bytes() != (ROOT / place).read_bytes())
    assert len(changed) == 1


def test_a_diff_that_does_not_apply_is_refused(copy):
    path = copy / "model.py"
    path.write_text(path.read_text().replace("mask = torch.full", "mask  = torch.full"))
    with pytest.raises(UserError, match=r"no_mask\.diff: does not apply to model.py"):
        lessons.apply_diff(diff(lessons.MISTAKES[0]), copy)


@pytest.mark.parametrize("mistake", lessons.MISTAKES, ids=name)
def test_the_checks_that_fail_are_those_that_the_page_names(mistake, tiny_run, import_copy):
    trainer = make_trainer(import_copy(mistake, "train"), tiny_run.options, mistake)
    checks = sys.modules["support.preflight"].CHECKS
    row = ROWS[mistake.name]
    if "RuntimeError" in row:
        with pytest.raises(RuntimeError, match="expected target dtype to be Long"):
            checks["initial loss"](trainer)
        return
    trainer.model.eval()
    named = {check for check in checks if f"FAIL {check}" in row}
    failed = {check for check, function in checks.items() if not function(trainer)[0]}
    assert failed <= named and bool(failed) == bool(named)  # this model is smaller than the page's


def test_a_correct_run_fails_no_check(tiny_run, import_copy):
    trainer = make_trainer(import_copy(lessons.CORRECT, "train"), tiny_run.options, lessons.CORRECT)
    trainer.model.eval()
    checks = sys.modules["support.preflight"].CHECKS
    assert {check for check, function in checks.items() if not function(trainer)[0]} == set()


@pytest.mark.parametrize("mistake", [m for m in WITH_DIFF if m.name in TESTS], ids=name)
def test_the_test_that_the_page_names_fails_under_the_mistake(mistake, dataset, import_copy):
    assert f"`tests/{TESTS[mistake.name]}`" in PAGE
    file, _, function = TESTS[mistake.name].partition("::")
    known = {"dataset": dataset, "tie_weights": True, "bf16": False}

    def run_test() -> None:
        spec = importlib.util.spec_from_file_location("named_test", ROOT / "tests" / file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        test = getattr(module, function)
        test(**{key: known[key] for key in inspect.signature(test).parameters})

    run_test()
    import_copy(mistake, "train")
    with pytest.raises((AssertionError, RuntimeError)):
        run_test()


def test_the_slow_loader_gives_the_same_batches_and_preflight_warns(tiny_run, import_copy):
    (mistake,) = (m for m in lessons.MISTAKES if m.lesson == "loader")
    Path("long.txt").write_text(TEXT * 20, encoding="utf-8")
    prepare_shakespeare.main(prepare_shakespeare.PrepareConfig(input="long.txt", dataset="tiny"))
    correct = make_trainer(train, tiny_run.options, mistake)
    slow = make_trainer(import_copy(mistake, "train"), tiny_run.options, mistake)
    batches = zip(correct.micro_batch(3, 0), slow.micro_batch(3, 0), strict=True)
    assert all(torch.equal(*pair) for pair in batches)
    for trainer, warned in ((correct, False), (slow, True)):
        found = preflight.warnings(trainer, "compiled", 0.05)
        assert any("batches take" in warning for warning in found) == warned


def test_the_softmax_by_hand_is_right_until_a_score_is_too_large(import_copy):
    q, k, v = torch.randn(3, 1, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    (mistake,) = (m for m in lessons.MISTAKES if m.name == "softmax_by_hand")
    correct = sys.modules["model"].attention
    wrong = import_copy(mistake, "model").attention
    torch.testing.assert_close(wrong(q, k, v), correct(q, k, v), rtol=1e-2, atol=1e-2)
    assert wrong(30 * q, k, v).isnan().any() and correct(30 * q, k, v).isfinite().all()


def test_rates_are_ten_times_too_high_and_too_low():
    phase1 = str(ROOT / "config" / "phase1_char.py")
    correct = read_options(train.TrainConfig, [phase1])
    for mistake, factor in ((m, 10 if "high" in m.name else 0.1) for m in lessons.MISTAKES):
        if mistake.options:
            changed = read_options(train.TrainConfig, [phase1, *mistake.options.split()])
            for option in ("learning_rate", "muon_lr"):
                expected = factor * getattr(correct, option)
                assert getattr(changed, option) == pytest.approx(expected)


# The program


def test_the_copy_runs_and_not_the_repository(tmp_path):
    (tmp_path / "model.py").write_text("")
    (tmp_path / "train.py").write_text(
        "import sys, model\nprint(model.__file__)\nsys.exit('a warning\\nthe reason')"
    )
    output, error = lessons.run_train(str(tmp_path), [])
    assert Path(output.strip()) == tmp_path / "model.py" and error == "the reason"


def test_a_lesson_that_does_not_exist_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="only=maks is not a lesson; choose one of mask, positions"):
        lessons.main(lessons.LessonsConfig(only="maks"))


@pytest.mark.slow
def test_a_lesson_leaves_runs_a_figure_and_a_table(dataset, capsys):
    Path("play.txt").write_text("ROMEO:\n" + TEXT, encoding="utf-8")
    options = prepare_shakespeare.PrepareConfig(input="play.txt", dataset="shakespeare_char")
    prepare_shakespeare.main(options)
    lessons.main(lessons.LessonsConfig(only="dtype", max_iters=15, pictures="pictures"))
    printed = capsys.readouterr().out
    correct, int32, bytes_ = printed.splitlines()[-3:]
    assert correct.startswith("| correct ") and correct.endswith("|  |")
    assert "RuntimeError: expected target dtype to be Long" in int32
    assert bytes_.startswith("| read_as_bytes ") and "FAIL data" in bytes_
    for picture in ("dtype", "shapes"):
        assert Path(f"pictures/lessons_{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert Path("out/lessons/read_as_bytes/ckpt.pt").exists()


def test_shapes_in_the_figure_are_those_of_a_forward_pass():
    shapes, sizes = [], lessons.SIZES
    assert len(set(sizes.values())) == len(sizes)

    class Record(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, tuple) else [output]:
                shapes.append(tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else None)
            return output

    config = GPTConfig(vocab_size=sizes["V"], block_size=100, n_layer=1, n_head=4, n_embd=128)
    idx = torch.zeros(sizes["B"], sizes["T"], dtype=torch.int64)
    shapes.append(tuple(idx.shape))
    with Record():
        GPT(config)(idx, idx)
    start = 0
    for code, shape in lessons.SHAPES.items():
        wanted = tuple(sizes[letter] for letter in shape.split(", ") if letter)
        assert wanted in shapes[start:], code
        start = shapes.index(wanted, start) + 1


# The page


def test_the_page_shows_every_diff_and_option_and_picture():
    assert list(ROWS)[2:] == ["correct", *(m.name for m in lessons.MISTAKES)]
    for mistake in lessons.MISTAKES:
        if mistake.options:
            assert mistake.options in PAGE, mistake.name
        else:
            assert f"```diff\n{diff(mistake).read_text(encoding='utf-8')}```" in PAGE, mistake.name
    pictures = re.findall(r"\]\(pictures/lessons_(\w+)\.png\)", PAGE)
    assert pictures == ["shapes", *dict.fromkeys(m.lesson for m in lessons.MISTAKES)]


def test_what_the_page_names_exists():
    for file, function in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE):
        assert f"\ndef {function}(" in (ROOT / file).read_text(encoding="utf-8"), function
    for path in re.findall(r"\]\((pictures/[^)]+)\)", PAGE):
        assert (ROOT / "docs" / path).is_file(), path
    for path in re.findall(r"`((?:\w+/)*\w+\.py)`", PAGE):
        assert (ROOT / path).is_file(), path
    for check in re.findall(r"^(?:FAIL|ok  ) ([^:]+):", PAGE, re.MULTILINE):
        assert check in preflight.CHECKS, check


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
    # The end of a code block is no output.
    for part in example.examples:
        part.want = part.want.replace("```\n", "")
    try:
        assert doctest.DocTestRunner(NearNumbers()).run(example).failed == 0
    finally:
        torch.set_printoptions(profile="default")
