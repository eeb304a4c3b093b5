"""Byte pair encoding is exact for any bytes and gives the same ids as other libraries."""

import json
from configurator import UserError

import numpy as np
import pytest
import rustbpe
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from support.tokenizer import PIECES, SPLIT_PATTERN, BPETokenizer, CharTokenizer, from_dict

TEXT = "the cat sat on the mat; it's the cat's mat, isn't it? 1234 "
TEXT = (TEXT + "\u00e9t\u00e9 \U0001f600\n\n  the end.\n") * 3
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


def test_training_gives_the_tokens_of_rustbpe():
    theirs = rustbpe.Tokenizer()
    theirs.train_from_iterator([TEXT], 279, pattern=SPLIT_PATTERN)
    assert BPE.vocab_size == 280 and BPE.end_of_text == 279
    for text in (TEXT, *ODD):
        assert BPE.encode(text) == theirs.encode(text)


def test_the_split_is_that_of_gpt2():
    """tiktoken writes the pattern of GPT-2 differently; both split any text at the same places."""
    from tiktoken_ext.openai_public import r50k_pat_str

    ranks = {token: i for i, token in enumerate(BPE.tokens)}
    theirs = tiktoken.Encoding(
        "theirs", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={}
    )
    for text in (TEXT, *ODD):
        assert BPE.encode(text) == theirs.encode_ordinary(text)


@given(st.binary())
def test_any_bytes_are_decoded_exactly(content):
    assert BPE.decode_bytes(BPE.encode(content.decode("utf-8", "surrogateescape"))) == content


@given(st.text())
def test_any_document_is_decoded_exactly(text):
    ids = BPE.encode_document(text)
    assert BPE.decode(ids[:-1].tolist()) == text.encode("utf-8", "replace").decode()


def test_only_a_prompt_can_contain_the_end_of_text_token():
    assert BPE.encode("a<|endoftext|>b") == [97, 279, 98]
    ids = BPE.encode_document("a<|endoftext|>b").tolist()
    assert ids[-1] == 279 and 279 not in ids[:-1]
    assert BPE.decode([97, 279]) == "a<|endoftext|>"


def test_a_tokenizer_survives_json():
    again = from_dict(json.loads(json.dumps(BPE.to_dict())))
    assert again.tokens == BPE.tokens and again.encode(TEXT) == BPE.encode(TEXT)


def test_part_of_a_character_is_decoded_to_a_replacement_character():
    first, *rest = BPE.encode("\U0001f680")  # a rocket, which is not in TEXT: four tokens
    assert BPE.decode([first]) == "\ufffd" and len(rest) == 3


def test_gpt2_keeps_the_ids_of_tiktoken(monkeypatch):
    """GPT-2 does not number the single bytes from 0 to 255."""
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


def test_both_tokenizers_decode_to_the_same_text():
    chars = CharTokenizer.from_text(TEXT)
    assert chars.decode(chars.encode(TEXT)) == BPE.decode(BPE.encode(TEXT)) == TEXT
    assert isinstance(BPE.encode_document("a"), np.ndarray)


@pytest.mark.parametrize("pattern", [r"\w+", r"[^\n]", r"[^ ]+", r"a*", ""])
def test_a_pattern_that_skips_text_or_matches_nothing_is_refused(pattern):
    with pytest.raises(UserError, match="BPE tokenizer") as error:
        from_dict(BPE.to_dict() | {"pattern": pattern})
    assert "\n" not in str(error.value)


def test_a_single_character_that_the_pattern_skips_is_noticed():
    tokenizer = from_dict(BPE.to_dict() | {"pattern": "[^\u0416]"})
    assert len(tokenizer.encode("abc")) == 3
    for encode in (tokenizer.encode, tokenizer.encode_document):
        with pytest.raises(UserError, match="skips characters"):
            encode("abc \u0416")


def test_a_pattern_that_backtracks_too_much_ends_in_one_line():
    tokenizer = from_dict(BPE.to_dict() | {"pattern": r"(?:a|aa|aaa)+(?=!)|[\s\S]"})
    with pytest.raises(UserError, match="Max limit for backtracking") as error:
        tokenizer.encode("a" * 300)
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


def test_a_short_text_is_one_piece():
    text = TEXT * 1000
    assert PIECES.findall(text) == [text]


def test_a_lone_surrogate_of_a_prompt_becomes_a_replacement_character():
    assert BPE.decode(BPE.encode("a\ud800b")) == "a\ufffdb"


def test_characters_survive_encoding_and_decoding():
    text = "naïve café, 日本 🙂\r\n\ttabs"
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert sorted(set(ids)) == list(range(tokenizer.vocab_size))


def test_an_unknown_character_is_named_with_its_position():
    with pytest.raises(UserError, match=r"'d' at position 3 is not one of the 3 characters"):
        CharTokenizer("abc").encode("abcd")


@pytest.mark.parametrize(
    "fields", [{}, {"kind": "other"}, {"kind": "char", "chars": 3}, {"kind": "char", "chars": "ba"}]
)
def test_an_unknown_tokenizer_is_refused(fields):
    with pytest.raises(UserError, match="prepare"):
        from_dict(fields)
