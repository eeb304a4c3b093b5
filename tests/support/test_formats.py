"""Documents from files of every format: the texts, what is skipped, what is refused."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configurator import UserError
from support.formats import MENDED, format_of, read_documents

TEXTS = ["first, text", 'a "second"\nof two lines', "3rd"]


def read(path: Path, column: str = "text") -> tuple[list[str], Counter]:
    """Return the documents of a file, and the counts."""
    return list(read_documents(path, column, counts := Counter())), counts


def test_a_long_text_file_is_split_at_ends_of_lines(tmp_path):
    lines = [f"line {i} of a long book\n" for i in range(20_000)]
    (tmp_path / "book.txt").write_text("".join(lines), encoding="utf-8", newline="\n")
    documents, _ = read(tmp_path / "book.txt")
    assert "".join(documents) == "".join(lines) and len(documents) > 4
    assert all(d.endswith("\n") and len(d) <= 100_000 for d in documents)


def test_a_line_that_never_ends_is_not_read_at_once(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 250_000, encoding="utf-8")
    assert [len(d) for d in read(tmp_path / "a.txt")[0]] == [100_000, 100_000, 50_000]


@pytest.mark.parametrize("before", [3, 99_990, 99_995, 100_000, 199_995])
def test_the_end_of_text_separates_documents_anywhere(tmp_path, before):
    content = "x" * before + "<|endoftext|>two\r\n<|endoftext|>\r\n<|endoftext|>three"
    (tmp_path / "a.txt").write_bytes(content.encode())
    documents, _ = read(tmp_path / "a.txt")
    assert documents[-2:] == ["two\n", "three"] and "".join(documents[:-2]) == "x" * before
    if before < 100_000:
        assert len(documents) == 3
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": content}))
    assert read(tmp_path / "a.jsonl")[0] == ["x" * before, "two\n", "three"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_names_the_encoding(tmp_path, encoding):
    text = "caf\u00e9 \u4f60"
    for name, content in (("a.txt", text), ("a.jsonl", f'{{"text": "{text}"}}')):
        (tmp_path / name).write_text(content, encoding=encoding)
        assert read(tmp_path / name)[0] == [text]


def test_single_bad_characters_are_mended_and_counted_and_many_are_refused(tmp_path):
    path = tmp_path / "a.txt"
    # The byte 0 and the Escape of a terminal's colors vanish, as all control characters do.
    path.write_bytes(b"one \xff two \xe9t\xe9 \0" + b"\x1b[0mx" * 1000)
    documents, counts = read(path)
    assert documents[0].startswith("one \ufffd two \ufffdt\ufffd [0mx") and counts[MENDED] == 3
    japanese = ("\u5409\u672c " * 9).encode("iso2022_jp")
    for content, words in (
        (b"un caf\xe9 noir, " * 50, r"50 char.* byte 0xe9 after 'un caf'.*iconv"),
        ("text without a mark".encode("utf-16-le"), r"19 characters .* byte 0x00 after 't'"),
        (japanese, "characters are not UTF-8, the first is byte 0x1b"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            read(path)


KINDS = {
    "string": pa.array([*TEXTS, None], pa.string()),
    "large_string": pa.array([*TEXTS, None], pa.large_string()),
    "string_view": pa.array([*TEXTS, None], pa.string_view()),
    "binary": pa.array([*(text.encode() for text in TEXTS), None], pa.binary()),
    "dictionary": pa.array([*TEXTS, None]).dictionary_encode(),
    "null": pa.nulls(4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tables_give_the_texts_of_every_type_and_skip_missing_ones(tmp_path, kind):
    table = pa.table({"id": range(4), "text": KINDS[kind]})
    pq.write_table(table, tmp_path / "a.PARQUET")
    for name, make in (("a.arrow", pa.ipc.new_file), ("b.arrow", pa.ipc.new_stream)):
        with pa.OSFile(str(tmp_path / name), "wb") as sink, make(sink, table.schema) as writer:
            writer.write_table(table)
    for path in tmp_path.iterdir():
        documents, counts = read(path)
        assert documents == (TEXTS if kind != "null" else [])
        assert counts["skipped: rows without a text"] == 4 - len(documents)


ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
FILES = {
    "a.jsonl": LINES,
    "a.NDJSON": LINES,
    "a.json": LINES,
    "array.json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2),
    "strings.json": json.dumps(TEXTS),
    "a.csv": 'id,text\n0,"first, text"\n1,"a ""second""\nof two lines"\n2,3rd\n',
    "semicolons.csv": 'text;id\nfirst, text;0\n"a ""second""\nof two lines";1\n3rd;2\n',
    "a.tsv": 'id\ttext\n0\tfirst, text\n1\t"a ""second""\nof two lines"\n2\t3rd\n',
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("compression", ["", ".gz", ".bz2", ".zst"])
def test_rows_of_text_formats_compressed_or_not(tmp_path, name, compression):
    path, codec = tmp_path / (name + compression), {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
    with pa.output_stream(str(path), compression=codec.get(compression)) as file:
        file.write(FILES[name].encode())
    assert read(path) == (TEXTS, Counter())


@pytest.mark.parametrize("row", ["[]", "7", "null", '{"text": 7}', '{"text": null}', '{"a": "b"}'])
def test_a_row_without_a_text_is_skipped_and_counted(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(f"{LINES}\n{row}\n{LINES}")
    documents, counts = read(tmp_path / "a.jsonl")
    assert documents == TEXTS * 2 and counts["skipped: rows without a text"] == 1


@pytest.mark.parametrize("line", ["[" * 9**5, "{", '{"text": "cut'])
def test_a_line_that_is_not_json_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "first"}}\n\n{line}\n')
    documents = read_documents(tmp_path / "a.jsonl", "text", Counter())
    assert next(documents) == "first"
    with pytest.raises(UserError, match=r"a.jsonl: line 3 is not JSON .*run the same "):
        next(documents)


WRONG_TABLES = {
    "commas.csv": ("text\nFirst, there\n", "line 2 has 2 cells, the first line 1"),
    "open.csv": ('id,text\n1,"open\n2,next\n', "unexpected end of data"),
    "spark.csv": ('id,text\n1,"he said \\"no\\" twice"\n', "',' expected after '\"'"),
    "film.tsv": ('id\ttext\n1\t"Great film" said all\n', "expected after '\"'"),
}


@pytest.mark.parametrize("name", WRONG_TABLES)
def test_a_table_whose_texts_would_be_cut_or_joined_is_refused(tmp_path, name):
    content, words = WRONG_TABLES[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}: not readable .*{words}.*double the quotes"):
        read(tmp_path / name)


def test_a_header_may_have_spaces_and_empty_lines_before_it(tmp_path):
    (tmp_path / "a.csv").write_text('\n\nid, text\n1, "a, b"\n')
    assert read(tmp_path / "a.csv")[0] == ["a, b"]


def test_side_files_are_not_read():
    names = "a/dataset_info.json a/cache-12.arrow a/._b.txt b.pdf b b.parquet.gz"
    assert not any(format_of(Path(name)) for name in names.split())
    assert format_of(Path("../data/b.TXT.gz")) == (".txt", ".gz")


def test_a_column_that_no_row_has_is_named(tmp_path):
    for name in ("a.csv", "a.jsonl"):
        (tmp_path / name).write_text(FILES[name])
        with pytest.raises(UserError, match=f"{name}: --column=body is not one of id, text"):
            read(tmp_path / name, "body")
