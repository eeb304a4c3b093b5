"""From text files to token files: read documents, clean them, write train.bin and val.bin.

`Writer` appends to files called NAME.part. progress.json says how many bytes of each file count.
So the work can be interrupted: the next run cuts off what was written after the last save.
"""

import csv
import hashlib
import io
import json
import os
import re
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from configurator import UserError, one_line, quote
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from support.data import TOKEN, write_meta
from support.files import CONVERT, atomic_write, clean, encoding_of, progress_bar, replace
from support.tokenizer import END_OF_TEXT, BPETokenizer

TABLES = (".parquet", ".arrow", ".feather")  # .arrow: also a folder that `datasets` saved
FORMATS = (*TABLES, ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".text")
DESCRIPTIONS = ("dataset_info.json", "state.json", "dataset_dict.json")  # of `datasets`
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", "": None}
TXT_DOCUMENT = 100_000  # characters; a longer text file is split, if possible at ends of lines
SAVE_BYTES = 10_000_000  # save after a file if there is so much new text: a save takes time
END = re.compile(re.escape(END_OF_TEXT) + r"(?:\r?\n)?")  # between two documents of one text
BROKEN = re.compile("[\0\ud800-\udfff]")  # what a byte that is not UTF-8 becomes, and half an emoji
MENDED = "mended: characters that were not UTF-8"
BINS = ("train.bin", "val.bin")
PARTS = (*BINS, "seen")  # seen: the hash of every document, 8 bytes each


def format_of(path: Path) -> tuple[str, str] | None:
    """Return the format and the compression of a file by its name: (".jsonl", ".gz"), or None."""
    suffixes = ["", *(suffix.lower() for suffix in path.suffixes)]
    compression = suffixes.pop() if suffixes[-1] in COMPRESSED else ""
    is_read = suffixes and suffixes[-1] in FORMATS and path.name not in DESCRIPTIONS
    return (suffixes[-1], compression) if is_read else None


def read_documents(path: Path, column: str, counts: Counter) -> Iterator[str]:
    """Yield the documents of a file one by one. Count what is skipped and mended.

    A row without a text is skipped. <|endoftext|> inside a text separates two documents. Raises
    UserError for a file that can not be read, has no such column, or has another encoding.
    """
    n_characters, n_broken, first = 0, 0, ""
    try:
        for row in read_rows(path, column):
            if not isinstance(row, str) or not row:
                counts["skipped: rows without a text"] += 1
                continue
            n_characters += len(row)
            if broken := BROKEN.search(row):
                text = row[max(0, broken.start() - 20) : broken.start()]
                first = first or f"byte 0x{ord(broken[0]) & 0xFF:02x} after {text!r}"
                row, n = BROKEN.subn(lambda match: "\ufffd" * (match[0] > "\0"), row)
                n_broken, counts[MENDED] = n_broken + n, counts[MENDED] + n
                check_encoding(path, n_broken, max(n_characters, 10_000_000), first)
            yield from filter(None, END.split(row))
    except (pa.ArrowException, csv.Error, OSError, MemoryError, UnicodeError) as error:
        hint = "is it whole? If it was downloaded, remove it"
        if "too much memory" in str(error):  # zstd's long mode
            hint = f"run: zstd -d --long=31 {quote(path)}"
        raise UserError(f"{path}: not readable ({one_line(error)[:99]}); {hint}") from error
    check_encoding(path, n_broken, n_characters, first)


def check_encoding(path: Path, n_broken: int, n_characters: int, first: str) -> None:
    """Raise UserError if a file is not in UTF-8: single bad characters are mended, not many."""
    if n_broken > max(10, n_characters / 1000):
        many = f"{n_broken:,} characters are not UTF-8, the first is {first}"
        raise UserError(f"{path}: {many}; {CONVERT}")


def read_rows(path: Path, column: str) -> Iterator:
    """Yield each row's value of a column, or the parts of a text file. Not all need to be text."""
    kind, compression = format_of(path)
    if kind in TABLES:
        yield from read_table(path, kind, column)
        return
    with pa.input_stream(str(path), compression=COMPRESSED[compression]) as stream:
        encoding = encoding_of(stream.read(4))
    with pa.input_stream(str(path), compression=COMPRESSED[compression]) as stream:
        # Bytes that are not UTF-8 pass as surrogates.
        lines = io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline="")
        if kind in (".txt", ".text"):
            yield from read_txt(lines)
            return
        first, found = {}, False
        for row in read_csv(lines) if kind in (".csv", ".tsv") else read_json(path, lines):
            if isinstance(row, dict):
                first, found = first or row, found or column in row
                row = row.get(column)
            yield row
        if first and not found:
            raise UserError(f"{path}: --column={column} is not one of {', '.join(first)}"[:300])


def read_table(path: Path, kind: str, column: str) -> Iterator[str | None]:
    """Yield the values of a text column of a parquet or Arrow file."""
    if kind == ".parquet":
        file = pq.ParquetFile(path)
        schema, batches = file.schema_arrow, file.iter_batches(batch_size=128, columns=[column])
    else:
        source = pa.memory_map(str(path))
        try:
            file = pa.ipc.open_file(source)
            batches = map(file.get_batch, range(file.num_record_batches))
        except pa.ArrowInvalid:  # `datasets` saves streams
            source.seek(0)
            batches = file = pa.ipc.open_stream(source)
        schema = file.schema
    types = {field.name: str(field.type) for field in schema}
    # string, large_string, binary_view, dictionary<values=string, ...>; null if all rows lack it
    if not re.match(r"(dictionary<values=)?(large_)?(string|binary|null)", types.get(column, "")):
        raise UserError(f"{path}: --column={column} is not a text column among {types}"[:300])
    for batch in batches:
        values = batch.column(column)
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        for value in values.cast(pa.large_binary()).to_pylist():
            yield value if value is None else value.decode("utf-8", "surrogateescape")


def read_json(path: Path, lines: io.TextIOWrapper) -> Iterator:
    """Yield the values of JSON lines or, if the first line begins with [, of a JSON array."""
    for number, line in enumerate(lines, start=1):
        try:
            if number == 1 and line.lstrip().startswith("["):
                yield from json.loads(line + lines.read())
            elif line.strip():
                yield json.loads(line)
        except (ValueError, RecursionError) as error:
            what = f"line {number} is not JSON ({one_line(error)[:80]})"
            hint = "write one object per line (jq -c), and run the same command again"
            raise UserError(f"{path}: {what}; {hint}") from None


def read_csv(lines: io.TextIOWrapper) -> Iterator[dict]:
    """Yield the rows of a table whose first line has the names of the columns."""
    csv.field_size_limit(1 << 30)
    header = lines.readline()
    delimiter = max(",;\t", key=header.count)
    [names] = csv.reader([header], delimiter=delimiter)
    yield from csv.DictReader(lines, names, delimiter=delimiter)


def read_txt(text: io.TextIOWrapper) -> Iterator[str]:
    """Yield a text in parts of at most TXT_DOCUMENT characters, if possible up to ends of lines."""
    rest, longest = "", TXT_DOCUMENT + len(END_OF_TEXT)  # no cut divides an <|endoftext|>
    while block := text.read(TXT_DOCUMENT):
        *documents, rest = END.split(rest + block)
        yield from filter(None, documents)
        while len(rest) > longest:
            cut = rest.rfind("\n", 0, TXT_DOCUMENT) + 1 or TXT_DOCUMENT
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


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
    """Return the progress of an interrupted run with the same options; None if there is none.

    Input files that are not done may have changed since: an error in one of them was corrected.
    """
    path = folder / "progress.json"
    again = f"remove {path} to start again"
    try:
        progress = Progress(**json.loads(path.read_bytes()))
        done = None if progress.complete else progress.shards
        then, now = (
            {k: v[:done] if type(v) is list else v for k, v in o.items()}
            for o in (progress.options, options)
        )
        change, progress.counts = difference(then, now), Counter(progress.counts)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged, or of an earlier version; {again}") from None
    if change:
        raise UserError(f"{folder} was begun with {change}; use another --dataset, or {again}")
    progress.options = options
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
        bar = progress_bar(self.limit, progress.text_bytes)

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
        if progress.complete:
            self.balance(tokenizer)
        if progress.complete or new >= SAVE_BYTES:
            self.save()
            done = f"{progress.text_bytes / 1e6:,.1f} MB of text so far"
            print(f"{path.name}: {done}, {new / 1e6 / seconds:.1f} MB/s")

    def keep_documents(self, path: Path) -> Iterator[tuple[BinaryIO, str]]:
        """Yield the documents to keep, up to `limit`, and the file for their tokens. Count all."""
        progress, options = self.progress, self.progress.options
        for document in read_documents(path, options["column"], progress.counts):
            text = clean(document)
            encoded = text.encode()
            progress.counts["read"] += 1
            progress.counts["cleaned: line ends, control characters, form NFC"] += text != document
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

    def balance(self, tokenizer: BPETokenizer) -> None:
        """Correct the share of validation, if it is far from val_fraction, at the files' ends.

        A document's hash decides where it goes, so few or very long documents give any share: then
        one file's last tokens move to the other.
        """
        train, val = self.files["train.bin"], self.files["val.bin"]
        n_train, n_val = (file.tell() // TOKEN.itemsize for file in (train, val))
        wanted = max(1, round(self.progress.options["val_fraction"] * (n_train + n_val)))
        if abs(n_val - wanted) <= wanted / 4 or n_train + n_val < 2:
            return
        source, target = (train, val) if n_val < wanted else (val, train)
        end = source.tell() - abs(n_val - wanted) * TOKEN.itemsize
        source.flush()
        ids = np.fromfile(source.name, dtype=TOKEN, offset=end)
        target.write(ids.tobytes())
        text = tokenizer.decode_bytes(ids[ids != tokenizer.end_of_text].tolist())
        self.progress.val_bytes += len(text) if target is val else -len(text)
        source.seek(end)  # `finish` cuts the file off there, after this is saved

    def save(self) -> None:
        """Record on the disk what is done."""
        progress = self.progress
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            progress.lengths[name] = file.tell()
            if progress.complete:
                file.close()  # Windows can not rename an open file
        if progress.complete and not (
            progress.lengths["train.bin"] and progress.lengths["val.bin"]
        ):
            (self.folder / "progress.json").unlink()
            read = "; ".join(f"{n:,} {what}" for what, n in progress.counts.items() if n)
            raise UserError(f"no text is left for {self.folder} ({read}); lower --min_chars?")
        with atomic_write(self.folder / "progress.json") as file:
            file.write(json.dumps(vars(progress)).encode())
        self.saved_at, self.saved_bytes = time.perf_counter(), progress.text_bytes


def finish(folder: Path, progress: Progress, tokenizer: BPETokenizer) -> None:
    """Give the complete files their names and write meta.json. Can be repeated after a kill."""
    (folder / "meta.json").unlink(missing_ok=True)  # an old one would describe the new files
    for path in (folder / "train.bin.part", folder / "val.bin.part"):
        if path.exists():
            os.truncate(path, progress.lengths[path.stem])
            replace(path, folder / path.stem)
    done = {"text_bytes": progress.text_bytes, "documents": progress.counts}
    write_meta(folder, tokenizer, progress.val_bytes, progress.options | done)
    for name in ("progress.json", "seen.part"):
        (folder / name).unlink(missing_ok=True)
