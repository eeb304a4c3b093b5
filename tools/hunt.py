"""The bug hunt: find the mistake in a copy of the code, starting from what a user noticed.

    python -m tools.hunt              # all hunts, from easy to hard, and which are solved
    python -m tools.hunt 3            # copy the code to hunt/3/, put in a mistake, say what it does
    python -m tools.hunt 3 --hint     # the next of three hints
    python -m tools.hunt 3 --check    # judge the copy: tests and, in some hunts, the preflight
    python -m tools.hunt 3 --solve    # the mistake as a diff, and what to learn from it
    python -m tools.hunt 3 --again    # a new copy; your edits are lost

tools/mistakes/hunts.toml has the texts.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from configurator import UserError, check_range, configure, run
from support.files import atomic_write, read_text

ROOT = Path(__file__).parent.parent
MISTAKES = ROOT / "tools" / "mistakes"  # a .diff file for each
HUNTS = tomllib.loads(read_text(MISTAKES / "hunts.toml"))["hunt"]  # dicts; number 1 is the first
FOLDER = Path("hunt")  # of the copies, in the working directory


def copy_code(source: Path, target: Path) -> None:
    """Copy the scripts, support/ and config/ to the folder `target`: no tools, tests or history."""
    target.mkdir(parents=True)
    for path in source.glob("*.py"):
        shutil.copy(path, target)
    for name in ("support", "config"):
        shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))


def apply_diff(diff: Path, folder: Path) -> None:
    """Make the change of a unified diff to one file in `folder`. Raises UserError if it can not."""
    header, *hunks = re.split(r"^@@ .*\n", read_text(diff), flags=re.MULTILINE)
    path = folder / re.search(r"^\+\+\+ b/(\S+)", header, re.MULTILINE)[1]
    text = path.read_text(encoding="utf-8")
    for hunk in hunks:
        lines = hunk.splitlines()
        before = "\n".join(line[1:] for line in lines if line[:1] != "+")
        after = "\n".join(line[1:] for line in lines if line[:1] != "-")
        if text.count(before) != 1:
            raise UserError(f"{diff}: does not apply to {path.name}; make the diff again")
        text = text.replace(before, after)
    path.write_text(text, encoding="utf-8")


def run_with(code: Path, *args, **options) -> subprocess.CompletedProcess:
    """Run `python -m` or `python -c` with the code of the copy `code` and this project's tools."""
    # -P: otherwise Python would look in the working directory first.
    command = [sys.executable, "-P", *["-m"] * (args[0] != "-c"), *map(str, args)]
    # pytest cuts its lines at the width of the terminal, which it takes from COLUMNS.
    env = os.environ | {"PYTHONPATH": f"{code}{os.pathsep}{ROOT}", "COLUMNS": "200"}
    options |= {"env": env, "encoding": "utf-8", "errors": "replace"}
    return subprocess.run(command, capture_output=True, **options)


def judge(item: dict, copy: Path) -> list[str]:
    """Run what judges the code in `copy`. Returns the lines that say what failed."""
    tests = ["-q", "--color=no", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
    tests += [f"tests/{test}" for test in item["tests"]]
    data, failed = Path("data/shakespeare_char").absolute(), []
    checks = ["config/phase1_quick.py", "--device=cpu", f"--dataset={data}", "--out_dir=out"]
    commands = [["pytest", *tests], *[["tools.preflight", *checks]] * item.get("preflight", False)]
    with tempfile.TemporaryDirectory() as folder:
        # The tests are the project's own and not in the copy, where they could be edited.
        judged = Path(folder) / "copy"
        copy_code(copy, judged)
        shutil.copytree(ROOT / "tests", judged / "tests")
        shutil.copy(ROOT / "pyproject.toml", judged)
        for program, *arguments in commands:
            done = run_with(judged, program, *arguments, cwd=judged)
            lines = [s for s in done.stdout.splitlines() if s.startswith(("FAIL", "ERROR "))]
            if done.returncode and not lines:  # such as an error while a module is imported
                lines = [f"{program} does not run:", *done.stderr.splitlines()[-4:]]
            failed += lines
    return failed


@dataclass
class HuntConfig:
    """Find the mistake in a copy of the code. A number alone, as in `tools.hunt 3`, starts one."""

    number: int = 0  # which one; 0: list all of them
    hint: bool = False  # print the next of three hints
    check: bool = False  # run what judges the copy
    solve: bool = False  # print the solution and what to learn from it
    again: bool = False  # start once more; your edits are lost

    program, items, progress, copy, note = "tools.hunt", HUNTS, FOLDER / "progress.json", None, ""

    def __post_init__(self) -> None:
        check_range(self, 0, len(self.items), "number")
        if not self.number and (self.hint or self.check or self.solve or self.again):
            raise UserError(f"which one? Give its number, as in: python -m {self.program} 3 --hint")
        self.item = self.items[self.number - 1]
        self.command = f"python -m {self.program} {self.number}"
        self.copy = self.copy or FOLDER / str(self.number)

    def read_progress(self) -> dict:
        """Return the solved numbers, those begun (of pieces alone), and the hints read of each."""
        empty = {"solved": [], "begun": [], "hints": {}}
        return empty | (json.loads(read_text(self.progress)) if self.progress.exists() else {})

    def write_progress(self, **changed) -> None:
        """Write what `read_progress` returns, with some values changed."""
        with atomic_write(self.progress) as file:
            file.write(json.dumps(self.read_progress() | changed).encode())

    def play(self) -> None:
        """Do what the options say."""
        if not self.number:
            self.list_items()
        elif self.hint:
            self.print_hint()
        elif self.check:
            self.judge_copy()
        elif self.solve:
            self.print_solution()
        else:
            self.start()
            uses = {"check": "judge the copy", "hint": "get a hint", "solve": "give up"}
            for option, use in uses.items():
                print(f"    {self.command} --{option:5}    {use}")

    def list_items(self) -> None:
        solved = self.read_progress()["solved"]
        for number, item in enumerate(self.items, start=1):
            print(f"{number:3}  {'solved' if number in solved else '':7} {item['title']}")
        count = f"{len(solved)} of {len(self.items)} solved"
        print(f"\n{count}. Start one: python -m {self.program} 1{self.note}")

    def print_hint(self) -> None:
        """Print the next hint, or all of them when none is left."""
        hints, read = self.item["hints"], self.read_progress()["hints"]
        count = read.get(str(self.number), 0)
        if count == len(hints):
            return print("There is no further hint. These were all:", *hints, sep="\n    ")
        print(f"hint {count + 1} of {len(hints)}: {hints[count]}")
        self.write_progress(hints=read | {str(self.number): count + 1})

    def judge_copy(self) -> None:
        """Judge the copy and remember if it is solved. Raises UserError if it is not."""
        if not self.copy.exists():
            raise UserError(f"{self.copy}: no such folder; start with: {self.command}")
        if not all(map(find_spec, ("pytest", "hypothesis", "transformers"))):
            raise UserError("the judges need packages; run: pip install -r tests/requirements.txt")
        print(f"running the tests that judge {self.copy} (5 to 20 s) ...", flush=True)
        if failed := self.find_mistakes():
            print(*failed, sep="\n")
            raise UserError(f"not solved yet; for a hint: {self.command} --hint")
        self.write_progress(solved=sorted({self.number, *self.read_progress()["solved"]}))
        print(f"Solved! What there is to learn: {self.command} --solve")

    def find_mistakes(self) -> list[str]:
        return judge(self.item, self.copy)

    def start(self) -> None:
        """Make the copy with the mistake, unless it exists, and print what a user noticed."""
        note = f"The mistake is somewhere in {self.copy}. Correct it there."
        if self.copy.exists() and not self.again:
            note = f"{self.copy} is as you left it. For a new copy: {self.command} --again"
        else:
            shutil.rmtree(self.copy, ignore_errors=True)
            copy_code(ROOT, self.copy)
            apply_diff(MISTAKES / f"{self.item['mistake']}.diff", self.copy)
        print(f"Hunt {self.number}: {self.item['title']}\n\n{self.item['symptom'].strip()}\n")
        command = self.item["command"].strip().format(copy=self.copy.as_posix())
        print(f"See it yourself:\n\n{command}\n\n{note}")

    def print_solution(self) -> None:
        """Print the mistake as a diff, and the lesson."""
        name, lesson = self.item["mistake"], self.item["lesson"].strip()
        print(f"Hunt {self.number}. Lines with - are correct, the copy has those with +.\n")
        print(f"{read_text(MISTAKES / f'{name}.diff')}\n{lesson}")


if __name__ == "__main__":
    arguments = [f"--number={a}" if a.isdecimal() else a for a in sys.argv[1:]]
    run(HuntConfig.play, configure(HuntConfig, arguments))
