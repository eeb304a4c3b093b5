"""Draw batches from token files, open and check a data set, write one.

A data set is a folder, data/<name>/, with three files:

    train.bin, val.bin   token ids as little-endian uint16 and nothing else, as in nanoGPT
    meta.json            tokenizer, vocab_size, train_tokens, val_tokens, val_bytes (the size of the
                         text behind val.bin, for bits per byte), source, sha256 of both files
"""

import json
from pathlib import Path

import numpy as np

from configurator import UserError, one_line, quote
from support.files import atomic_write, file_sha256
from support.tokenizer import BPETokenizer, Tokenizer, from_dict, load_tokenizer

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
    """The token ids of a .bin file. The file stays open, even if it is replaced."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, open(path, "rb")  # noqa: SIM115  # as long as this object
        size = path.stat().st_size
        self.length, rest = divmod(size, TOKEN.itemsize)
        if rest or not self.length:
            raise UserError(f"{path}: {size:,} bytes are not uint16 token ids; {PREPARE}")

    def __len__(self) -> int:
        return self.length

    def open(self) -> np.ndarray:
        """Return all ids, (length,) uint16, as a new memory map.

        A map counts every page that it touched as this process's memory while it is open. A new map
        for each batch keeps a long run from looking like a memory leak.
        """
        return np.memmap(self.file, dtype=TOKEN, mode="r")


# Open and check a data set


def open_dataset(folder: Path) -> tuple[dict, Tokenizer, Tokens, Tokens]:
    """Return the meta.json, the tokenizer, train.bin and val.bin of a data set.

    Raises UserError for anything wrong with its files.
    """
    # With progress.json, prepare_openweb.py was interrupted: the same command finishes its work.
    ours = any((folder / name).exists() for name in ("meta.json", "progress.json"))
    is_nanogpt = (folder / "train.bin").exists() and not ours
    meta = describe_nanogpt(folder) if is_nanogpt else read_meta(folder / "meta.json")
    tokenizer, both = from_dict(meta["tokenizer"]), []
    for path in (folder / "train.bin", folder / "val.bin"):
        size, expected = path.stat().st_size, meta[f"{path.stem}_tokens"] * TOKEN.itemsize
        if size != expected:
            raise UserError(f"{path}: has {size} bytes, but meta.json says {expected}; {PREPARE}")
        both.append(open_tokens(path, tokenizer.vocab_size))
    return meta, tokenizer, *both


def open_tokens(path: Path, vocab_size: int) -> Tokens:
    """Return the token ids of a .bin file. Raises UserError if they are not uint16 or too large."""
    tokens, file = Tokens(path), path.as_posix()  # in a text of Python, \t would be a tab
    ids = tokens.open()
    if ids[:3].tobytes() == b"\x93NUMPY":
        write = f"python -c \"import numpy; numpy.load('{file}').astype('<u2').tofile('new.bin')\""
        raise UserError(f"{path}: is a .npy file, not plain uint16; rewrite it: {write}")
    dtype, offset = guess_layout(ids, vocab_size)
    if (dtype, offset) != (TOKEN, 0):
        numbers = f"{8 * dtype.itemsize}-bit {'big' if dtype.str[0] == '>' else 'little'}-endian"
        header = f" after a header of {offset} bytes" * (offset > 0)
        read = f"numpy.fromfile('{file}', '{dtype.str}', offset={offset})"
        write = f"python -c \"import numpy; {read}.astype('{TOKEN.str}').tofile('new.bin')\""
        what = f"{path}: has {numbers} numbers{header}, not plain little-endian uint16"
        raise UserError(f"{what}; rewrite it: {write}")
    if (largest := ids.max()) >= vocab_size:  # reads all, which also fills the system's cache
        raise UserError(f"{path}: token id {largest} is not in the vocabulary; {PREPARE}")
    return tokens


def guess_layout(ids: np.ndarray, vocab_size: int) -> tuple[np.dtype, int]:
    """Return the dtype of the numbers in a .bin file and the number of bytes before them.

    The bytes of another program's files can pass for token ids, and a model would learn nonsense.
    """
    start, offset = ids[: 1 << 20], 0
    if len(start) > 512 and start[:16].any() and not start[16:512].any():
        offset = 1024  # 256 numbers of 32 bits, most of them 0: llm.c and modded-nanogpt
    start = start[offset // TOKEN.itemsize :]
    if len(start) < 64 or not start.any():
        return TOKEN, offset
    content = start.tobytes()
    for dtype in map(np.dtype, ("<u8", ">u8", "<u4", ">u4")):  # they leave zeros beside each id
        if np.frombuffer(content[: len(content) // 8 * 8], dtype).max() < 1 << 16:
            return dtype, offset
    is_big_endian = start.max() >= vocab_size > start.byteswap().max()
    return np.dtype(">u2") if is_big_endian else TOKEN, offset


def eval_parts(train: Tokens, val: Tokens, block_size: int, limit: int) -> list[tuple]:
    """Return what an evaluation reads: train and val, each with the offsets of its sequences.

    Those of val.bin follow each other without gaps, so that each token but the first is a target
    once; `limit` keeps only that many, spread over the file (0: all). The same number is taken from
    train.bin, spread evenly. Raises UserError if a file is shorter than one sequence.
    """
    for tokens in (train, val):
        if len(tokens) <= block_size:
            few = f"{len(tokens)} tokens are too few for block_size={block_size}"
            raise UserError(f"{tokens.path}: {few}; choose a smaller one, or a longer text")
    offsets = np.arange(0, len(val) - 1, block_size)
    if 0 < limit < len(offsets):
        offsets = offsets[np.linspace(0, len(offsets) - 1, limit).astype(int)]
    spread = np.linspace(0, len(train) - block_size - 1, len(offsets)).astype(np.int64)
    return [(train, spread), (val, offsets)]


def read_meta(path: Path) -> dict:
    """Return the content of a meta.json. Raises UserError if it does not describe a data set."""
    if not path.is_file():
        found = ", ".join(sorted(p.parent.name for p in path.parent.parent.glob("*/train.bin")))
        raise UserError(f"{path}: no such file; {PREPARE}" + f"; data has {found}" * bool(found))
    try:
        meta = json.loads(path.read_bytes())
        counts = [meta[key] for key in ("vocab_size", "train_tokens", "val_tokens", "val_bytes")]
        assert all(type(count) is int and count > 0 for count in counts), "a count is not positive"
        dicts = (meta["tokenizer"], meta["sha256"])
        assert all(isinstance(d, dict) for d in dicts), "tokenizer or sha256 is not an object"
        return meta
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        reason = f"has no {error}" if isinstance(error, KeyError) else one_line(error)[:150]
        raise UserError(f"{path}: {reason}; {PREPARE}") from error


def find_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer called "gpt2", or that of a meta.json, of a data set or of a model."""
    if name == "gpt2":
        return BPETokenizer.gpt2()
    if Path(name, "tokenizer.json").exists():  # in Hugging Face's format
        try:
            return load_tokenizer(name)
        except Exception as error:  # the library raises many kinds for bad files
            raise UserError(f"{name}: {one_line(error)[:300]}") from error
    path = Path(name, "meta.json") if Path(name).is_dir() else Path(name)
    return from_dict(read_meta(path)["tokenizer"])


def describe_nanogpt(folder: Path) -> dict:
    """Return what meta.json would say of token files by nanoGPT. Their ids must be GPT-2's."""
    if (folder / "meta.pkl").exists():
        text, name = quote(folder / "input.txt"), quote(folder.name)
        command = f"prepare_shakespeare.py --input={text} --dataset={name}"
        raise UserError(f"{folder / 'meta.pkl'}: pickles are unsafe; run python {command}")
    start, val = Tokens(folder / "train.bin").open()[: 1 << 20], Tokens(folder / "val.bin").open()
    # In any text some of GPT-2's ids are higher. Only small bytes: characters or ids of 8 bits.
    if start.max() < 1000 or (start % 256).max() < 128:
        raise UserError(f"{folder}: has no meta.json, and its ids are not GPT-2's; {PREPARE}")
    tokenizer = BPETokenizer.gpt2()
    val_bytes = len(tokenizer.decode_bytes(val[val < tokenizer.end_of_text].tolist()))
    return describe(folder, tokenizer, val_bytes) | {"sha256": {}}


def describe(folder: Path, tokenizer: Tokenizer, val_bytes: int) -> dict:
    """Return what meta.json says of a train.bin and val.bin, but for their source and sha256."""
    return {
        "tokenizer": tokenizer.to_dict(),
        "vocab_size": tokenizer.vocab_size,
        "train_tokens": len(Tokens(folder / "train.bin")),
        "val_tokens": len(Tokens(folder / "val.bin")),
        "val_bytes": val_bytes,
    }


# Write a data set


def write_dataset(
    folder: Path, tokenizer: Tokenizer, train: list, val: list, val_bytes: int, source: dict
) -> None:
    """Write the three files from two lists of token ids; meta.json is written last."""
    if tokenizer.vocab_size > 1 << 16:
        raise UserError(f"vocab_size={tokenizer.vocab_size} does not fit uint16; at most 65,536 do")
    (folder / "meta.json").unlink(missing_ok=True)  # an old one would describe the new token files
    for name, ids in (("train.bin", train), ("val.bin", val)):
        with atomic_write(folder / name) as file:
            file.write(np.array(ids, dtype=TOKEN).tobytes())
    write_meta(folder, tokenizer, val_bytes, source)


def write_meta(folder: Path, tokenizer: Tokenizer, val_bytes: int, source: dict) -> None:
    """Write meta.json for the train.bin and val.bin that are in `folder`."""
    sha256 = {name: file_sha256(folder / name) for name in ("train.bin", "val.bin")}
    meta = describe(folder, tokenizer, val_bytes) | {"source": source, "sha256": sha256}
    with atomic_write(folder / "meta.json") as file:
        # A file's name may have bytes that are not UTF-8; JSON has an escape for them.
        text = json.dumps(meta, indent=2, ensure_ascii=False)
        file.write(text.encode("utf-8", "backslashreplace"))
