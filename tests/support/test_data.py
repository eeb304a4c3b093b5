"""Token files: batches from them, the checks of a data set, and what meta.json says."""

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import TEXT

from configurator import UserError
from support import data
from support.data import Tokens, gather, open_dataset, random_offsets, write_dataset
from support.tokenizer import BPETokenizer, CharTokenizer

N = int(0.9 * len(TEXT))  # characters for training


def test_files_are_byte_for_byte_what_numpy_writes_and_meta_describes_them(dataset):
    """tinyshakespeare's formula, in numpy alone."""
    ids = np.searchsorted(np.array(sorted(set(TEXT))), np.array(list(TEXT))).astype("<u2")
    contents = {"train.bin": ids[:N].tobytes(), "val.bin": ids[N:].tobytes()}
    meta = json.loads((dataset / "meta.json").read_text(encoding="utf-8"))
    for name, content in contents.items():
        assert (dataset / name).read_bytes() == content
        assert meta["sha256"][name] == hashlib.sha256(content).hexdigest()
    counts = [meta[key] for key in ("train_tokens", "val_tokens", "val_bytes", "vocab_size")]
    assert counts == [N, len(TEXT) - N, len(TEXT) - N, len(set(TEXT))]
    assert meta["source"]["file"] == "tiny.txt"
    assert meta["tokenizer"] == {"kind": "char", "chars": "".join(sorted(set(TEXT)))}
    assert {path.name for path in dataset.iterdir()} == {"train.bin", "val.bin", "meta.json"}


def test_batch_has_the_text_and_its_next_characters(dataset):
    meta, tokenizer, train, val = open_dataset(dataset)
    assert (len(train), len(val), meta["train_tokens"]) == (N, len(TEXT) - N, N)
    x, y = gather(train, np.array([0, 100, N - 17]), 16)
    for row, offset in enumerate((0, 100, N - 17)):
        assert tokenizer.decode(x[row].tolist()) == TEXT[offset : offset + 16]
        assert tokenizer.decode(y[row].tolist()) == TEXT[offset + 1 : offset + 17]
    assert x.dtype == y.dtype == np.int64 and x.flags.c_contiguous
    assert isinstance(train.open(), np.memmap) and train.open() is not train.open()
    if os.name != "nt":  # Windows replaces no open file; elsewhere a run keeps the one it opened
        other = (17 - train.open()).tolist()
        write_dataset(dataset, tokenizer, other, other, len(other), {})
        assert np.array_equal(gather(train, np.array([0, 100, N - 17]), 16)[0], x)
        assert np.array_equal(Tokens(dataset / "train.bin").open(), other)


def test_random_offsets_cover_the_file_and_depend_on_seed_and_step_alone():
    offsets = np.concatenate([random_offsets(1, step, 50, 30, 16) for step in range(20)])
    # the last target of the last window is the last token
    assert sorted(set(offsets.tolist())) == list(range(30 - 16))
    assert np.array_equal(random_offsets(1, 7, 50, 30, 16), random_offsets(1, 7, 50, 30, 16))
    assert not np.array_equal(random_offsets(1, 7, 50, 30, 16), random_offsets(1, 8, 50, 30, 16))
    assert not np.array_equal(random_offsets(1, 7, 50, 30, 16), random_offsets(2, 7, 50, 30, 16))


@pytest.mark.parametrize("T", [1, 7, 16, 599])
def test_an_evaluation_sees_every_validation_token_but_the_first_as_a_target_once(dataset, T):
    _, _, train, val = open_dataset(dataset)
    [(first, train_offsets), (second, val_offsets)] = data.eval_parts(train, val, T, limit=0)
    assert first is train and second is val and len(train_offsets) == len(val_offsets)
    x, y = gather(val, val_offsets, T)
    assert np.array_equal(y[y >= 0], val.open()[1:])
    assert np.array_equal(x[y >= 0], val.open()[:-1])
    assert (y[y < 0] == -1).all() and (y >= 0).any(axis=1).all()  # no sequence is without targets


def test_a_limited_evaluation_is_spread_over_both_files(dataset):
    _, _, train, val = open_dataset(dataset)
    (_, in_train), (_, in_val) = data.eval_parts(train, val, 16, limit=5)
    assert len(in_train) == len(in_val) == 5 and in_train[0] == in_val[0] == 0
    assert in_train[-1] + 16 == len(train) - 1  # the last target is the last token
    assert len(val) - 1 - in_val[-1] <= 16 and set(np.diff(in_val) % 16) == {0}
    assert max(np.diff(in_val)) < 2 * min(np.diff(in_val)) and max(np.diff(in_train, 2)) <= 1
    whole = data.eval_parts(train, val, 16, limit=0)[1][1]
    assert np.array_equal(data.eval_parts(train, val, 16, len(whole))[1][1], whole)


def test_a_split_shorter_than_a_sequence_is_refused(dataset):
    _, _, train, val = open_dataset(dataset)
    data.eval_parts(train, val, len(val) - 1, 0)
    with pytest.raises(UserError, match=f"val.bin: {len(val)} tokens are too few for block_size="):
        data.eval_parts(train, val, len(val), 0)
    with pytest.raises(UserError, match=r"val\.bin"):
        data.eval_parts(val, train, len(val), 0)  # the first is checked, too


def test_vocabulary_beyond_uint16_is_refused_before_a_token_is_written(tmp_path):
    chars = "".join(map(chr, range(0x10000, 0x10000 + 65_537)))
    with pytest.raises(UserError, match="65537 does not fit"):
        write_dataset(tmp_path, CharTokenizer(chars), [1], [1], 1, {})
    assert not list(tmp_path.iterdir())
    write_dataset(tmp_path, CharTokenizer(chars[:-1]), [65_535], [1], 1, {})
    assert open_dataset(tmp_path)[2].open().tolist() == [65_535]


def test_a_file_name_that_is_no_utf8_is_written_with_an_escape(tmp_path):
    write_dataset(tmp_path, CharTokenizer("ab"), [0], [1], 1, {"file": "caf\udce9"})
    assert b"caf\\udce9" in (tmp_path / "meta.json").read_bytes()
    assert open_dataset(tmp_path)[0]["source"]["file"] == "caf\udce9"


def as_llm_c(ids: np.ndarray, dtype: str = "<u2") -> bytes:
    """Return a token file of llm.c: a header of 256 numbers of 32 bits, then the ids."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    return header.tobytes() + ids.astype(dtype).tobytes()


LAYOUTS = {
    "32-bit little-endian numbers": lambda ids: ids.astype("<i4").tobytes(),
    "64-bit little-endian numbers": lambda ids: ids.astype("<i8").tobytes(),
    "32-bit big-endian numbers": lambda ids: ids.astype(">u4").tobytes(),
    "16-bit big-endian numbers": lambda ids: ids.astype(">u2").tobytes(),
    "16-bit little-endian numbers after a header of 1024 bytes": as_llm_c,
    "32-bit little-endian numbers after a header of 1024 bytes": lambda ids: as_llm_c(ids, "<u4"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_files_of_other_programs_are_refused_with_the_way_to_rewrite_them(place, layout):
    ids = np.random.default_rng(0).integers(50257, size=5000)
    Path("some.bin").write_bytes(LAYOUTS[layout](ids))
    with pytest.raises(UserError, match=f"some.bin: has {layout}, not plain") as error:
        data.open_tokens(Path("some.bin"), 50257)
    code = re.search(r'rewrite it: python -c "(.*)"$', str(error.value))[1]
    exec(code)
    assert np.array_equal(data.open_tokens(Path("new.bin"), 50257).open(), ids)


def test_an_array_of_numpy_is_refused_with_the_way_to_rewrite_it(place):
    ids = np.arange(100, dtype=np.uint8)
    np.save("a.npy", ids)
    Path("a.npy").rename("a.bin")
    with pytest.raises(UserError, match=r"a\.bin: is a \.npy file, not plain uint16") as error:
        data.open_tokens(Path("a.bin"), 50257)
    exec(re.search(r'rewrite it: python -c "(.*)"$', str(error.value))[1])
    assert np.array_equal(data.open_tokens(Path("new.bin"), 50257).open(), ids)


def test_small_and_uniform_token_files_are_not_taken_for_those_of_other_programs(tmp_path):
    for ids in ([0] * 5000, [1, 0] * 30, [7] * 3, np.arange(5000)):
        np.array(ids, "<u2").tofile(tmp_path / "a.bin")
        assert len(data.open_tokens(tmp_path / "a.bin", 50257)) == len(ids)


# nanoGPT's folders


@pytest.fixture
def nanogpt(tmp_path, monkeypatch) -> Path:
    """A folder as nanoGPT's prepare.py writes it; GPT-2's vocabulary is 1,300 tokens here."""
    singles = [bytes([i]) for i in range(256)]
    tokens = [*singles, *(a + b for a in singles[97:107] for b in singles[:104])][:1299]
    tokenizer = BPETokenizer(tokens)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: tokenizer.encoding)
    monkeypatch.setattr(tiktoken.Encoding, "eot_token", 1296, raising=False)
    np.array([97, 1200, 1296], dtype="<u2").tofile(tmp_path / "train.bin")
    np.array([97, 300, 1296, 98], dtype="<u2").tofile(tmp_path / "val.bin")
    return tmp_path


def test_token_files_of_nanogpt_are_read_with_the_ids_of_gpt2(nanogpt):
    meta, tokenizer, train, val = open_dataset(nanogpt)
    assert (len(train), len(val)) == (meta["train_tokens"], meta["val_tokens"]) == (3, 4)
    assert tokenizer.vocab_size == meta["vocab_size"] == 1297 and meta["val_bytes"] == 1 + 2 + 1
    assert meta["sha256"] == {} and "meta.json" not in os.listdir(nanogpt)


def test_token_files_of_nanogpt_with_other_ids_say_what_to_do(nanogpt):
    for content in (bytes([97, 0, 98, 0]), b"characters of 8 bits"):
        (nanogpt / "train.bin").write_bytes(content)
        with pytest.raises(UserError, match=r"has no meta\.json, and its ids are not GPT-2's"):
            open_dataset(nanogpt)
    (nanogpt / "meta.pkl").touch()
    with pytest.raises(UserError, match=r"meta\.pkl: pickles are unsafe; run python prepare_shake"):
        open_dataset(nanogpt)
    (nanogpt / "meta.pkl").unlink()
    (nanogpt / "progress.json").touch()  # prepare_openweb.py was interrupted
    with pytest.raises(UserError, match=r"meta\.json: no such file"):
        open_dataset(nanogpt)
