"""The bug hunt: every hunt can be played, nothing gives the answer away, no edit is lost."""

import random
import re
import shutil
import string
import subprocess
import sys
from configurator import UserError, one_line
from pathlib import Path

import pytest
from conftest import ROOT

import prepare_shakespeare
from support.broken_copy import apply_diff
from tools import hunt
from tools.lessons import MISTAKES

NUMBERS = range(1, len(hunt.HUNTS) + 1)


def name(number: int) -> str:
    return hunt.HUNTS[number - 1]["mistake"]


def number_of(mistake: str) -> int:
    return next(n for n in NUMBERS if name(n) == mistake)


def diff(number: int) -> Path:
    return hunt.MISTAKES / f"{name(number)}.diff"


def play(number: int = 0, **action) -> None:
    hunt.main(hunt.HuntConfig(number=number, **action))


def code(folder: Path) -> dict[str, bytes]:
    """Return the content of every file of the code in `folder`, by its name."""
    files = (*folder.glob("*.py"), *folder.glob("support/*.py"), *folder.glob("config/*.py"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def correct(number: int) -> None:
    """Replace the code in the copy of a hunt by the correct code."""
    for file, content in code(ROOT).items():
        (Path("hunt") / str(number) / file).write_bytes(content)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The hunts


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
    assert len(set(map(name, NUMBERS))) == len(NUMBERS) >= 12


def test_every_diff_belongs_to_a_hunt_or_to_a_lesson():
    in_lessons = {m.name for m in MISTAKES if not m.options}
    assert {path.stem for path in hunt.MISTAKES.glob("*.diff")} == {
        *in_lessons,
        *map(name, NUMBERS),
    }


@pytest.mark.parametrize("number", NUMBERS, ids=name)
def test_a_diff_makes_the_change_that_git_makes_and_git_can_undo_it(number, place):
    hunt.copy_code(ROOT, place / "ours")
    hunt.copy_code(ROOT, place / "git")
    assert code(place / "git") == code(ROOT)
    apply_diff(diff(number), place / "ours")
    subprocess.run(["git", "apply", diff(number)], cwd=place / "git", check=True)
    ours = code(place / "ours")
    assert ours == code(place / "git")
    assert sum(ours[file] != content for file, content in code(ROOT).items()) == 1
    subprocess.run(["git", "apply", "-R", diff(number)], cwd=place / "git", check=True)
    assert code(place / "git") == code(ROOT)


@pytest.fixture
def random_data(place):
    """Data of 53 characters without any order, so that no check depends on a text."""
    text = "".join(random.Random(0).choices(string.ascii_letters + " :\n", k=20_000))
    Path("play.txt").write_text(text, encoding="utf-8")
    data = prepare_shakespeare.PrepareConfig(input="play.txt", dataset="shakespeare_char")
    prepare_shakespeare.main(data)


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS, ids=name)
def test_the_broken_copy_fails_all_that_judges_it(number, random_data, capsys):
    play(number)
    with pytest.raises(UserError, match="not solved yet"):
        play(number, check=True)
    printed = capsys.readouterr().out
    for test in hunt.HUNTS[number - 1]["tests"]:
        assert f"FAILED tests/{test}" in printed
    assert ("\nFAIL " in printed) == hunt.HUNTS[number - 1].get("preflight", False)


@pytest.mark.slow
def test_the_solved_copy_passes_the_judges_of_all_hunts(random_data, place, monkeypatch):
    """The solved copies of all hunts are the same, so one run judges all of them."""
    monkeypatch.setattr(hunt, "SECONDS", 600)
    tests = list(dict.fromkeys(test for one in hunt.HUNTS for test in one["tests"]))
    hunt.copy_code(ROOT, place / "solved")
    assert hunt.judge({"tests": tests, "preflight": True}, place / "solved") == []


# Playing


def test_a_check_judges_the_copy_and_remembers_a_solved_hunt(place, capsys):
    number = number_of("same_batch")
    play(number)
    with pytest.raises(UserError, match=f"tools.hunt {number} --hint"):
        play(number, check=True)
    assert "FAILED tests/support/test_data.py::test_random_offsets" in capsys.readouterr().out
    play()
    assert f"0 of {len(NUMBERS)} solved" in capsys.readouterr().out
    correct(number)
    # The judged code says where it is, and edited tests in the copy have no effect.
    with open(f"hunt/{number}/support/data.py", "a", encoding="utf-8") as file:
        file.write(f"\nPath({str(place / 'judged')!r}).write_text(__file__)\n")
    Path(f"hunt/{number}/tests").mkdir()
    Path(f"hunt/{number}/tests/conftest.py").write_text("raise SystemExit")
    play(number, check=True)
    judged = Path((place / "judged").read_text())
    assert judged.name == "data.py" and ROOT not in judged.parents
    play()
    printed = capsys.readouterr().out
    assert f"{number:3}  solved  {hunt.HUNTS[number - 1]['title']}" in printed
    assert f"1 of {len(NUMBERS)} solved" in printed


def test_nothing_tells_the_answer_before_it_is_asked_for(place, capsys):
    play()
    for number in NUMBERS:
        play(number)
        for _ in range(4):
            play(number, hint=True)
    printed = capsys.readouterr().out
    for number in NUMBERS:
        changes = re.findall(r"^[+-] +(.{12,})$", diff(number).read_text("utf-8"), re.MULTILINE)
        assert changes and not [line for line in changes if line in printed]
        assert name(number) not in printed and name(number).replace("_", " ") not in printed
        copy = Path(f"hunt/{number}")
        assert {path.name for path in copy.iterdir()} == {
            *(path.name for path in ROOT.glob("*.py")),
            "support",
            "config",
        }
        assert not any(name(number).encode() in content for content in code(copy).values())


def test_edits_are_kept_until_a_new_copy_is_asked_for(place, capsys):
    play(3)
    broken = code(Path("hunt/3"))
    Path("hunt/3/model.py").write_text("edited")
    Path("hunt/3.tmp").mkdir()  # left by a copy that was interrupted
    play(3)
    assert Path("hunt/3/model.py").read_text() == "edited"
    assert "is as you left it" in (printed := capsys.readouterr().out)
    assert "python -m tools.hunt 3 --again" in printed
    play(3, again=True)
    assert code(Path("hunt/3")) == broken and not Path("hunt/3.tmp").exists()


def test_hints_come_one_after_the_other_and_end(place, capsys):
    hints = hunt.HUNTS[1]["hints"]
    for i in range(3):
        play(2, hint=True)
        assert capsys.readouterr().out == f"hint {i + 1} of 3: {hints[i]}\n"
    for _ in range(2):
        play(2, hint=True)
        assert "no further hint" in (printed := capsys.readouterr().out)
        assert all(text in printed for text in hints)
    play(1, hint=True)
    assert capsys.readouterr().out.startswith("hint 1 of 3: ")


def test_the_solution_is_shown_and_the_copy_is_not_changed(place, capsys):
    play(3)
    before = code(Path("hunt/3"))
    play(3, solve=True)
    printed = capsys.readouterr().out
    assert diff(3).read_text(encoding="utf-8") in printed and hunt.HUNTS[2]["lesson"] in printed
    assert code(Path("hunt/3")) == before


# What can go wrong


def test_a_syntax_error_is_named_with_its_line(place):
    play(4)
    path = Path("hunt/4/support/data.py")
    path.write_text("import json\ndef f(:\n", encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(f"{path}, line 2: invalid syntax")):
        play(4, check=True)
    path.write_bytes(b"\0")
    with pytest.raises(UserError, match=r"null bytes; correct this first"):
        play(4, check=True)


def test_an_endless_loop_and_code_that_does_not_run_end_in_one_line(place, monkeypatch):
    (line,) = hunt.failures(["-c", "1 / 0"], cwd=place)
    assert line == "the copy does not run: ZeroDivisionError: division by zero"
    monkeypatch.setattr(hunt, "SECONDS", 0.5)
    with pytest.raises(UserError, match=r"stopped after 0\.5 s; is there an endless loop\?"):
        hunt.failures(["-c", "while True: pass"], cwd=place)


def test_what_a_check_needs_is_named(place, monkeypatch):
    with pytest.raises(UserError, match="no such folder; start with: python -m"):
        play(3, check=True)
    play(3)
    with pytest.raises(UserError, match="run: python prepare_shakespeare"):
        play(3, check=True)
    monkeypatch.setattr(hunt, "find_spec", lambda package: None)
    with pytest.raises(UserError, match="pytest is missing; run: pip install -r tests/req"):
        play(3, check=True)


def test_a_folder_that_can_not_be_written_is_named(place):
    Path("hunt").write_text("a file")
    with pytest.raises(UserError, match="can not be written") as error:
        play(3)
    assert "use a folder that you may write to" in one_line(error.value)


def test_a_damaged_progress_file_is_named(place):
    Path("hunt").mkdir()
    for content in ("nonsense", "[1]", '{"solved": 3}'):
        Path("hunt/progress.json").write_text(content)
        with pytest.raises(UserError, match=r"progress\.json: .* delete it"):
            play()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"number": 99}, "number=99 must be at least 0 and at most"),
        ({"number": 1, "hint": True, "solve": True}, "only one of"),
        ({"check": True}, "which hunt"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        hunt.HuntConfig(**options)


def test_the_program_takes_a_number(place):
    command = [sys.executable, "-m", "tools.hunt"]
    done = subprocess.run([*command, "3"], capture_output=True, text=True)
    assert done.stdout.startswith("Hunt 3: ") and Path("hunt/3/model.py").exists()
    done = subprocess.run([*command, "3", "--check"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    shutil.rmtree("hunt")
    done = subprocess.run([*command, "0", "--hint"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: which hunt?")
