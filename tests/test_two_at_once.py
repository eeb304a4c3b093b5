"""Two programs at once on one folder: the second ends in one line, and no result is damaged."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_prepare_openweb import make_documents

import prepare_openweb
import prepare_shakespeare
import train
from configurator import UserError
from support import start
from support.files import lock_path
from support.processes import Processes

REFUSAL = "another process is at work there"


@pytest.fixture
def hold():
    """A function: start a process that writes a file in a locked folder until stdin is closed."""
    code = """
import sys
from pathlib import Path
from support.files import atomic_write, lock_path
path = Path(sys.argv[1])
with lock_path(path.parent), atomic_write(path) as file:
    file.write(bytes(1000))
    file.flush()
    print("working", flush=True)
    sys.stdin.read()
"""
    processes = []

    def start(path: Path) -> subprocess.Popen:
        args, pipe = [sys.executable, "-c", code, str(path)], subprocess.PIPE
        processes.append(subprocess.Popen(args, stdin=pipe, stdout=pipe, text=True))
        assert processes[-1].stdout.readline() == "working\n"
        return processes[-1]

    yield start
    for process in processes:
        with process:
            process.kill()


def prepare_plays(tiny_run) -> Path:
    prepare_shakespeare.main(prepare_shakespeare.PrepareConfig(input="tiny.txt", dataset="other"))
    return Path("data/other")


def prepare_web(tiny_run) -> Path:
    Path("web.txt").write_text("\n<|endoftext|>\n".join(make_documents(60)), encoding="utf-8")
    small = {"vocab_size": 300, "val_fraction": 0.2}
    config = prepare_openweb.PrepareConfig(input="web.txt", dataset="other", **small)
    prepare_openweb.main(config)
    return Path("data/other")


def train_tiny(tiny_run) -> Path:
    return tiny_run(out_dir="out/other")


@pytest.mark.parametrize(
    ("file", "program"),
    [
        ("data/other/meta.json", prepare_plays),
        ("data/other/meta.json", prepare_web),
        ("out/other/ckpt.pt", train_tiny),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_folder_is_free_again_and_clean_after_the_process_at_work_was_killed(
    tiny_run, hold, file, program
):
    folder = Path(file).parent
    other = hold(Path(file))
    before = {*folder.iterdir()}
    assert before == {Path(f"{file}.tmp")}
    with pytest.raises(UserError, match=REFUSAL):
        program(tiny_run)
    assert {*folder.iterdir()} == before  # the refused program changed nothing

    other.kill()
    other.wait()
    lock = folder.with_name(".other.lock")
    assert lock.exists() and before <= {*folder.iterdir()}
    assert program(tiny_run) == folder
    assert os.name == "nt" or not (lock.exists() or before & {*folder.iterdir()})


def test_a_worker_of_torchrun_waits_for_one_that_is_ending(tmp_path, hold):
    out_dir, processes = tmp_path / "out", Processes("cpu")
    config = train.TrainConfig(out_dir=str(out_dir))
    other = hold(out_dir / "ckpt.pt")
    with pytest.raises(UserError, match=REFUSAL), start.lock_run(config, processes):
        pass
    processes.is_first = False
    with start.lock_run(config, processes):
        pass  # the other workers leave the lock to the first one
    processes.is_first = True
    processes.distributed, processes.gather = True, lambda _: []
    assert not (out_dir / "ckpt.pt").exists()
    threading.Timer(1, other.stdin.close).start()
    with start.lock_run(config, processes):
        assert (out_dir / "ckpt.pt").exists()  # so the other process was done


def test_a_run_is_locked_from_the_reading_of_its_checkpoint_to_its_report(tiny_run, monkeypatch):
    """Otherwise it could move away or continue what another run is just saving."""
    tiny_run(max_iters=1)

    def check_and(function):
        def checked(path):
            with pytest.raises(UserError, match=REFUSAL), lock_path(Path("out/tiny")):
                pass
            calls.append(function.__name__)
            return function(path)

        return checked

    calls = []
    with lock_path(Path("out/tiny")):  # only to look at a run that is at work is allowed
        tiny_run(init_from="resume", eval_only=True)
    monkeypatch.setattr(start, "load_checkpoint", check_and(start.load_checkpoint))
    for name in ("make_run_folder", "write_report"):
        monkeypatch.setattr(train, name, check_and(getattr(train, name)))
    for init_from in ("resume", "scratch"):
        tiny_run(init_from=init_from)
    assert calls == ["load_checkpoint", "write_report", "make_run_folder", "write_report"]
