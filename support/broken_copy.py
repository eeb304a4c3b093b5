"""A copy of the code in which a mistake is made: what the lessons and the bug hunt stand on."""

import re
import shutil
from configurator import UserError
from pathlib import Path

ROOT = Path(__file__).parent.parent
MISTAKES = ROOT / "tools" / "mistakes"  # a .diff file for each


def copy_code(source: Path, target: Path) -> None:
    """Copy the scripts, support/ and config/ to the folder `target`: no tools, tests or history."""
    target.mkdir(parents=True)
    for path in source.glob("*.py"):
        shutil.copy(path, target)
    for name in ("support", "config"):
        shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))


def apply_diff(diff: Path, folder: Path) -> None:
    """Make the change of a unified diff to one file in `folder`. Raises UserError if it can not."""
    header, *hunks = re.split(r"^@@ .*\n", diff.read_text(encoding="utf-8"), flags=re.MULTILINE)
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
