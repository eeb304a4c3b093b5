"""Web text, as byte pair encoded tokens, to data/openweb/.

    python prepare_openweb.py --size=250MB                   # OpenWebText from the Hugging Face hub
    python prepare_openweb.py --size=12GB --dataset=openweb12
    python prepare_openweb.py --source=fineweb-edu --size=1GB --dataset=fineweb
    python prepare_openweb.py --input=my_texts/ --dataset=mine --tokenizer=gpt2

One shard after the other is downloaded, cleaned, tokenized, added to the token files and deleted.
Interrupted at any moment, the same command goes on with the shard it was at, and ends with the same
bytes. Documents are kept whole, each followed by <|endoftext|>, and once each.
"""

import hashlib
import io
import json
import math
import os
import re
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from configurator import UserError, configure, one_line, run
from support.data import TOKEN, read_meta, write_meta
from support.download import download, hub_url, remote_size
from support.files import atomic_write, free_bytes
from support.tokenizer import END_OF_TEXT, BPETokenizer, from_dict

# Revisions are pinned: what a name stands for on the hub has changed before.
SOURCES = {  # name: folder on the hub, files in it, how many
    "openwebtext": (
        "datasets/Skylion007/openwebtext/resolve/79d93d786212f7344586290adb811d4ae6a1762c/plain_text",
        "train-{:05}-of-00080.parquet",
        80,
    ),
    "fineweb-edu": (
        "datasets/HuggingFaceFW/fineweb-edu/resolve/87f09149ef4734204d70ed1d046ddc9ca3f2b8f9/sample/10BT",
        "{:03}_00000.parquet",
        14,
    ),
}
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")
SAMPLE_BYTES = 32_000_000  # the text that a tokenizer is trained on
TXT_DOCUMENT = 100_000  # characters after which a text file is cut at the next end of a line
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 and C1 without tab and newline


@dataclass(frozen=True)
class PrepareConfig:
    """Prepare web text, or texts of your own, for a model of byte pair encoded tokens."""

    # what to read
    source: Literal["openwebtext", "fineweb-edu"] = (
        "openwebtext"  # on the Hugging Face hub, or HF_ENDPOINT's mirror
    )
    input: str = ""  # files or folders of your own instead, with commas between: .parquet .jsonl .txt (.gz, .zst)
    column: str = "text"  # of a parquet or jsonl file
    size: str = ""  # stop after so much text, as 250MB or 12GB; 'all'; by default 250MB of a source, all of input
    keep_shards: bool = False  # keep what was downloaded, in data/cache/
    # what to make of it
    dataset: str = "openweb"  # the folder under data/ to write
    tokenizer: str = "bpe"  # bpe: train one; gpt2: GPT-2's own; data/other/meta.json: the one of another data set
    vocab_size: int = 32000  # tokens of a trained one, <|endoftext|> among them
    min_chars: int = 200  # shorter documents are dropped
    val_fraction: float = 0.005  # share of the documents, chosen by their hash, for validation
    num_threads: int = 0  # that tokenize; 0: one per processor

    def __post_init__(self) -> None:
        if not 257 <= self.vocab_size <= 1 << 16:
            raise UserError(
                f"vocab_size is {self.vocab_size} but must be at least 257 and at most 65536 (uint16)"
            )
        if not 0 < self.val_fraction < 1:
            raise UserError(f"val_fraction is {self.val_fraction} but must be between 0 and 1")
        if self.min_chars < 1 or self.num_threads < 0:
            raise UserError(
                f"min_chars={self.min_chars}, num_threads={self.num_threads}: 1 and 0 are the least"
            )
        object.__setattr__(self, "size", self.size or ("all" if self.input else "250MB"))
        parse_size(self.size)


def parse_size(size: str) -> float:
    """Bytes: 250MB is 250,000,000; 'all' is infinity."""
    if size == "all":
        return math.inf
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB|TB|B)", size.upper())
    if not match or not float(match[1]):
        raise UserError(
            f"size is {size!r} but must be a number with its unit, as 250MB or 12GB, or 'all'"
        )
    return float(match[1]) * {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[match[2]]


def read_documents(path: Path, column: str) -> Iterator[bytes]:
    """The documents of a file, one at a time."""
    if path.name.endswith(".parquet"):
        yield from read_parquet(path, column)
        return
    try:
        with pa.input_stream(
            str(path), compression={".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
        ) as stream:
            # Bytes that are no UTF-8 pass through as surrogates; `clean` counts and mends them.
            lines = io.TextIOWrapper(
                stream, encoding="utf-8", errors="surrogateescape", newline="\n"
            )
            read = read_jsonl if ".jsonl" in path.suffixes else read_text
            yield from read(path, lines, column)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: can not be unpacked ({error}); is it whole?") from error


def read_parquet(path: Path, column: str) -> Iterator[bytes]:
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if column not in names:
            raise UserError(
                f"{path}: no column {column!r}; choose among {', '.join(names)} with --column"
            )
        kind = file.schema_arrow.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(
                f"{path}: column {column!r} has no text but {kind}; choose another with --column"
            )
        for batch in file.iter_batches(batch_size=128, columns=[column]):
            yield from batch.column(0).cast(pa.large_binary()).drop_null().to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path}: can not be read as parquet ({str(error).splitlines()[0][:150]})"
        ) from error


def read_jsonl(path: Path, lines: io.TextIOWrapper, column: str) -> Iterator[bytes]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[column]
            yield text.encode("utf-8", "surrogatepass")
        except (ValueError, RecursionError):
            raise UserError(f"{path}: line {number} is no JSON") from None
        except (KeyError, TypeError, IndexError, AttributeError):
            raise UserError(
                f"{path}: line {number} has no text named {column!r}; choose with --column"
            ) from None


def read_text(_path: Path, lines: io.TextIOWrapper, _column: str) -> Iterator[bytes]:
    """A document ends with a line <|endoftext|>, with the file, or with the line that makes it long enough.

    So a book in one file has parts for validation too, and no file is ever in memory whole.
    """
    document, length = [], 0
    while line := lines.readline(TXT_DOCUMENT):
        ended = line.rstrip("\r\n") == END_OF_TEXT
        if not ended:
            document.append(line)
            length += len(line)
        if ended or length >= TXT_DOCUMENT:
            yield "".join(document).encode("utf-8", "surrogateescape")
            document, length = [], 0
    yield "".join(document).encode("utf-8", "surrogateescape")


def clean(document: bytes, counts: Counter) -> str:
    """A document as text in Unicode's form NFC, without control characters; `counts` is told what was done."""
    try:
        text = document.decode("utf-8")
    except UnicodeDecodeError:
        text = document.decode("utf-8", "replace")
        counts["mended: bytes that were no UTF-8"] += 1
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    visible = CONTROL.sub("", text)
    counts["mended: control characters"] += visible != text
    composed = unicodedata.normalize("NFC", visible)
    counts["mended: not in Unicode's form NFC"] += composed != visible
    return composed


def document_hash(text: bytes) -> int:
    """64 bits of BLAKE2: that any two of 10 million documents share theirs has a chance of 1 in 370,000."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def is_validation(number: int, fraction: float) -> bool:
    """By the document's hash alone: so one that is in val.bin at 250 MB is there at 12 GB too."""
    return number < fraction * 2**64


@dataclass(frozen=True)
class Shard:
    """A file of documents: one's own, or one that is downloaded when it is read."""

    path: Path
    url: str = ""

    def fetch(self) -> Path:
        if not self.path.exists():
            download(self.url, self.path)
            try:
                pq.read_metadata(self.path)
            except (pa.ArrowInvalid, OSError) as error:
                self.path.unlink()
                raise UserError(
                    f"{self.url}: what came is no parquet file ({one_line(error)[:100]})"
                ) from error
        return self.path


def list_shards(config: PrepareConfig) -> list[Shard]:
    """The files that `config` names, in the order in which they are read."""
    if not config.input:
        folder, name, count = SOURCES[config.source]
        names = [name.format(n) for n in range(count)]
        return [
            Shard(Path("data") / "cache" / config.source / n, hub_url(f"{folder}/{n}"))
            for n in names
        ]
    paths = []
    for name in [config.input] if Path(config.input).exists() else config.input.split(","):
        path = Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
            if not found:
                raise UserError(
                    f"input={name}: no file in this folder ends with {', '.join(SUFFIXES)}"
                )
            paths += found
        elif not path.is_file():
            raise UserError(f"input={name}: no such file or folder")
        elif not path.name.endswith(SUFFIXES):
            raise UserError(
                f"input={name}: unknown kind of file; it must end with {', '.join(SUFFIXES)}"
            )
        else:
            paths.append(path)
    return [Shard(path) for path in paths]


def make_tokenizer(config: PrepareConfig, shards: list[Shard]) -> BPETokenizer:
    if config.tokenizer == "gpt2":
        return BPETokenizer.gpt2()
    if config.tokenizer != "bpe":
        tok = from_dict(read_meta(Path(config.tokenizer))["tokenizer"])
        if not isinstance(tok, BPETokenizer):
            raise UserError(
                f"tokenizer={config.tokenizer}: that data set is one of characters; choose one with BPE"
            )
        return tok
    tok = BPETokenizer.train(training_sample(config, shards), config.vocab_size)
    if tok.vocab_size < config.vocab_size:
        print(
            f"the text has no pairs for {config.vocab_size:,} tokens: the vocabulary is {tok.vocab_size:,}"
        )
    return tok


def training_sample(config: PrepareConfig, shards: list[Shard]) -> Iterator[str]:
    """The first 32 MB of training text: the same for any size, so that the tokenizer is the same too."""
    taken = 0
    for shard in shards:
        for document in read_documents(shard.fetch(), config.column):
            text = clean(document, Counter())
            if len(text) >= config.min_chars and not is_validation(
                document_hash(text.encode()), config.val_fraction
            ):
                yield text
                taken += len(text.encode())
                if taken >= SAMPLE_BYTES:
                    return


class Unfinished:
    """A data set while it grows: token files as .part, and progress.json, which says how much of them counts.

    What is behind the lengths in progress.json was written after the last whole shard, and is cut off.
    """

    def __init__(self, folder: Path, options: dict) -> None:
        self.folder, self.path = folder, folder / "progress.json"
        self.state = {
            "options": options,
            "shards": 0,  # that are done
            "complete": False,  # nothing is left to do but to give the files their names
            "text_bytes": 0,
            "val_bytes": 0,
            "counts": {},
            "lengths": {
                "train.bin": 0,
                "val.bin": 0,
                "seen": 0,
            },  # seen: 8 bytes for each document, its hash
        }
        if self.path.exists():
            self.state = json.loads(self.path.read_bytes())
            then = self.state["options"]
            for name in options.keys() | then.keys():
                if options.get(name) != then.get(name):
                    raise UserError(
                        f"{folder} was begun with {name}={then.get(name)} and not {options.get(name)}; "
                        f"set it back to go on, choose another --dataset, or remove {self.path} to start anew"
                    )

    def __enter__(self) -> "Unfinished":
        self.files = {}
        if not self.path.exists():
            (self.folder / "tokenizer.json").unlink(missing_ok=True)  # of another beginning
            self.save()
        if not self.state["complete"]:
            for name, length in self.state["lengths"].items():
                path = self.part(name)
                if length > (path.stat().st_size if path.exists() else 0):
                    raise UserError(
                        f"{path} is shorter than {self.path} says; remove {self.path} to start anew"
                    )
                self.files[name] = open(path, "r+b" if path.exists() else "w+b")
                self.files[name].truncate(length)
                self.files[name].seek(length)
            self.counts = Counter(self.state["counts"])
            self.sort_seen()
        return self

    def __exit__(self, *_) -> None:
        for file in self.files.values():
            file.close()

    def part(self, name: str) -> Path:
        return self.folder / f"{name}.part"

    def sort_seen(self) -> None:
        # A sorted array takes 8 bytes a document where a set takes 90; the set is for this shard's.
        self.seen, self.seen_now = np.sort(np.fromfile(self.part("seen"), dtype="<u8")), set()

    def is_new(self, number: int) -> bool:
        """Whether no document with this hash has been added; it now counts as added."""
        at = np.searchsorted(self.seen, np.uint64(number))
        if number in self.seen_now or (at < len(self.seen) and self.seen[at] == number):
            return False
        self.seen_now.add(number)
        self.files["seen"].write(number.to_bytes(8, "little"))
        return True

    def shard_done(self, complete: bool) -> None:
        """From now on the shard counts; with `complete`, it was the last."""
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            self.state["lengths"][name] = file.tell()
        self.state |= {
            "shards": self.state["shards"] + 1,
            "complete": complete,
            "counts": dict(self.counts),
        }
        self.save()
        self.sort_seen()

    def save(self) -> None:
        with atomic_write(self.path) as file:
            file.write(json.dumps(self.state, indent=2).encode())

    def finish(self, tok: BPETokenizer) -> None:
        """Give the files their names. Whatever moment interrupts this, it can be done again."""
        self.__exit__()  # Windows renames no open file
        (self.folder / "meta.json").unlink(missing_ok=True)
        for name in ("train.bin", "val.bin"):
            if self.part(name).exists():
                os.replace(self.part(name), self.folder / name)
        source = self.state["options"] | {
            "text_bytes": self.state["text_bytes"],
            "documents": self.state["counts"],
        }
        write_meta(self.folder, tok, self.state["val_bytes"], source)
        for path in (self.path, self.part("seen"), self.folder / "tokenizer.json"):
            path.unlink(missing_ok=True)


def keep(work: Unfinished, path: Path, config: PrepareConfig) -> Iterator[tuple[str, bool]]:
    """The documents of a file that belong to the data set, clean, each with whether it is for validation."""
    state, counts, size = work.state, work.counts, parse_size(config.size)
    for document in read_documents(path, config.column):
        counts["read"] += 1
        text = clean(document, counts)
        encoded = text.encode()
        number = document_hash(encoded)
        if len(text) < config.min_chars:
            counts["dropped: shorter than min_chars"] += 1
        elif not work.is_new(number):
            counts["dropped: the same as an earlier one"] += 1
        else:
            for_val = is_validation(number, config.val_fraction)
            counts["kept for validation" if for_val else "kept for training"] += 1
            state["text_bytes"] += len(encoded)
            state["val_bytes"] += len(encoded) * for_val
            yield text, for_val
            if state["text_bytes"] >= size:
                return


def add_shard(
    work: Unfinished, path: Path, tok: BPETokenizer, config: PrepareConfig, bar: tqdm
) -> None:
    """Tokenize what is to be kept of a file, on all processors, and write it in its order."""
    waiting: deque = deque()

    def write_first() -> None:
        ids, for_val = waiting.popleft()
        work.files["val.bin" if for_val else "train.bin"].write(
            ids.result().astype(TOKEN).tobytes()
        )

    with ThreadPoolExecutor(
        config.num_threads or os.cpu_count()
    ) as pool:  # tiktoken works without Python's lock
        for text, for_val in keep(work, path, config):
            waiting.append((pool.submit(tok.encode_document, text), for_val))
            if len(waiting) > 100:
                write_first()
            bar.update(work.state["text_bytes"] - bar.n)
        while waiting:
            write_first()


def check_disk(folder: Path, shards: list[Shard], config: PrepareConfig, done: int) -> None:
    """Raises UserError if there is no room for the tokens, 2 bytes for about 4 of text, and for what is downloaded."""
    if config.input:
        shard, text = 0, sum(s.path.stat().st_size for s in shards)
    else:
        shard = remote_size(shards[0].url)
        text = 1.6 * shard * len(shards)  # OpenWebText: 39.8 GB in 80 files of 0.3 GB
    text = min(text, parse_size(config.size)) - done
    kept = math.ceil(text / (1.6 * shard)) if shard and config.keep_shards else 1
    needed, free = int(max(0, text) / 2 + shard * kept), free_bytes(folder)
    if needed > free:
        raise UserError(
            f"{folder} will need about {needed / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free there; "
            f"make room, or choose a smaller --size than {config.size}"
        )


def main(config: PrepareConfig) -> None:
    """First a tokenizer, then shard after shard, then the files get their names."""
    folder, shards = Path("data") / config.dataset, list_shards(config)
    options = (
        {"files": [str(s.path) for s in shards]}
        if config.input
        else {"source": SOURCES[config.source][0]}
    )
    for name in ("column", "size", "tokenizer", "vocab_size", "min_chars", "val_fraction"):
        options[name] = getattr(config, name)
    finished = (folder / "meta.json").exists() and not (folder / "progress.json").exists()
    if (
        finished
        and not config.input
        and options.items() <= read_meta(folder / "meta.json")["source"].items()
    ):
        print(
            f"{folder} is there already, made with these very options; to make it anew, remove it"
        )
        return
    try:
        with Unfinished(folder, options) as work:
            check_disk(folder, shards, config, work.state["text_bytes"])
            tok = load_tokenizer(folder / "tokenizer.json", config, shards)
            if not work.state["complete"]:
                add_shards(work, shards, tok, config)
            work.finish(tok)
    except OSError as error:
        free = free_bytes(folder)
        raise UserError(
            f"{folder}: {error.strerror or error}, with {free:,} bytes free; what is done is kept, and the same "
            "command goes on with it"
        ) from error
    if not config.keep_shards:
        for shard in shards:
            if shard.url:
                shard.path.unlink(missing_ok=True)
    report(folder)


def load_tokenizer(path: Path, config: PrepareConfig, shards: list[Shard]) -> BPETokenizer:
    """The tokenizer of the unfinished data set; it is made first if this is the beginning."""
    if not path.exists():
        tok = make_tokenizer(config, shards)
        with atomic_write(path) as file:
            file.write(json.dumps(tok.to_dict()).encode())
    return from_dict(json.loads(path.read_bytes()))


def add_shards(
    work: Unfinished, shards: list[Shard], tok: BPETokenizer, config: PrepareConfig
) -> None:
    """Shard after shard, until `size` is reached or there are no more."""
    size = parse_size(config.size)
    total = None if math.isinf(size) else size
    with tqdm(
        total=total, initial=work.state["text_bytes"], unit="B", unit_scale=True, disable=None
    ) as bar:
        for number in range(work.state["shards"], len(shards)):
            path = shards[number].fetch()
            started, before = time.perf_counter(), work.state["text_bytes"]
            add_shard(work, path, tok, config, bar)
            complete = work.state["text_bytes"] >= size or number == len(shards) - 1
            if complete and not all(work.files[name].tell() for name in ("train.bin", "val.bin")):
                work.path.unlink(missing_ok=True)
                kept = work.counts["kept for training"] + work.counts["kept for validation"]
                raise UserError(
                    f"of {work.counts['read']:,} documents {kept:,} were kept, too few to have some for training and "
                    f"some for validation; give more text, lower --min_chars or raise --val_fraction"
                )
            work.shard_done(complete)
            seconds, added = time.perf_counter() - started, work.state["text_bytes"] - before
            bar.write(
                f"{path.name}: {added / 1e6:,.1f} MB of text in {seconds:.1f} s, {added / 1e6 / seconds:.1f} MB/s"
            )
            if shards[number].url and not config.keep_shards:
                path.unlink()
            if complete:
                return


def report(folder: Path) -> None:
    """Print what the data set has become."""
    meta = read_meta(folder / "meta.json")
    tokens, source = meta["train_tokens"] + meta["val_tokens"], meta["source"]
    print(
        f"{folder}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens of "
        f"{meta['vocab_size']:,}, {source['text_bytes'] / tokens:.2f} bytes each"
    )
    print(
        "documents: "
        + "; ".join(f"{count:,} {what}" for what, count in source["documents"].items() if count)
    )


if __name__ == "__main__":
    run(main, configure(PrepareConfig))
