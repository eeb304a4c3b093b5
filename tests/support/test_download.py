"""A download ends with the right bytes or with one line, whatever the server does."""

import gzip
import hashlib
import socket
import threading
from configurator import UserError

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from support import download as module
from support.download import NotFound, download, remote_size

CONTENT = bytes(i * i % 251 for i in range(300_000))
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def file(server):
    """Return a function: download CONTENT while the server makes these faults; return the bytes."""
    server.files["/file"] = CONTENT

    def fetch(path, *faults, **options) -> bytes:
        server.faults, server.requests[:] = list(faults), []
        download(f"{server.url}/file", path, **options)
        assert not path.with_name(path.name + ".part").exists()
        return path.read_bytes()

    return fetch


def test_a_download_needs_one_request(file, server, tmp_path):
    assert file(tmp_path / "new" / "file") == CONTENT
    assert server.requests == [("/file", "")]
    assert (
        remote_size(f"{server.url}/file") == len(CONTENT) and remote_size(f"{server.url}/none") == 0
    )


def test_an_interrupted_download_resumes_at_the_same_byte(file, server, tmp_path):
    assert file(tmp_path / "file", "cut", "cut") == CONTENT
    assert [wanted for _, wanted in server.requests] == ["", "bytes=150000-", "bytes=225000-"]


def test_a_download_resumes_after_the_program_was_killed(file, server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    assert file(tmp_path / "file") == CONTENT
    assert server.requests == [("/file", "bytes=1000-")]


def test_two_downloads_of_the_same_file_are_one(file, server, tmp_path):
    server.seconds_per_block = 0.05  # the second begins while the first is at work
    path, url = tmp_path / "a", f"{server.url}/file"
    two = [threading.Thread(target=download, args=(url, path)) for _ in range(2)]
    for thread in two:
        thread.start()
    for thread in two:
        thread.join(timeout=60)
    assert path.read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_a_complete_part_only_gets_its_name(file, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    assert file(tmp_path / "file") == CONTENT


def test_after_a_server_error_there_is_another_attempt(file, server, tmp_path):
    assert file(tmp_path / "file", 500, 503, 429) == CONTENT
    assert len(server.requests) == 4


@pytest.mark.parametrize("fault", ["ignore", "shift", "part"])
def test_a_wrong_range_does_no_harm(file, tmp_path, fault):
    assert file(tmp_path / "file", "cut", fault) == CONTENT


def test_new_bytes_allow_more_attempts(file, tmp_path):
    assert (
        file(tmp_path / "file", *["cut"] * 3, "long", *["cut"] * 3, 500, 500, 500, "long")
        == CONTENT
    )


@pytest.mark.parametrize("header", ["X-Linked-Etag", None], ids=["of the hub", "given"])
def test_wrong_bytes_are_deleted(file, server, tmp_path, header):
    server.headers = {header: f'"{SHA256}"'} if header else {}
    given = {} if header else {"sha256": SHA256}
    assert file(tmp_path / "file", "wrong", "extra", "cut", "wrong", **given) == CONTENT


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ([404], "status 404 Not Found"),
        ([401], "set HF_TOKEN"),
        ([416], "status 416"),
        ([500] * 9, "status 500 Internal Server Error"),
        (["wrong"] * 9, "the sha256 of the file is not"),
        (["cut", *[503] * 9], "the first 150,000 bytes are kept"),
    ],
    ids=str,
)
def test_a_failure_ends_in_one_line(file, server, tmp_path, faults, words):
    with pytest.raises(UserError, match=words) as error:
        file(tmp_path / "file", *faults, sha256=SHA256)
    assert "\n" not in str(error.value) and not (tmp_path / "file").exists()
    assert isinstance(error.value, NotFound) == (faults == [404])
    assert len(server.requests) <= 6 and not server.faults[6:]


def test_hf_token_is_sent_to_no_other_server(file, server, tmp_path, monkeypatch):
    sent, send = [], requests.Session.send
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(
        requests.Session,
        "send",
        lambda s, r, **o: sent.append(r.headers.get("Authorization")) or send(s, r, **o),
    )
    file(tmp_path / "file")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    file(tmp_path / "file")
    assert sent == [None, "Bearer hf_secret"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:9/file", "Connection refused|refused it"),
        ("http://no-such-host.invalid/file", "try again later"),
        ("no address", "check the address"),
        ("ftp://127.0.0.1/file", "check the address"),
        ("http://[::1/file", "check the address"),
        ("http://127.0.0.1:99999/file", "check the address"),
    ],
)
def test_an_unreachable_server_ends_in_one_readable_line(server, tmp_path, url, words):
    with pytest.raises(UserError, match=words) as error:
        download(url, tmp_path / "file")
    assert "Connection(" not in str(error.value) and "Pool(" not in str(error.value)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.fixture
def canned(server):
    """Return a function: start a server that sends these bytes to every request; return its URL."""
    sockets = []

    def serve(answer: bytes, repeat: bytes = b"") -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        sockets.append(listener)

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(1 << 16)
                        connection.sendall(answer)
                        while repeat:
                            connection.sendall(repeat)
                except OSError:
                    if listener.fileno() == -1:
                        return

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/file"

    yield serve
    for listener in sockets:
        listener.close()


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
@pytest.mark.parametrize(("asked", "pause"), [("100000", 60), ("7", 7), ("tomorrow", 0)])
def test_a_pause_that_the_server_asks_for_is_announced_and_limited(
    canned, tmp_path, monkeypatch, capsys, status, asked, pause
):
    pauses = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    head = f"HTTP/1.1 {status}\r\nRetry-After: {asked}\r\nContent-Length: 0\r\n"
    url = canned(f"{head}Connection: close\r\n\r\n".encode())
    with pytest.raises(UserError, match=status):
        download(url, tmp_path / "file", tries=3)
    assert pauses == [pause] * 2
    assert f"trying again in {pause} s ..." in capsys.readouterr().out


@pytest.mark.parametrize(
    "address",
    [
        "http://[bad",
        "http://127.0.0.1:99999/",
        "ftp://x/",
        "http://.a/",
        "http://%/",
        "//[",
        "file",
    ],
)
def test_a_bad_redirect_ends_in_one_line(canned, tmp_path, address):
    head = f"HTTP/1.1 302 Found\r\nLocation: {address}\r\nContent-Length: 0\r\n"
    url = canned(f"{head}Connection: close\r\n\r\n".encode())
    with pytest.raises(UserError, match="could not download") as error:
        download(url, tmp_path / "file")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", [True, False])
def test_a_compressed_answer_is_stored_as_it_is(canned, tmp_path, length):
    body = gzip.compress(CONTENT)
    head = "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nConnection: close\r\n"
    head += f"Content-Length: {len(body)}\r\n" * length
    url = canned(f"{head}\r\n".encode() + body)
    download(url, tmp_path / "file", sha256=hashlib.sha256(body).hexdigest())
    assert (tmp_path / "file").read_bytes() == body


@pytest.mark.parametrize("size", [0, 1_000_000])
def test_an_endless_answer_without_a_length_is_stopped(canned, tmp_path, monkeypatch, size):
    monkeypatch.setattr(module, "MOST_BYTES", 3_000_000)
    url = canned(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", repeat=b"x" * 65536)
    with pytest.raises(UserError, match=f"more than {size or 3_000_000:,} bytes"):
        download(url, tmp_path / "file", size=size)
    assert not list(tmp_path.iterdir())


def test_an_answer_that_is_not_http_ends_in_one_readable_line(canned, tmp_path):
    with pytest.raises(UserError, match="could not download") as error:
        download(canned(b"SSH-2.0-OpenSSH\r\n"), tmp_path / "file", tries=2)
    assert "Connection(" not in str(error.value) and "\n" not in str(error.value)


@settings(max_examples=60)
@given(
    st.lists(
        st.sampled_from([500, "cut", "long", "extra", "ignore", "shift", "silent", "wrong"]),
        max_size=8,
    )
)
def test_no_wrong_byte_ever_appears(file, tmp_path, faults):
    path = tmp_path / "file"
    path.unlink(missing_ok=True)
    try:
        assert file(path, *faults, sha256=SHA256) == CONTENT
    except UserError:
        assert not path.exists()
