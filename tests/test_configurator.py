"""Options from a dataclass, config files and the command line."""

import os
import re
import subprocess
import sys
from configurator import UserError, check_range, configure, read_options
from dataclasses import FrozenInstanceError, dataclass
from typing import Literal

import pytest
from conftest import ROOT


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
        if self.steps < 0:
            raise UserError(f"steps is {self.steps} but must not be negative")


def read(*argv: str) -> Options:
    return read_options(Options, list(argv))


@pytest.fixture
def config_file(tmp_path):
    def write(text: str | bytes, name: str = "c.py") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_defaults():
    assert read() == Options()


@pytest.mark.parametrize(
    ("arg", "name", "value"),
    [
        ("--steps=7", "steps", 7),
        ("--rate=1", "rate", 1.0),
        ("--rate=1e-4", "rate", 1e-4),
        ("--name=7", "name", "7"),
        ("--name=x=y", "name", "x=y"),
        ("--name=", "name", ""),
        ("--flag", "flag", True),
        ("--flag=False", "flag", False),
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
    got = getattr(read(arg), name)
    assert got == value and type(got) is type(value)


def test_later_arguments_and_files_win(config_file):
    a, b = config_file("steps = 1\nrate = 2", "a.py"), config_file("steps = 3", "b.py")
    assert read(a, b).steps == 3
    assert read(b, a).steps == 1
    assert read("--steps=9", a).steps == 1
    assert read(a, "--steps=9").steps == 9
    assert read(a).rate == 2.0 and type(read(a).rate) is float


def test_config_file_may_import_compute_and_see_current_values(config_file):
    path = config_file(
        "import time\n_half = steps // 2\nsteps = 5 * 8 + _half\nname = 'ft-' + str(time.time())\n"
    )
    options = read("--steps=4", path)
    assert options.steps == 42 and options.name.startswith("ft-")


def test_options_are_frozen():
    with pytest.raises(FrozenInstanceError):
        read().steps = 3


@pytest.mark.parametrize(
    ("arg", "parts"),
    [
        ("--stepz=3", ["stepz", "did you mean 'steps'"]),
        ("--qqqqqq=3", ["qqqqqq", "--help"]),
        ("--steps=1.5", ["steps", "1.5", "an integer"]),
        ("--steps=many", ["steps", "'many'", "an integer"]),
        ("--steps=True", ["steps", "True", "an integer"]),
        ("--steps", ["--steps", "needs a value", "--steps=10"]),
        ("--rate=fast", ["rate", "'fast'", "a number"]),
        ("--rate=1e999", ["rate", "inf", "a number"]),
        ("--flag=maybe", ["flag", "'maybe'", "True or False"]),
        ("--mode=medium", ["mode", "'medium'", "'soft' or 'hard'"]),
        ("--steps=-1", ["steps", "-1", "negative"]),
        ("--limit=[1]", ["limit", "[1]", "an integer or None"]),
        ("--rate=" + "(" * 9999, ["rate", "a number"]),
        ("missing.py", ["missing.py", "no such config file"]),
        ("To be, " * 99, ["To be, "]),  # too long for a name of a file
        ("-steps=3", ["-steps=3", "did you mean 'steps'"]),
    ],
)
def test_mistake_is_one_line_with_exit_code_2(arg, parts, capsys):
    with pytest.raises(SystemExit) as exit_:
        configure(Options, [arg])
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert all(part in captured.err for part in parts), captured.err


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("stepz = 3", ["c.py", "stepz", "did you mean 'steps'"]),
        ("steps = 'x'", ["c.py", "steps", "'x'", "an integer"]),
        ("rate = float('nan')", ["c.py", "rate", "nan", "a number"]),
        ("steps = = 3", ["c.py", "SyntaxError", "line 1"]),
        ("steps = 1 / 0", ["c.py", "ZeroDivisionError"]),
        (b"steps = 1\0", ["c.py", "null byte"]),
        (b"\xff\xfe", ["c.py", "SyntaxError"]),
    ],
)
def test_mistake_in_a_config_file_is_one_line_with_exit_code_2(text, parts, config_file, capsys):
    with pytest.raises(SystemExit) as exit_:
        configure(Options, [config_file(text)])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in parts), error


def test_help_lists_each_option_with_default_and_comment(capsys):
    with pytest.raises(SystemExit) as exit_:
        configure(Options, ["--steps=3", "--help"])
    assert exit_.value.code == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "Options for a test."
    for line in ("--steps=10 how many", "--mode=soft which way", "--limit=None at most this many"):
        assert line in lines
    assert (
        lines.index("first heading:")
        < lines.index("--name=a what it is called")
        < lines.index("second heading:")
    )


@pytest.mark.parametrize("script", [["prepare_shakespeare.py"], ["-m", "tools.report"]])
def test_scripts_and_tools_have_help_and_name_mistakes(script):
    for arg, code, words in (
        ("--help", 0, f"usage: python {' '.join(script)} "),
        ("--xyz=3", 2, "there is no option 'xyz'"),
    ):
        command = [sys.executable, *script, arg]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code and words in done.stdout + done.stderr, done.stderr


@pytest.mark.parametrize("script", ["train.py", "prepare_openweb.py", "tools/report.py"])
def test_a_missing_package_ends_in_one_line_with_what_to_do(script, tmp_path):
    """Started without any package (-S), as in a shell that has not activated its environment."""
    command = [sys.executable, "-S", ROOT / script]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert re.fullmatch(r"error: No module .*; run: pip install -r .*\n", done.stderr)


@dataclass(frozen=True)
class LongComment:
    """An option whose comment fills more than one line of a narrow terminal."""

    pad_vocab_to: int = 0  # rows of the embedding: a multiple of 64 is faster; --pad_vocab_to=0: V


@pytest.mark.parametrize("columns", [75, 80, 120])
def test_help_fits_the_terminal(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        configure(LongComment, ["--help"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= columns
    words = (
        "--pad_vocab_to=0 rows of the embedding: a multiple of 64 is faster; --pad_vocab_to=0: V"
    )
    assert words in " ".join(printed.split())


def test_a_missing_config_file_gets_a_suggestion(config_file):
    path = config_file("steps = 1", "phase.py")
    with pytest.raises(UserError, match=r"phases\.py: .*; did you mean .*phase\.py"):
        read(path.replace("phase.py", "phases.py"))


@pytest.mark.parametrize("text", ["steps = 10 ** 5000", "rate = 10 ** 400", "limit = 1 << 63"])
def test_a_number_too_large_for_a_tensor_is_refused(config_file, text):
    with pytest.raises(UserError, match="'a number of 64 bits or more' but must be"):
        read(config_file(text))


def test_a_number_out_of_range_is_named_with_both_limits():
    options = read("--steps=3")
    check_range(options, 3, 3, "steps", "limit")  # None is no number
    with pytest.raises(UserError, match=r"steps=3 must be at least 4 and at most 5,000"):
        check_range(options, 4, 5000, "steps")


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.name)
def test_config_files_are_valid(path):
    from train import TrainConfig

    assert read_options(TrainConfig, [str(path)]) != TrainConfig()


def test_a_config_file_written_for_nanogpt_is_taken(config_file):
    from train import TrainConfig

    text = """
import time
out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False # feel free to turn on
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare_char'
always_save_checkpoint = False
batch_size = 1
gradient_accumulation_steps = 5 * 8
max_iters = 20
learning_rate = 3e-5
decay_lr = False
device = 'cpu'
compile = False
"""
    options = read_options(TrainConfig, [config_file(text)])
    assert (options.gradient_accumulation_steps, options.compile, options.decay_lr) == (
        40,
        False,
        False,
    )
