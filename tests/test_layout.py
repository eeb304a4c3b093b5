"""The three floors: which files there are, what may import what, and how long the scripts are."""

import ast
import sys
from pathlib import Path

import pytest
from conftest import ROOT

BUDGETS = {  # lines
    "model.py": 280,
    "train.py": 400,
    "sample.py": 90,
    "configurator.py": 185,
    "prepare_shakespeare.py": 90,
    "prepare_openweb.py": 220,
}
FLOORS = {  # what the files of a floor may import of this project
    "model": set(),
    "configurator": set(),
    "support": {"model", "configurator", "support"},
    "script": {"model", "configurator", "support"},
    "tools": {"model", "configurator", "support", "script"},
}
FILES = [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("tools/*.py")]


def floor_of(name: str) -> str:
    """Return the floor of a module, or "" for a module of another project."""
    top = name.split(".")[0]
    if top in ("model", "configurator", "support", "tools"):
        return top
    return "script" if f"{top}.py" in BUDGETS else ""


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Return the modules that a file imports, or only those that it imports when it is loaded."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_top_level_has_the_six_scripts_and_no_others():
    assert {path.name for path in ROOT.glob("*.py")} == BUDGETS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_arrows_between_the_floors_go_down_only(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    wrong = {
        module
        for module in imports(path)
        if floor_of(module) and floor_of(module) not in FLOORS[floor_of(name)]
    }
    assert not wrong
    if name == "model":
        assert {m.split(".")[0] for m in imports(path)} - sys.stdlib_module_names == {"torch"}


def test_no_modules_of_support_import_each_other_in_a_circle_when_they_are_loaded():
    names = {path.stem for path in ROOT.glob("support/*.py")}
    below = {}
    for path in ROOT.glob("support/*.py"):
        modules = {m.removeprefix("support.") for m in imports(path, everywhere=False)}
        below[path.stem] = {m.split(".")[0] for m in modules} & names
    while below:
        free = {name for name, needs in below.items() if not needs & below.keys() - {name}}
        assert free, f"a circle among {sorted(below)}"
        below = {name: needs for name, needs in below.items() if name not in free}


def test_the_scripts_are_short_enough_to_be_read_in_an_afternoon():
    lengths = {name: len((ROOT / name).read_text("utf-8").splitlines()) for name in BUDGETS}
    assert {name: n for name, n in lengths.items() if n > BUDGETS[name]} == {}
    assert sum(lengths.values()) <= 1243


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_option_has_a_comment_that_fits_the_help(path):
    """--help prints `  --name=default`, padded to 40 columns, and the comment: 100 columns."""
    tree = ast.parse(text := path.read_text(encoding="utf-8"))
    lines = text.splitlines()
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        if not cls.name.endswith("Config") or cls.name == "GPTConfig":
            continue
        for field in (node for node in cls.body if isinstance(node, ast.AnnAssign)):
            name, default = field.target.id, ast.literal_eval(field.value)
            comment = lines[field.end_lineno - 1].partition("  # ")[2]
            assert comment, f"{name} has no comment"
            assert len(f"  {f'--{name}={default}':38} {comment}") <= 100, name
