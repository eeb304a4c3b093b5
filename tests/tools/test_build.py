"""The workshop: every piece can be played, and what is wrong is named."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, logged, options

from configurator import UserError
from tools import build, hunt

pytestmark = pytest.mark.usefixtures("place")
PIECES = build.TEXTS["piece"]
NUMBERS = range(1, len(PIECES) + 1)
NAMES = [piece["function"] for piece in PIECES]
MLP, CACHE, ATTENTION = (NAMES.index(n) + 1 for n in ("MLP.forward", "KVCache.append", "attention"))
MLP_CODE = "        return self.dropout(self.c_proj(gelu(self.c_fc(x), self.gelu)))  # mine\n"


def play(number: int = 0, **action) -> None:
    build.BuildConfig(number=number, **action).play()


def write(number: int, code: str) -> None:
    """Write `code` where piece `number` is blank."""
    path = build.COPY / PIECES[number - 1]["file"]
    before, after = path.read_text("utf-8").split(build.find(PIECES[number - 1], build.COPY)[1])
    path.write_text(before + code + after, encoding="utf-8")


def mistakes(number: int) -> str:
    return "\n".join(build.BuildConfig(number=number).find_mistakes())


@pytest.fixture
def no_tests(monkeypatch):
    """Only the numbers decide: the project's tests always pass."""
    monkeypatch.setattr(hunt, "judge", lambda piece, copy: [])


def test_the_file_of_pieces_is_complete():
    fields = set("title file function returns text example hints tests lesson".split())
    assert 10 <= len(PIECES) == len(set(NAMES))
    for each in PIECES:
        assert each.keys() == fields and all(each.values())
        assert len(each["hints"]) == 3 and len(each["title"]) <= 90
        lines = [line for text in ("text", "lesson") for line in each[text].splitlines()]
        assert max(map(len, lines)) <= 100
        for test in each["tests"]:
            file, function = test.split("[")[0].split("::")
            assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text("utf-8"), function


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS, ids=NAMES)
def test_a_blank_piece_is_refused_and_the_original_passes(number, capsys, monkeypatch):
    play(number)
    head, code = build.find(PIECES[number - 1], build.ORIGINAL)
    blank = build.find(PIECES[number - 1], build.COPY)
    assert blank[0] == head and blank[1].strip().startswith("raise NotImplementedError  # ")
    with pytest.raises(UserError, match=f"tools.build {number} --hint"):
        play(number, check=True)
    assert "NotImplementedError" in capsys.readouterr().out
    # The tests see it, too.
    failed = "\n".join(hunt.judge(PIECES[number - 1], build.COPY))
    assert all(f"FAILED tests/{test}" in failed for test in PIECES[number - 1]["tests"])
    write(number, code)
    monkeypatch.setattr(hunt, "judge", lambda *_: [])  # the next test runs them all at once
    play(number, check=True)
    words = f"Solved! What there is to learn: python -m tools.build {number} --solve"
    assert words in capsys.readouterr().out


@pytest.mark.slow
def test_the_original_passes_the_tests_of_all_pieces(place):
    build.make_copy(place / "copy")
    tests = [test for piece in PIECES for test in piece["tests"]]
    assert hunt.judge({"tests": tests}, place / "copy") == []


def test_the_examples_in_the_texts_are_true(place):
    build.make_copy(place / "copy")
    texts = "\n\n".join(piece["text"] for piece in PIECES)
    (place / "texts.txt").write_text(texts, encoding="utf-8")
    done = hunt.run_with(place / "copy", "doctest", "texts.txt")
    assert texts.count(">>>") > 40 and done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (MLP, "        return self.c_fc(x)\n", r"shapes \(2, 3, 16\), \(2, 3, 4\) mismatch"),
        (MLP, "        return x.double()\n", r"dtypes float64, float32 mismatch"),
        (MLP, "        return self.c_proj(gelu(self.c_fc(x)))\n", r"gelu='exact'\n(.*\n)* ACTUAL"),
        (ATTENTION, "    return v[:, :, -q.size(2) :]\n", r"\[0, 0, 1, 0\]: \S+ \(ACTUAL\)"),
        (CACHE, "        return k, v\n", r"length after 3"),
        (CACHE, "        return k.T[0\n", r"model.py\", line \d+\n.*\n.*\n *SyntaxError"),
    ],
)
def test_a_wrong_shape_and_a_wrong_number_are_named(number, code, words, no_tests):
    play(number)
    write(number, code)
    printed = mistakes(number)
    assert re.search(words, printed) and PIECES[number - 1]["example"] in printed


def test_solved_pieces_and_edits_stay_and_again_makes_one_blank(no_tests, capsys):
    play(MLP)
    write(MLP, MLP_CODE)
    play(MLP, check=True)
    play(ATTENTION)
    play(MLP)
    code = (build.COPY / "model.py").read_text("utf-8")
    assert MLP_CODE in code and code.count("NotImplementedError") == 1
    capsys.readouterr()
    play()
    assert f"{MLP:3}  solved  {PIECES[MLP - 1]['title']}" in capsys.readouterr().out
    play(MLP, again=True)
    code = (build.COPY / "model.py").read_text("utf-8")
    assert MLP_CODE not in code and code.count("NotImplementedError") == 2
    play()
    assert "0 of 12 solved. Start one: python -m tools.build 1" in capsys.readouterr().out


def test_only_a_solution_shows_the_original(capsys):
    play(CACHE)
    for _ in range(4):
        play(CACHE, hint=True)
    printed = capsys.readouterr().out
    head, code = build.find(PIECES[CACHE - 1], build.ORIGINAL)
    assert code not in printed and "hint 3 of 3" in printed and "no further hint" in printed
    before = (build.COPY / "model.py").read_bytes()
    play(CACHE, solve=True)
    assert f"{head}{code}\n{PIECES[CACHE - 1]['lesson']}" in capsys.readouterr().out
    assert (build.COPY / "model.py").read_bytes() == before


def test_the_copy_computes_what_the_project_computes_with_the_added_functions(tiny_run):
    expected = logged(tiny_run(dtype="float32"))
    build.make_copy(build.COPY)
    arguments = options(tiny_run, dtype="float32", out_dir="out/copy")
    command = [sys.executable, build.COPY / "train.py", *arguments]
    done = subprocess.run(command, env={}, capture_output=True)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(logged(Path("out/copy")), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    codes = [(build.COPY / file).read_text("utf-8") for file in {p["file"] for p in PIECES}]
    for library in ("F.cross_entropy(", "torch.optim.AdamW(adam", "tiktoken.Encoding("):
        assert not any(library in code for code in codes)


def test_what_makes_no_sense_or_is_missing_ends_in_one_line(no_tests):
    with pytest.raises(UserError, match=r"hunt.build: no such folder; start with: .*tools.build 3"):
        play(3, check=True)
    play(3)
    with pytest.raises(UserError, match=r"piece 4 is not begun; start with: .*tools.build 4"):
        play(4, check=True)
    path = build.COPY / "model.py"
    path.write_text(path.read_text("utf-8").replace("class MLP", "class Other"), encoding="utf-8")
    with pytest.raises(UserError, match=r"model.py: MLP.forward is missing"):
        play(MLP)
    path.write_text("def f(:\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"model.py: invalid syntax \(.*model.py, line 1\)"):
        play(MLP)
