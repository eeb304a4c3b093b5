"""Several processes of torchrun compute what one computes, and end as one."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, logged, options, weights

from configurator import UserError
from support.processes import Processes

# gloo needs a network interface; without a network only this one works.
NAMES = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
LOOPBACK = {"GLOO_SOCKET_IFNAME": NAMES[0]} if NAMES else {}
TRAIN = str(ROOT / "train.py")
TWO = ("--standalone", "--nproc_per_node=2")


def torchrun(*args: str) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **LOOPBACK}
    command = [sys.executable, "-m", "torch.distributed.run", *args]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def finish(process: subprocess.Popen) -> str:
    """Return what the processes printed. They must all succeed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


def test_one_process_needs_no_torchrun(capsys):
    processes, values = Processes("cpu"), torch.tensor([1.0, 2.0])
    assert processes.is_first and (processes.rank, processes.count) == (0, 1)
    assert processes.sum(values).tolist() == [1, 2] and processes.gather("a") == ["a"]
    assert processes.any(True) and not processes.any(False)
    assert list(processes.share(5)) == [0, 1, 2, 3, 4]
    model = torch.nn.Linear(2, 2)
    assert processes.wrap(model) is model
    for processes.is_first in (True, False):
        processes.say("a line")
    assert capsys.readouterr().out == "a line\n"


def test_every_process_has_its_share_of_the_passes():
    processes = Processes("cpu")
    for rank, passes in ((0, [0, 1, 2]), (1, [3, 4, 5])):
        processes.rank, processes.count = rank, 2
        assert list(processes.share(6)) == passes
    words = "gradient_accumulation_steps=5 can not be divided among 2 processes; set it to a mul"
    with pytest.raises(UserError, match=words):
        processes.share(5)


def test_a_rank_without_torchrun_is_refused(monkeypatch):
    for rank in ("", "a name"):
        monkeypatch.setenv("RANK", rank)
        assert not Processes("cpu").distributed
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    words = "the environment has RANK but no LOCAL_RANK; start with torchrun, or unset RANK"
    with pytest.raises(UserError, match=words):
        Processes("cpu")


@pytest.mark.parametrize(
    "changed",
    [
        {"dropout": 0.1},
        pytest.param({"optimizer": "muon", "dropout": 0.1}, marks=pytest.mark.slow),
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_processes_train_the_model_of_one(tiny_run, changed):
    common = {"dtype": "float32", "gradient_accumulation_steps": 4, **changed}
    one = tiny_run(out_dir="out/one", **{**common, "compile": False})
    two = {"out_dir": "out/two", "backend": "nccl"}  # which becomes gloo on a CPU
    printed = finish(torchrun(*TWO, TRAIN, *options(tiny_run, **two, **common)))
    assert printed.count("parameters:") == 1
    assert ("\ncompiled in" in printed) is ("compile" in changed)
    for a, b in zip(logged(one), logged(Path("out/two")), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    # Muon's products in bfloat16 enlarge differences in the last digits of a gradient.
    tolerance = 1e-2 if changed.get("optimizer") == "muon" else 1e-3
    two = weights(Path("out/two"))
    torch.testing.assert_close(weights(one), two, rtol=1e-2, atol=tolerance)


def test_when_the_first_process_fails_the_other_prints_nothing(tiny_run):
    """Started without torchrun, which would end the other process at once."""
    Path("file").write_text("no folder", encoding="utf-8")
    env = {**os.environ, "OMP_NUM_THREADS": "1", **LOOPBACK, "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # no warnings about the names of this machine
    command = [sys.executable, TRAIN, *options(tiny_run, out_dir="file/run")]
    ranks = [{**env, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    pipe = subprocess.PIPE
    two = [subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=e) for e in ranks]
    (_, error), other = (process.communicate(timeout=120) for process in two)
    assert [process.returncode for process in two] == [1, 1], error
    assert error.count("\n") == 1 and error.startswith("error: ") and "file" in error
    assert other == ("", "")


@pytest.mark.slow
def test_two_machines_train_the_model_of_one(tiny_run):
    """torchrun is started twice; the two meet at an address of this machine."""
    one = tiny_run(out_dir="out/one", dtype="float32")
    meet = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=test"]
    meet += [f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--local_addr=127.0.0.1"]
    args = options(tiny_run, out_dir="out/two", dtype="float32")
    printed = [finish(process) for process in [torchrun(*meet, TRAIN, *args) for _ in range(2)]]
    assert sum(out.count("parameters:") for out in printed) == 1
    two = weights(Path("out/two"))
    torch.testing.assert_close(weights(one), two, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_killed_worker_is_restarted_and_the_run_ends_with_the_same_bits(tiny_run):
    args = options(tiny_run, dtype="float32", max_iters=300, eval_interval=20, init_from="auto")
    launch = (*TWO, "--max-restarts=2", TRAIN, *args)
    finish(torchrun(*launch, "--out_dir=out/whole"))
    process = torchrun(*launch, "--out_dir=out/killed")
    log = Path("out/killed/log.jsonl")
    while not (log.exists() and log.read_text(encoding="utf-8").count("\n") > 60):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    children = psutil.Process(process.pid).children()
    workers = [child for child in children if "train.py" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[1].kill()
    assert finish(process).count("parameters:") == 2  # the run began, and began again
    killed, whole = Path("out/killed"), Path("out/whole")
    assert logged(killed) == logged(whole)
    torch.testing.assert_close(weights(killed), weights(whole), rtol=0, atol=0)
