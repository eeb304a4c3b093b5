"""Two programs at once on one folder: the second ends in one line, and no result is damaged."""

import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from configurator import UserError
from pathlib import Path

import pytest
from conftest import ROOT, assert_same_run, logged, options
from test_prepare_openweb import make_documents

import prepare_openweb
import prepare_shakespeare
import train
from support import start
from support.checkpoint import load_checkpoint
from support.files import lock_path
from support.processes import Processes

REFUSAL = "another process is at work there"


def command(script: str, *args: str) -> list[str]:
    return [sys.executable, str(ROOT / script), *args]


def assert_refused(returncode: int, errors: str) -> None:
    assert returncode == 1 and len(errors.splitlines()) == 1 and REFUSAL in errors, errors


@pytest.fixture(autouse=True)
def one_thread_per_process(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # several processes share the processors


# What one killed process leaves, and what the next one does


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
    assert before == {Path(f"{file}.tmp"), folder / f".{Path(file).name}.lock"}
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


def test_a_run_reads_its_checkpoint_after_it_has_locked_the_folder(tiny_run, monkeypatch):
    """Otherwise it could go on from one that another run, which is just ending, replaces."""
    tiny_run(max_iters=6)
    read = start.load_checkpoint

    def locked_and_read(path):
        with pytest.raises(UserError, match=REFUSAL), lock_path(path.parent):
            pass
        return read(path)

    monkeypatch.setattr(start, "load_checkpoint", locked_and_read)
    tiny_run(init_from="resume")
    monkeypatch.setattr(start, "load_checkpoint", read)
    with lock_path(Path("out/tiny")):  # only to look at a run that is at work is allowed
        tiny_run(init_from="resume", eval_only=True)


# A second process in the middle of a run


def test_a_second_training_in_one_folder_ends_in_one_line_and_moves_nothing(
    tiny_run, before_update
):
    alone = tiny_run(out_dir="out/alone")
    seen = set()

    def list_files() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in Path("out/tiny").iterdir()}

    def start_another(step, *_) -> None:
        if step != 6:
            return
        before = list_files()
        args = command("train.py", *options(tiny_run))
        other = subprocess.run(args, capture_output=True, encoding="utf-8")
        assert_refused(other.returncode, other.stderr)
        assert list_files() == before and not Path("out/tiny.1").exists()
        seen.update(before)

    before_update(start_another)
    assert_same_run(tiny_run(), alone)
    assert "ckpt.pt" in seen  # so there was something to move


def test_the_folder_stays_locked_until_the_report_is_written(tiny_run, monkeypatch):
    write_report = train.write_report

    def write_while_locked(out_dir):
        with pytest.raises(UserError, match=REFUSAL), lock_path(out_dir):
            pass
        return write_report(out_dir)

    monkeypatch.setattr(train, "write_report", write_while_locked)
    assert (tiny_run() / "loss.png").exists()


# 20 rounds of two processes with random delays and kills

ROUNDS, SEED = int(os.environ.get("ROUNDS", 20)), 13  # .ci/run makes fewer


def attempt(command: list[str], lock: Path, delay: float = 0, limit: float | None = None) -> str:
    """Start a process after `delay` seconds and return how it ended.

    With a `limit`, the process is killed so many seconds after one of the two has the lock.
    """
    time.sleep(delay)
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8"
    )
    while limit is not None and process.poll() is None and not lock.exists():
        time.sleep(0.01)
    try:
        errors, ended = process.communicate(timeout=limit)[1], True
    except subprocess.TimeoutExpired:
        process.kill()
        errors, ended = process.communicate()[1], False
    assert "Traceback" not in errors, errors
    if not ended or process.returncode == 0:
        return "ended" if ended else "killed"
    assert_refused(process.returncode, errors)
    return "refused"


@pytest.mark.slow
def test_20_rounds_of_two_trainings_are_refused_or_equal(tiny_run):
    """Two at once in one folder, then one alone, which completes what the two have left."""
    last, parent = 100, Path("out")
    alone = parent / "alone"
    changed = {"max_iters": last, "eval_interval": 20, "eval_iters": 2, "dropout": 0.1}
    changed["checkpoint_interval"] = 0.01

    def make_command(folder: Path, init_from: str) -> list[str]:
        return command(
            "train.py", *options(tiny_run, **changed, out_dir=folder, init_from=init_from)
        )

    def check(folder: Path, ended: bool) -> bool:
        """Compare the folder with `alone`. Returns whether it is complete, as it is if `ended`."""
        complete = False
        # A process that starts from scratch may have moved what a killed or ended one left.
        for path in [folder, *folder.parent.glob(f"{folder.name}.*")]:
            if (path / "log.jsonl").exists():  # not a mixture of two
                records = logged(path)
                assert records == logged(alone)[: len(records)]
            checkpoint = path / "ckpt.pt"
            if checkpoint.exists() and load_checkpoint(checkpoint).step == last:
                assert_same_run(path, alone)
                complete = True
        assert complete or not ended
        return complete

    def play_round(number: int) -> Counter:
        draw, folder = random.Random(f"{SEED} {number}"), parent / str(number)
        lock, attempts = parent / f".{number}.lock", []
        with ThreadPoolExecutor(2) as pool:
            for init_from in draw.choices(("auto", "scratch"), k=2):
                limit = draw.uniform(0, 0.6) * seconds if draw.random() < 0.5 else None
                delay = draw.uniform(0, 0.4) * seconds
                one = make_command(folder, init_from)
                attempts.append(pool.submit(attempt, one, lock, delay, limit))
        outcomes = sorted(one.result() for one in attempts)
        unfinished = not check(folder, "ended" in outcomes) and folder.exists()
        assert attempt(make_command(folder, "auto"), lock) == "ended" and check(folder, ended=True)
        assert {p.name for p in folder.iterdir()} == {p.name for p in alone.iterdir()}
        assert os.name == "nt" or not lock.exists()
        return Counter([" + ".join(outcomes)] + ["left unfinished"] * unfinished)

    started = time.perf_counter()
    assert attempt(make_command(alone, "auto"), parent / "no lock") == "ended"
    seconds = time.perf_counter() - started
    with ThreadPoolExecutor(2) as pool:
        counts = sum(pool.map(play_round, range(ROUNDS)), Counter())
    print(f"seed {SEED}, {ROUNDS} rounds, one process alone takes {seconds:.1f} s: {dict(counts)}")
    outcomes = ("refused", "killed", "ended", "left unfinished")
    for outcome in outcomes if ROUNDS >= 20 else ():  # a few rounds may miss one by chance
        assert any(outcome in name for name in counts), f"nothing was {outcome}"
