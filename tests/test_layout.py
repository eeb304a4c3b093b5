"""The three floors: which files there are, what may import what, and how long they are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = {  # and the most lines that each may have
    "model.py": 285,
    "train.py": 353,
    "sample.py": 80,
    "configurator.py": 189,
    "prepare_shakespeare.py": 70,
    "prepare_openweb.py": 172,
}
BUDGETS = SCRIPTS | {  # lines of all files of a pattern together
    "*.py": 1_149,
    "support/**/*.py": 2_245,
    "tools/**/*.py": 1_889,
    "tools/*.[chj][st]*": 1_500,  # the page: css, html, js
    "docs/gpt.py": 150,
    "config/**/*.py": 230,
    "tests/**/*.py": 7_400,
    "README.md": 150,
}
FLOORS = {  # what the files of a floor may import of this project
    "model": set(),
    "configurator": set(),
    "support": {"model", "configurator", "support"},
    "script": {"model", "configurator", "support"},
    "tools": {"model", "configurator", "support", "script", "tools"},
}
# packages that are optional or slow to load: a function may import them
LATE = "huggingface_hub matplotlib rustbpe tokenizers torch.utils.tensorboard transformers wandb"
FILES = [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("tools/*.py")]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())


def floor_of(name: str) -> str:
    """Return the floor of a module, or "" for a module of another project."""
    top = name.split(".")[0]
    if top in ("model", "configurator", "support", "tools"):
        return top
    return "script" if f"{top}.py" in SCRIPTS else ""


def imports(tree: ast.AST) -> set[str]:
    """Return the modules that a part of a program imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_the_top_level_has_the_six_scripts_and_no_others():
    assert {path.name for path in ROOT.glob("*.py")} == SCRIPTS.keys()


@pytest.mark.parametrize(("pattern", "budget"), BUDGETS.items())
def test_every_budget_holds(pattern, budget):
    lengths = {str(p): len(p.read_text("utf-8").splitlines()) for p in ROOT.glob(pattern)}
    assert lengths and sum(lengths.values()) <= budget, lengths


@each_file
def test_arrows_between_the_floors_go_down_only(path):
    name, found = ".".join(path.relative_to(ROOT).with_suffix("").parts), imports(parse(path))
    assert not {m for m in found if floor_of(m) not in {"", *FLOORS[floor_of(name)]}}
    if name == "model":
        assert {m.split(".")[0] for m in found} - sys.stdlib_module_names == {"torch"}


@each_file
def test_a_function_imports_only_packages_that_are_optional_or_slow(path):
    functions = [node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef)]
    late = {module for function in functions for module in imports(function)}
    assert all(any(f"{m}.".startswith(f"{name}.") for name in LATE.split()) for m in late), late


def test_no_modules_of_support_import_each_other_in_a_circle():
    names, below = {path.stem for path in ROOT.glob("support/*.py")}, {}
    for name in names:
        modules = imports(parse(ROOT / "support" / f"{name}.py"))
        below[name] = {m.removeprefix("support.").split(".")[0] for m in modules} & names
    while below:
        free = {name for name, needs in below.items() if not needs & below.keys() - {name}}
        assert free, f"a circle among {sorted(below)}"
        below = {name: needs for name, needs in below.items() if name not in free}


@pytest.mark.parametrize("name", ["configurator", "prepare_shakespeare", "prepare_openweb"])
def test_a_preparation_does_not_load_torch(name):
    """That would take more than a second, even for --help."""
    code = f"import sys, {name}; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_support_knows_no_trainer():
    texts = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("support/*.py")}
    assert not [name for name, text in texts.items() if "trainer" in text.lower()]


@each_file
def test_every_option_has_a_comment_that_fits_the_help(path):
    """--help prints `  --name=default`, padded to 40 columns, and the comment: 100 columns."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for cls in (node for node in parse(path).body if isinstance(node, ast.ClassDef)):
        if not cls.name.endswith("Config") or cls.name == "GPTConfig":
            continue
        for field in (node for node in cls.body if isinstance(node, ast.AnnAssign)):
            name, default = field.target.id, ast.literal_eval(field.value)
            comment = lines[field.end_lineno - 1].partition("  # ")[2]
            assert comment, f"{name} has no comment"
            assert len(f"  {f'--{name}={default}':38} {comment}") <= 100, name
