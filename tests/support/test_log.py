"""The log of a run: its records, its lines on the screen, and what goes elsewhere."""

import json
import os
import struct
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from conftest import ROOT, logged, options

import train
from configurator import UserError
from support import log
from support.log import read_log, shorten


def test_records_have_the_documented_keys_and_are_printed(tiny_run, capsys):
    out_dir = tiny_run(log_interval=4, sample_interval=12, sample_start="1", sample_tokens=2)
    lines = (out_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    step = {"step", "epoch", "seconds", "loss", "grad_norm", "lr", "tokens_per_second"}
    evaluation = {"step", "epoch", "seconds", "train_loss", "val_loss"}
    kinds = {frozenset(json.loads(line)) for line in lines}
    sample = {"step", "epoch", "seconds", "sample"}
    assert kinds == {frozenset(step), frozenset(evaluation), frozenset(sample)}
    assert [r["step"] for r in logged(out_dir) if "loss" in r] == [4, 8, 12]
    seconds = [json.loads(line)["seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[0] >= 0
    printed = capsys.readouterr()
    assert all(part in printed.out for part in ("| loss ", "tokens/s", "left"))
    assert printed.err == "" and printed.out.count("evaluating ...") == 1


def test_a_resumed_run_appends_and_its_clock_goes_on(tiny_run):
    path = tiny_run() / "log.jsonl"
    lines = [r | {"seconds": r["seconds"] + 1000} for r in read_log(path)]
    cut = b'{"step": 13, "epoch": 0.1, "los'  # by a kill
    before = "".join(json.dumps(record) + "\n" for record in lines).encode()
    path.write_bytes(before + cut)
    records = read_log(tiny_run(init_from="resume", max_iters=20) / "log.jsonl")
    assert path.read_bytes().startswith(before + b'{"step": 13, "epoch": ')
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 21))
    assert all(r["seconds"] > 1000 for r in records)


def test_what_a_resumed_run_computed_again_is_read_once(tmp_path):
    def line(step: int, **figures) -> str:
        return json.dumps({"step": step, **figures}) + "\n"

    text = line(1, loss=1.0) + line(2, loss=2.0) + line(2, val_loss=2.5) + line(3, loss=3.0)
    text += line(2, sample="a")  # resumed after step 2: step 3 is computed again
    text += line(2, val_loss=2.6) + line(3, loss=3.1) + line(4, loss=4.0)
    (tmp_path / "log.jsonl").write_text(text + line(5, loss=5.0)[:-1], encoding="utf-8")
    rest = {"epoch": 0, "seconds": 0}
    assert read_log(tmp_path / "log.jsonl") == [
        {"step": 1, "loss": 1.0, **rest},
        {"step": 2, "loss": 2.0, **rest},
        {"step": 2, "val_loss": 2.6, **rest},
        {"step": 2, "sample": "a", **rest},
        {"step": 3, "loss": 3.1, **rest},
        {"step": 4, "loss": 4.0, **rest},
    ]
    with pytest.raises(UserError, match=r"none/log\.jsonl: no such file; name the folder of a run"):
        read_log(tmp_path / "none" / "log.jsonl")


def test_speed_is_that_of_the_steps_and_not_of_what_is_between_them(tiny_run, monkeypatch):
    now = [0.0]

    def taking(seconds, function):
        def slow(*args):
            now[0] += seconds
            return function(*args)

        return slow

    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    for name in ("learning_rate", "evaluate", "write_sample", "save_checkpoint"):
        seconds = 1.0 if name == "learning_rate" else 1000.0
        monkeypatch.setattr(train, name, taking(seconds, getattr(train, name)))
    sample = {"sample_interval": 6, "sample_start": "1", "sample_tokens": 1}
    records = read_log(tiny_run(log_interval=4, eval_interval=6, **sample) / "log.jsonl")
    speeds = {r["step"]: r["tokens_per_second"] for r in records if "tokens_per_second" in r}
    assert speeds == {4: 128, 8: 128, 12: 128}  # tokens in a step of one second


def test_a_long_text_is_shortened_between_words():
    assert shorten("a\n\nb") == "a / b" and shorten("x" * 44) == "x" * 44
    assert shorten("word " * 20) == "word " * 8 + "..." and len(shorten("ab " * 20)) <= 44


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
    with suppress(OSError):  # Linux says so when the other end is closed
        while chunk := os.read(parent, 65536):
            shown += chunk
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    assert b"12/12" in shown and b"loss" in shown and b"tokens/s" in shown
    assert "tokens/s" not in out and "validation loss" in out


@pytest.mark.parametrize("name", ["wandb", "torch.utils.tensorboard"])
def test_a_missing_package_ends_in_one_line(tiny_run, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    name = name.split(".")[-1]
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


def fake_wandb(monkeypatch, init) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))


def test_wandb_gets_what_the_log_gets_and_a_resumed_run_is_the_same_run_there(
    tiny_run, monkeypatch
):
    starts, run = [], Mock()
    fake_wandb(monkeypatch, lambda **options: starts.append(options) or run)
    records = read_log(tiny_run(wandb_log=True, wandb_run_name="a", max_iters=3) / "log.jsonl")
    expected = [(r.pop("step"), r) for r in records]
    for _, record in expected:
        del record["epoch"], record["seconds"]
    assert [(call.kwargs["step"], call.args[0]) for call in run.log.mock_calls] == expected
    run.finish.assert_called_once_with()
    tiny_run(wandb_log=True, init_from="resume")
    tiny_run(wandb_log=True)  # the earlier run is moved aside
    first, resumed, other = starts
    assert first["id"] == resumed["id"] != other["id"] and first["config"]["max_iters"] == 3
    assert (first["name"], first["project"]) == ("a", "gpt2-from-scratch")
    assert {start["resume"] for start in starts} == {"allow"}  # go on with an id that exists


def test_a_tracker_that_can_not_start_ends_in_one_line(tiny_run, monkeypatch):
    fake_wandb(monkeypatch, Mock(side_effect=RuntimeError("no key\nis set")))
    with pytest.raises(UserError, match="wandb: no key is set; or use --wandb_log=False"):
        tiny_run(wandb_log=True)


@pytest.mark.parametrize("method", ["log", "finish"])
def test_a_run_goes_on_without_a_tracker_that_fails(tiny_run, monkeypatch, capsys, method):
    run = Mock(**{f"{method}.side_effect": BrokenPipeError(32, "Broken pipe")})
    fake_wandb(monkeypatch, lambda **_: run)
    assert read_log(tiny_run(wandb_log=True, max_iters=2) / "log.jsonl")[-1]["step"] == 2
    assert "failed ([Errno 32] Broken pipe); it gets no more" in capsys.readouterr().out
    assert (run.log.call_count == 1) is (method == "log")
