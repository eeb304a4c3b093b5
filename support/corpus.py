"""From text files to token files: read documents, clean them, write train.bin and val.bin.

`Writer` appends to files called NAME.part. progress.json says how many bytes of each file count.
So the work can be interrupted: the next run cuts off what was written after the last save.
"""

import hashlib
import io
import json
import os
import re
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from configurator import UserError, one_line
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from support.data import TOKEN, write_meta
from support.files import atomic_write, replace
from support.tokenizer import END_OF_TEXT, BPETokenizer

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")
TXT_DOCUMENT = 100_000  # characters; a longer text file is split, if possible at ends of lines
SAVE_BYTES = 10_000_000  # save after a file if there is so much new text: a save takes time
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 and C1 without tab and newline
PARTS = ("train.bin", "val.bin", "seen")  # seen: the hash of every document, 8 bytes each


def read_documents(path: Path, column: str) -> Iterator[bytes]:
    """Yield the documents of a file one by one, as bytes that may not be valid UTF-8."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    try:
        if path.suffix == ".parquet":
            yield from read_parquet(path, column)
            return
        with pa.input_stream(str(path), compression=compression) as stream:
            # Bytes that are not UTF-8 pass as surrogates; `clean` counts and replaces them.
            lines = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="\n")
            jsonl = ".jsonl" in path.suffixes
            yield from read_jsonl(path, lines, column) if jsonl else read_txt(lines)
    except (pa.ArrowException, OSError, MemoryError, OverflowError, UnicodeError) as error:
        hint = "is it whole? If it was downloaded, remove it"
        raise UserError(f"{path}: not readable ({one_line(error)[:99]}); {hint}") from error


def read_parquet(path: Path, column: str) -> Iterator[bytes]:
    file = pq.ParquetFile(path)
    columns = {field.name: str(field.type) for field in file.schema_arrow}
    if columns.get(column) not in ("string", "large_string"):
        raise UserError(f"{path}: --column={column} is not a text column among {columns}"[:300])
    for batch in file.iter_batches(batch_size=128, columns=[column]):
        yield from batch.column(0).cast(pa.large_binary()).drop_null().to_pylist()


def read_jsonl(path: Path, lines: Iterable[str], column: str) -> Iterator[bytes]:
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                yield json.loads(line)[column].encode("utf-8", "surrogatepass")
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            where = f"{path}: line {number}"
            raise UserError(f"{where} is not JSON with a text {column!r}; use --column") from None


def read_txt(lines: io.TextIOWrapper) -> Iterator[bytes]:
    """Yield documents: from one line <|endoftext|> to the next, or TXT_DOCUMENT characters."""
    document = ""
    while line := lines.readline(TXT_DOCUMENT):
        ended = line.rstrip("\r\n") == END_OF_TEXT
        document += "" if ended else line
        if ended or len(document) >= TXT_DOCUMENT:
            yield document.encode("utf-8", "surrogateescape")
            document = ""
    yield document.encode("utf-8", "surrogateescape")


def clean(document: bytes, counts: Counter) -> str:
    """Return the document in Unicode's form NFC without control characters; count the repairs."""
    text = document.decode("utf-8", "replace")
    if text.encode() != document:
        counts["mended: bytes that were no UTF-8"] += 1
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    visible = CONTROL.sub("", text)
    counts["mended: control characters"] += visible != text
    composed = unicodedata.normalize("NFC", visible)
    counts["mended: not in Unicode's form NFC"] += composed != visible
    return composed


def hash_document(text: bytes, val_fraction: float) -> tuple[int, bool]:
    """Return 64 bits of BLAKE2 and, decided by them alone, whether the text is for validation."""
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return number, number < val_fraction * 2**64


@dataclass
class Progress:
    """The content of progress.json: what is done of an unfinished data set."""

    options: dict  # the options that decide the content; the next run must have the same
    tokenizer: dict  # its to_dict()
    shards: int = 0  # number of files that are done
    complete: bool = False  # only the renaming of the files is left
    text_bytes: int = 0
    val_bytes: int = 0
    counts: Counter = field(default_factory=Counter)  # documents that were read, kept, ...
    lengths: dict = field(default_factory=lambda: dict.fromkeys(PARTS, 0))  # valid bytes


def load_progress(folder: Path, options: dict) -> Progress | None:
    """Return the progress of an interrupted run with the same options; None if there is none."""
    path = folder / "progress.json"
    again = f"remove {path} to start again"
    try:
        progress = Progress(**json.loads(path.read_bytes()))
        change, progress.counts = difference(progress.options, options), Counter(progress.counts)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged, or of an earlier version; {again}") from None
    if change:
        raise UserError(f"{folder} was begun with {change}; use another --dataset, or {again}")
    return progress


def difference(then: dict, now: dict) -> str:
    """Return "other values of size, column" for options that have changed, or "" if none has."""
    changed = [name for name, value in now.items() if then.get(name) != value]
    return f"other values of {', '.join(changed)}" if changed else ""


class Writer:
    """Appends shard after shard to an unfinished data set, up to `limit` bytes of text."""

    def __init__(self, folder: Path, progress: Progress, limit: float, n_threads: int) -> None:
        self.folder, self.progress, self.limit = folder, progress, limit
        self.n_threads = n_threads or os.cpu_count()
        folder.mkdir(parents=True, exist_ok=True)
        self.files = {name: open(folder / f"{name}.part", "ab") for name in PARTS}  # noqa: SIM115
        for name, file in self.files.items():
            if file.tell() < progress.lengths[name]:
                raise UserError(f"{file.name} is shorter than in progress.json; remove the latter")
            file.seek(progress.lengths[name])
            file.truncate()
        # The hashes take some 100 bytes each: 0.25 GB for 12 GB of OpenWebText.
        self.seen = set(np.fromfile(folder / "seen.part", dtype="<u8").tolist())
        self.save()

    def add_shard(self, path: Path, tokenizer: BPETokenizer, last: bool) -> None:
        """Append a file's documents, tokenized, up to `limit`. Saves if SAVE_BYTES are new."""
        progress, waiting = self.progress, deque()  # of documents, in order
        settings = {"unit": "B", "unit_scale": True, "leave": False, "disable": None}
        bar = tqdm(total=self.limit, initial=progress.text_bytes, **settings)

        def encode(text: str) -> bytes:
            return tokenizer.encode_document(text).astype(TOKEN).tobytes()

        with bar, ThreadPoolExecutor(self.n_threads) as pool:  # tiktoken releases Python's lock
            for file, text in self.keep_documents(path):
                waiting.append((file, pool.submit(encode, text)))
                if len(waiting) > 4 * self.n_threads:
                    first, ids = waiting.popleft()
                    first.write(ids.result())
                bar.update(progress.text_bytes - bar.n)
            for file, ids in waiting:
                file.write(ids.result())
        progress.shards += 1
        progress.complete = last or progress.text_bytes >= self.limit
        new, seconds = progress.text_bytes - self.saved_bytes, time.perf_counter() - self.saved_at
        if progress.complete or new >= SAVE_BYTES:
            self.save()
            done = f"{progress.text_bytes / 1e6:,.1f} MB of text so far"
            print(f"{path.name}: {done}, {new / 1e6 / seconds:.1f} MB/s")

    def keep_documents(self, path: Path) -> Iterator[tuple[BinaryIO, str]]:
        """Yield the documents to keep, up to `limit`, and the file for their tokens. Count all."""
        progress, options = self.progress, self.progress.options
        for document in read_documents(path, options["column"]):
            progress.counts["read"] += 1
            text = clean(document, progress.counts)
            encoded = text.encode()
            number, for_val = hash_document(encoded, options["val_fraction"])
            if len(text) < options["min_chars"]:
                progress.counts["dropped: shorter than min_chars"] += 1
            elif number in self.seen:
                progress.counts["dropped: the same as an earlier one"] += 1
            else:
                progress.counts["kept for validation" if for_val else "kept for training"] += 1
                progress.text_bytes += len(encoded)
                progress.val_bytes += len(encoded) * for_val
                self.seen.add(number)
                self.files["seen"].write(number.to_bytes(8, "little"))
                yield self.files["val.bin" if for_val else "train.bin"], text
            if progress.text_bytes >= self.limit:
                break

    def save(self) -> None:
        """Record on the disk what is done."""
        progress = self.progress
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            progress.lengths[name] = file.tell()
            if progress.complete:
                file.close()  # Windows can not rename an open file
        if progress.complete and not all(progress.lengths.values()):
            (self.folder / "progress.json").unlink()
            remedy = "give more text, lower --min_chars or raise --val_fraction"
            raise UserError(f"too few documents for both training and validation; {remedy}")
        with atomic_write(self.folder / "progress.json") as file:
            file.write(json.dumps(vars(progress)).encode())
        self.saved_at, self.saved_bytes = time.perf_counter(), progress.text_bytes


def finish(folder: Path, progress: Progress, tokenizer: BPETokenizer) -> None:
    """Give the complete files their names and write meta.json. Can be repeated after a kill."""
    (folder / "meta.json").unlink(missing_ok=True)  # an old one would describe the new files
    for path in (folder / "train.bin.part", folder / "val.bin.part"):
        if path.exists():
            replace(path, folder / path.stem)
    done = {"text_bytes": progress.text_bytes, "documents": progress.counts}
    write_meta(folder, tokenizer, progress.val_bytes, progress.options | done)
    for name in ("progress.json", "seen.part"):
        (folder / name).unlink(missing_ok=True)
