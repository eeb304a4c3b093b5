"""Byte pair encoding: exact for any bytes, and the same ids as the libraries that others wrote."""

import json

import numpy as np
import pytest
import rustbpe
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from configurator import UserError
from support.tokenizer import SPLIT_PATTERN, BPETokenizer, CharTokenizer, from_dict

TEXT = (
    "the cat sat on the mat; it's the cat's mat, isn't it? 1234 \u00e9t\u00e9 \U0001f600\n\n  the end.\n"
    * 3
)
BPE = BPETokenizer.train([TEXT], 280)
ODD = [
    "",
    " ",
    "\n\n \t\n",
    "the end",
    "\U0001f600\u0301 \u4f60\u597d",
    "  a  b\r\n",
    "<|endoftext|",
    "\x7f",
    "it'S",
]


def test_training_gives_the_merges_of_rustbpe():
    theirs = rustbpe.Tokenizer()
    theirs.train_from_iterator([TEXT], 279, pattern=SPLIT_PATTERN)
    assert BPE.vocab_size == 280 and BPE.end_of_text == 279
    for text in (TEXT, *ODD):
        assert BPE.encode(text) == theirs.encode(text)


def test_the_split_is_that_of_gpt2():
    """tiktoken's pattern for GPT-2 is written in another way; both cut any text at the same places."""
    from tiktoken_ext.openai_public import r50k_pat_str

    ranks = {token: i for i, token in enumerate(BPE.tokens)}
    theirs = tiktoken.Encoding(
        "theirs", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={}
    )
    for text in (TEXT, *ODD):
        assert BPE.encode(text) == theirs.encode_ordinary(text)


@given(st.binary())
def test_any_bytes_come_back(content):
    assert BPE.decode_bytes(BPE.encode(content.decode("utf-8", "surrogateescape"))) == content


@given(st.text())
def test_any_document_comes_back(text):
    ids = BPE.encode_document(text)
    assert BPE.decode(ids[:-1].tolist()) == text.encode("utf-8", "replace").decode()


def test_only_a_prompt_can_have_the_end_of_a_text():
    assert BPE.encode("a<|endoftext|>b") == [97, 279, 98]
    ids = BPE.encode_document("a<|endoftext|>b").tolist()
    assert ids[-1] == 279 and 279 not in ids[:-1]
    assert BPE.decode([97, 279]) == "a<|endoftext|>"


def test_it_comes_back_from_json():
    again = from_dict(json.loads(json.dumps(BPE.to_dict())))
    assert again.tokens == BPE.tokens and again.encode(TEXT) == BPE.encode(TEXT)


def test_bytes_that_are_no_character_yet_are_shown_as_such():
    first, *rest = BPE.encode("\U0001f680")  # a rocket, which is not in TEXT: four tokens
    assert BPE.decode([first]) == "\ufffd" and len(rest) == 3


def test_gpt2_has_its_own_ids(monkeypatch):
    """The ids are those of tiktoken's encoding, in which the bytes have an order of their own."""
    tokens = [bytes([255 - i]) for i in range(256)] + [b"th", b"the"]
    ranks = {token: i for i, token in enumerate(tokens)}
    theirs = tiktoken.Encoding(
        "gpt2", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": theirs}[name])
    assert BPETokenizer.gpt2().tokens == tokens
    assert BPETokenizer.gpt2().encode("the<|endoftext|>") == [257, 258]


def test_without_a_network_the_error_names_the_files_to_place(monkeypatch, tmp_path):
    def fails(_name):
        raise OSError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", fails)
    with pytest.raises(UserError) as error:
        BPETokenizer.gpt2()
    for words in (
        "no route",
        "vocab.bpe",
        "encoder.json",
        "TIKTOKEN_CACHE_DIR",
        "6d1cbeee0f20",
        "6c7ea1a7e38e",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": []},
        {"tokens": BPE.to_dict()["tokens"][1:]},
        {"tokens": [*BPE.to_dict()["tokens"], "a"]},
        {"tokens": [*BPE.to_dict()["tokens"], 7]},
        {"tokens": [*BPE.to_dict()["tokens"], "\u4f60"]},
        {"pattern": "("},
        {"kind": "other"},
    ],
    ids=[
        "none",
        "a byte missing",
        "a token twice",
        "a number",
        "no bytes",
        "no pattern",
        "another kind",
    ],
)
def test_a_damaged_tokenizer_is_refused(change):
    with pytest.raises(UserError) as error:
        from_dict(BPE.to_dict() | change)
    assert "\n" not in str(error.value)


def test_both_tokenizers_decode_to_the_same():
    chars = CharTokenizer.from_text(TEXT)
    assert chars.decode(chars.encode(TEXT)) == BPE.decode(BPE.encode(TEXT)) == TEXT
    assert isinstance(BPE.encode_document("a"), np.ndarray)
