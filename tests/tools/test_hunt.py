"""The bug hunt: every hunt can be played, nothing gives the answer away, no edit is lost."""

import random
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import prepare_shakespeare
from configurator import UserError
from tools import hunt
from tools.lessons import MISTAKES

NUMBERS = range(1, len(hunt.HUNTS) + 1)
DIFFS = sorted(hunt.MISTAKES.glob("*.diff"))


def name(number: int) -> str:
    return hunt.HUNTS[number - 1]["mistake"]


def diff_of(number: int) -> str:
    return (hunt.MISTAKES / f"{name(number)}.diff").read_text(encoding="utf-8")


def play(number: int = 0, **action) -> None:
    hunt.HuntConfig(number=number, **action).play()


def code(folder: Path) -> dict[str, bytes]:
    """Return the content of every file of the code in `folder`, by its name."""
    files = (*folder.glob("*.py"), *folder.glob("support/*.py"), *folder.glob("config/*.py"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_file_of_hunts_is_complete():
    fields = {"mistake", "title", "symptom", "command", "hints", "tests", "lesson"}
    for each in hunt.HUNTS:
        assert each.keys() - {"preflight"} == fields and all(each.values())
        assert len(each["hints"]) == 3 and len(each["title"]) <= 90
        for test in each["tests"]:
            file, _, function = test.partition("::")
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert f"\ndef {function}(" in text, function
        for path in re.findall(r"\{copy\}/(\w+\.py)|(config/\w+\.py)", each["command"]):
            assert (ROOT / "".join(path)).is_file()
    names = set(map(name, NUMBERS))
    assert len(names) == len(NUMBERS) >= 12
    assert {path.stem for path in DIFFS} == names | {m.name for m in MISTAKES if not m.options}
    # A name that says what is wrong would be seen by everybody who lists the folder.
    assert all(re.fullmatch(r"(hunt|mistake)_\d+[ab]?", path.stem) for path in DIFFS)


@pytest.mark.parametrize("diff", DIFFS, ids=lambda path: path.stem)
def test_a_diff_makes_the_change_that_git_makes_and_git_can_undo_it(diff, place):
    for copy in ("ours", "git"):
        hunt.copy_code(ROOT, place / copy)
        assert code(place / copy) == code(ROOT)
    hunt.apply_diff(diff, place / "ours")
    subprocess.run(["git", "apply", diff], cwd=place / "git", check=True)
    ours = code(place / "ours")
    assert ours == code(place / "git")
    assert sum(ours[file] != content for file, content in code(ROOT).items()) == 1
    subprocess.run(["git", "apply", "-R", diff], cwd=place / "git", check=True)
    assert code(place / "git") == code(ROOT)


def test_a_diff_that_does_not_apply_is_refused(place):
    (place / "model.py").write_text("mask  = torch.full", encoding="utf-8")
    with pytest.raises(UserError, match=r"mistake_1\.diff: does not apply to model.py"):
        hunt.apply_diff(hunt.MISTAKES / "mistake_1.diff", place)


@pytest.mark.slow
@pytest.mark.parametrize("number", [*NUMBERS, 0], ids=lambda n: name(n) if n else "solved")
def test_judges_refuse_each_broken_copy_and_accept_the_solved_one(number, place):
    # data of 53 characters without any order, so that no check depends on a text
    text = "".join(random.Random(0).choices(string.ascii_letters + " :\n", k=20_000))
    Path("play.txt").write_text(text, encoding="utf-8")
    prepare_shakespeare.main(prepare_shakespeare.PrepareConfig(input="play.txt"))
    hunt.copy_code(ROOT, place / "copy")
    if not number:  # the solved copies of all hunts are the same
        tests = dict.fromkeys(test for one in hunt.HUNTS for test in one["tests"])
        assert hunt.judge({"tests": tests, "preflight": True}, place / "copy") == []
        return
    hunt.apply_diff(hunt.MISTAKES / f"{name(number)}.diff", place / "copy")
    failed = "\n".join(hunt.judge(hunt.HUNTS[number - 1], place / "copy"))
    assert all(f"FAILED tests/{test}" in failed for test in hunt.HUNTS[number - 1]["tests"])
    assert ("\nFAIL " in failed) == hunt.HUNTS[number - 1].get("preflight", False)


def test_a_check_judges_the_copy_and_remembers_a_solved_hunt(place, capsys):
    number = 4
    play(number)
    with pytest.raises(UserError, match=f"tools.hunt {number} --hint"):
        play(number, check=True)
    assert "FAILED tests/support/test_data.py::test_random_offsets" in capsys.readouterr().out
    for file, content in code(ROOT).items():
        Path(f"hunt/{number}", file).write_bytes(content)
    # The judged code says where it is, and edited tests in the copy have no effect.
    with open(f"hunt/{number}/support/data.py", "a", encoding="utf-8") as file:
        file.write(f"\nPath({str(place / 'judged')!r}).write_text(__file__)\n")
    Path(f"hunt/{number}/tests").mkdir()
    Path(f"hunt/{number}/tests/conftest.py").write_text("raise SystemExit")
    play(number, check=True)
    judged = Path((place / "judged").read_text())
    assert judged.name == "data.py" and ROOT not in judged.parents
    play()
    assert f"{number:3}  solved  {hunt.HUNTS[number - 1]['title']}" in capsys.readouterr().out


def test_nothing_tells_the_answer_before_it_is_asked_for(place, capsys):
    play()
    for number in NUMBERS:
        play(number)
        for _ in range(4):
            play(number, hint=True)
    printed = capsys.readouterr().out
    for number in NUMBERS:
        changes = re.findall(r"^[+-] +(.{12,})$", diff_of(number), re.MULTILINE)
        assert changes and not [line for line in changes if line in printed]
        copy, scripts = Path(f"hunt/{number}"), {path.name for path in ROOT.glob("*.py")}
        assert {path.name for path in copy.iterdir()} == scripts | {"support", "config"}


def test_edits_are_kept_until_a_new_copy_is_made_and_a_solution_changes_nothing(place, capsys):
    play(3)
    broken = code(Path("hunt/3"))
    Path("hunt/3/model.py").write_text("edited")
    play(3)
    assert Path("hunt/3/model.py").read_text() == "edited"
    assert "For a new copy: python -m tools.hunt 3 --again" in capsys.readouterr().out
    play(3, again=True)
    assert code(Path("hunt/3")) == broken
    play(3, solve=True)
    assert diff_of(3) in (printed := capsys.readouterr().out)
    assert hunt.HUNTS[2]["lesson"] in printed
    assert code(Path("hunt/3")) == broken


def test_hints_come_one_after_the_other_and_end(place, capsys):
    hints = hunt.HUNTS[1]["hints"]
    for i in range(3):
        play(2, hint=True)
        assert capsys.readouterr().out == f"hint {i + 1} of 3: {hints[i]}\n"
    for _ in range(2):
        play(2, hint=True)
        printed = capsys.readouterr().out
        assert all(text in printed for text in ("no further hint", *hints))
    play(1, hint=True)
    assert capsys.readouterr().out.startswith("hint 1 of 3: ")


@pytest.mark.parametrize("program", ["train", "tools.preflight"])
def test_programs_take_the_modules_of_the_copy(place, program):
    hunt.copy_code(ROOT, place / "copy")
    where = place / "copy" / "configurator.py"
    where.write_text("import sys\nsys.exit('a warning\\n' + __file__)")
    done = hunt.run_with(place / "copy", program, cwd=ROOT)
    assert done.returncode == 1 and Path(done.stderr.splitlines()[-1]) == where


def test_code_that_does_not_run_says_where(place, capsys):
    play(4)
    Path("hunt/4/support/data.py").write_text("import json\ndef f(:\n", encoding="utf-8")
    with pytest.raises(UserError, match="not solved yet"):
        play(4, check=True)
    printed = capsys.readouterr().out
    assert re.search(r"support.data\.py\", line 2\n.*\n.*\n.*SyntaxError: invalid syntax", printed)


def test_what_makes_no_sense_or_is_missing_ends_in_one_line(place, monkeypatch):
    def run(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "tools.hunt", *arguments]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        return done.returncode, done.stderr or done.stdout

    code, printed = run("3")
    assert code == 0 and printed.startswith("Hunt 3: ") and Path("hunt/3/model.py").exists()
    for arguments, expected in {
        "99": (2, "number=99 must be at least 0 and at most"),
        "0 --hint": (2, "error: which one?"),
        "4 --check": (1, "no such folder; start with: python -m tools.hunt 4"),
    }.items():
        code, printed = run(*arguments.split())
        assert code == expected[0] and expected[1] in printed and printed.count("\n") == 1
    monkeypatch.setattr(hunt, "find_spec", lambda package: None)
    with pytest.raises(UserError, match="run: pip install -r tests/requirements"):
        play(3, check=True)
