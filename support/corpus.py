"""From text files to token files: read documents, clean them, write train.bin and val.bin.

`Writer` appends to files called NAME.part. progress.json says how many bytes of each file count.
So the work can be interrupted: the next run cuts off what was written after the last save.
"""

import errno
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from support.data import TOKEN, read_meta, write_meta
from support.files import atomic_write, free_bytes, replace
from support.tokenizer import END_OF_TEXT, BPETokenizer

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")
TXT_DOCUMENT = 100_000  # characters; a longer text file is split, if possible at ends of lines
SAVE_BYTES = 10_000_000  # save after a file if there is so much new text: a save takes time
HUGE = 1_000_000  # characters of a document that is not kept waiting in memory beside others
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
        raise UserError(f"{path}: not readable ({one_line(error)[:99]}); is it whole?") from error


def read_parquet(path: Path, column: str) -> Iterator[bytes]:
    file = pq.ParquetFile(path)
    kinds = [field.type for field in file.schema_arrow if field.name == column]
    if len(kinds) != 1 or not (pa.types.is_string(kinds[0]) or pa.types.is_large_string(kinds[0])):
        columns = ", ".join(f"{field.name} ({field.type})" for field in file.schema_arrow)
        raise UserError(f"{path}: --column={column} is not one text column among {columns[:200]}")
    for batch in file.iter_batches(batch_size=128, columns=[column]):
        yield from batch.column(0).cast(pa.large_binary()).drop_null().to_pylist()


def read_jsonl(path: Path, lines: Iterable[str], column: str) -> Iterator[bytes]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)[column].encode("utf-8", "surrogatepass")
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            where = f"{path}: line {number}"
            raise UserError(f"{where} is not JSON with a text {column!r}; use --column") from None


def read_txt(lines: io.TextIOWrapper) -> Iterator[bytes]:
    """Yield documents: from one line <|endoftext|> to the next, or TXT_DOCUMENT characters."""
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
    """Return the document in Unicode's form NFC without control characters; count the repairs."""
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


def hash_document(text: bytes, val_fraction: float) -> tuple[int, bool]:
    """Return 64 bits of BLAKE2 and, decided by them alone, whether the text is for validation."""
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return number, number < val_fraction * 2**64


@dataclass
class Progress:
    """The content of progress.json: what is done of an unfinished data set."""

    options: dict  # those that decide the content; the next run must have the same
    shards: int  # number of files that are done
    complete: bool  # only the renaming of the files is left
    text_bytes: int
    val_bytes: int
    counts: dict  # of documents that were read, kept, dropped, ...
    lengths: dict  # of each of PARTS: the number of bytes that are valid
    sha256: dict  # of each of PARTS: the checksum of these bytes

    def save(self, folder: Path) -> None:
        with atomic_write(folder / "progress.json") as file:
            file.write(json.dumps(asdict(self), indent=2).encode())


def load_progress(folder: Path, options: dict, n_shards: int) -> Progress:
    """Return the progress of an interrupted run with the same options, or that of a new one."""
    path = folder / "progress.json"
    again = f"remove {path} to start again"
    if not path.exists():
        (folder / "tokenizer.json").unlink(missing_ok=True)  # of an earlier start
        Progress(options, 0, False, 0, 0, {}, dict.fromkeys(PARTS, 0), {}).save(folder)
    try:
        progress = Progress(**{"sha256": {}} | json.loads(path.read_bytes()))
        numbers = [progress.shards, progress.text_bytes, progress.val_bytes]
        numbers += [*progress.lengths.values(), *progress.counts.values()]
        good = all(type(n) is int and 0 <= n < 1 << 60 for n in numbers)
        good = good and progress.shards + (not progress.complete) <= n_shards
        if not (good and progress.lengths.keys() == set(PARTS) >= progress.sha256.keys()):
            raise ValueError("wrong values")
        change = difference(progress.options, options)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({one_line(error)[:100]}); {again}") from error
    if change:
        raise UserError(f"{folder} was begun with {change}; use another --dataset, or {again}")
    return progress


def difference(then: dict, now: dict) -> str:
    """Return in words how the options of two runs differ, or "" if they do not."""
    for name in now | then:
        if then.get(name) != now.get(name) and (name != "inputs" or name in then):
            if name in ("files", "inputs"):  # inputs: path, size and time of change of every file
                return "other input files, or they have changed"
            return f"{name}={then.get(name)} instead of {now.get(name)}"
    return ""


class Part:
    """A file that grows, and its sha256. Of an older file, only the valid bytes are kept."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self.hash, left = hashlib.sha256(), progress.lengths[path.stem]
        self.file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
        while chunk := self.file.read(min(left, 1 << 24)):
            self.hash.update(chunk)
            left -= len(chunk)
        self.file.truncate()
        sha256 = self.hash.hexdigest()
        if left or progress.sha256.get(path.stem, sha256) != sha256 or self.file.tell() % 2:
            raise UserError(f"{path} does not fit progress.json; remove the latter to start again")

    def write(self, content: bytes) -> None:
        self.file.write(content)
        self.hash.update(content)


class Writer:
    """Appends shard after shard to an unfinished data set, up to `limit` bytes of text."""

    def __init__(self, folder: Path, progress: Progress, limit: float, n_threads: int) -> None:
        self.folder, self.progress, self.limit, self.n_threads = folder, progress, limit, n_threads
        self.counts = Counter(progress.counts)
        self.parts = {name: Part(folder / f"{name}.part", progress) for name in PARTS}
        # A sorted array takes 8 bytes per document, a set 90: the set has only the unsaved ones.
        self.seen = np.sort(np.fromfile(folder / "seen.part", dtype="<u8"))
        self.seen_now: set[int] = set()
        self.saved_at, self.saved_bytes = time.perf_counter(), progress.text_bytes

    def add_shard(self, path: Path, tokenizer: BPETokenizer, last: bool) -> None:
        """Append a file's documents, tokenized, up to `limit`. Saves if SAVE_BYTES are new."""
        progress, waiting = self.progress, deque()

        def write_first() -> None:
            name, ids = waiting.popleft()
            self.parts[name].write(ids.result().astype(TOKEN).tobytes())

        settings = {"unit": "B", "unit_scale": True, "leave": False, "disable": None}
        bar = tqdm(total=self.limit, initial=progress.text_bytes, **settings)
        with bar, ThreadPoolExecutor(self.n_threads) as pool:  # tiktoken releases Python's lock
            for document in read_documents(path, progress.options["column"]):
                self.counts["read"] += 1
                text = clean(document, self.counts)
                if name := self.choose_file(text):
                    waiting.append((name, pool.submit(tokenizer.encode_document, text)))
                while waiting and (len(waiting) > 100 or len(text) > HUGE):
                    write_first()
                bar.update(progress.text_bytes - bar.n)
                if progress.text_bytes >= self.limit:
                    break
            while waiting:
                write_first()
        progress.shards += 1
        complete, mb = last or progress.text_bytes >= self.limit, progress.text_bytes / 1e6
        if complete or progress.text_bytes - self.saved_bytes >= SAVE_BYTES:
            speed = (mb - self.saved_bytes / 1e6) / (time.perf_counter() - self.saved_at)
            self.save(complete)
            print(f"{path.name}: {mb:,.1f} MB of text so far, {speed:.1f} MB/s")

    def choose_file(self, text: str) -> str:
        """Return "train.bin", "val.bin", or "" for a document that is dropped; count it."""
        options, encoded = self.progress.options, text.encode()
        number, for_val = hash_document(encoded, options["val_fraction"])
        at = np.searchsorted(self.seen, np.uint64(number))
        if len(text) < options["min_chars"]:
            self.counts["dropped: shorter than min_chars"] += 1
            return ""
        if number in self.seen_now or number in self.seen[at : at + 1]:
            self.counts["dropped: the same as an earlier one"] += 1
            return ""
        self.seen_now.add(number)
        self.parts["seen"].write(number.to_bytes(8, "little"))
        self.counts["kept for validation" if for_val else "kept for training"] += 1
        self.progress.text_bytes += len(encoded)
        self.progress.val_bytes += len(encoded) * for_val
        return "val.bin" if for_val else "train.bin"

    def save(self, complete: bool) -> None:
        """Record on the disk what is done. `complete`: no other shard follows."""
        progress = self.progress
        for name, part in self.parts.items():
            part.file.flush()
            os.fsync(part.file.fileno())
            progress.lengths[name], progress.sha256[name] = part.file.tell(), part.hash.hexdigest()
        if complete and not all(progress.lengths.values()):
            (self.folder / "progress.json").unlink()
            remedy = "give more text, lower --min_chars or raise --val_fraction"
            raise UserError(f"too few documents for both training and validation; {remedy}")
        progress.complete, progress.counts = complete, dict(self.counts)
        progress.save(self.folder)
        self.seen = np.union1d(self.seen, np.fromiter(self.seen_now, dtype="<u8"))
        self.seen_now.clear()
        self.saved_at, self.saved_bytes = time.perf_counter(), progress.text_bytes
        for part in self.parts.values() if complete else []:
            part.file.close()  # Windows can not rename an open file


def finish(folder: Path, progress: Progress, tokenizer: BPETokenizer) -> dict:
    """Give the complete files their names, write meta.json and return it. Can be repeated."""
    for path in (folder / "train.bin.part", folder / "val.bin.part"):
        if path.exists():
            Part(path, progress).file.close()  # checks the sha256
            replace(path, folder / path.stem)
    done = {"text_bytes": progress.text_bytes, "documents": progress.counts}
    write_meta(folder, tokenizer, progress.val_bytes, progress.options | done)
    for name in ("progress.json", "seen.part", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)
    return read_meta(folder / "meta.json")


@contextmanager
def explain_disk(folder: Path) -> Iterator[None]:
    """Turn an error of the disk into a UserError that says what is wrong with it."""
    try:
        yield
    except OSError as error:
        reason, free = f"{error.filename or folder}: {error.strerror or error}", free_bytes(folder)
        if error.errno == errno.ENOSPC and free > 1e8:  # then there is room for bytes
            reason += f"; {free / 1e6:,.0f} MB are free, but the number of files may have a limit"
        raise UserError(f"{reason}; fix it, then the same command continues") from error
