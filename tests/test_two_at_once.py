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
from conftest import ROOT, TEXT
from test_prepare_openweb import contents, make_documents
from test_train import assert_same_run, logged, options

import prepare_openweb
import prepare_shakespeare
import train
from support import data, log, start
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
    """A function: start a process that writes to a locked folder until its stdin is closed."""
    code = """
import sys
from pathlib import Path
from support.files import atomic_write, lock_path
folder = Path(sys.argv[1])
with lock_path(folder), atomic_write(folder / "ckpt.pt") as file:
    file.write(bytes(1000))
    file.flush()
    print("working", flush=True)
    sys.stdin.read()
"""
    processes = []

    def start(folder: Path) -> subprocess.Popen:
        args, pipe = [sys.executable, "-c", code, str(folder)], subprocess.PIPE
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


PROGRAMS = {"data/other": [prepare_plays, prepare_web], "out/other": [train_tiny]}
PAIRS = [(Path(folder), program) for folder, programs in PROGRAMS.items() for program in programs]


@pytest.mark.parametrize("folder, program", PAIRS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_folder_is_free_again_and_clean_after_the_process_at_work_was_killed(
    tiny_run, hold, folder, program
):
    other = hold(folder)
    temporary = list(folder.iterdir())
    notes = folder / "notes.tmp"
    notes.write_text("no temporary file of ours", encoding="utf-8")
    assert len(temporary) == 1 and temporary[0].match("ckpt.pt.????????.tmp")
    with pytest.raises(UserError, match=REFUSAL):
        program(tiny_run)
    assert {*folder.iterdir()} == {notes, *temporary}  # the refused program changed nothing

    other.kill()
    other.wait()
    lock = folder.with_name(".other.lock")
    assert lock.exists() and temporary[0].exists()
    assert program(tiny_run) == folder
    assert list(folder.glob("*.tmp")) == [notes]
    assert os.name == "nt" or not lock.exists()


def test_a_worker_of_torchrun_waits_for_one_that_is_ending(tmp_path, hold):
    out_dir, processes = tmp_path / "out", Processes("cpu")
    config = train.TrainConfig(out_dir=str(out_dir))
    other = hold(out_dir)
    with pytest.raises(UserError, match=REFUSAL), log.lock_run(config, processes):
        pass
    processes.is_first = False
    with log.lock_run(config, processes):
        pass  # the other workers leave the lock to the first one
    processes.is_first = True
    processes.distributed, processes.gather = True, lambda _: []
    assert not (out_dir / "ckpt.pt").exists()
    threading.Timer(1, other.stdin.close).start()
    with log.lock_run(config, processes):
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


def during_step_6(monkeypatch, action) -> None:
    """Have the training runs of this process call `action` before their step 6."""
    step_of_trainer = train.Trainer.train_step

    def train_step(trainer, step, *args, **others):
        if step == 6:
            action()
        return step_of_trainer(trainer, step, *args, **others)

    monkeypatch.setattr(train.Trainer, "train_step", train_step)


def test_a_second_training_in_one_folder_ends_in_one_line_and_moves_nothing(tiny_run, monkeypatch):
    alone = tiny_run(out_dir="out/alone")
    seen = set()

    def list_files() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in Path("out/tiny").iterdir()}

    def start_another() -> None:
        before = list_files()
        args = command("train.py", *options(tiny_run))
        other = subprocess.run(args, capture_output=True, encoding="utf-8")
        assert_refused(other.returncode, other.stderr)
        assert list_files() == before and not Path("out/tiny.1").exists()
        seen.update(before)

    during_step_6(monkeypatch, start_another)
    assert_same_run(tiny_run(), alone)
    assert "ckpt.pt" in seen  # so there was something to move


def test_data_prepared_anew_does_not_change_a_run_that_has_mapped_them(tiny_run, monkeypatch):
    memory = data.psutil.virtual_memory()._replace(available=0)
    monkeypatch.setattr(data.psutil, "virtual_memory", lambda: memory)  # forces the map
    alone, before = tiny_run(out_dir="out/alone"), Path("data/tiny/train.bin").read_bytes()

    def prepare_anew() -> None:
        Path("other.txt").write_text(TEXT[::-1], encoding="utf-8")
        args = ("--input=other.txt", "--dataset=tiny")
        done = subprocess.run(command("prepare_shakespeare.py", *args), check=False)
        # Windows replaces no open file, so there the preparation is refused.
        assert done.returncode == 0 or os.name == "nt"

    during_step_6(monkeypatch, prepare_anew)
    assert_same_run(tiny_run(), alone)
    assert Path("data/tiny/train.bin").read_bytes() != before or os.name == "nt"


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


def play(parent: Path, make_commands, check) -> None:
    """Play all rounds, two at a time, each in its own folder in `parent`; print what happened.

    `make_commands(folder)` returns three commands: two that run at once, and one that then runs
    alone. `check(folder, ended)` compares the folder with one that was left alone, and returns
    whether it is complete; it must be if `ended`.
    """

    def play_round(number: int) -> Counter:
        draw, folder = random.Random(f"{SEED} {number}"), parent / str(number)
        lock, attempts = parent / f".{number}.lock", []
        *two, again = make_commands(folder)
        with ThreadPoolExecutor(2) as pool:
            for one in two:
                limit = draw.uniform(0, 0.6) * seconds if draw.random() < 0.5 else None
                delay = draw.uniform(0, 0.4) * seconds
                attempts.append(pool.submit(attempt, one, lock, delay, limit))
        outcomes = sorted(one.result() for one in attempts)
        complete = check(folder, "ended" in outcomes)
        unfinished = not complete and folder.exists()
        assert attempt(again, lock) == "ended" and check(folder, ended=True)
        left = {path.name for path in folder.iterdir()}
        assert left == {path.name for path in (parent / "alone").iterdir()}
        assert os.name == "nt" or not lock.exists()
        return Counter([" + ".join(outcomes)] + ["left unfinished"] * unfinished)

    started = time.perf_counter()
    assert attempt(make_commands(parent / "alone")[-1], parent / "no lock") == "ended"
    seconds = time.perf_counter() - started
    with ThreadPoolExecutor(2) as pool:
        counts = sum(pool.map(play_round, range(ROUNDS)), Counter())
    print(f"seed {SEED}, {ROUNDS} rounds, one process alone takes {seconds:.1f} s: {dict(counts)}")
    outcomes = ("refused", "killed", "ended", "left unfinished")
    for outcome in outcomes if ROUNDS >= 20 else ():  # a few rounds may miss one by chance
        assert any(outcome in name for name in counts), f"nothing was {outcome}"


@pytest.mark.slow
def test_20_rounds_of_two_preparations_are_refused_or_equal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documents = make_documents(1200)
    Path("texts").mkdir()
    for n in range(4):
        text = "\n<|endoftext|>\n".join(documents[300 * n : 300 * n + 300])
        Path(f"texts/{n}.txt").write_text(text, encoding="utf-8")

    def make_commands(folder: Path) -> list[list[str]]:
        small = ("--vocab_size=500", "--val_fraction=0.1", "--num_threads=1")
        args = ("--input=texts", f"--dataset={folder.name}", *small)
        return 3 * [command("prepare_openweb.py", *args)]

    def check(folder: Path, ended: bool) -> bool:
        complete = ended or (folder / "meta.json").exists()
        if complete:
            assert contents(folder) == contents(Path("data/alone"))
        return complete

    play(Path("data"), make_commands, check)


@pytest.mark.slow
def test_20_rounds_of_two_trainings_are_refused_or_equal(tiny_run):
    last = 100
    changed = {"max_iters": last, "eval_interval": 20, "eval_iters": 2, "dropout": 0.1}
    changed["checkpoint_interval"] = 0.01

    def make_commands(folder: Path) -> list[list[str]]:
        draw = random.Random(f"{SEED} {folder.name}")
        return [
            command("train.py", *options(tiny_run, **changed, out_dir=folder, init_from=origin))
            for origin in (*draw.choices(("auto", "scratch"), k=2), "auto")
        ]

    def check(folder: Path, ended: bool) -> bool:
        alone, complete = Path("out/alone"), False
        # A process that starts from scratch may have moved what a killed or ended one left.
        for path in [folder, *folder.parent.glob(f"{folder.name}.*")]:
            if (path / "log.jsonl").exists():  # not a mixture of two
                records = logged(path)
                assert records == logged(alone)[: len(records)]
            checkpoint = path / "ckpt.pt"
            if checkpoint.exists() and load_checkpoint(checkpoint)[1]["step"] == last:
                assert_same_run(path, alone)
                complete = True
        assert complete or not ended
        return complete

    play(Path("out"), make_commands, check)


def test_the_folder_stays_locked_until_the_report_is_written(tiny_run, monkeypatch):
    write_report = train.pictures.write_report

    def write_while_locked(out_dir):
        with pytest.raises(UserError, match=REFUSAL), lock_path(out_dir):
            pass
        return write_report(out_dir)

    monkeypatch.setattr(train.pictures, "write_report", write_while_locked)
    assert (tiny_run() / "loss.png").exists()
