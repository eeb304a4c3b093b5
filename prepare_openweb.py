"""Prepare web text, or your own text, as BPE tokens in data/openweb/.

    python prepare_openweb.py --size=250MB --vocab_size=8192     # OpenWebText from the hub
    python prepare_openweb.py --size=12GB --dataset=openweb12
    python prepare_openweb.py --source=fineweb-edu --size=1GB --dataset=fineweb
    python prepare_openweb.py --input=my_texts/ --dataset=mine --tokenizer=gpt2

One file after the other (a shard) is downloaded, cleaned, tokenized, appended to the token files
and deleted. After an interruption, the same command continues and gives the same bytes. Documents
end with <|endoftext|>. Repeated ones are dropped, and a long .txt is cut every 100,000 characters.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import UserError, check_range, configure, run
from support import corpus
from support.data import find_tokenizer, open_dataset
from support.download import download, hub_url
from support.files import lock_path
from support.formats import FORMATS, files_below, format_of, read_documents
from support.tokenizer import PIECES, BPETokenizer, from_dict

# The revisions are fixed, because the content behind a name on the hub has changed before.
OPENWEBTEXT = "datasets/Skylion007/openwebtext/resolve/79d93d786212f7344586290adb811d4ae6a1762c/"
FINEWEB_EDU = "datasets/HuggingFaceFW/fineweb-edu/resolve/87f09149ef4734204d70ed1d046ddc9ca3f2b8f9/"
SOURCES = {  # name: its files on the hub, how many
    "openwebtext": (OPENWEBTEXT + "plain_text/train-{:05}-of-00080.parquet", 80),
    "fineweb-edu": (FINEWEB_EDU + "sample/10BT/{:03}_00000.parquet", 14),
}
SAMPLE_BYTES = 32_000_000  # of text that a tokenizer is trained on


@dataclass(frozen=True)
class PrepareConfig:
    """Prepare web text, or your own text, for a model of BPE tokens."""

    # what to read
    source: Literal["openwebtext", "fineweb-edu"] = "openwebtext"  # on the Hugging Face hub
    input: str = ""  # your files or folders instead, comma-separated
    column: str = "text"  # column of parquet files, key in jsonl files
    size: str = ""  # 250MB, 12GB, all; '': 250MB of a source, all of input
    keep_shards: bool = False  # keep what was downloaded in data/cache/
    # what to make of it
    dataset: str = "openweb"  # folder under data/ to write
    tokenizer: str = "bpe"  # bpe: train one; or gpt2, or data/NAME/meta.json
    vocab_size: int = 32000  # tokens of a trained tokenizer, with <|endoftext|>
    min_chars: int = 200  # drop shorter documents
    val_fraction: float = 0.005  # share of the documents for validation
    num_threads: int = 0  # threads that tokenize; 0: one per processor

    def __post_init__(self) -> None:
        check_range(self, 257, 1 << 16, "vocab_size")  # token ids are stored as uint16
        check_range(self, 1, 1 << 30, "min_chars")
        check_range(self, 0, 1024, "num_threads")
        check_range(self, 1e-9, 0.999, "val_fraction")
        object.__setattr__(self, "size", self.size or ("all" if self.input else "250MB"))
        parse_size(self.size)


def parse_size(size: str) -> float:
    """Return a size in bytes: 250MB is 250,000,000; 'all' is infinity."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?B)", size.upper())
    if size != "all" and not (match and float(match[1])):
        raise UserError(f"size is {size!r} but must be a number with a unit, as 250MB, or 'all'")
    return float(match[1]) * 1000 ** "BKMGT".index(match[2][0]) if match else math.inf


def main(config: PrepareConfig) -> None:
    """Make a tokenizer, add shard after shard, and give the token files their names."""
    folder, cache = Path("data", config.dataset), Path("data/cache", config.source)
    with lock_path(folder), nullcontext() if config.input else lock_path(cache):
        shards, options = list_shards(config)
        if is_prepared(folder, options):
            return
        progress = corpus.load_progress(folder, options)
        progress = progress or corpus.Progress(options, make_tokenizer(config, shards).to_dict())
        tokenizer = from_dict(progress.tokenizer)
        if not progress.complete:
            writer = corpus.Writer(folder, progress, parse_size(config.size), config.num_threads)
        for number, (path, url) in enumerate(shards.items()):
            is_enough = progress.complete or progress.text_bytes >= writer.limit
            if number >= progress.shards and not is_enough:
                if url:
                    download(url, path)
                writer.add_shard(path, tokenizer)
            if url and not config.keep_shards and number < progress.shards:
                path.unlink(missing_ok=True)
        if not progress.complete:
            writer.complete(tokenizer)
        corpus.finish(folder, progress, tokenizer)
    train, val = (progress.lengths[name] // 2 for name in ("train.bin", "val.bin"))
    kinds = f"{tokenizer.vocab_size:,}, {progress.text_bytes / (train + val):.2f} bytes each"
    print(f"{folder}: {train:,} training and {val:,} validation tokens of {kinds}")
    print("documents:", "; ".join(f"{n:,} {what}" for what, n in progress.counts.items() if n))


def list_shards(config: PrepareConfig) -> tuple[dict[Path, str], dict]:
    """Return the files to read, each with its address ("": yours), and what decides the content."""
    names = ("column", "size", "tokenizer", "vocab_size", "min_chars", "val_fraction")
    options = {name: getattr(config, name) for name in names}
    if not config.input:
        files, count = SOURCES[config.source]
        urls = [hub_url(files.format(number)) for number in range(count)]
        shards = {Path("data/cache", config.source, Path(url).name): url for url in urls}
        return shards, {"source": files.rpartition("/")[0]} | options
    paths = []
    parts = filter(None, map(str.strip, config.input.split(",")))
    names = [config.input] if os.path.exists(config.input) else [*parts]
    for path in (Path(name).expanduser() for name in names or [config.input]):
        files = files_below(path) if path.is_dir() else [path]
        found = [file for file in files if format_of(file) and file.exists()]
        if not found:
            what = f"no such file, or none of {', '.join(FORMATS)} (also .gz, .bz2, .zst)"
            raise UserError(f"input={path}: {what}; convert others with pandoc, unpack archives")
        if others := [file.name for file in files if file not in found]:
            print(f"{path}: left out, of other formats or broken links: {', '.join(others)[:200]}")
        paths += found
    inputs = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in dict.fromkeys(paths)]
    return dict.fromkeys(paths, ""), options | {"inputs": inputs}


def is_prepared(folder: Path, options: dict) -> bool:
    """Return whether the data set is there. Raises UserError if it was made with other options."""
    if (folder / "progress.json").exists() or not (folder / "meta.json").exists():
        return False
    try:
        made_with = open_dataset(folder)[0].get("source", {})
    except (UserError, OSError):
        print(folder, "has damaged files; preparing it again ...")
        return False
    corpus.check_options(folder, made_with, options, folder)
    print(folder, "is there already; remove it to prepare it again")
    return True


def make_tokenizer(config: PrepareConfig, shards: dict[Path, str]) -> BPETokenizer:
    """Return GPT-2's tokenizer, that of another data set, or a new one, trained on the text."""
    if config.tokenizer == "bpe":
        print(f"training a tokenizer of {config.vocab_size:,} tokens on up to 32 MB of text ...")
        return BPETokenizer.train(training_sample(config, shards), config.vocab_size)
    tokenizer = find_tokenizer(config.tokenizer)
    if getattr(tokenizer, "end_of_text", None) is None or tokenizer.vocab_size > 1 << 16:
        raise UserError(f"{config.tokenizer}: not BPE with at most 65,536 tokens and <|endoftext|>")
    return tokenizer


def training_sample(config: PrepareConfig, shards: dict[Path, str]) -> Iterator[str]:
    """Yield the first 32 MB of training text, so that every --size gets the same tokenizer."""
    taken = 0
    for path, url in shards.items():
        if url:
            download(url, path)
        for text in read_documents(path, config.column, Counter()):
            _, for_val = corpus.hash_document(text.encode(), config.val_fraction)
            keep = len(text) >= config.min_chars and not for_val
            for piece in PIECES.findall(text) if keep else []:
                yield piece
                taken += len(piece.encode())
                if taken >= SAMPLE_BYTES:
                    return


if __name__ == "__main__":
    run(main, configure(PrepareConfig))
