"""Text to token ids and back.

Both tokenizers have the same methods:

    vocab_size          token ids are 0 ... vocab_size - 1
    encode(text)        list of token ids; raises UserError for text that it can not encode
    decode(ids)         text; decode_bytes(ids) is exact even where ids end inside a character
    to_dict()           plain values for meta.json and checkpoints; `from_dict` turns them back
"""

import re
from collections.abc import Iterable

import numpy as np
import tiktoken

from configurator import UserError, one_line

END_OF_TEXT = "<|endoftext|>"
# GPT-2 first splits text into words, then merges bytes inside each word: no token spans two words
# (https://github.com/openai/gpt-2/blob/master/src/encoder.py, `self.pat`).
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Text is encoded in pieces, because one word of 200 MB would take 3 GB of memory. A piece ends
# before a space that follows a word, where the pattern splits anyway, or after 500,000 characters.
PIECES = re.compile(r".{1,500000}(?:(?<=\S)(?= )|\Z)|.{1,500000}", re.DOTALL)


class Tokenizer:
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")


class CharTokenizer(Tokenizer):
    """One token per character; the id of a character is its position in the sorted alphabet."""

    def __init__(self, chars: str) -> None:
        assert list(chars) == sorted({*chars}) and chars, f"{chars!r:.40} is not a sorted alphabet"
        self.chars, self.vocab_size = chars, len(chars)
        self.ids = {char: i for i, char in enumerate(chars)}

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> list[int]:
        try:
            return [self.ids[char] for char in text]
        except KeyError as error:
            char = error.args[0]
            raise UserError(
                f"{text[:30]!r}: character {char!r} at position {text.index(char)} is not one of "
                f"the {self.vocab_size} characters of this vocabulary: {self.chars[:200]!r}"
            ) from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self.chars[i] for i in ids).encode()

    def to_dict(self) -> dict:
        return {"kind": "char", "chars": self.chars}


class BPETokenizer(Tokenizer):
    """Byte-level byte pair encoding as in GPT-2 (Radford et al. 2019, section 2.2).

    A token is a string of bytes. All single bytes are tokens, so any text can be encoded. Every
    longer token joins two earlier ones, and the pair that gives the lowest id is merged first.

    Special tokens, as <|endoftext|>, are names that stand for no text, with their ids: by default
    only <|endoftext|>, as the last id. The `tokens` have the other ids, in their order.
    """

    def __init__(self, tokens: list[bytes], special: dict[str, int] | None = None) -> None:
        self.tokens = tokens
        self.special = {END_OF_TEXT: len(tokens)} if special is None else special
        self.end_of_text = self.special.get(END_OF_TEXT)
        self.vocab_size = len(tokens) + len(self.special)
        self.ids = sorted({*range(self.vocab_size)} - {*self.special.values()})  # of the tokens
        ranks = dict(zip(tokens, self.ids, strict=False))
        assert len(ranks) == len(self.ids) == len(tokens), "a token occurs twice"
        assert ranks.keys() >= {bytes([i]) for i in range(256)}, "a single byte is missing"
        self.encoding = tiktoken.Encoding(
            "bpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self.special
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Return a tokenizer of `vocab_size` tokens, or fewer if no pair is left to merge."""
        import rustbpe  # here, because it is only needed to train a new tokenizer

        bpe = rustbpe.Tokenizer()
        bpe.train_from_iterator(iter(texts), vocab_size - 1, pattern=SPLIT_PATTERN)
        return cls([bytes(token) for token, _ in bpe.get_mergeable_ranks()])

    @classmethod
    def gpt2(cls) -> "BPETokenizer":
        """Return GPT-2's own tokenizer of 50,257 tokens. tiktoken downloads its files once."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # no network, no disk space, or a wrong checksum
            raise UserError(
                f"could not download GPT-2's vocabulary ({one_line(error)[:150]}); put vocab.bpe "
                "and encoder.json into a folder as 6d1cbeee0f20b3d9449abfede4726ed8212e3aee and "
                "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6, and set TIKTOKEN_CACHE_DIR to the folder"
            ) from error
        return cls([encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)])

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt, in which special tokens stand for themselves."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # lone surrogates
        return self._encode(text, set(self.special)).tolist()

    def encode_document(self, text: str) -> np.ndarray:
        """Return the token ids of a document (uint32), then <|endoftext|>, which ends it."""
        return np.append(self._encode(text, set()), np.uint32(self.end_of_text))

    def _encode(self, text: str, special: set[str]) -> np.ndarray:
        options = {"allowed_special": special, "disallowed_special": ()}
        pieces = PIECES.findall(text) or [""]
        return np.concatenate([self.encoding.encode_to_numpy(p, **options) for p in pieces])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.encoding.decode_bytes(list(ids))

    def to_dict(self) -> dict:
        # Latin-1 maps each byte to one character, so most tokens are readable in meta.json.
        tokens = [token.decode("latin-1") for token in self.tokens]
        fields = {"kind": "bpe", "pattern": SPLIT_PATTERN, "tokens": tokens}
        is_usual = self.special == {END_OF_TEXT: len(tokens)}
        return fields if is_usual else fields | {"special": self.special}


def from_dict(fields: dict) -> CharTokenizer | BPETokenizer:
    """Return the tokenizer whose `to_dict` gave `fields`. Raises UserError."""
    try:
        if fields["kind"] == "char":
            return CharTokenizer(fields["chars"])
        assert fields["kind"] == "bpe", f"unknown kind {fields['kind']!r:.50}"
        assert fields["pattern"] == SPLIT_PATTERN, "it splits words in another way than GPT-2"
        tokens = [token.encode("latin-1") for token in fields["tokens"]]
        return BPETokenizer(tokens, fields.get("special"))
    except (LookupError, TypeError, AttributeError, AssertionError, UnicodeError) as error:
        reason = one_line(error)[:100]
        raise UserError(f"damaged tokenizer ({reason}); prepare the data set again") from error


# Tokenizers in Hugging Face's format. Not in hub.py: preparing a text must not load torch.

SAFE = {"trust_remote_code": False, "local_files_only": True}  # for every from_pretrained
# They write each byte of a token as a printable character, as OpenAI's encoder.py does: most bytes
# as themselves, the others as U+0100, U+0101, ... A space is U+0120.
BYTE_TO_CHAR = {b: chr(b) for b in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}
BYTE_TO_CHAR |= {b: chr(0x100 + i) for i, b in enumerate(sorted({*range(256)} - {*BYTE_TO_CHAR}))}
# Tokenizers that split or change a text in another way encode this one differently.
PROBE = "It's a DON'T 12ab_3c!?\t\r\n\n     \xa0x\xe9e\u0301\ufb01\u3000\u4f60 \U0001f600   'St \n"


def import_transformers():
    """Return the library transformers, silent but for the progress of downloads."""
    try:
        import transformers
        from huggingface_hub.utils import enable_progress_bars
    except ImportError:
        raise UserError("transformers is not installed; run: pip install transformers") from None
    if int((version := transformers.__version__).split(".")[0]) < 5:
        raise UserError(f"transformers {version} is too old; run: pip install -U transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    enable_progress_bars()
    return transformers


def load_tokenizer(folder: str) -> Tokenizer:
    """Return our tokenizer that gives the same ids as that in a folder. Raises UserError.

    The two encode a text with every token. A vocabulary of single characters has one token each.
    """
    theirs = import_transformers().AutoTokenizer.from_pretrained(folder, **SAFE)
    try:
        names = sorted(vocab := theirs.get_vocab(), key=vocab.get)
        added = {*theirs.get_added_vocab(), END_OF_TEXT} & {*names}
        special = {name: vocab[name] for name in added}
        while "pad" in names[-1].lower() and names[-1] in special:  # these never occur in a text
            del special[names.pop()]
        plain = [name for name in names if name not in special]
        if special or max(map(len, plain)) > 1:
            to_byte = {char: byte for byte, char in BYTE_TO_CHAR.items()}
            ours = BPETokenizer([bytes(map(to_byte.get, name)) for name in plain], special)
            probe = PROBE + ours.decode(range(ours.vocab_size)) + " x ".join(["", *special, ""])
        else:
            ours = CharTokenizer("".join(plain))
            probe = ours.chars + ours.chars[::-1]
        if ours.encode(probe) != theirs.encode(probe, add_special_tokens=False):
            raise ValueError("the ids differ")
        return ours
    except Exception as error:
        what = "one token for each byte, then one for each merge in order, and special tokens"
        raise UserError(f"its tokenizer is not like GPT-2's, which has {what}") from error
