"""Text to token ids and back.

Every tokenizer has the same few parts:

    vocab_size      ids are 0 ... vocab_size - 1
    encode(text)    list of ids; UserError names what it can not encode
    decode(ids)     text
    to_dict()       plain values for meta.json and for checkpoints; `from_dict` reads them back
"""

from collections.abc import Iterable

from configurator import UserError


class CharTokenizer:
    """One token per character; its id is its place in the sorted alphabet."""

    def __init__(self, chars: str) -> None:
        if list(chars) != sorted(set(chars)) or not chars:
            raise UserError(f"character tokenizer: {chars[:40]!r} is no sorted alphabet; prepare the data set again")
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

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.chars[i] for i in ids)

    def to_dict(self) -> dict:
        return {"kind": "char", "chars": self.chars}


def from_dict(fields: dict) -> CharTokenizer:
    """The tokenizer whose `to_dict` gave `fields`."""
    match fields:
        case {"kind": "char", "chars": str(chars)}:
            return CharTokenizer(chars)
        case _:
            raise UserError(f"unknown tokenizer {str(fields)[:80]!r}; prepare the data set again")
