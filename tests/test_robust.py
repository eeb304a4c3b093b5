"""Kills, full disks, damaged files, numbers that are not finite: caused for real, and survived."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_train import logged, options

import train
from configurator import UserError, one_line, read_options
from support import checkpoint
from support import log as report
from support.checkpoint import load_checkpoint
from support.data import Dataset

TRAIN = ROOT / "train.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


# Kills and resumes


@pytest.mark.skipif(os.name == "nt", reason="the script forks")
@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_runs_end_with_the_same_bits(kills):
    script = ROOT / "tests" / "kill_training.py"
    done = subprocess.run(
        [sys.executable, script, f"--kills={kills}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"killed {kills} times" in done.stdout and "equal to the last bit" in done.stdout
    print(done.stdout)


def test_auto_starts_anew_without_a_checkpoint_and_goes_on_with_one(tiny_run):
    whole = tiny_run(out_dir="out/whole")
    tiny_run(out_dir="out/parts", init_from="auto", max_iters=7, lr_decay_iters=12)
    for _ in range(2):  # the second time there is nothing left to do
        parts = tiny_run(out_dir="out/parts", init_from="auto", lr_decay_iters=12)
        assert load_checkpoint(parts / "ckpt.pt")[1]["step"] == 12
    torch.testing.assert_close(
        *(load_checkpoint(path / "ckpt.pt")[1]["model"] for path in (whole, parts)), rtol=0, atol=0
    )


def test_checkpoints_between_evaluations_bound_what_is_lost(tiny_run, monkeypatch):
    saved = []
    monkeypatch.setattr(train.Trainer, "save_state", lambda trainer, step: saved.append(step))
    monkeypatch.setattr(train.Trainer, "save_is_due", lambda trainer: True)
    tiny_run()
    assert saved == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12, 12]


def test_saving_waits_for_its_interval_and_for_a_hundred_times_its_own_length(
    tiny_run, monkeypatch
):
    config = read_options(train.TrainConfig, options(tiny_run, checkpoint_interval=60))
    trainer = train.Trainer(config, train.Processes(config))
    now = trainer.saved_at
    monkeypatch.setattr(train.time, "perf_counter", lambda: now)
    for save_seconds, age, due in (
        (0.1, 59, False),
        (0.1, 61, True),
        (1.0, 61, False),
        (1.0, 101, True),
    ):
        trainer.save_seconds, now = save_seconds, trainer.saved_at + age
        assert trainer.save_is_due() is due


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send to another process")
def test_a_second_interrupt_stops_at_once(tiny_run):
    args = options(tiny_run, max_iters=100_000, eval_interval=100_000)
    code = f"""
import sys, time, train
taken = train.Trainer.train_step
def slow(trainer, step, *args):
    if step == 5:
        print("waiting", flush=True)
        time.sleep(30)
    return taken(trainer, step, *args)
train.Trainer.train_step = slow
train.main(train.configure(train.TrainConfig, {args!r}))
"""
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    for line in process.stdout:
        if line == "waiting\n":
            break
    started = time.perf_counter()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # the first is polite
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130 and time.perf_counter() - started < 10


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")
def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), "from the allocator"]
)
def test_running_out_of_memory_says_what_to_set(tiny_run, monkeypatch, error):
    def train_step(*_):
        if isinstance(error, str):
            torch.empty(1 << 55)
        raise error

    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    with pytest.raises(
        UserError,
        match="out of memory at batch_size=4; lower it, and raise gradient_accumulation_steps=2",
    ):
        tiny_run()


# Many processes


def torchrun(*args: str, script: list) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [*TORCHRUN, *args, *script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


def weights(path: str) -> dict:
    return load_checkpoint(Path(path) / "ckpt.pt")[1]["model"]


def test_a_killed_worker_is_restarted_and_the_run_ends_as_if_nothing_had_been(tiny_run):
    args = options(tiny_run, dtype="float32", max_iters=300, eval_interval=20, init_from="auto")
    launch = ("--standalone", "--nproc_per_node=2", "--max-restarts=2")
    finish(torchrun(*launch, script=[TRAIN, *args, "--out_dir=out/whole"]))
    process = torchrun(*launch, script=[TRAIN, *args, "--out_dir=out/killed"])
    log = Path("out/killed/log.jsonl")
    while not (log.exists() and log.read_text(encoding="utf-8").count("\n") > 60):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    workers = [
        c for c in psutil.Process(process.pid).children() if "train.py" in " ".join(c.cmdline())
    ]
    assert len(workers) == 2
    workers[1].kill()
    out = finish(process)
    assert out.count("parameters:") == 2  # it began, and began again
    assert logged(Path("out/killed")) == logged(Path("out/whole"))
    torch.testing.assert_close(weights("out/killed"), weights("out/whole"), rtol=0, atol=0)


def test_a_run_goes_on_with_another_number_of_processes(tiny_run):
    tiny_run(out_dir="out/one", dtype="float32", dropout=0.1)
    common = dict(
        out_dir="out/mixed", dtype="float32", dropout=0.1, lr_decay_iters=12, init_from="auto"
    )
    script = [TRAIN, *options(tiny_run, **{**common, "max_iters": 5})]
    finish(torchrun("--standalone", "--nproc_per_node=2", script=script))
    tiny_run(**common)
    torch.testing.assert_close(weights("out/one"), weights("out/mixed"), rtol=1e-3, atol=1e-4)


def test_two_machines_are_one(tiny_run):
    """Two invocations of torchrun that meet at an address, here of this machine's own."""
    tiny_run(out_dir="out/one", dtype="float32")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    meet = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}",
    ]
    meet += ["--rdzv_id=test", "--local_addr=127.0.0.1"]
    args = options(tiny_run, out_dir="out/two", dtype="float32")
    outputs = [finish(p) for p in [torchrun(*meet, script=[TRAIN, *args]) for _ in range(2)]]
    assert sum(out.count("parameters:") for out in outputs) == 1
    torch.testing.assert_close(weights("out/one"), weights("out/two"), rtol=1e-3, atol=1e-4)


# Losses and gradients that are not finite


def poisoned(tiny_run, monkeypatch, poison, at_step: int = 8, **changed) -> str:
    taken = train.Trainer.train_step

    def train_step(trainer, step, *args):
        if step == at_step:
            with torch.no_grad():
                poison(trainer)
        return taken(trainer, step, *args)

    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    with pytest.raises(UserError) as error:
        tiny_run(**changed)
    kept = load_checkpoint(Path("out/tiny/ckpt.pt"))[1]
    assert kept["step"] == 6 and all(p.isfinite().all() for p in kept["model"].values())
    assert logged(Path("out/tiny"))[-1]["step"] == 8
    message = str(error.value)
    assert "\n" not in message and "step 8: " in message and "ckpt.pt is as it was" in message
    assert message.count(", ") >= 6 and "at learning rate 0.00" in message
    return message


def test_weights_that_are_not_finite_are_named(tiny_run, monkeypatch):
    def poison(trainer):
        trainer.model.transformer.h[1].mlp.c_fc.weight[3, 3] = float("nan")

    message = poisoned(tiny_run, monkeypatch, poison)
    assert "the output of transformer.h.1.mlp.c_fc is the first" in message
    assert "to blame are the weights: 1 values of transformer.h.1.mlp.c_fc.weight" in message


def test_a_batch_that_alone_overflows_is_named(tiny_run, monkeypatch):
    """The embedding of a token that only this batch has is too large for float32's sums."""

    def poison(trainer):
        trainer.model.transformer.wte.weight[0] = 3e38
        batch = trainer.micro_batch

        def only_step_8_has_token_0(step, micro):
            x, y = batch(step, micro)
            x[x == 0] = 5
            x[0, 3] = 0 if step == 8 else 5
            return x, y

        trainer.micro_batch = only_step_8_has_token_0

    message = poisoned(tiny_run, monkeypatch, poison, tie_weights=False)
    assert "in float32 too; to blame is the batch: another one gives a loss of" in message


def test_weights_that_have_grown_too_large_are_named(tiny_run, monkeypatch):
    def poison(trainer):
        trainer.model.transformer.h[0].attn.c_proj.weight.fill_(3e38)

    message = poisoned(tiny_run, monkeypatch, poison)
    assert "to blame are the weights, which have grown" in message


def test_a_dtype_that_overflows_is_named(tiny_run, monkeypatch):
    def poison(trainer):
        trainer.model.transformer.h[0].mlp.c_fc.weight.mul_(1e7)
        trainer.model.transformer.h[0].mlp.c_proj.weight.mul_(1e-7)

    message = poisoned(tiny_run, monkeypatch, poison, dtype="float16")
    assert "the output of transformer.h.0.mlp.c_fc is the first" in message
    assert "to blame is float16: in float32 the same batch gives a loss of" in message


def test_a_gradient_that_is_not_finite_is_named(tiny_run, monkeypatch):
    def poison(trainer):
        norm = trainer.model.transformer.h[0].ln_1
        norm.register_full_backward_hook(lambda *_: (torch.full_like(_[1][0], float("nan")),))

    message = poisoned(tiny_run, monkeypatch, poison)
    assert (
        "the loss is 2." in message
        and "the gradient nan" in message
        and "the gradient of transformer." in message
    )


def test_steps_that_the_float16_scaler_leaves_out_are_no_errors(tiny_run, monkeypatch):
    norms = []
    taken = train.Trainer.train_step

    def train_step(trainer, step, *args):
        if step == 3:
            trainer.scaler.update(new_scale=2.0**40)
        figures = taken(trainer, step, *args)
        norms.append(figures[1])
        return figures

    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    out_dir = tiny_run(dtype="float16")
    assert not all(map(torch.isfinite, norms))
    assert all(p.isfinite().all() for p in weights(str(out_dir)).values())


# Disks


def run_with_largest_file(size: int, *args: str) -> subprocess.CompletedProcess:
    """Train under a limit on the size of files, which fails a write as a full disk does."""
    code = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
    code += "sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", code, TRAIN, *args], capture_output=True, text=True
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit to set on the size of files")
def test_a_checkpoint_that_does_not_fit_leaves_the_old_one(tiny_run):
    out_dir = tiny_run(lr_decay_iters=24)
    before = (out_dir / "ckpt.pt").read_bytes()
    args = options(tiny_run, init_from="resume", max_iters=24, lr_decay_iters=24)
    done = run_with_largest_file(20_000, *args)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    needed = checkpoint.tensor_bytes(load_checkpoint(out_dir / "best.pt")[1])
    for words in (
        "best.pt: can not be written (File too large)",
        f"needs {needed:,} bytes",
        "are free",
    ):
        assert words in done.stderr
    assert (out_dir / "ckpt.pt").read_bytes() == before and not list(out_dir.glob("*.tmp"))
    resumed = tiny_run(init_from="resume", max_iters=24, lr_decay_iters=24)
    whole = tiny_run(out_dir="out/whole", max_iters=24)
    torch.testing.assert_close(weights(str(resumed)), weights(str(whole)), rtol=0, atol=0)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit to set on the size of files")
def test_a_log_that_can_not_grow_ends_in_one_line(tiny_run):
    done = run_with_largest_file(100, *options(tiny_run))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert (
        "out/tiny/log.jsonl: can not grow (File too large)" in done.stderr
        and "are free" in done.stderr
    )


@pytest.mark.skipif(
    not Path("/sys/kernel").exists(), reason="a folder that not even root may write to is Linux's"
)
def test_a_folder_without_permission_is_named(tiny_run):
    done = subprocess.run(
        [sys.executable, TRAIN, *options(tiny_run, out_dir="/sys/run")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "/sys/run" in done.stderr


# Damaged files, by the hundred

FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
damages = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True)),
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True)),
    st.tuples(st.just("random"), st.binary(max_size=300)),
)


def damaged(content: bytes, damage: tuple) -> bytes:
    kind, value = damage
    if kind == "random":
        return value
    if kind == "cut":
        return content[: int(value * len(content))]
    bit = int(value * len(content) * 8)
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


def or_one_line(read):
    """What `read` returns, or None if it raised a UserError; anything else fails the test."""
    try:
        return read()
    except UserError as error:
        assert str(error) and "\n" not in one_line(error)
        return None


@pytest.mark.parametrize("name", ["train.bin", "meta.json"])
def test_a_damaged_data_set_is_refused_or_the_same(dataset, name):
    original = (dataset / name).read_bytes()
    tokens = Dataset(dataset, 16).train.open().copy()

    @FUZZ
    @given(damages)
    def look(damage):
        content = damaged(original, damage)
        (dataset / name).write_bytes(content)
        got = or_one_line(lambda: Dataset(dataset, 16))
        assert got is None or (got.train.open() == tokens).all()
        assert name == "meta.json" or content == original or got is None

    look()


def test_meta_json_cut_at_every_length_is_refused(dataset):
    original = (dataset / "meta.json").read_bytes()
    for length in range(len(original) - 1):
        (dataset / "meta.json").write_bytes(original[:length])
        assert or_one_line(lambda: Dataset(dataset, 16)) is None


def test_a_damaged_checkpoint_is_refused_or_the_same(tiny_run):
    path = tiny_run() / "ckpt.pt"
    original, expected = path.read_bytes(), load_checkpoint(path)[1]

    @FUZZ
    @given(damages)
    def look(damage):
        path.write_bytes(damaged(original, damage))
        got = or_one_line(lambda: load_checkpoint(path))
        if got is not None:  # the damage is in bytes that mean nothing: padding, dates
            for key, value in expected.items():
                if key in ("model", "optimizers"):
                    torch.testing.assert_close(got[1][key], value, rtol=0, atol=0)
                else:
                    assert got[1][key] == value

    look()


def test_checkpoints_that_contradict_themselves_are_refused(tiny_run):
    path = tiny_run() / "ckpt.pt"
    good = torch.load(path, weights_only=True)
    for key in ("model", "model_config"):
        torch.save({k: v for k, v in good.items() if k != key}, path)
        assert or_one_line(lambda: load_checkpoint(path)) is None
    for changed in ({"n_embd": 32}, {"n_head": 3}, {"unknown": 1}):
        torch.save({**good, "model_config": {**good["model_config"], **changed}}, path)
        assert or_one_line(lambda: load_checkpoint(path)) is None


def test_a_damaged_config_file_is_refused_in_one_line_or_read(tmp_path):
    original = (ROOT / "config" / "phase1_char.py").read_bytes()
    path = tmp_path / "config.py"

    @FUZZ
    @given(damages)
    def look(damage):
        path.write_bytes(damaged(original, damage))
        or_one_line(lambda: read_options(train.TrainConfig, [str(path)]))

    look()


@FUZZ
@given(st.text(), st.text())
def test_any_argument_is_refused_in_one_line_or_read(name, value):
    or_one_line(lambda: read_options(train.TrainConfig, [f"--{name}={value}"]))
    known = random.Random(value).choice(list(train.TrainConfig.__dataclass_fields__))
    or_one_line(lambda: read_options(train.TrainConfig, [f"--{known}={value}"]))


def test_a_damaged_log_is_refused_or_read(tiny_run):
    path = tiny_run() / "log.jsonl"
    original = path.read_bytes()

    @FUZZ
    @given(damages)
    def look(damage):
        path.write_bytes(damaged(original, damage))
        or_one_line(lambda: report.read_log(path))

    look()


def test_an_evaluation_that_was_logged_but_not_saved_is_logged_once(tiny_run, monkeypatch):
    """A save at the step of an evaluation, then the evaluation's line, then a kill before its own save."""
    whole = tiny_run(out_dir="out/whole")
    saved = train.Trainer.save_state

    def save_state(trainer, step):
        if trainer.evaluated_step == 6:
            raise SystemExit
        saved(trainer, step)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "save_state", save_state)
        patch.setattr(train.Trainer, "save_is_due", lambda _: True)
        with pytest.raises(SystemExit):
            tiny_run()
    assert logged(tiny_run(init_from="auto")) == logged(whole)


def test_a_run_that_reached_its_target_is_over_when_started_again(tiny_run):
    before = logged(tiny_run(eval_interval=2, target_val_loss=2.8))
    assert logged(tiny_run(eval_interval=2, target_val_loss=2.8, init_from="auto")) == before


def test_weights_that_are_not_finite_are_not_saved(tiny_run, monkeypatch):
    taken = train.Trainer.train_step

    def train_step(trainer, step, *args):
        result = taken(trainer, step, *args)
        if step == 8:
            with torch.no_grad():
                trainer.model.transformer.wpe.weight[3, 3] = float("inf")
        return result

    monkeypatch.setattr(train.Trainer, "train_step", train_step)
    monkeypatch.setattr(train.Trainer, "save_is_due", lambda _: True)
    with pytest.raises(UserError, match="weights after step 9 are not finite any more"):
        tiny_run()
    assert load_checkpoint(Path("out/tiny/ckpt.pt"))[1]["step"] == 8


def test_a_scale_of_float16_that_only_falls_stops_the_run(tiny_run, monkeypatch):
    def poisoned_init(trainer, *args):
        made(trainer, *args)
        norm = trainer.model.transformer.h[0].ln_1
        norm.register_full_backward_hook(
            lambda _module, grads, _outputs: (torch.full_like(grads[0], float("nan")),)
        )

    made = train.Trainer.__init__
    monkeypatch.setattr(train.Trainer, "__init__", poisoned_init)
    with pytest.raises(UserError, match=r"the loss is 2\..* the gradient nan"):
        tiny_run(dtype="float16", max_iters=100)


def test_weights_alone_are_no_checkpoint_to_go_on_from(tiny_run):
    out_dir = tiny_run()
    (out_dir / "best.pt").replace(out_dir / "ckpt.pt")
    with pytest.raises(UserError, match="weights alone"):
        tiny_run(init_from="resume")


def test_leftovers_of_a_killed_write_do_no_harm(tiny_run):
    Path("out/tiny").mkdir(parents=True)
    for name in ("ckpt.pt.tmp", "log.jsonl.tmp"):
        Path("out/tiny", name).write_bytes(b"half")
    out_dir = tiny_run()
    assert not list(out_dir.glob("*.tmp"))
    shutil.rmtree(out_dir)
