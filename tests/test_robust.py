"""Kills at any moment, and options and config files with any content."""

import random
import subprocess
import sys
from configurator import read_options
from pathlib import Path

import pytest
from conftest import ROOT, damaged, damages, many_examples, or_user_error
from hypothesis import given
from hypothesis import strategies as st

import train


@pytest.mark.parametrize("kills", [pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_bits_of_the_uninterrupted_run(kills):
    command = [sys.executable, ROOT / "tests" / "kill_training.py", f"--kills={kills}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"killed {kills} times" in done.stdout and "equal to the last bit" in done.stdout
    print(done.stdout)


def test_files_that_a_killed_write_left_are_removed(tiny_run):
    Path("out/tiny").mkdir(parents=True)
    for name in ("ckpt.pt.abcd1234.tmp", "log.jsonl.abcd1234.tmp"):
        Path("out/tiny", name).write_bytes(b"half")
    assert not list(tiny_run(max_iters=1).glob("*.tmp"))


@many_examples
def test_a_damaged_config_file_is_refused_in_one_line_or_read(tmp_path, fuzz):
    original = (ROOT / "config" / "phase1_char.py").read_bytes()
    path = tmp_path / "config.py"

    @fuzz
    @given(damages)
    def read(damage):
        path.write_bytes(damaged(original, damage))
        or_user_error(lambda: read_options(train.TrainConfig, [str(path)]))

    read()


@many_examples
def test_any_argument_is_refused_in_one_line_or_read(fuzz):
    @fuzz
    @given(st.text(), st.text())
    def read(name, value):
        known = random.Random(value).choice(list(train.TrainConfig.__dataclass_fields__))
        for argument in (f"--{name}={value}", f"--{known}={value}"):
            or_user_error(lambda a=argument: read_options(train.TrainConfig, [a]))

    read()
