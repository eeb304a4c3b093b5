"""Draw batches from token files, open and check a data set, write one.

A data set is a folder, data/<name>/, with three files:

    train.bin, val.bin   token ids as little-endian uint16 and nothing else, as in nanoGPT
    meta.json            tokenizer, vocab_size, train_tokens, val_tokens, val_bytes (the size of the
                         text behind val.bin, for bits per byte), source, sha256 of both files
"""

import hashlib
import json
import math
import os
from configurator import UserError
from pathlib import Path

import numpy as np
import psutil

from support.files import atomic_write
from support.tokenizer import Tokenizer, from_dict

TOKEN = np.dtype("<u2")
PREPARE = "run a prepare script (python prepare_shakespeare.py, or prepare_openweb.py)"

# Draw batches


def random_offsets(
    seed: int, step: int, n_sequences: int, n_tokens: int, block_size: int
) -> np.ndarray:
    """Return where the sequences of training step `step` start in train.bin, (n_sequences,).

    They depend on the arguments alone. So a resumed run continues with the batches that it would
    have seen, and several processes, each with its share, see the same batch together.
    """
    return np.random.default_rng((seed, step)).integers(n_tokens - block_size, size=n_sequences)


def gather(tokens: "Tokens", offsets: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs x and targets y, (B, T) int64 each, of the B sequences that start at `offsets`.

    y is x moved by one token. Targets after the end of the file are -1: the loss ignores them.
    """
    positions = offsets[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    last = len(tokens) - 1
    windows = tokens.open()[np.minimum(positions, last)].astype(np.int64)
    x, y = windows[:, :-1], np.where(positions[:, 1:] <= last, windows[:, 1:], -1)
    return np.ascontiguousarray(x), y


class Tokens:
    """The token ids of one .bin file, in memory if they take less than half of what is free.

    The file stays open, so a data set that is prepared again meanwhile changes nothing here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = open(path, "rb")  # noqa: SIM115  # as long as this object lives
        size = path.stat().st_size
        self.length = size // TOKEN.itemsize
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of torchrun
        self.in_memory = size < psutil.virtual_memory().available / 2 / sharing
        self.array = np.fromfile(self.file, dtype=TOKEN) if self.in_memory else None

    def __len__(self) -> int:
        return self.length

    def open(self) -> np.ndarray:
        """Return all ids, (length,) uint16, in memory or as a new memory map."""
        # A memory map counts every page that it touched as this process's memory while it is open.
        # A new map for each batch keeps a long run from looking like a leak.
        return self.array if self.in_memory else np.memmap(self.file, dtype=TOKEN, mode="r")


# Open and check a data set


class Dataset:
    """A checked data set: meta (of meta.json), tokenizer, and the Tokens train and val.

    Raises UserError for anything wrong in its folder.
    """

    def __init__(self, folder: Path, block_size: int) -> None:
        self.meta = load_meta(folder)
        self.tokenizer: Tokenizer = from_dict(self.meta["tokenizer"])
        if (size := self.tokenizer.vocab_size) != self.meta["vocab_size"]:
            raise UserError(f"{folder / 'meta.json'}: the tokenizer has {size} tokens; {PREPARE}")
        self.train = self._open_split(folder / "train.bin", block_size)
        self.val = self._open_split(folder / "val.bin", block_size)

    def _open_split(self, path: Path, block_size: int) -> Tokens:
        if not path.is_file():
            raise UserError(f"{path}: no such file; {PREPARE}")
        size, expected = path.stat().st_size, self.meta[f"{path.stem}_tokens"] * TOKEN.itemsize
        if size % TOKEN.itemsize:
            raise UserError(f"{path}: {size} bytes are not whole uint16 token ids; {PREPARE}")
        if size != expected:
            raise UserError(f"{path}: has {size} bytes, but meta.json says {expected}; {PREPARE}")
        if size // TOKEN.itemsize < block_size + 1:
            raise UserError(
                f"{path}: {size // TOKEN.itemsize} tokens are too few for block_size={block_size}; "
                "choose a smaller one, or a longer text"
            )
        tokens = Tokens(path)
        sha256, largest = inspect_bin(path)
        if largest >= self.meta["vocab_size"]:
            raise UserError(
                f"{path}: token id {largest} is not in meta.json's vocabulary; {PREPARE}"
            )
        if sha256 != self.meta["sha256"][path.name]:
            raise UserError(f"{path}: changed since meta.json was written (sha256); {PREPARE}")
        return tokens

    def eval_windows(self, block_size: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where the sequences of an evaluation start in train.bin and in val.bin.

        In val.bin they stand side by side, so that each token but the first is a target once;
        `limit` keeps only that many (0: all). In train.bin as many are spread over the file.
        """
        val = np.arange(0, len(self.val) - 1, block_size)
        if 0 < limit < len(val):
            val = val[np.linspace(0, len(val) - 1, limit).astype(int)]
        train = np.linspace(0, len(self.train) - block_size - 1, len(val)).astype(np.int64)
        return train, val

    def bits_per_byte(self, val_loss: float) -> float:
        """Return the validation loss in bits per byte of text, comparable between tokenizers."""
        return val_loss / math.log(2) * self.meta["val_tokens"] / self.meta["val_bytes"]


def load_meta(folder: Path) -> dict:
    """Return the content of meta.json, or compute it for a folder that nanoGPT prepared."""
    # With progress.json, prepare_openweb.py was interrupted: the same command finishes its work.
    ours = any((folder / name).exists() for name in ("meta.json", "progress.json"))
    if (folder / "train.bin").exists() and not ours:
        from support.nanogpt import describe_data  # imports this module

        return describe_data(folder)
    return read_meta(folder / "meta.json")


def read_meta(path: Path) -> dict:
    """Return the content of a meta.json after checking every key. Raises UserError."""
    if not path.is_file():
        found = ", ".join(sorted(p.parent.name for p in path.parent.parent.glob("*/train.bin")))
        raise UserError(f"{path}: no such file; {PREPARE}" + f"; data has {found}" * bool(found))
    try:
        meta = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON; {PREPARE}") from None
    counts = ("vocab_size", "train_tokens", "val_tokens", "val_bytes")
    keys = {*counts, "tokenizer", "source", "sha256"}
    missing = keys - meta.keys() if isinstance(meta, dict) else keys
    if missing:
        raise UserError(f"{path}: {', '.join(sorted(missing))} missing; {PREPARE}")
    for key in counts:
        if type(meta[key]) is not int or not 0 < meta[key] < 1 << 50:
            raise UserError(f"{path}: {key} is {str(meta[key])[:30]}, not a count; {PREPARE}")
    for key, inner in (("tokenizer", "kind"), ("sha256", "train.bin"), ("sha256", "val.bin")):
        if not isinstance(meta[key], dict) or inner not in meta[key]:
            raise UserError(f"{path}: {key} has no {inner!r}; {PREPARE}")
    return meta


def inspect_bin(path: Path) -> tuple[str, int]:
    """Return the sha256 of a .bin file and the largest token id in it."""
    sha256, largest = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            sha256.update(chunk)
            ids = np.frombuffer(chunk, dtype=TOKEN, count=len(chunk) // TOKEN.itemsize)
            largest = max(largest, int(ids.max(initial=0)))
    return sha256.hexdigest(), largest


# Write a data set


def write_dataset(
    folder: Path, tokenizer: Tokenizer, train: list, val: list, val_bytes: int, source: dict
) -> None:
    """Write the three files from two lists of token ids.

    meta.json is written last. Until then readers notice that the sha256 in an old one is wrong.
    """
    if tokenizer.vocab_size > 1 << 16:
        raise UserError(f"vocab_size={tokenizer.vocab_size} does not fit uint16; at most 65,536 do")
    for name, ids in (("train.bin", train), ("val.bin", val)):
        with atomic_write(folder / name) as file:
            file.write(np.array(ids, dtype=TOKEN).tobytes())
    write_meta(folder, tokenizer, val_bytes, source)


def write_meta(folder: Path, tokenizer: Tokenizer, val_bytes: int, source: dict) -> None:
    """Write meta.json for the train.bin and val.bin that are in `folder`."""
    meta = make_meta(folder, tokenizer, val_bytes, source)
    with atomic_write(folder / "meta.json") as file:
        # A file's name may have bytes that are not UTF-8; JSON has an escape for them.
        text = json.dumps(meta, indent=2, ensure_ascii=False)
        file.write(text.encode("utf-8", "backslashreplace"))


def make_meta(folder: Path, tokenizer: Tokenizer, val_bytes: int, source: dict) -> dict:
    """Return the content of meta.json for the train.bin and val.bin that are in `folder`."""
    return {
        "tokenizer": tokenizer.to_dict(),
        "vocab_size": tokenizer.vocab_size,
        "train_tokens": (folder / "train.bin").stat().st_size // TOKEN.itemsize,
        "val_tokens": (folder / "val.bin").stat().st_size // TOKEN.itemsize,
        "val_bytes": val_bytes,
        "source": source,
        "sha256": {name: inspect_bin(folder / name)[0] for name in ("train.bin", "val.bin")},
    }
