"""Text to token ids and back.

Both tokenizers have the same few parts:

    vocab_size          ids are 0 ... vocab_size - 1
    encode(text)        list of ids; UserError names what it can not encode
    decode(ids)         text; decode_bytes(ids) is exact where ids end in the middle of a character
    to_dict()           plain values for meta.json and for checkpoints; `from_dict` reads them back
"""

import re
from collections.abc import Iterable

import numpy as np
import tiktoken

from configurator import UserError

END_OF_TEXT = "<|endoftext|>"
# GPT-2's way to cut text into words before any bytes are merged, so that no token spans two of them
# (https://github.com/openai/gpt-2/blob/master/src/encoder.py, `self.pat`).
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")


class CharTokenizer(Tokenizer):
    """One token per character; its id is its place in the sorted alphabet."""

    def __init__(self, chars: str) -> None:
        if list(chars) != sorted(set(chars)) or not chars:
            raise UserError(
                f"character tokenizer: {chars[:40]!r} is no sorted alphabet; prepare the data set again"
            )
        self.chars = chars
        self.ids = {char: i for i, char in enumerate(chars)}

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The alphabet of `text`."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        return len(self.chars)

    def encode(self, text: str) -> list[int]:
        try:
            return [self.ids[char] for char in text]
        except KeyError as error:
            char = error.args[0]
            raise UserError(
                f"{text[:30]!r}: character {char!r} at position {text.index(char)} is not among the "
                f"{self.vocab_size} characters of this vocabulary: {self.chars[:200]!r}"
            ) from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self.chars[i] for i in ids).encode()

    def to_dict(self) -> dict:
        return {"kind": "char", "chars": self.chars}


class BPETokenizer(Tokenizer):
    """Byte-level byte pair encoding, as GPT-2 has it (Radford et al. 2019, section 2.2).

    A token is a string of bytes. The first 256 are the single bytes, so nothing is unknown; each
    later one joins two earlier ones, and the pair that comes first in `tokens` is joined first. The
    id of a token is its place in `tokens`; the last id, behind them all, is <|endoftext|>.
    """

    def __init__(self, tokens: list[bytes], pattern: str = SPLIT_PATTERN) -> None:
        self.tokens, self.pattern, self.end_of_text = tokens, pattern, len(tokens)
        try:
            ranks = {token: i for i, token in enumerate(tokens)}
            self.encoding = tiktoken.Encoding(
                "bpe",
                pat_str=pattern,
                mergeable_ranks=ranks,
                special_tokens={END_OF_TEXT: len(tokens)},
                explicit_n_vocab=len(tokens) + 1,
            )
            whole = len(ranks) == len(tokens) and ranks.keys() >= {
                bytes([byte]) for byte in range(256)
            }
        except (
            Exception
        ) as error:  # whatever tiktoken's Rust part has to say of a pattern or of tokens
            raise UserError(f"BPE tokenizer: {error}; prepare the data set again") from error
        if not whole:
            raise UserError(
                "BPE tokenizer: a byte is missing or a token is there twice; prepare the data set again"
            )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """The `vocab_size` tokens that shorten `texts` most, or fewer if no pair of tokens is left to join."""
        import rustbpe  # here, because who has a tokenizer does not need it

        bpe = rustbpe.Tokenizer()
        bpe.train_from_iterator(iter(texts), vocab_size - 1, pattern=SPLIT_PATTERN)
        return cls(
            [
                bytes(token)
                for token, _ in sorted(bpe.get_mergeable_ranks(), key=lambda pair: pair[1])
            ]
        )

    @classmethod
    def gpt2(cls) -> "BPETokenizer":
        """GPT-2's own 50,257 tokens, which tiktoken downloads once."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # of the network, of the file system, or of a wrong checksum
            raise UserError(
                f"GPT-2's vocabulary can not be downloaded ({str(error)[:150]}); put its files vocab.bpe and "
                "encoder.json into a folder, under the names 6d1cbeee0f20b3d9449abfede4726ed8212e3aee and "
                "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6, and set TIKTOKEN_CACHE_DIR to the folder"
            ) from error
        return cls([encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)])

    @property
    def vocab_size(self) -> int:
        return len(self.tokens) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt: in it `<|endoftext|>` is the token, as the start of a document.

        Bytes that are no UTF-8 stand in `text` as Python has them in arguments and file names, as
        surrogates (PEP 383), and keep their value.
        """
        ids = []
        for part in re.split("([\udc80-\udcff])", text):
            if re.fullmatch("[\udc80-\udcff]", part):
                ids.append(
                    self.encoding.encode_single_token(part.encode("utf-8", "surrogateescape"))
                )
            else:
                ids += self.encoding.encode(part, allowed_special={END_OF_TEXT})
        return ids

    def encode_document(self, text: str) -> np.ndarray:
        """The ids of a document, uint32, with the <|endoftext|> that ends it; no other is special."""
        return np.append(
            self.encoding.encode_to_numpy(text, disallowed_special=()), np.uint32(self.end_of_text)
        )

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.encoding.decode_bytes(list(ids))

    def to_dict(self) -> dict:
        # A byte as the character with its number (Latin-1): most tokens can be read in meta.json.
        return {
            "kind": "bpe",
            "pattern": self.pattern,
            "tokens": [token.decode("latin-1") for token in self.tokens],
        }


def from_dict(fields: dict) -> CharTokenizer | BPETokenizer:
    """The tokenizer whose `to_dict` gave `fields`."""
    match fields:
        case {"kind": "char", "chars": str(chars)}:
            return CharTokenizer(chars)
        case {"kind": "bpe", "pattern": str(pattern), "tokens": list(tokens)}:
            try:
                return BPETokenizer([token.encode("latin-1") for token in tokens], pattern)
            except (AttributeError, UnicodeEncodeError) as error:
                raise UserError(f"BPE tokenizer: a token is no string of bytes ({error})") from None
        case _:
            raise UserError(f"unknown tokenizer {str(fields)[:80]!r}; prepare the data set again")
