"""The bug hunt: find the mistake in a copy of the code, starting from what a user noticed.

    python -m tools.hunt              # all hunts, from easy to hard, and which are solved
    python -m tools.hunt 3            # copy the code to hunt/3/, put in a mistake, say what it does
    python -m tools.hunt 3 --hint     # the next of three hints
    python -m tools.hunt 3 --check    # judge the copy: tests and, in some hunts, the preflight
    python -m tools.hunt 3 --solve    # the mistake as a diff, and what to learn from it

tools/mistakes/hunts.toml has the texts. hunt/progress.json has the solved hunts and the hints read.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from configurator import UserError, check_range, configure, run
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from support.broken_copy import MISTAKES, ROOT, apply_diff, copy_code
from support.files import atomic_write, read_text

HUNTS = tomllib.loads(read_text(MISTAKES / "hunts.toml"))["hunt"]  # dicts; number 1 is the first
FOLDER = Path("hunt")  # of the copies, in the working directory
SECONDS = 120  # after which a program that judges a copy is stopped


@dataclass(frozen=True)
class HuntConfig:
    """Find the mistake in a copy of the code. A number alone, as in `tools.hunt 3`, starts one."""

    number: int = 0  # which hunt; 0: list all of them
    hint: bool = False  # print the next of three hints
    check: bool = False  # run the tests that judge the copy
    solve: bool = False  # print the mistake and what to learn from it
    again: bool = False  # make the copy again; your edits in it are lost

    def __post_init__(self) -> None:
        check_range(self, 0, len(HUNTS), "number")
        n_actions = self.hint + self.check + self.solve + self.again
        if n_actions > 1:
            raise UserError("use only one of --hint, --check, --solve and --again")
        if n_actions and not self.number:
            raise UserError("which hunt? Give its number, as in: python -m tools.hunt 3 --hint")


def read_progress() -> tuple[set[int], dict[str, int]]:
    """Return the numbers of the solved hunts, and how many hints were read for each number."""
    path = FOLDER / "progress.json"
    try:
        progress = json.loads(read_text(path)) if path.exists() else {}
        return set(progress.get("solved", [])), dict(progress.get("hints", {}))
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{path}: not written by this program; delete it") from None


def write_progress(solved: set[int], hints: dict[str, int]) -> None:
    """Write progress.json."""
    with atomic_write(FOLDER / "progress.json") as file:
        file.write(json.dumps({"solved": sorted(solved), "hints": hints}).encode())


def list_hunts() -> None:
    """Print a line per hunt."""
    solved, _ = read_progress()
    for number, hunt in enumerate(HUNTS, start=1):
        print(f"{number:3}  {'solved' if number in solved else '':7} {hunt['title']}")
    print(f"\n{len(solved)} of {len(HUNTS)} solved. Start one: python -m tools.hunt 1")


def start(number: int, copy: Path, again: bool) -> None:
    """Make the copy with the mistake, unless it exists, and print what a user noticed."""
    hunt, note = HUNTS[number - 1], f"The mistake is somewhere in {copy}. Correct it there."
    if copy.exists() and not again:
        note = f"{copy} is as you left it. For a new copy: python -m tools.hunt {number} --again"
    else:
        make_copy(hunt, copy)
    print(f"Hunt {number}: {hunt['title']}\n\n{hunt['symptom'].strip()}\n")
    print(f"See it yourself:\n\n{hunt['command'].strip().format(copy=copy.as_posix())}\n\n{note}")
    for option, use in (("check", "judge the copy"), ("hint", "get a hint"), ("solve", "give up")):
        print(f"    python -m tools.hunt {number} --{option:5}    {use}")


def make_copy(hunt: dict, copy: Path) -> None:
    """Write the code with the mistake to the folder `copy`; an earlier copy is deleted."""
    whole = copy.with_suffix(".tmp")  # gets its name when it is complete
    try:
        if whole.exists():
            shutil.rmtree(whole)
        copy_code(ROOT, whole)
        apply_diff(MISTAKES / f"{hunt['mistake']}.diff", whole)
        if copy.exists():
            shutil.rmtree(copy)
        whole.rename(copy)
    except OSError as error:
        reason = f"{copy}: can not be written ({error.strerror or error})"
        raise UserError(f"{reason}; use a folder that you may write to") from error


def print_hint(number: int) -> None:
    """Print the next hint, or all of them when none is left."""
    hints, (solved, read) = HUNTS[number - 1]["hints"], read_progress()
    count = read.get(str(number), 0)
    if count < len(hints):
        print(f"hint {count + 1} of {len(hints)}: {hints[count]}")
        write_progress(solved, {**read, str(number): count + 1})
    else:
        print("There is no further hint. These were all:", *hints, sep="\n    ")


def check(number: int, copy: Path) -> None:
    """Judge the copy and remember if it is solved. Raises UserError if it is not."""
    hunt, data = HUNTS[number - 1], Path("data/shakespeare_char")
    if not copy.exists():
        raise UserError(f"{copy}: no such folder; start with: python -m tools.hunt {number}")
    for path in (*copy.glob("*.py"), *copy.glob("support/*.py")):
        try:
            compile(path.read_bytes(), path, "exec")
        except (SyntaxError, ValueError) as error:  # ValueError: a NUL character
            line, reason = getattr(error, "lineno", "?"), getattr(error, "msg", error)
            raise UserError(f"{path}, line {line}: {reason}; correct this first") from None
    for package in ("pytest", "hypothesis", "transformers"):
        if not find_spec(package):
            raise UserError(f"{package} is missing; run: pip install -r tests/requirements.txt")
    if hunt.get("preflight") and not (data / "meta.json").exists():
        raise UserError(f"{data}: not prepared yet; run: python prepare_shakespeare.py")
    print(f"running the tests that judge {copy} (5 to 20 s) ...", flush=True)
    if failed := judge(hunt, copy):
        print(*failed, sep="\n")
        raise UserError(f"not solved yet; for a hint: python -m tools.hunt {number} --hint")
    solved, hints = read_progress()
    write_progress(solved | {number}, hints)
    print(f"Solved! What there is to learn: python -m tools.hunt {number} --solve")


def judge(hunt: dict, copy: Path) -> list[str]:
    """Run what judges the code in `copy`. Returns a line per failure."""
    with tempfile.TemporaryDirectory() as folder:
        # The tests are the project's own and not in the copy, where they could be edited.
        judged = Path(folder) / "copy"
        copy_code(copy, judged)
        shutil.copytree(ROOT / "tests", judged / "tests")
        shutil.copy(ROOT / "pyproject.toml", judged)
        options = ["-q", "--color=no", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
        tests = [f"tests/{test}" for test in hunt["tests"]]
        # Both programs look for modules in the copy first: in cwd, and beside train.py.
        failed = failures(["-m", "pytest", *options, *tests], cwd=judged)
        if hunt.get("preflight"):
            options = ["--preflight", "--device=cpu", f"--out_dir={judged / 'out'}"]
            train, config = judged / "train.py", ROOT / "config" / "phase1_quick.py"
            failed += failures([train, config, *options], cwd=Path.cwd())
    return failed


def failures(args: list, cwd: Path) -> list[str]:
    """Run Python with these arguments in `cwd`. Returns a line per failure."""
    command = [sys.executable, *map(str, args)]
    # pytest cuts its lines at the width of the terminal, which it takes from COLUMNS.
    options = {"env": {**os.environ, "COLUMNS": "200"}, "timeout": SECONDS}
    options |= {"encoding": "utf-8", "errors": "replace"}
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, **options)
    except subprocess.TimeoutExpired:
        raise UserError(f"stopped after {SECONDS} s; is there an endless loop?") from None
    lines = [s for s in done.stdout.splitlines() if s.startswith(("FAILED ", "ERROR ", "FAIL "))]
    if done.returncode and not lines:  # such as an error while a module is imported
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        lines = [f"the copy does not run: {last.removeprefix('E ').strip()}"]
    return lines


def solve(number: int) -> None:
    """Print the mistake as a diff, and the paragraph about it."""
    name, lesson = HUNTS[number - 1]["mistake"], HUNTS[number - 1]["lesson"].strip()
    print(f"Hunt {number}: {name}. Lines with - are correct, lines with + are in the copy.\n")
    print(f"{read_text(MISTAKES / f'{name}.diff')}\n{lesson}")


def main(config: HuntConfig) -> None:
    """Do what the options say."""
    number, copy = config.number, FOLDER / str(config.number)
    if not number:
        list_hunts()
    elif config.hint:
        print_hint(number)
    elif config.check:
        check(number, copy)
    elif config.solve:
        solve(number)
    else:
        start(number, copy, config.again)


if __name__ == "__main__":
    arguments = [f"--number={a}" if a.isdecimal() else a for a in sys.argv[1:]]
    run(main, configure(HuntConfig, arguments))
