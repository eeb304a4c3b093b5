"""A download ends with the right bytes or with one line, whatever the server does."""

import hashlib
import threading

import pytest
import requests

from configurator import UserError
from support.download import download

CONTENT = bytes(i * i % 251 for i in range(300_000))
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def file(server, tmp_path):
    """Return a function: download CONTENT while the server makes these faults; return the bytes."""
    server.files["/file"] = CONTENT

    def fetch(*faults, name: str = "file", **options) -> bytes:
        server.faults, server.requests[:] = list(faults), []
        download(f"{server.url}/file", tmp_path / name, **options)
        assert not (tmp_path / f"{name}.part").exists()
        return (tmp_path / name).read_bytes()

    return fetch


def test_a_download_needs_one_request_and_the_next_one_none(file, server):
    assert file(name="new/file") == CONTENT and server.requests == [("/file", "")]
    assert file(name="new/file", sha256=SHA256) == CONTENT and server.requests == []


def test_a_file_with_another_checksum_is_downloaded_again(file, tmp_path):
    (tmp_path / "file").write_bytes(b"damaged")
    assert file(sha256=SHA256) == CONTENT


def test_a_download_goes_on_where_it_stopped_or_the_program_was_killed(file, server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    assert file("cut", 503, "part") == CONTENT
    ranges = ["bytes=999-", "bytes=150498-", "bytes=150498-", "bytes=225248-"]
    assert [wanted for _, wanted in server.requests] == ranges
    (tmp_path / "whole.part").write_bytes(CONTENT)
    assert file(name="whole") == CONTENT and server.requests == [("/file", "bytes=299999-")]
    server.headers = {"X-Linked-Etag": '"a git hash, not a sha256"'}
    for fault in ("ignore", "shift"):
        assert file("cut", fault, name=fault) == CONTENT


def test_two_downloads_of_the_same_file_are_one(file, server, tmp_path):
    server.seconds_per_block = 0.05  # the second begins while the first is at work
    args = (f"{server.url}/file", tmp_path / "a")
    two = [threading.Thread(target=download, args=args) for _ in range(2)]
    for thread in two:
        thread.start()
    for thread in two:
        thread.join(timeout=60)
    assert (tmp_path / "a").read_bytes() == CONTENT and len(server.requests) == 1


@pytest.mark.parametrize("part", [CONTENT, CONTENT[:7] + b"!", b"x" * 400_000], ids=len)
@pytest.mark.parametrize("fault", ["", "ignore", "shift", 500, "silent"])
def test_neither_an_old_part_nor_another_range_gives_a_wrong_file(file, tmp_path, part, fault):
    (tmp_path / "file.part").write_bytes(part)
    for _ in range(2):  # a wrong part is deleted at the first attempt
        try:
            assert file(fault, sha256=SHA256) == CONTENT
        except UserError as error:
            assert "the sha256 of the file is not" in str(error)
            assert not list(tmp_path.iterdir())
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("faults", "words", "kept"),
    [
        ([404], "404 Client Error: Not Found", 0),
        ([500] * 9, "500 Server Error", 0),
        (["wrong"], "the sha256 of the file is not", 0),
        (["cut"] * 20, "IncompleteRead", 299_413),
        (["cut", *[503] * 9], "503 Server Error", 149_999),
    ],
    ids=str,
)
@pytest.mark.parametrize("given", [True, False], ids=["sha256 given", "sha256 of the hub"])
def test_a_failure_ends_in_one_line_and_keeps_right_bytes(
    file, server, tmp_path, faults, words, kept, given
):
    server.headers = {} if given else {"X-Linked-Etag": f'"{SHA256}"'}
    with pytest.raises(UserError, match=f"could not download {server.url}/file.*{words}") as error:
        file(*faults, sha256=SHA256 if given else "")
    assert "\n" not in str(error.value) and not (tmp_path / "file").exists()
    left = [path.stat().st_size for path in tmp_path.iterdir()]
    assert left == ([kept] if kept else [])
    assert len(server.requests) <= 9
    assert file() == CONTENT


def test_hf_token_is_sent_to_no_other_server(file, server, monkeypatch):
    sent, send = [], requests.Session.send

    def record(session, request, **options):
        sent.append(request.headers.get("Authorization"))
        return send(session, request, **options)

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(requests.Session, "send", record)
    file(name="a")
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/")
    file(name="b")
    monkeypatch.setenv("HF_TOKEN", " ")
    file(name="c")
    assert sent == [None, "Bearer hf_secret", None]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:9/file", "Connection refused|refused it"),
        ("http://no-such-host.invalid/file", "try again later"),
        ("no address", "check the address"),
        ("ftp://127.0.0.1/file", "check the address"),
    ],
)
def test_an_unreachable_server_ends_in_one_readable_line(server, tmp_path, url, words):
    with pytest.raises(UserError, match=words) as error:
        download(url, tmp_path / "file")
    assert "Connection(" not in str(error.value) and "Pool(" not in str(error.value)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
