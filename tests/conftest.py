"""What the tests share: one small data set and run, damage to files, a local server."""

import os
import re
import signal
import threading
import time
from configurator import UserError, one_line
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import prepare_shakespeare
import train
from support import download
from support.checkpoint import load_checkpoint
from support.log import read_log
from support.processes import Processes

ROOT = Path(__file__).parent.parent
os.environ["PYTHONPATH"] = str(ROOT)  # for the programs that tests start
os.environ.pop("PYTHONUNBUFFERED", None)  # it hides mistakes in how they end
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are about a CPU, also where there is a GPU
torch.backends.mps.is_available = lambda: False

# A shell ignores these two in the background, and so would all programs that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # not on Windows
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n: several workers share the cores
    os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start
    torch.set_num_threads(1)

# 18 different characters
TEXT = "".join(f"{i} times {j} is {i * j}.\n" for i in range(40) for j in range(10))


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> Path:
    """The folder data/tiny, prepared from TEXT. The working directory is the parent of data/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.txt").write_text(TEXT, encoding="utf-8", newline="\n")
    prepare_shakespeare.main(prepare_shakespeare.PrepareConfig(input="tiny.txt", dataset="tiny"))
    return tmp_path / "data" / "tiny"


@pytest.fixture
def tiny_run(dataset):
    """A function: train a tiny model, with some options changed, and return the run's folder."""
    options = dict(
        dataset="tiny",
        out_dir="out/tiny",
        n_layer=2,
        n_head=2,
        n_embd=16,
        block_size=16,
        batch_size=4,
        gradient_accumulation_steps=2,
        max_iters=12,
        eval_interval=6,
        log_interval=1,
        warmup_iters=2,
        learning_rate=1e-2,
        min_lr=1e-3,
        compile=False,
        device="cpu",
    )

    def run(**changed) -> Path:
        config = train.TrainConfig(**{**options, **changed})
        train.main(config)
        return Path(config.out_dir)

    run.options = options
    return run


@pytest.fixture
def tiny_trainer(tiny_run):
    """A function: return a Trainer with the options of tiny_run, some of them changed."""

    def make(**changed) -> train.Trainer:
        return train.Trainer(train.TrainConfig(**{**tiny_run.options, **changed}), Processes("cpu"))

    return make


def options(tiny_run, **changed) -> list[str]:
    """Return the arguments of train.py for a tiny run."""
    return [f"--{name}={value}" for name, value in {**tiny_run.options, **changed}.items()]


def logged(out_dir: Path) -> list[dict]:
    """Return the records of a run, without what depends on the clock."""
    clock = {"seconds", "tokens_per_second"}
    records = read_log(out_dir / "log.jsonl")
    return [{k: v for k, v in record.items() if k not in clock} for record in records]


def weights(out_dir: Path) -> dict:
    return load_checkpoint(out_dir / "ckpt.pt")[1]["model"]


def assert_same_run(a: Path, b: Path) -> None:
    """Assert that weights, optimizer states and logs of two runs are equal to the last bit."""
    first, second = (load_checkpoint(path / "ckpt.pt")[1] for path in (a, b))
    for name in ("model", "optimizers", "scaler", "step", "best_val_loss", "evaluated_step"):
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
    assert logged(a) == logged(b)


# The same examples in every run, and no time limit: a busy machine is no fault of the code.
settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("tests")


# Damaged files. A test with @many_examples runs with 60 of them, and its slow twin with 600.


def examples(count: int) -> settings:
    return settings(max_examples=count)


many_examples = pytest.mark.parametrize(
    "fuzz", [examples(60), pytest.param(examples(600), marks=pytest.mark.slow)], ids=["60", "600"]
)
places = st.floats(0, 1, exclude_max=True)  # as a part of the file's length
damages = st.one_of(
    st.tuples(st.just("cut"), places),
    st.tuples(st.just("flip"), places),
    st.tuples(st.just("random"), st.binary(max_size=300)),
)


def damaged(content: bytes, damage: tuple) -> bytes:
    """Return `content` cut short, with one bit flipped, or replaced by random bytes."""
    kind, value = damage
    if kind == "random":
        return value
    if kind == "cut":
        return content[: int(value * len(content))]
    bit = int(value * len(content) * 8)
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


# JSON values that a program does not expect
odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from([10**30, -1, 0, float("nan"), float("inf"), [], {}, [1], {"a": 1}]),
)


def or_user_error(read):
    """Return read(), or None if it raised a UserError. Any other error fails the test."""
    try:
        return read()
    except UserError as error:
        assert str(error) and "\n" not in one_line(error)
        return None


class Server(ThreadingHTTPServer):
    """A server on this machine that serves `files` and, like the hub, parts of files.

    Each answer takes the next of `faults`, until none is left:

        an integer   that status instead of the file
        "cut"        the connection ends in the middle of the body
        "long"       Content-Length promises more than comes
        "extra"      bytes after the end of the file, with a Content-Length to match
        "ignore"     the whole file instead of the requested range
        "shift"      a Content-Range other than the requested one
        "part"       half of the requested range, with a Content-Length to match
        "silent"     no Content-Length
        "wrong"      one wrong byte in the body
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes | None] = {}
        self.headers: dict[str, str] = {}
        self.faults: list[int | str] = []
        self.requests: list[tuple[str, str]] = []  # path, range
        self.seconds_per_block = 0.0
        self.gate = threading.Event()  # it must be set before a file is sent
        self.gate.set()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        wanted, fault = self.headers.get("Range", ""), server.faults.pop(0) if server.faults else ""
        server.requests.append((self.path, wanted))
        content = server.files.get(self.path)
        if content is None or isinstance(fault, int):
            self.send_response(fault or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and fault != "ignore" else 0
        if start >= len(content) and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = content[start:]
        body = {
            "cut": body[: len(body) // 2],
            "part": body[: len(body) // 2],
            "extra": body + b"!",
            "wrong": bytes([body[0] ^ 1]) + body[1:],
        }.get(fault, body)
        self.send_response(206 if start else 200)
        if start:
            first = start + 7 * (fault == "shift")
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if fault != "silent":
            length = {"extra": len(body), "part": len(body), "long": len(body) + 9}.get(
                fault, len(content) - start
            )
            self.send_header("Content-Length", str(length))
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        for i in range(0, len(body), 1 << 16):
            time.sleep(server.seconds_per_block)
            server.gate.wait()
            self.wfile.write(body[i : i + (1 << 16)])

    def do_HEAD(self) -> None:
        content = self.server.files.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.0)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
