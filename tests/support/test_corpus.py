"""Reading and cleaning of documents; tests/test_prepare_openweb.py has the tests of the writer."""

import unicodedata
from collections import Counter
from configurator import UserError

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.corpus import clean, hash_document, read_documents


def test_a_long_text_file_is_split_at_ends_of_lines(tmp_path):
    lines = [f"line {i} of a long book\n" for i in range(20_000)]
    (tmp_path / "book.txt").write_text("".join(lines), encoding="utf-8", newline="\n")
    documents = [d.decode() for d in read_documents(tmp_path / "book.txt", "text")]
    assert "".join(documents) == "".join(lines) and len(documents) > 4
    assert all(d.endswith("\n") and len(d) < 100_100 for d in documents if d)


def test_a_line_that_never_ends_is_not_read_at_once(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 250_000, encoding="utf-8")
    lengths = [len(d) for d in read_documents(tmp_path / "a.txt", "text")]
    assert lengths == [100_000, 100_000, 50_000]


def test_the_end_of_text_line_ends_a_document_and_a_byte_order_mark_is_no_text(tmp_path):
    content = "\ufeffone\r\ntwo\r\n<|endoftext|>\nthree <|endoftext|>\n<|endoftext|>\r\nfour"
    (tmp_path / "a.txt").write_bytes(content.encode() + b" \xff")
    documents = [b"one\r\ntwo\r\n", b"three <|endoftext|>\n", b"four \xff"]
    assert list(read_documents(tmp_path / "a.txt", "text")) == documents
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "text"}\n'.encode())
    assert list(read_documents(tmp_path / "a.jsonl", "text")) == [b"text"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_missing_texts_in_a_parquet_file_are_skipped(tmp_path, kind):
    table = pa.table({"text": pa.array(["a", None, "", "b"] * 100, kind), "id": range(400)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=30)
    assert list(read_documents(tmp_path / "a.parquet", "text")) == [b"a", b"", b"b"] * 100


@pytest.mark.parametrize(
    "line", ["[" * 9**5, "{", "[]", "7", '"text"', '{"text": 7}', '{"a": "b"}']
)
def test_a_jsonl_line_without_text_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "first \\ud800"}}\n\n{line}\n')
    documents = read_documents(tmp_path / "a.jsonl", "text")
    assert next(documents) == b"first \xed\xa0\x80"
    with pytest.raises(UserError, match="line 3 is not JSON with a text 'text'; use --column"):
        next(documents)


@given(st.text())
def test_clean_text_has_form_nfc_and_no_control_characters(text):
    cleaned = clean(text.encode(), Counter())
    assert cleaned == unicodedata.normalize("NFC", cleaned)
    assert not [c for c in cleaned if unicodedata.category(c) == "Cc" and c not in "\n\t"]
    assert clean(cleaned.encode(), Counter()) == cleaned


def test_what_clean_repairs_is_counted():
    counts = Counter()
    assert clean(b"a\r\nb\rc\x00 e\xcc\x81 \xff", counts) == "a\nb\nc \u00e9 \ufffd"
    assert set(counts.values()) == {1} and len(counts) == 3
    assert clean("right: \ufffd".encode(), counts) == "right: \ufffd"
    assert set(counts.values()) == {1} and len(counts) == 3


def test_a_larger_share_for_validation_contains_a_smaller_one():
    texts = [str(n).encode() for n in range(2000)]
    few, many = ({t for t in texts if hash_document(t, share)[1]} for share in (0.1, 0.3))
    assert few < many and 100 < len(few) < 300 and 500 < len(many) < 700
