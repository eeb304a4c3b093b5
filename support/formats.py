"""Read the documents in a file, whatever its usual format: a table, JSON, CSV or plain text."""

import csv
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from configurator import UserError, one_line, quote
from support.files import CONVERT, clean, encoding_of
from support.tokenizer import END_OF_TEXT

TABLES = (".parquet", ".arrow", ".feather")  # .arrow: also a folder that `datasets` saved
FORMATS = (*TABLES, ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".text")
# Side files: of `datasets`, and hidden ones
OTHERS = re.compile(r"(dataset_infos?|state|dataset_dict)\.json|cache-.*\.arrow|\..*")
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", "": None}
TXT_DOCUMENT = 100_000  # characters; a longer text file is split, if possible at ends of lines
END = re.compile(re.escape(END_OF_TEXT) + r"(?:\r\n?|\n)?")  # `clean` removes this line end, too
SURROGATE = re.compile("[\ud800-\udfff]")  # what a byte that is not UTF-8 becomes
BROKEN = re.compile("([\0\ud800-\udfff]|\x1b[$(])")  # 0 is frequent in UTF-16, the last in ISO-2022
MENDED = "mended: characters that were not UTF-8"


def format_of(path: Path) -> tuple[str, str] | None:
    """Return the format and the compression of a file by its name: (".jsonl", ".gz"), or None."""
    suffixes = ["", *(suffix.lower() for suffix in path.suffixes)]
    compression = suffixes.pop() if suffixes[-1] in COMPRESSED else ""
    readable = FORMATS[len(TABLES) :] if compression else FORMATS  # a table compresses itself
    is_read = suffixes and suffixes[-1] in readable and not OTHERS.fullmatch(path.name)
    return (suffixes[-1], compression) if is_read else None


def files_below(folder: Path) -> list[Path]:
    """Return the files below a folder by path, also those behind links, but no hidden folders."""
    found, visited = [], set()

    def fail(error: OSError) -> None:  # no permission: os.walk would leave the folder out
        raise error

    for name, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        is_new = (real := os.path.realpath(name)) not in visited  # no link to a folder above
        visited.add(real)
        found += [Path(name, file) for file in files if is_new]
        folders[:] = [folder for folder in folders if is_new and not folder.startswith(".")]
    return sorted(found)


def read_documents(path: Path, column: str, counts: Counter) -> Iterator[str]:
    """Yield the documents of a file one by one, cleaned. Count what is skipped and mended.

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
            if is_broken(row):
                before, broken, _ = BROKEN.split(row, maxsplit=1)
                first = first or f"byte 0x{ord(broken[0]) & 0xFF:02x} after {before[-20:]!r}"
                n_broken += len(BROKEN.findall(row))
                row, n = SURROGATE.subn("\ufffd", row)
                counts[MENDED] += n
                check_encoding(path, n_broken, max(n_characters, 500_000), first)
            text = clean(row)
            counts["cleaned: line ends, control characters, form NFC"] += text != row
            yield from filter(None, text.split(END_OF_TEXT))
    except (pa.ArrowException, csv.Error, OSError, MemoryError, UnicodeError) as error:
        hint = "is it whole? If it was downloaded, remove it"
        if isinstance(error, csv.Error):
            hint = 'put texts with commas or quotes between "", and double the quotes inside'
        elif "too much memory" in str(error):  # zstd's long mode
            hint = f"run: zstd -d --long=31 {quote(path)}"
        raise UserError(f"{path}: not readable ({one_line(error)[:99]}); {hint}") from error
    check_encoding(path, n_broken, n_characters, first)


def is_broken(text: str) -> bool:
    """Return whether BROKEN finds something in a text, in an eighth of its time."""
    try:
        text.encode()
    except UnicodeEncodeError:  # a surrogate
        return True
    return "\0" in text or "\x1b$" in text or "\x1b(" in text


def check_encoding(path: Path, n_broken: int, n_characters: int, first: str) -> None:
    """Raise UserError if a file is not in UTF-8: single bad characters are mended, not many."""
    if n_broken > max(3, n_characters / 1000):
        many = f"{n_broken:,} characters are not UTF-8, the first is {first}"
        raise UserError(f"{path}: {many}; {CONVERT}")


def read_rows(path: Path, column: str) -> Iterator:
    """Yield each row's value of a column, or the parts of a text file. Not all need to be text."""
    kind, compression = format_of(path)
    if kind in TABLES:
        yield from read_table(path, kind, column)
        return
    with pa.input_stream(str(path), compression=COMPRESSED[compression]) as stream:
        content = io.BufferedReader(stream)
        encoding = encoding_of(content.peek(4))
        lines = io.TextIOWrapper(content, encoding, errors="surrogateescape", newline="")
        if kind in (".txt", ".text"):
            yield from read_txt(lines)
            return
        first, found = {}, False
        for row in read_csv(lines, kind) if kind in (".csv", ".tsv") else read_json(path, lines):
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


def read_csv(lines: io.TextIOWrapper, kind: str) -> Iterator[dict]:
    """Yield the rows of a table whose first line has the names of the columns.

    Raises csv.Error for quotes in wrong places and too many cells: they would cut or join texts.
    """
    csv.field_size_limit(1 << 30)
    header = next(filter(str.strip, lines), "")
    delimiter = "\t" if kind == ".tsv" else max(",;\t", key=header.count)
    strict = dict(delimiter=delimiter, strict=True, skipinitialspace=True)
    rows = csv.reader(itertools.chain([header], lines), **strict)
    names = [name.strip() for name in next(rows, [])]
    for row in rows:
        if len(row) > len(names):
            what = f"line {rows.line_num} has {len(row)} cells, the first line {len(names)}"
            raise csv.Error(what)
        yield dict(zip(names, row, strict=False))


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
