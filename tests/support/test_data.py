"""Token files: batches from them, checks of a data set, and what meta.json says."""

import json
import os
from configurator import UserError

import numpy as np
import pytest
from conftest import TEXT, damaged, damages, many_examples, odd_values, or_user_error
from hypothesis import given
from hypothesis import strategies as st

from support import data
from support.data import Dataset, Tokens, gather, random_offsets, write_dataset
from support.tokenizer import CharTokenizer


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
    tokenizer = CharTokenizer.from_text(TEXT)
    n = int(0.9 * len(TEXT))
    for row, offset in enumerate((0, 100, n - 17)):
        assert tokenizer.decode(x[row].tolist()) == TEXT[offset : offset + 16]
        assert tokenizer.decode(y[row].tolist()) == TEXT[offset + 1 : offset + 17]
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
def test_an_evaluation_sees_every_validation_token_but_the_first_as_a_target_once(
    dataset, block_size
):
    opened = Dataset(dataset, block_size)
    _, windows = opened.eval_windows(block_size, limit=0)
    x, y = gather(opened.val, windows, block_size)
    assert np.array_equal(y[y >= 0], opened.val.open()[1:])
    assert np.array_equal(x[y >= 0], opened.val.open()[:-1])


def test_a_limited_evaluation_is_spread_over_both_files(dataset):
    opened = Dataset(dataset, 16)
    train, val = opened.eval_windows(16, limit=5)
    assert len(train) == len(val) == 5
    assert train[0] == val[0] == 0
    assert train[-1] + 16 == len(opened.train) - 1  # the last target is the last token
    assert len(opened.val) - 1 - val[-1] <= 16 and set(np.diff(val) % 16) == {0}


@pytest.mark.skipif(os.name == "nt", reason="Windows replaces no open file")
def test_a_run_keeps_its_data_when_the_data_set_is_prepared_again(dataset, monkeypatch):
    nothing = type("Memory", (), {"available": 100})
    monkeypatch.setattr(data.psutil, "virtual_memory", lambda: nothing)
    tokens = Tokens(dataset / "train.bin")
    before = np.array(tokens.open())
    other = (17 - before).tolist()
    write_dataset(dataset, CharTokenizer.from_text(TEXT), other, other, len(other), {})
    assert isinstance(tokens.open(), np.memmap)
    assert np.array_equal(tokens.open(), before)
    assert np.array_equal(Tokens(dataset / "train.bin").open(), other)


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
        (lambda folder: (folder / "meta.json").unlink(), ["no meta.json", "prepare"]),
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
        (edit_meta(vocab_size="many"), ["meta.json", "vocab_size", "many", "not a count"]),
        (edit_meta(val_bytes=0), ["meta.json", "val_bytes is 0", "not a count"]),
        (edit_meta(val_bytes=10**30), ["meta.json", "val_bytes", "not a count"]),
        (edit_meta(sha256={}), ["meta.json", "sha256", "train.bin"]),
        (edit_meta(vocab_size=5), ["meta.json", "the tokenizer has 18 tokens", "prepare"]),
        (
            edit_meta(vocab_size=5, tokenizer={"kind": "char", "chars": "abcde"}),
            ["train.bin", "token id 17", "not in meta.json's vocabulary"],
        ),
        (edit_meta(train_tokens=3), ["train.bin", "meta.json says 6", "prepare"]),
        (
            lambda folder: os.truncate(folder / "val.bin", 801),
            ["val.bin", "801 bytes", "not whole", "prepare"],
        ),
        (
            lambda folder: os.truncate(folder / "val.bin", 800),
            ["val.bin", "800 bytes", "says", "prepare"],
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
        UserError, match=rf"val.bin: {n_val} tokens are too few for block_size={n_val}"
    ):
        Dataset(dataset, n_val)


def test_vocabulary_beyond_uint16_is_refused_before_anything_is_written(tmp_path):
    too_many = CharTokenizer("".join(map(chr, range(0x10000, 0x10000 + 65_537))))
    with pytest.raises(UserError, match="65537 does not fit"):
        data.write_dataset(tmp_path / "new", too_many, [1], [1], 1, {})
    assert not (tmp_path / "new").exists()


@many_examples
@pytest.mark.parametrize("name", ["train.bin", "meta.json"])
def test_a_data_set_with_any_damage_is_refused_or_the_same(dataset, name, fuzz):
    original = (dataset / name).read_bytes()
    tokens = Dataset(dataset, 16).train.open().copy()

    @fuzz
    @given(damages)
    def read(damage):
        content = damaged(original, damage)
        (dataset / name).write_bytes(content)
        data = or_user_error(lambda: Dataset(dataset, 16))
        assert data is None or (data.train.open() == tokens).all()
        assert name == "meta.json" or content == original or data is None

    read()


@many_examples
def test_a_meta_json_with_odd_values_is_refused_or_usable(dataset, fuzz):
    """Any value, or any value inside a dict, is replaced."""
    path = dataset / "meta.json"
    good = json.loads(path.read_text(encoding="utf-8"))
    inner = [(key, k) for key in ("tokenizer", "sha256", "source") for k in good[key]]
    places = [(key,) for key in good] + inner

    @fuzz
    @given(st.sampled_from(places), odd_values)
    def read(place, value):
        meta = json.loads(json.dumps(good))
        (meta if len(place) == 1 else meta[place[0]])[place[-1]] = value
        path.write_text(json.dumps(meta), encoding="utf-8")
        data = or_user_error(lambda: Dataset(dataset, 16))
        if data is not None:
            assert 0 < data.bits_per_byte(1.0) < 1e20
            assert data.tokenizer.decode(data.tokenizer.encode("3 times")) == "3 times"

    read()


def test_meta_json_cut_at_every_length_is_refused(dataset):
    original = (dataset / "meta.json").read_bytes()
    for length in range(len(original) - 1):
        (dataset / "meta.json").write_bytes(original[:length])
        assert or_user_error(lambda: Dataset(dataset, 16)) is None
