"""What the tests share: the top-level files on the path, and one small data set and run."""

import os
import re
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # for the programs that tests start

for name in (
    "SIGINT",
    "SIGHUP",
):  # in the background these are ignored, also by the programs that tests start
    if hasattr(signal, name):
        signal.signal(
            getattr(signal, name),
            signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL,
        )

TEXT = "".join(
    f"{i} times {j} is {i * j}.\n" for i in range(40) for j in range(10)
)  # 18 characters


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> Path:
    """The folder data/tiny, made from TEXT; the working directory is the one that holds data/."""
    import prepare_shakespeare

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.txt").write_text(TEXT, encoding="utf-8")
    prepare_shakespeare.main(prepare_shakespeare.PrepareConfig(input="tiny.txt", dataset="tiny"))
    return tmp_path / "data" / "tiny"


@pytest.fixture
def tiny_run(dataset):
    """A function: train a tiny model with these options changed; returns its folder."""
    import train

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
    )

    def run(**changed) -> Path:
        config = train.TrainConfig(**{**options, **changed})
        train.main(config)
        return Path(config.out_dir)

    run.options = options
    return run


class Server(ThreadingHTTPServer):
    """A server on this machine that has `files` and, as the hub does, answers ranges.

    `faults` are put into its answers, one an answer, in this order, until none is left:

        an integer   that status instead of the file
        "cut"        the connection ends in the middle of the body
        "long"       Content-Length promises more than comes
        "extra"      the answer has bytes that are not of the file, and a Content-Length to match
        "ignore"     the whole file, whatever range was asked for
        "shift"      another range than was asked for
        "part"       half of what was asked for, and says so
        "silent"     no Content-Length
        "wrong"      one byte of the body is another
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
    from support import download

    monkeypatch.setattr(download, "PAUSE", 0.0)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
