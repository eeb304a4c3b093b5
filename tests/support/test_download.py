"""Downloads end with the right bytes or with one line, whatever the server does."""

import hashlib

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configurator import UserError
from support.download import download, remote_size

CONTENT = bytes(i * i % 251 for i in range(300_000))
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def file(server):
    """A function: download CONTENT while the server makes these faults; returns what came."""
    server.files["/file"] = CONTENT

    def fetch(path, *faults, **options) -> bytes:
        server.faults, server.requests[:] = list(faults), []
        download(f"{server.url}/file", path, **options)
        assert not path.with_name(path.name + ".part").exists()
        return path.read_bytes()

    return fetch


def test_a_file_comes_whole_at_the_first_attempt(file, server, tmp_path):
    assert file(tmp_path / "new" / "file") == CONTENT
    assert server.requests == [("/file", "")]
    assert (
        remote_size(f"{server.url}/file") == len(CONTENT) and remote_size(f"{server.url}/none") == 0
    )


def test_a_break_is_taken_up_where_it_happened(file, server, tmp_path):
    assert file(tmp_path / "file", "cut", "cut") == CONTENT
    assert [wanted for _, wanted in server.requests] == ["", "bytes=147456-", "bytes=212992-"]


def test_a_download_goes_on_after_the_program_was_killed(file, server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    assert file(tmp_path / "file") == CONTENT
    assert server.requests == [("/file", "bytes=1000-")]


def test_a_file_that_was_whole_but_had_not_its_name_yet_gets_it(file, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    assert file(tmp_path / "file") == CONTENT


def test_server_errors_are_tried_again(file, server, tmp_path):
    assert file(tmp_path / "file", 500, 503, 429) == CONTENT
    assert len(server.requests) == 4


@pytest.mark.parametrize("fault", ["ignore", "shift", "part"])
def test_another_range_than_was_asked_for_is_no_harm(file, tmp_path, fault):
    assert file(tmp_path / "file", "cut", fault) == CONTENT


def test_more_progress_is_worth_more_attempts(file, tmp_path):
    assert (
        file(tmp_path / "file", *["cut"] * 3, "long", *["cut"] * 3, 500, 500, 500, "long")
        == CONTENT
    )


@pytest.mark.parametrize("header", ["X-Linked-Etag", None], ids=["of the hub", "given"])
def test_wrong_bytes_are_thrown_away(file, server, tmp_path, header):
    server.headers = {header: f'"{SHA256}"'} if header else {}
    given = {} if header else {"sha256": SHA256}
    assert file(tmp_path / "file", "wrong", "extra", "cut", "wrong", **given) == CONTENT


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ([404], "answers 404"),
        ([401], "set HF_TOKEN"),
        ([500] * 9, "too many 500"),
        (["wrong"] * 9, "its sha256 is not"),
        (["cut", *[503] * 9], "the first 147,456 bytes are kept"),
        (["long"] * 9, "bytes are kept"),
    ],
    ids=str,
)
def test_what_can_not_be_had_ends_in_one_line(file, tmp_path, faults, words):
    with pytest.raises(UserError, match=words) as error:
        file(tmp_path / "file", *faults, sha256=SHA256)
    assert "\n" not in str(error.value) and not (tmp_path / "file").exists()


def test_the_token_of_the_hub_goes_nowhere_else(file, server, tmp_path, monkeypatch):
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


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/file", "no address", "ftp://127.0.0.1/file"])
def test_no_server_ends_in_one_line(server, tmp_path, url):
    with pytest.raises(UserError, match="download"):
        download(url, tmp_path / "file")
    assert not list(tmp_path.iterdir())


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
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
