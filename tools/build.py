"""The workshop: write GPT-2 piece by piece in a copy of the code, with a judge for each piece.

    python -m tools.build              # all pieces, and which are solved
    python -m tools.build 3            # make piece 3 blank in hunt/build/, and say what to write
    python -m tools.build 3 --hint     # the next of three hints
    python -m tools.build 3 --check    # judge it: first some numbers, then the project's tests
    python -m tools.build 3 --solve    # the project's own code, and what to learn from it

tools/pieces.toml has the texts, hunt/original/ the copy as it was before the first piece.
"""

import ast
import sys
import tempfile
import tomllib
from configurator import UserError, configure, run
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from support.files import read_text
from tools import hunt

TEXTS = tomllib.loads(read_text(hunt.ROOT / "tools" / "pieces.toml"))
COPY, ORIGINAL = (hunt.FOLDER / name for name in ("build", "original"))
PROGRESS = COPY / "progress.json"  # as for the hunts, and the functions that are begun
SAVE = """
import numpy
numpy.savez("right.npz", **results)
"""
COMPARE = """
import numpy
for name, right in numpy.load("right.npz").items():
    numpy.testing.assert_allclose(results[name], right, 1e-4, 1e-6, err_msg=name, strict=True)
"""


@dataclass(frozen=True)
class BuildConfig(hunt.HuntConfig):
    """Write GPT-2, piece by piece. A number alone, as in `tools.build 3`, starts one."""

    program, items, progress = "tools.build", TEXTS["piece"], PROGRESS


def make_copy(folder: Path) -> None:
    """Copy the code. Where a library does the work of a piece, a function of ours replaces it."""
    hunt.copy_code(hunt.ROOT, folder)
    for added in TEXTS["added"]:
        path, library = folder / added["file"], added["instead_of"]
        code = read_text(path)
        assert code.count(library) == 1, library
        path.write_text(code.replace(library, added["call"]) + added["code"], encoding="utf-8")


def original(piece: dict) -> tuple[str, str]:
    """Return the piece as it was: its signature and docstring, and its code."""
    code = read_text(ORIGINAL / piece["file"])
    lines, node = code.splitlines(keepends=True), ast.parse(code)
    for name in piece["function"].split("."):
        node = next(part for part in node.body if getattr(part, "name", "") == name)
    first = node.body[0].lineno - 1 if ast.get_docstring(node) is None else node.body[0].end_lineno
    return "".join(lines[node.lineno - 1 : first]), "".join(lines[first : node.end_lineno])


def start(piece: dict, copy: Path, again: bool) -> None:
    """Make the piece blank, unless it is begun, and print what to write."""
    function, path = piece["function"], copy / piece["file"]
    if not copy.exists():
        make_copy(copy)
        make_copy(ORIGINAL)
    progress = {"begun": []} | hunt.read_progress(PROGRESS)
    if again:
        raise UserError(f"delete the code of {function} in {path} yourself")
    if function not in progress["begun"]:
        head, code = original(piece)
        indent = code[: -len(code.lstrip())]
        blank = f"{head}{indent}raise NotImplementedError  # write this\n"
        path.write_text(read_text(path).replace(head + code, blank), encoding="utf-8")
        progress["begun"].append(function)
        hunt.write_progress(PROGRESS, progress)
    print(f"{piece['text'].strip()}\n\nWrite {function} in {path}.")


def judge(piece: dict, copy: Path) -> list[str]:
    """Return how the results of the example differ from the original's, or which tests fail."""
    if piece["function"] not in hunt.read_progress(PROGRESS)["begun"]:
        raise UserError(f"{piece['function']} is not begun; give its number without --check first")
    with tempfile.TemporaryDirectory() as folder:
        for code, then in ((ORIGINAL, SAVE), (copy, COMPARE)):
            done = hunt.run_with(code.absolute(), "-c", piece["example"] + then, cwd=folder)
            if done.returncode:
                error = done.stderr.split("AssertionError: \n")[-1].strip()
                return [error, f"\nThe example:\n{piece['example']}"]
    return hunt.judge(piece, copy)


def solve(piece: dict) -> None:
    """Print the original code of the piece, and the lesson."""
    print(*original(piece), piece["lesson"], sep="")


main = partial(hunt.main, copy=COPY, start=start, judge=judge, solve=solve)
if __name__ == "__main__":
    arguments = [f"--number={a}" if a.isdecimal() else a for a in sys.argv[1:]]
    run(main, configure(BuildConfig, arguments))
