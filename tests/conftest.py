"""What the tests share: one small data set, a tiny run on it, a local server."""

import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import prepare_shakespeare
import train
from support import download
from support.checkpoint import load_checkpoint
from support.log import read_log

ROOT = Path(__file__).parent.parent
os.environ["PYTHONPATH"] = str(ROOT)  # for the programs that tests start
os.environ.pop("PYTHONUNBUFFERED", None)  # it hides mistakes in how they end
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are about a CPU, also where there is a GPU
if torch.backends.mps.is_available():

    def mps_is_available() -> bool:  # no lambda: torch compiles the source of this function
        return False

    torch.backends.mps.is_available = mps_is_available

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
def place(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def dataset(place) -> Path:
    """The folder data/tiny, prepared from TEXT. The working directory is the parent of data/."""
    (place / "tiny.txt").write_text(TEXT, encoding="utf-8", newline="\n")
    prepare_shakespeare.main(prepare_shakespeare.PrepareConfig(input="tiny.txt", dataset="tiny"))
    return place / "data" / "tiny"


@pytest.fixture
def tiny_run(dataset):
    """A function: train a tiny model, with some options changed, and return the run's folder."""
    place = dict(dataset="tiny", out_dir="out/tiny", device="cpu", compile=False)
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=16)
    batch = dict(batch_size=4, gradient_accumulation_steps=2)
    steps = dict(max_iters=12, eval_interval=6, log_interval=1, warmup_iters=2)
    options = {**place, **shape, **batch, **steps, "learning_rate": 1e-2, "min_lr": 1e-3}

    def run(**changed) -> Path:
        config = train.TrainConfig(**{**options, **changed})
        train.main(config)
        return Path(config.out_dir)

    run.options = options
    return run


@pytest.fixture
def before_update(monkeypatch):
    """A function: have runs call action(step, model, optimizers) when `step` updates are done."""

    def patch(action) -> None:
        parts, make_optimizers, learning_rate = [], train.make_optimizers, train.learning_rate

        def make_and_keep(model, *args):
            parts[:] = [model, make_optimizers(model, *args)]
            return parts[1]

        def act(step, config):
            action(step, *parts)
            return learning_rate(step, config)

        monkeypatch.setattr(train, "make_optimizers", make_and_keep)
        monkeypatch.setattr(train, "learning_rate", act)

    return patch


def options(tiny_run, **changed) -> list[str]:
    """Return the arguments of train.py for a tiny run."""
    return [f"--{name}={value}" for name, value in {**tiny_run.options, **changed}.items()]


def logged(out_dir: Path) -> list[dict]:
    """Return the records of a run, without what depends on the clock."""
    clock = {"seconds", "tokens_per_second"}
    records = read_log(out_dir / "log.jsonl")
    return [{k: v for k, v in record.items() if k not in clock} for record in records]


def weights(out_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(out_dir / "ckpt.pt").weights


def assert_same_run(a: Path, b: Path) -> None:
    """Assert that weights, optimizer states and logs of two runs are equal to the last bit."""
    first, second = (vars(load_checkpoint(path / "ckpt.pt")) for path in (a, b))
    for name in ("weights", "optimizers", "scaler", "step", "best_val_loss", "evaluated_step"):
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
    assert logged(a) == logged(b)


# The same examples in every run; no time limit, because a busy machine is no fault of the code.
settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("tests")


class Server(ThreadingHTTPServer):
    """A server on this machine that serves `files` and, like the hub, parts of files.

    Each answer takes the next of `faults`:

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


class Handler(BaseHTTPRequestHandler):
    def answer(self, status: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def do_GET(self) -> None:
        server = self.server
        wanted, fault = self.headers.get("Range", ""), server.faults.pop(0) if server.faults else ""
        server.requests.append((self.path, wanted))
        content = server.files.get(self.path)
        if content is None or isinstance(fault, int):
            return self.answer(fault or 404, {"Content-Length": 0})
        total = len(content)
        start = int(wanted[6:-1]) if wanted and fault != "ignore" else 0  # bytes=START-
        if start >= total and start:
            return self.answer(416, {"Content-Range": f"bytes */{total}", "Content-Length": 0})
        body = rest = content[start:]
        if fault in ("cut", "part"):
            body = rest[: len(rest) // 2]
        elif fault == "extra":
            body = rest + b"!"
        elif fault == "wrong":
            body = bytes([rest[0] ^ 1]) + rest[1:]
        first, length = start + 7 * (fault == "shift"), len(rest if fault == "cut" else body)
        headers = {"Content-Range": f"bytes {first}-{total - 1}/{total}"} if start else {}
        if fault != "silent":
            headers["Content-Length"] = length + 9 * (fault == "long")
        self.answer(206 if start else 200, headers | server.headers)
        for i in range(0, len(body), 1 << 16):
            time.sleep(server.seconds_per_block)
            self.wfile.write(body[i : i + (1 << 16)])

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.0, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
