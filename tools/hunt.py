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
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from configurator import UserError, check_range, configure, run
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from support.files import atomic_write, read_text

ROOT = Path(__file__).parent.parent
MISTAKES = ROOT / "tools" / "mistakes"  # a .diff file for each
HUNTS = tomllib.loads(read_text(MISTAKES / "hunts.toml"))["hunt"]  # dicts; number 1 is the first
FOLDER = Path("hunt")  # of the copies, in the working directory


@dataclass(frozen=True)
class HuntConfig:
    """Find the mistake in a copy of the code. A number alone, as in `tools.hunt 3`, starts one."""

    number: int = 0  # which one; 0: list all of them
    hint: bool = False  # print the next of three hints
    check: bool = False  # run what judges the copy
    solve: bool = False  # print the solution and what to learn from it
    again: bool = False  # start once more; your edits are lost

    # not options: what tools.build has instead
    program, items, progress = "tools.hunt", HUNTS, FOLDER / "progress.json"

    def __post_init__(self) -> None:
        check_range(self, 0, len(self.items), "number")
        if not self.number and (self.hint or self.check or self.solve or self.again):
            raise UserError(f"which one? Give its number, as in: {self.command[:-1]}3 --hint")

    @property
    def command(self) -> str:
        return f"python -m {self.program} {self.number}"

    @property
    def item(self) -> dict:
        return self.items[self.number - 1]


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


def read_progress(path: Path) -> dict:
    """Return the numbers of the solved items, and how many hints were read for each number."""
    return json.loads(read_text(path)) if path.exists() else {"solved": [], "hints": {}}


def write_progress(path: Path, progress: dict) -> None:
    """Write what `read_progress` reads."""
    with atomic_write(path) as file:
        file.write(json.dumps(progress).encode())


def list_items(config: HuntConfig) -> None:
    """Print a line for each item."""
    solved = read_progress(config.progress)["solved"]
    for number, item in enumerate(config.items, start=1):
        print(f"{number:3}  {'solved' if number in solved else '':7} {item['title']}")
    print(f"\n{len(solved)} of {len(config.items)} solved. Start one: {config.command[:-1]}1")


def print_hint(config: HuntConfig) -> None:
    """Print the next hint, or all of them when none is left."""
    hints, progress = config.item["hints"], read_progress(config.progress)
    count = progress["hints"].get(str(config.number), 0)
    if count == len(hints):
        return print("There is no further hint. These were all:", *hints, sep="\n    ")
    print(f"hint {count + 1} of {len(hints)}: {hints[count]}")
    progress["hints"][str(config.number)] = count + 1
    write_progress(config.progress, progress)


def check(config: HuntConfig, copy: Path, judge) -> None:
    """Have `judge` judge the copy, and remember if it is solved. Raises UserError if it is not."""
    if not copy.exists():
        raise UserError(f"{copy}: no such folder; start with: {config.command}")
    if not all(map(find_spec, ("pytest", "hypothesis", "transformers"))):
        raise UserError("the judges need packages; run: pip install -r tests/requirements.txt")
    print(f"running the tests that judge {copy} (5 to 20 s) ...", flush=True)
    if failed := judge(config.item, copy):
        print(*failed, sep="\n")
        raise UserError(f"not solved yet; for a hint: {config.command} --hint")
    progress = read_progress(config.progress)
    progress["solved"] = sorted({config.number, *progress["solved"]})
    write_progress(config.progress, progress)
    print(f"Solved! What there is to learn: {config.command} --solve")


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


def start(hunt: dict, copy: Path, again: bool) -> None:
    """Make the copy with the mistake, unless it exists, and print what a user noticed."""
    note = f"The mistake is somewhere in {copy}. Correct it there."
    if copy.exists() and not again:
        note = f"{copy} is as you left it."
    else:
        shutil.rmtree(copy, ignore_errors=True)
        copy_code(ROOT, copy)
        apply_diff(MISTAKES / f"{hunt['mistake']}.diff", copy)
    print(f"{hunt['symptom'].strip()}\n\nSee it yourself:\n")
    print(f"{hunt['command'].strip().format(copy=copy.as_posix())}\n\n{note}")


def solve(hunt: dict) -> None:
    """Print the mistake as a diff, and the lesson."""
    name = hunt["mistake"]
    print(f"{name}. Lines with - are correct, lines with + are in the copy.\n")
    print(f"{read_text(MISTAKES / f'{name}.diff')}\n{hunt['lesson'].strip()}")


def main(config: HuntConfig, copy: Path | None = None, start=start, judge=judge, solve=solve):
    """Do what the options say. tools.build has its own copy and functions."""
    copy = copy or FOLDER / str(config.number)
    if not config.number:
        list_items(config)
    elif config.hint:
        print_hint(config)
    elif config.check:
        check(config, copy, judge)
    elif config.solve:
        solve(config.item)
    else:
        print(f"{config.number}: {config.item['title']}\n")
        start(config.item, copy, config.again)
        uses = dict(check="judge it", hint="get a hint", solve="give up", again="start once more")
        for option, use in uses.items():
            print(f"    {config.command} --{option:5}    {use}")


if __name__ == "__main__":
    arguments = [f"--number={a}" if a.isdecimal() else a for a in sys.argv[1:]]
    run(main, configure(HuntConfig, arguments))
