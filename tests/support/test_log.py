"""The log of a run: its records, its lines on the screen, and damaged files."""

import json
import math
import os
import struct
import subprocess
import sys
from configurator import UserError
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import ROOT, damaged, damages, logged, many_examples, odd_values, options
from hypothesis import given
from hypothesis import strategies as st

import train
from support import log
from support.log import read_log
from support.pictures import write_report


def test_records_have_the_documented_keys(tiny_run):
    lines = (tiny_run() / "log.jsonl").read_text(encoding="utf-8").splitlines()
    step = {"step", "epoch", "seconds", "loss", "grad_norm", "lr", "tokens_per_second"}
    evaluation = {"step", "epoch", "seconds", "train_loss", "val_loss"}
    kinds = {frozenset(json.loads(line)) for line in lines}
    assert kinds == {frozenset(step), frozenset(evaluation)}


def test_max_iters_of_a_resumed_run_may_grow(tiny_run):
    tiny_run()
    records = logged(tiny_run(init_from="resume", max_iters=20))
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 21))


def test_speed_is_that_of_the_steps_and_not_of_the_evaluations(tiny_run, monkeypatch):
    now = [0.0]

    def taking(seconds, function):
        def slow(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        return slow

    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    for name, seconds in (("train_step", 1.0), ("evaluate", 1000.0)):
        slow = taking(seconds, getattr(train.Trainer, name))
        monkeypatch.setattr(train.Trainer, name, slow)
    records = read_log(tiny_run(log_interval=4, eval_interval=6) / "log.jsonl")
    speeds = {r["step"]: r["tokens_per_second"] for r in records if "tokens_per_second" in r}
    assert speeds == {4: 128, 8: 128, 12: 128}  # tokens in a step of one second


def test_a_new_run_is_described_with_its_size_and_device(tiny_run, capsys):
    tiny_run()
    printed = capsys.readouterr().out
    assert "parameters: 2 layers, 2 heads, 16 wide, context 16, vocabulary 18" in printed
    assert "128 tokens per step" in printed and "cpu x 1, " in printed


# On the screen


def test_progress_is_lines_where_the_output_is_not_a_terminal(tiny_run, capsys):
    tiny_run()
    printed = capsys.readouterr()
    assert all(part in printed.out for part in ("| loss ", "tokens/s", "left"))
    assert printed.err == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_progress_is_a_bar_on_a_terminal(tiny_run):
    import fcntl  # Windows has none of these three
    import pty
    import termios

    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    command = [sys.executable, ROOT / "train.py", *options(tiny_run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=child, text=True)
    os.close(child)
    shown = b""
    while chunk := read_terminal(parent):
        shown += chunk
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    assert b"12/12" in shown and b"loss" in shown and b"tokens/s" in shown
    assert "tokens/s" not in out and "validation loss" in out


def read_terminal(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # Linux says so when the other end is closed
        return b""


# Other places


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_ends_in_one_line(tiny_run, monkeypatch, name):
    for module in list(sys.modules):
        if module.split(".")[0] == name or module.startswith("torch.utils.tensorboard"):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"pip install {name}"):
        tiny_run(**{f"{name}_log": True})


def test_tensorboard_gets_what_the_log_gets(tiny_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = dict(tensorboard_log=True, sample_interval=6)
    out_dir = tiny_run(**options, max_iters=6)
    state = (out_dir / "ckpt.pt").read_bytes()
    for _ in range(2):  # as if the first had been killed: the second computes the same steps again
        (out_dir / "ckpt.pt").write_bytes(state)
        tiny_run(**options, init_from="resume")
    events = EventAccumulator(str(out_dir))
    events.Reload()
    for name in ("loss", "val_loss", "lr"):
        expected = [(r["step"], r[name]) for r in logged(out_dir) if name in r]
        found = [(e.step, e.value) for e in events.Scalars(name)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    assert events.Tags()["tensors"] == ["sample/text_summary"]


def test_wandb_gets_what_the_log_gets(tiny_run, monkeypatch):
    calls = []

    class Run:
        def log(self, figures, step):
            calls.append((step, figures))

        def finish(self):
            calls.append("finish")

    wandb = type("wandb", (), {"init": staticmethod(lambda **_: Run())})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    records = read_log(tiny_run(wandb_log=True) / "log.jsonl")
    expected = [(r.pop("step"), r) for r in records]
    for _, record in expected:
        del record["epoch"], record["seconds"]
    assert calls == [*expected, "finish"]


def test_a_resumed_run_is_the_same_run_for_wandb(tiny_run, monkeypatch):
    starts = []
    init = lambda **options: starts.append(options) or Mock()  # noqa: E731
    monkeypatch.setitem(sys.modules, "wandb", type("wandb", (), {"init": staticmethod(init)}))
    tiny_run(wandb_log=True, max_iters=3)
    tiny_run(wandb_log=True, init_from="resume")
    tiny_run(wandb_log=True)  # the earlier run is moved aside
    first, resumed, other = starts
    assert first["id"] == resumed["id"] != other["id"]
    assert {start["resume"] for start in starts} == {"allow"}  # go on with an id that exists


@pytest.mark.parametrize("place", ["log", "finish"])
def test_a_run_goes_on_without_a_tracker_that_fails(tiny_run, monkeypatch, capsys, place):
    steps = []

    def fail(place_here):
        if place_here == place:
            raise BrokenPipeError(32, "Broken pipe")

    class Run:
        def log(self, figures, step):
            steps.append(step)
            fail("log")

        def finish(self):
            fail("finish")

    wandb = type("wandb", (), {"init": staticmethod(lambda **_: Run())})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert read_log(tiny_run(wandb_log=True) / "log.jsonl")[-1]["step"] == 12
    assert "Wandb failed ([Errno 32] Broken pipe); it gets no more" in capsys.readouterr().out
    assert (len(steps) == 1) is (place == "log")


def test_a_tracker_that_can_not_start_ends_in_one_line(tiny_run, monkeypatch):
    def init(**_):
        raise RuntimeError("no key\nis set")

    monkeypatch.setitem(sys.modules, "wandb", type("wandb", (), {"init": staticmethod(init)}))
    with pytest.raises(UserError, match="wandb: no key is set; or use --wandb_log=False"):
        tiny_run(wandb_log=True)


# Folders


def test_a_folder_that_can_not_be_renamed_is_named(tmp_path, monkeypatch):
    def rename(*_):
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(UserError, match=r"out has an earlier run .* choose another out_dir"):
        log.set_aside(tmp_path / "out")


@pytest.mark.skipif(os.name == "nt", reason="Windows sets no limit on the size of files")
def test_a_log_that_can_not_grow_ends_in_one_line(tiny_run):
    code = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = [sys.executable, "-c", code, ROOT / "train.py", *options(tiny_run)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "out/tiny/log.jsonl: can not grow (File too large)" in done.stderr
    assert "are free" in done.stderr


@pytest.mark.skipif(not Path("/sys/kernel").exists(), reason="even root can not write to /sys")
def test_a_folder_without_permission_is_named(tiny_run):
    with pytest.raises((UserError, OSError), match="/sys"):
        tiny_run(out_dir="/sys/run")


# Damaged logs


def test_a_line_cut_by_a_kill_is_left_out(tiny_run):
    path = tiny_run() / "log.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 1')
    assert read_log(path)[-1]["step"] == 12


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "3",
        "null",
        "[" * 100_000,
        '{"step": 7}',
        '{"step": "7", "loss": 1.0}',
        '{"step": 7, "loss": "high"}',
        '{"step": 7, "val_loss": 1.0}',
        '{"step": 7, "train_loss": 1.0, "val_loss": 1.0, "sample": 3}',
        '{"step": true, "loss": 1.0}',
    ],
    ids=lambda line: line[:30],
)
def test_a_damaged_line_is_left_out_and_said_and_never_ends_a_run(tiny_run, capsys, line):
    path = tiny_run(max_iters=4, eval_interval=4) / "log.jsonl"
    good = read_log(path)
    content = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([*content[:2], line + "\n", *content[2:]]), encoding="utf-8")
    capsys.readouterr()
    assert read_log(path) == good
    assert capsys.readouterr().err == f"{path}: line 3 is damaged and was left out\n"
    write_report(path.parent)
    assert "line 3 is damaged" in capsys.readouterr().err
    out_dir = tiny_run(init_from="resume", max_iters=6)
    assert [r["step"] for r in logged(out_dir) if "loss" in r] == list(range(1, 7))


@many_examples
def test_a_damaged_log_is_read_drawn_and_continued(tiny_run, fuzz):
    path = tiny_run(max_iters=2, eval_interval=2) / "log.jsonl"
    original = path.read_bytes()

    @fuzz
    @given(damages)
    def read(damage):
        path.write_bytes(damaged(original, damage))
        assert isinstance(read_log(path), list)

    read()


@many_examples
def test_a_record_with_odd_values_is_left_out_or_drawn(tiny_run, fuzz):
    """Any value of a record is replaced; the records that are kept have finite numbers."""
    path = tiny_run(max_iters=2, eval_interval=2, sample_interval=2, sample_start="1") / "log.jsonl"
    records = read_log(path)
    places = [(i, key) for i, record in enumerate(records) for key in record]

    @fuzz
    @given(st.sampled_from(places), odd_values)
    def read(place, value):
        i, key = place
        changed = [*records[:i], {**records[i], key: value}, *records[i + 1 :]]
        path.write_text("".join(json.dumps(r) + "\n" for r in changed), encoding="utf-8")
        found = read_log(path)
        assert len(found) in (len(records), len(records) - 1)
        for record in found:
            numbers = [record[k] for k in ("epoch", "seconds", "loss", "val_loss") if k in record]
            assert all(math.isfinite(number) for number in numbers)

    read()


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400], ids=["NaN", "inf", "10**400"])
@pytest.mark.parametrize("key", ["step", "epoch", "seconds", "loss", "train_loss", "val_loss"])
def test_numbers_that_can_not_be_drawn_do_not_end_a_report(tiny_run, key, value):
    path = Path("out/tiny/log.jsonl")
    path.parent.mkdir(parents=True)
    good = {"step": 2, "epoch": 1.0, "seconds": 1.0}
    loss, evaluation = {**good, "loss": 1.0}, {**good, "train_loss": 1.0, "val_loss": 1.0}
    lines = [{**r, key: value} if key in r else r for r in (loss, evaluation)]
    lines = [loss, evaluation, *lines]
    path.write_text("".join(json.dumps(r) + "\n" for r in lines), encoding="utf-8")
    write_report(path.parent)
    assert read_log(path)[:2] == [loss, evaluation]
