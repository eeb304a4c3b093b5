"""Options from a dataclass, config files and the command line."""

import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from conftest import ROOT

from configurator import UserError, check_range, configure, quote, read_options, run
from train import TrainConfig


@dataclass(frozen=True)
class Options:
    """Options for a test."""

    # first heading
    steps: int = 10  # how many
    rate: float = 0.5  # how fast
    name: str = "a"  # what it is called
    # second heading
    flag: bool = False  # whether
    limit: int | None = None  # at most this many
    mode: Literal["soft", "hard"] = "soft"  # which way
    compile: bool | Literal["auto"] = "auto"  # or not

    def __post_init__(self):
        check_range(self, 0, 5000, "steps", "limit")  # a limit of None passes


@dataclass(frozen=True)
class MoreOptions(Options):
    """Options of another program, too."""

    # third heading
    prompt: str = "\n"  # a text; it is longer than one line of a narrow terminal: --prompt=text


def read(*argv: str) -> Options:
    return read_options(Options, list(argv))


@pytest.fixture
def config_file(tmp_path):
    def write(text: str | bytes, name: str = "c.py") -> str:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("arg", "name", "value"),
    [
        ("--steps=5000", "steps", 5000),
        ("--rate=1", "rate", 1.0),
        ("--rate=1e-4", "rate", 1e-4),
        ("--name=7", "name", "7"),
        ("--name=x=y", "name", "x=y"),
        ("--name=", "name", ""),
        ("--flag", "flag", True),
        ("--flag=true", "flag", True),
        ("--limit=3", "limit", 3),
        ("--limit=None", "limit", None),
        ("--mode=hard", "mode", "hard"),
        ("--compile", "compile", True),
        ("--compile=False", "compile", False),
        ("--compile=auto", "compile", "auto"),
    ],
)
def test_argument_is_read(arg, name, value):
    options = read(arg)
    assert options == Options(**{name: value})
    assert type(getattr(options, name)) is type(value)


def test_later_arguments_and_files_win(config_file):
    a, b = config_file("steps = 1\nrate = 2", "a.py"), config_file("steps = 3", "b.py")
    assert read() == Options()
    assert read(a, b).steps == 3
    assert read(b, a).steps == 1
    assert read("--steps=9", a).steps == 1
    assert read(a, "--steps=9").steps == 9
    assert read("--name=b", a) == Options(steps=1, rate=2.0, name="b")


def test_config_file_may_import_compute_and_see_current_values(config_file):
    text = "import time\nfrom math import sqrt\n_half = steps // 2\nsteps = 5 * 8 + _half\n"
    assert read("--steps=4", config_file(text)) == Options(steps=42)


@pytest.mark.parametrize(
    ("arg", "words"),
    [
        ("--stepz=3", ["--stepz=3: there is no option 'stepz'; did you mean 'steps'?"]),
        ("--qqqqqq=3", ["qqqqqq", "--help lists all options"]),
        ("--qqqqqq", ["there is no option 'qqqqqq'"]),
        ("-steps=3", ["-steps=3: there is no option '-steps'; did you mean 'steps'?"]),
        ("--steps=True", ["steps is True but must be an integer"]),
        ("--steps", ["--steps needs a value, as in --steps=10"]),
        ("--local-rank=0", ["no option 'local-rank'; start with torchrun"]),
        ("--rate=fast", ["rate is 'fast' but must be a number"]),
        ("--rate=1e999", ["rate is inf but must be a number"]),
        ("--rate=" + "-" * 99_999 + "1", ["rate", "a number"]),
        ("--flag=maybe", ["flag is 'maybe' but must be True or False"]),
        ("--mode=medium", ["mode is 'medium' but must be 'soft' or 'hard'"]),
        ("--compile=soft", ["compile is 'soft' but must be True or False or 'auto'"]),
        ("--steps=-1", ["steps=-1 must be at least 0 and at most 5,000"]),
        ("--limit=5001", ["limit=5001 must be at least 0 and at most 5,000"]),
        ("--limit=[1]", ["limit is [1] but must be an integer or None"]),
        ("missing.py", ["missing.py: no such config file"]),
        ("To be, " * 99, ["To be, "]),  # too long for a name of a file
        ({"name = 3"}, ["c.py: name is 3 but must be text"]),
        ({"stamp = 3"}, ["c.py: there is no option 'stamp'", "begin a name of your own with _"]),
        ({"rate = float('nan')"}, ["c.py: rate is nan but must be a number"]),
        ({"steps: 3"}, ["c.py: write steps = ... instead of a colon"]),
        ({"steps = = 3"}, ["c.py: SyntaxError", "line 1"]),
        ({"steps = 1 / 0"}, ["c.py: ZeroDivisionError"]),
        ({"exit()"}, ["c.py: SystemExit"]),
        ({b"steps = 1\0"}, ["c.py", "null byte"]),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2(arg, words, config_file, capsys):
    """An argument, or a set of one text: the content of a config file."""
    with pytest.raises(SystemExit) as exit_:
        configure(Options, [config_file(*arg) if isinstance(arg, set) else arg])
    captured = capsys.readouterr()
    assert exit_.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert all(word in captured.err for word in words), captured.err


def test_what_a_shell_passes_is_understood(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")  # of Windows
    more = read_options(MoreOptions, ["--steps", "5", "--flag", "--prompt=\\n\\n", "--name", "~/a"])
    assert (more.steps, more.flag, more.prompt, more.name) == (5, True, "\n\n", "/home/me/a")
    assert not read("--flag", "false").flag and read("--compile", "auto", "--flag").flag
    assert read("--name=a\\new").name == "a\\new"
    with pytest.raises(UserError, match="--steps needs a value"):
        read("--steps", "--flag")


def test_an_old_python_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    monkeypatch.setattr(sys, "version", "3.10.1 (main)")
    words = r"^error: this is Python 3\.10\.1; use Python 3\.11 or newer$"
    with pytest.raises(SystemExit, match=words):
        runpy.run_path(str(ROOT / "configurator.py"))


def test_a_path_is_quoted_where_a_command_needs_it():
    assert [quote(Path(p)) for p in ("out/a-1.b", "my runs/a")] == ["out/a-1.b", '"my runs/a"']


@pytest.mark.parametrize("columns", [75, 80, 120])
def test_help_lists_own_and_inherited_options_and_fits_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as exit_:
        configure(MoreOptions, ["--steps=3", "--help"])
    printed = capsys.readouterr().out
    assert exit_.value.code == 0 and max(map(len, printed.splitlines())) <= columns
    assert (f"\n{' ' * 41}" in printed) == (columns < 120)
    assert printed.startswith("Options of another program, too.\n\nusage: ")
    assert " ".join(printed.split()).endswith(
        "first heading: --steps=10 how many --rate=0.5 how fast --name=a what it is called "
        "second heading: --flag=False whether --limit=None at most this many "
        "--mode=soft which way (soft, hard) --compile=auto or not (True, False, auto) "
        "third heading: "
        r"--prompt=\n a text; it is longer than one line of a narrow terminal: --prompt=text"
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("two\n lines"), "error: two lines"),
        (PermissionError(13, "denied", "f"), "error: [Errno 13] denied: 'f'"),
        (KeyboardInterrupt(), 130),
    ],
)
def test_a_program_ends_without_a_traceback(error, code):
    def main(config):
        raise error

    with pytest.raises(SystemExit) as exit_:
        run(main, read())
    assert exit_.value.code == code


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.name)
def test_config_files_are_valid(path):
    assert read_options(TrainConfig, [str(path)]) != TrainConfig()


def test_a_config_file_written_for_nanogpt_is_taken(config_file):
    text = """
import time
wandb_log = False # feel free to turn on
wandb_run_name = 'ft-' + str(time.time())
gradient_accumulation_steps = 5 * 8
learning_rate = 3e-5
decay_lr = False
always_save_checkpoint = compile = False
"""
    options = read_options(TrainConfig, [config_file(text)])
    assert (options.gradient_accumulation_steps, options.compile) == (40, False)
