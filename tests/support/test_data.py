"""Tokenizer, token files and batches."""

import json
import os

import numpy as np
import pytest
from conftest import TEXT

from configurator import UserError
from support import data, tokenizer
from support.data import Dataset, gather, random_offsets, spread_offsets, whole_file_offsets
from support.files import atomic_write
from support.tokenizer import CharTokenizer


def test_text_survives_encoding_and_decoding():
    text = "naïve café, 日本 🙂\r\n\ttabs"
    tok = CharTokenizer.from_text(text)
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert sorted(set(ids)) == list(range(tok.vocab_size))
    again = tokenizer.from_dict(json.loads(json.dumps(tok.to_dict())))
    assert again.encode(text) == ids


def test_unknown_character_is_named_with_its_position():
    with pytest.raises(UserError, match=r"'d' at position 3 is not among the 3 characters"):
        CharTokenizer("abc").encode("abcd")


@pytest.mark.parametrize(
    "fields", [{}, {"kind": "other"}, {"kind": "char", "chars": 3}, {"kind": "char", "chars": "ba"}]
)
def test_unknown_tokenizer_is_refused(fields):
    with pytest.raises(UserError, match="prepare"):
        tokenizer.from_dict(fields)


def test_files_are_byte_for_byte_what_numpy_writes(dataset):
    """tinyshakespeare's formula, in numpy alone."""
    ids = np.searchsorted(np.array(sorted(set(TEXT))), np.array(list(TEXT)))
    n = int(0.9 * len(TEXT))
    assert (dataset / "train.bin").read_bytes() == ids[:n].astype("<u2").tobytes()
    assert (dataset / "val.bin").read_bytes() == ids[n:].astype("<u2").tobytes()


def test_meta_describes_the_files(dataset):
    meta = json.loads((dataset / "meta.json").read_text(encoding="utf-8"))
    n = int(0.9 * len(TEXT))
    assert (meta["train_tokens"], meta["val_tokens"], meta["val_bytes"]) == (
        n,
        len(TEXT) - n,
        len(TEXT) - n,
    )
    assert meta["vocab_size"] == len(set(TEXT)) and meta["source"]["file"] == "tiny.txt"
    assert {path.name for path in dataset.iterdir()} == {"train.bin", "val.bin", "meta.json"}


def test_batch_has_the_text_and_its_next_characters(dataset):
    train = Dataset(dataset, 16).train
    x, y = gather(train, np.array([0, 100, len(train) - 17]), 16)
    tok = CharTokenizer.from_text(TEXT)
    n = int(0.9 * len(TEXT))
    for row, offset in enumerate((0, 100, n - 17)):
        assert tok.decode(x[row].tolist()) == TEXT[offset : offset + 16]
        assert tok.decode(y[row].tolist()) == TEXT[offset + 1 : offset + 17]
    assert x.dtype == y.dtype == np.int64


def test_random_offsets_cover_the_file_and_depend_on_seed_and_step_alone():
    offsets = np.concatenate([random_offsets(1, step, 50, 30, 16) for step in range(20)])
    assert sorted(set(offsets.tolist())) == list(
        range(30 - 16)
    )  # the last window's last target is the last token
    assert np.array_equal(random_offsets(1, 7, 50, 30, 16), random_offsets(1, 7, 50, 30, 16))
    assert not np.array_equal(random_offsets(1, 7, 50, 30, 16), random_offsets(1, 8, 50, 30, 16))
    assert not np.array_equal(random_offsets(1, 7, 50, 30, 16), random_offsets(2, 7, 50, 30, 16))


@pytest.mark.parametrize("block_size", [1, 7, 16, 599])
def test_evaluation_sees_every_token_but_the_first_as_a_target_once(dataset, block_size):
    val = Dataset(dataset, block_size).val
    x, y = gather(val, whole_file_offsets(len(val), block_size), block_size)
    assert np.array_equal(y[y >= 0], val.open()[1:])
    assert np.array_equal(x[y >= 0], val.open()[:-1])


def test_spread_windows_reach_from_the_first_token_to_the_last():
    assert spread_offsets(5, 101, 16).tolist() == [0, 21, 42, 63, 84]


def test_mapped_file_gives_the_same_batches_as_one_in_memory(dataset, monkeypatch):
    offsets = np.array([5, 300])
    in_memory = Dataset(dataset, 16).train
    monkeypatch.setattr(
        data.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100})
    )
    mapped = Dataset(dataset, 16).train
    assert isinstance(mapped.open(), np.memmap) and not isinstance(in_memory.open(), np.memmap)
    for a, b in zip(gather(mapped, offsets, 16), gather(in_memory, offsets, 16), strict=True):
        assert np.array_equal(a, b)


def edit_meta(**changed):
    def edit(folder):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        (folder / "meta.json").write_text(json.dumps({**meta, **changed}), encoding="utf-8")

    return edit


def flip_a_bit(folder):
    content = bytearray((folder / "train.bin").read_bytes())
    content[0] ^= 1
    (folder / "train.bin").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "train.bin").unlink(), ["train.bin", "no such file", "prepare"]),
        (lambda folder: (folder / "meta.json").unlink(), ["meta.json", "no such file", "prepare"]),
        (
            lambda folder: (folder / "meta.json").write_bytes(b"\x80nonsense"),
            ["meta.json", "JSON", "prepare"],
        ),
        (
            lambda folder: (folder / "meta.json").write_text("[" * 100_000),
            ["meta.json", "JSON", "prepare"],
        ),
        (
            lambda folder: (folder / "meta.json").write_text('{"a": 1}'),
            ["meta.json", "vocab_size", "missing"],
        ),
        (
            lambda folder: (folder / "meta.json").write_text("3"),
            ["meta.json", "vocab_size", "missing"],
        ),
        (edit_meta(vocab_size="many"), ["meta.json", "vocab_size", "'many'", "whole number"]),
        (edit_meta(sha256={}), ["meta.json", "sha256", "train.bin"]),
        (edit_meta(vocab_size=5), ["meta.json", "vocab_size is 5", "18 tokens", "prepare"]),
        (
            edit_meta(vocab_size=5, tokenizer={"kind": "char", "chars": "abcde"}),
            ["train.bin", "token id 17", "vocabulary of 5"],
        ),
        (edit_meta(train_tokens=3), ["train.bin", "meta.json promises 6", "prepare"]),
        (
            lambda folder: os.truncate(folder / "val.bin", 801),
            ["val.bin", "801 bytes", "cut", "prepare"],
        ),
        (
            lambda folder: os.truncate(folder / "val.bin", 800),
            ["val.bin", "800 bytes", "promises", "prepare"],
        ),
        (flip_a_bit, ["train.bin", "sha256", "prepare"]),
    ],
)
def test_damaged_data_set_is_refused_in_one_line(dataset, damage, words):
    damage(dataset)
    with pytest.raises(UserError) as error:
        Dataset(dataset, 16)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_split_shorter_than_a_sequence_is_refused(dataset):
    n_val = len(Dataset(dataset, 16).val)
    Dataset(dataset, n_val - 1)
    with pytest.raises(
        UserError, match=rf"val.bin: {n_val} tokens are fewer than block_size \+ 1 = {n_val + 1}"
    ):
        Dataset(dataset, n_val)


def test_vocabulary_beyond_uint16_is_refused_before_anything_is_written(tmp_path):
    too_many = CharTokenizer("".join(map(chr, range(0x10000, 0x10000 + 65_537))))
    with pytest.raises(UserError, match="65537 does not fit"):
        data.write_dataset(tmp_path / "new", too_many, [1], [1], 1, {})
    assert not (tmp_path / "new").exists()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(content: bytes, fails: bool) -> None:
        with atomic_write(path) as file:
            file.write(content)
            file.flush()
            if fails:
                raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(b"half", fails=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"old"
    write(b"new", fails=False)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"new"
