"""The workshop: write GPT-2 piece by piece in a copy of the code, with a judge for each piece.

    python -m tools.build              # all pieces, and which are solved
    python -m tools.build 3            # make piece 3 blank in hunt/build/, and say what to write
    python -m tools.build 3 --check    # judge it: first some numbers, then the project's tests

--hint, --solve and --again are as in tools.hunt. tools/pieces.toml has the texts.
"""

import ast
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, configure, run
from support.files import read_text
from tools import hunt

TEXTS = tomllib.loads(read_text(hunt.ROOT / "tools" / "pieces.toml"))
COPY = hunt.FOLDER / "build"
ORIGINAL = COPY / "original"  # the copy as it was before the first piece
SAVE = "import numpy; numpy.savez('right.npz', **results)"
COMPARE = """
import numpy
for name, right in numpy.load("right.npz").items():
    numpy.testing.assert_allclose(results[name], right, 1e-4, 1e-6, err_msg=name, strict=True)
"""


@dataclass
class BuildConfig(hunt.HuntConfig):
    """Write GPT-2, piece by piece. A number alone, as in `tools.build 3`, starts one."""

    program, items, progress, copy = "tools.build", TEXTS["piece"], COPY / "progress.json", COPY
    note = "\nThe copy trains: python hunt/build/train.py config/phase1_quick.py --out_dir=out/mine"

    def start(self) -> None:
        """Make the piece blank, unless it is begun, and print what to write."""
        if not COPY.exists():
            make_copy(COPY)
            make_copy(ORIGINAL)
        done, path = self.read_progress(), COPY / self.item["file"]
        if self.number not in done["begun"] or self.again:
            now, (head, code) = "".join(find(self.item, COPY)), find(self.item, ORIGINAL)
            indent = code[: -len(code.lstrip())]
            blank = f"{head}{indent}raise NotImplementedError  # write it: {self.item['returns']}\n"
            path.write_text(path.read_text("utf-8").replace(now, blank), "utf-8")
            solved = [number for number in done["solved"] if number != self.number]
            self.write_progress(begun=[*done["begun"], self.number], solved=solved)
        print(f"Piece {self.number}: {self.item['title']}\n\n{self.item['text'].strip()}\n")
        print(f"Write {self.item['function']} in {path}. To begin anew: {self.command} --again")

    def find_mistakes(self) -> list[str]:
        """Return how results of the example differ from the original's, or which tests fail."""
        if self.number not in self.read_progress()["begun"]:
            raise UserError(f"piece {self.number} is not begun; start with: {self.command}")
        example = self.item["example"]
        with tempfile.TemporaryDirectory() as folder:
            for code, then in ((ORIGINAL, SAVE), (COPY, COMPARE)):
                done = hunt.run_with(code.absolute(), "-c", example + then, cwd=folder)
                if done.returncode:
                    error = done.stderr.split("AssertionError: \n")[-1].strip()
                    return [error, f"\nThe example:\n{example}"]
        return hunt.judge(self.item, COPY)

    def print_solution(self) -> None:
        print(*find(self.item, ORIGINAL), "\n", self.item["lesson"], sep="")


def make_copy(folder: Path) -> None:
    """Copy the code. Where a library does the work of a piece, a function of ours replaces it."""
    hunt.copy_code(hunt.ROOT, folder)
    for added in TEXTS["added"]:
        path = folder / added["file"]
        code = path.read_text("utf-8").replace(added["instead_of"], added["call"]) + added["code"]
        path.write_text(code, "utf-8")


def find(piece: dict, folder: Path) -> tuple[str, str]:
    """Return the piece in a folder: its signature with the docstring, and its code."""
    path = folder / piece["file"]
    lines = path.read_text("utf-8").splitlines(keepends=True)
    try:
        node = ast.parse("".join(lines), path)
        for name in piece["function"].split("."):
            node = next(part for part in node.body if getattr(part, "name", "") == name)
    except (SyntaxError, StopIteration) as error:
        raise UserError(f"{path}: {str(error) or piece['function'] + ' is missing'}") from error
    first = node.body[0].lineno - 1 if ast.get_docstring(node) is None else node.body[0].end_lineno
    return "".join(lines[node.lineno - 1 : first]), "".join(lines[first : node.end_lineno])


if __name__ == "__main__":
    arguments = [f"--number={a}" if a.isdecimal() else a for a in sys.argv[1:]]
    run(BuildConfig.play, configure(BuildConfig, arguments))
