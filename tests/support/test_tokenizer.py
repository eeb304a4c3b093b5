"""Byte pair encoding is exact for any bytes and gives the same ids as other libraries."""

import json

import numpy as np
import pytest
import rustbpe
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from configurator import UserError
from support.tokenizer import PIECES, SPLIT_PATTERN, BPETokenizer, CharTokenizer, from_dict

TEXT = "the cat sat on the mat; it's the cat's mat, isn't it? 1234 "
TEXT = (TEXT + "\u00e9t\u00e9 \U0001f600\n\n  the end.\n") * 3
BPE = BPETokenizer.train([TEXT], 280)
ODD = ["", " ", "\n\n \t\n", "the end", "\U0001f600\u0301 \u4f60\u597d"]
ODD += ["  a  b\r\n", "<|endoftext|", "\x7f", "it'S"]


def test_training_gives_the_tokens_of_rustbpe():
    theirs = rustbpe.Tokenizer()
    theirs.train_from_iterator([TEXT], 279, pattern=SPLIT_PATTERN)
    assert BPE.vocab_size == 280 and BPE.end_of_text == 279
    for text in (TEXT, *ODD):
        assert BPE.encode(text) == theirs.encode(text)


def test_the_split_is_that_of_gpt2():
    """tiktoken writes the pattern of GPT-2 differently; both split any text at the same places."""
    from tiktoken_ext.openai_public import r50k_pat_str

    parts = {"mergeable_ranks": {token: i for i, token in enumerate(BPE.tokens)}}
    theirs = tiktoken.Encoding("theirs", pat_str=r50k_pat_str, special_tokens={}, **parts)
    for text in (TEXT, *ODD):
        assert BPE.encode(text) == theirs.encode_ordinary(text)


@given(st.text())
def test_any_text_is_decoded_exactly(text):
    ids = BPE.encode_document(text)
    assert BPE.decode_bytes(ids[:-1].tolist()) == text.encode()
    assert BPE.decode(BPE.encode(text)) == text


def test_only_a_prompt_can_contain_the_end_of_text_token():
    assert BPE.encode("a<|endoftext|>b") == [97, 279, 98]
    ids = BPE.encode_document("a<|endoftext|>b").tolist()
    assert ids[-1] == 279 and 279 not in ids[:-1]
    assert BPE.encode_document("a").dtype == np.uint32
    assert BPE.decode([97, 279]) == "a<|endoftext|>"
    assert BPE.decode(BPE.encode("\U0001f680")[:1]) == "\ufffd"  # a part of a character


@pytest.mark.parametrize("tokenizer", [BPE, CharTokenizer.from_text(TEXT)], ids=["bpe", "char"])
def test_a_tokenizer_survives_json_and_decodes_what_it_encoded(tokenizer):
    again = from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert type(again) is type(tokenizer) and again.vocab_size == tokenizer.vocab_size
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.decode(again.encode(TEXT)) == TEXT


def test_gpt2_keeps_the_ids_of_tiktoken(monkeypatch):
    """GPT-2 does not number the single bytes from 0 to 255."""
    tokens = [bytes([255 - i]) for i in range(256)] + [b"th", b"the"]
    parts = {"mergeable_ranks": {token: i for i, token in enumerate(tokens)}}
    parts |= {"pat_str": SPLIT_PATTERN, "special_tokens": {"<|endoftext|>": 258}}
    theirs = tiktoken.Encoding("gpt2", **parts)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": theirs}[name])
    assert BPETokenizer.gpt2().tokens == tokens
    assert BPETokenizer.gpt2().encode("the<|endoftext|>") == [257, 258]


def test_without_a_network_the_error_names_the_files_to_place(monkeypatch, tmp_path):
    def fails(_name):
        raise OSError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", fails)
    with pytest.raises(UserError) as error:
        BPETokenizer.gpt2()
    names = "vocab.bpe encoder.json 6d1cbeee0f20 6c7ea1a7e38e TIKTOKEN_CACHE_DIR".split()
    assert all(words in str(error.value) for words in ["no route", *names])


TOKENS = BPE.to_dict()["tokens"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "damaged tokenizer ('kind')"),
        ({"kind": "other"}, "unknown kind 'other'"),
        ({"kind": "char", "chars": 3}, "damaged tokenizer"),
        ({"kind": "char", "chars": "ba"}, "'ba' is not a sorted alphabet"),
        ({"kind": "char", "chars": ""}, "'' is not a sorted alphabet"),
        (BPE.to_dict() | {"tokens": TOKENS[1:]}, "a single byte is missing"),
        (BPE.to_dict() | {"tokens": [*TOKENS, "a"]}, "a token occurs twice"),
        (BPE.to_dict() | {"tokens": [*TOKENS, 7]}, "damaged tokenizer"),
        (BPE.to_dict() | {"tokens": [*TOKENS, "\u4f60"]}, "damaged tokenizer"),
        (BPE.to_dict() | {"pattern": r"\w+"}, "another way than GPT-2"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_damaged_or_unknown_tokenizer_is_refused_in_one_line(fields, words):
    with pytest.raises(UserError) as error:
        from_dict(fields)
    assert words in str(error.value) and "prepare the data set again" in str(error.value)
    assert "\n" not in str(error.value)


LONG = [
    "the the the the " * 80_000,
    "it's the mat, isn't it?  \n\t" * 50_000,
    ("x" * 300_000 + "  ") * 5,
    "\u4f60 \u597d!\r\n" * 250_000,
]


@pytest.mark.parametrize("text", LONG, ids=["words", "spaces", "long words", "unicode"])
def test_a_long_text_has_the_same_ids_as_without_pieces(text):
    assert len(PIECES.findall(text)) > 1
    whole = BPE.encoding.encode_to_numpy(text, disallowed_special=())
    assert np.array_equal(BPE.encode_document(text)[:-1], whole)


@pytest.mark.parametrize("text", ["x" * 1_200_000, " " * 1_200_000 + "x"], ids=["word", "spaces"])
def test_a_text_without_a_place_to_split_is_encoded_exactly(text):
    assert BPE.decode(BPE.encode_document(text)[:-1].tolist()) == text


@pytest.mark.parametrize("text", ["a\ud800b", "a\udc80b"], ids=ascii)
def test_a_lone_surrogate_of_a_prompt_becomes_a_replacement_character(text):
    """The first may come from JSON, the second from an argument that is no UTF-8."""
    assert BPE.decode(BPE.encode(text)) == "a\ufffdb"


def test_an_unknown_character_is_named_with_its_position():
    with pytest.raises(UserError, match=r"'d' at position 3 is not one of the 3 characters"):
        CharTokenizer("abc").encode("abcd")
