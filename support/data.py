"""Token files: write them, open and check them, draw batches from them.

A data set is a folder with three files:

    train.bin, val.bin   token ids as little-endian uint16, nothing else (as nanoGPT has them)
    meta.json            tokenizer, vocab_size, train_tokens, val_tokens, val_bytes (size of the text
                         behind val.bin, for bits per byte), source, sha256 of both files
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import psutil

from configurator import UserError
from support import tokenizer
from support.files import atomic_write

TOKEN = np.dtype("<u2")
META_KEYS = {
    "tokenizer",
    "vocab_size",
    "train_tokens",
    "val_tokens",
    "val_bytes",
    "source",
    "sha256",
}
PREPARE = "run a prepare script (python prepare_shakespeare.py, or prepare_openweb.py)"


def write_dataset(
    folder: Path, tok, train: list[int], val: list[int], val_bytes: int, source: dict
) -> None:
    """Write the three files; meta.json is removed first and written last, so it never describes other files."""
    if tok.vocab_size > 1 << 16:
        raise UserError(
            f"a vocabulary of {tok.vocab_size} does not fit uint16; use at most 65,536 tokens"
        )
    (folder / "meta.json").unlink(missing_ok=True)
    for name, ids in (("train.bin", train), ("val.bin", val)):
        with atomic_write(folder / name) as file:
            file.write(np.array(ids, dtype=TOKEN).tobytes())
    write_meta(folder, tok, val_bytes, source)


def write_meta(folder: Path, tok, val_bytes: int, source: dict) -> None:
    """Write meta.json for the train.bin and val.bin that are in `folder`."""
    with atomic_write(folder / "meta.json") as file:
        file.write(
            json.dumps(
                make_meta(folder, tok, val_bytes, source), indent=2, ensure_ascii=False
            ).encode()
        )


def make_meta(folder: Path, tok, val_bytes: int, source: dict) -> dict:
    return {
        "tokenizer": tok.to_dict(),
        "vocab_size": tok.vocab_size,
        "train_tokens": (folder / "train.bin").stat().st_size // TOKEN.itemsize,
        "val_tokens": (folder / "val.bin").stat().st_size // TOKEN.itemsize,
        "val_bytes": val_bytes,
        "source": source,
        "sha256": {name: scan(folder / name)[0] for name in ("train.bin", "val.bin")},
    }


def nanogpt_meta(folder: Path) -> dict:
    """What meta.json would say of token files of nanoGPT's: without a meta.pkl their ids are GPT-2's."""
    if (folder / "meta.pkl").exists():
        raise UserError(
            f"{folder / 'meta.pkl'} is a pickle, which may run any code when it is read, so it is not; make meta.json "
            f"from the text: python prepare_shakespeare.py --input={folder / 'input.txt'} --dataset={folder.name}"
        )
    largest = np.fromfile(folder / "train.bin", dtype=TOKEN, count=1 << 20).max(initial=0)
    if largest < 1000:  # any text has commoner words among GPT-2's later tokens
        raise UserError(
            f"{folder / 'meta.json'}: no such file, and ids up to {largest} are not GPT-2's; {PREPARE}"
        )
    tok = tokenizer.BPETokenizer.gpt2()
    val = np.fromfile(folder / "val.bin", dtype=TOKEN)
    val_bytes = len(tok.decode_bytes(val[val < tok.end_of_text].tolist()))
    return make_meta(folder, tok, val_bytes, {"prepared by": "nanoGPT"})


def scan(path: Path) -> tuple[str, int]:
    """The sha256 of a .bin file and the largest id in it."""
    sha256, largest = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            sha256.update(chunk)
            largest = max(largest, int(np.frombuffer(chunk, dtype=TOKEN).max()))
    return sha256.hexdigest(), largest


class Tokens:
    """The ids of one .bin file, in memory if they take less than half of what is free."""

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        self.length = size // TOKEN.itemsize
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes on this machine
        self.in_memory = size < psutil.virtual_memory().available / 2 / sharing
        self.array = np.fromfile(path, dtype=TOKEN) if self.in_memory else None

    def __len__(self) -> int:
        return self.length

    def open(self) -> np.ndarray:
        # A memory map counts every page it has touched as this process's memory, for as long as it
        # is open: a map of its own for each batch keeps a long run from looking like a leak.
        return self.array if self.in_memory else np.memmap(self.path, dtype=TOKEN, mode="r")


class Dataset:
    """The folder `data/<name>`, checked. Raises UserError for whatever is wrong with it.

    meta        the content of meta.json
    tokenizer   the one that made the ids
    train, val  Tokens
    """

    def __init__(self, folder: Path, block_size: int) -> None:
        foreign = (folder / "train.bin").exists() and not (folder / "meta.json").exists()
        self.meta = nanogpt_meta(folder) if foreign else read_meta(folder / "meta.json")
        self.tokenizer = tokenizer.from_dict(self.meta["tokenizer"])
        if self.tokenizer.vocab_size != self.meta["vocab_size"]:
            raise UserError(
                f"{folder / 'meta.json'}: vocab_size is {self.meta['vocab_size']}, but its tokenizer has "
                f"{self.tokenizer.vocab_size} tokens; {PREPARE}"
            )
        self.train = self._open_split(folder / "train.bin", block_size)
        self.val = self._open_split(folder / "val.bin", block_size)

    def _open_split(self, path: Path, block_size: int) -> Tokens:
        if not path.is_file():
            raise UserError(f"{path}: no such file; {PREPARE}")
        size, expected = path.stat().st_size, self.meta[f"{path.stem}_tokens"] * TOKEN.itemsize
        if size % TOKEN.itemsize:
            raise UserError(
                f"{path}: {size} bytes is no whole number of uint16 ids, the file is cut; {PREPARE}"
            )
        if size != expected:
            raise UserError(f"{path}: {size} bytes where meta.json promises {expected}; {PREPARE}")
        if size // TOKEN.itemsize < block_size + 1:
            raise UserError(
                f"{path}: {size // TOKEN.itemsize} tokens are fewer than block_size + 1 = {block_size + 1}; "
                "choose a smaller block_size or a longer text"
            )
        sha256, largest = scan(path)
        if largest >= self.meta["vocab_size"]:
            raise UserError(
                f"{path}: token id {largest} is beyond the vocabulary of {self.meta['vocab_size']} "
                f"that meta.json gives; the two do not belong together: {PREPARE}"
            )
        if sha256 != self.meta["sha256"][path.name]:
            raise UserError(
                f"{path}: its sha256 is not the one in meta.json, so it has changed; {PREPARE}"
            )
        return Tokens(path)


def read_meta(path: Path) -> dict:
    """The content of meta.json, with every key there and of its kind."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; {PREPARE}")
    try:
        meta = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON; {PREPARE}") from None
    if not isinstance(meta, dict) or not meta.keys() >= META_KEYS:
        missing = META_KEYS - set(meta) if isinstance(meta, dict) else META_KEYS
        raise UserError(
            f"{path}: not a data set's meta.json, {', '.join(sorted(missing))} missing; {PREPARE}"
        )
    for key in ("vocab_size", "train_tokens", "val_tokens", "val_bytes"):
        if type(meta[key]) is not int or meta[key] < 0:
            raise UserError(f"{path}: {key} is {meta[key]!r} but must be a whole number; {PREPARE}")
    for key, inner in (("tokenizer", "kind"), ("sha256", "train.bin"), ("sha256", "val.bin")):
        if not isinstance(meta[key], dict) or inner not in meta[key]:
            raise UserError(f"{path}: {key} has no {inner!r}; {PREPARE}")
    return meta


def random_offsets(
    seed: int, step: int, n_sequences: int, n_tokens: int, block_size: int
) -> np.ndarray:
    """Where the sequences of training step `step` start, (n_sequences,): a function of its arguments.

    So a resumed run goes on with the batches it would have seen, and any number of processes, each
    taking its rows, sees the same ones together.
    """
    return np.random.default_rng((seed, step)).integers(n_tokens - block_size, size=n_sequences)


def gather(tokens: Tokens, offsets: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs x and targets y, both (B, T) int64, of the B windows at `offsets`.

    y is x moved by one token. Targets past the end of the file are -1, which the loss leaves out.
    """
    positions = offsets[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    last = len(tokens) - 1
    windows = tokens.open()[np.minimum(positions, last)].astype(np.int64)
    return np.ascontiguousarray(windows[:, :-1]), np.where(
        positions[:, 1:] <= last, windows[:, 1:], -1
    )


def whole_file_offsets(n_tokens: int, block_size: int) -> np.ndarray:
    """Windows side by side, in which every token but the first is a target exactly once."""
    return np.arange(0, n_tokens - 1, block_size)


def spread_offsets(n_windows: int, n_tokens: int, block_size: int) -> np.ndarray:
    """`n_windows` windows at even distances over the whole file."""
    return np.linspace(0, n_tokens - block_size - 1, n_windows).astype(np.int64)
