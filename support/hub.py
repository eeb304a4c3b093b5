"""GPT-2 as the Hugging Face hub has it, to GPT and its tokenizer; export.py goes the other way.

A model there is a folder, behind an address or on a disk:

    config.json         the shape
    tokenizer.json      the tokenizer; older models have vocab.json and merges.txt instead
    model.safetensors   the weights; large models have parts, which model.safetensors.index.json names

What is downloaded stays in data/cache/. No file is unpickled.
"""

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from configurator import UserError, one_line
from model import GPT, GPTConfig
from support.download import NotFound, download, hub_url
from support.tokenizer import END_OF_TEXT, SPLIT_PATTERN, BPETokenizer, CharTokenizer

# OpenAI's four models: commits of the repositories openai-community/<name>.
REVISIONS = {
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
SIZES = (
    "n_layer",
    "n_head",
    "n_embd",
)  # are called the same in both configs; block_size is their n_positions
COMPUTED = {  # what config.json must say of these for GPT to compute the same; to be silent is to say the first
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}
# Parameters have the same names here and there. But there a linear layer is a `Conv1D`, which
# computes x w + b where nn.Linear computes x w^T + b: these matrices are stored transposed.
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

# How tokenizer.json says where a text is cut before tokens are joined: at GPT-2's words, or everywhere.
GPT2_SPLIT = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
CHARACTER_SPLIT = {
    "type": "Split",
    "pattern": {"Regex": r"[\s\S]"},
    "behavior": "Isolated",
    "invert": False,
}
# GPT-2's files spell a byte as a character that can be seen: itself, or one from U+0100 on
# (https://github.com/openai/gpt-2/blob/master/src/encoder.py, `bytes_to_unicode`).
SPELLING = {
    byte: chr(byte) for byte in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
}
SPELLING |= {byte: chr(0x100 + i) for i, byte in enumerate(sorted({*range(256)} - SPELLING.keys()))}
BYTES = {char: byte for byte, char in SPELLING.items()}


@dataclass(frozen=True)
class Source:
    """A model's folder, which is filled from `url` as its files are asked for."""

    folder: Path
    url: str = ""  # empty: a folder of the user, with all that there is

    def find(self, *names: str) -> Path | None:
        """The first of these files that is in the folder or, if none is, at the address."""
        paths = [self.folder / name for name in names]
        for path in paths:
            if path.is_file():
                return path
        for path in paths if self.url else ():
            try:
                download(f"{self.url}/{path.name}", path)
            except NotFound:
                continue
            return path
        return None

    def need(self, *names: str) -> Path:
        path = self.find(*names)
        if path is None:
            raise UserError(
                f"{self.url or self.folder}: has no {' and no '.join(names)}; is this a GPT-2?"
            )
        return path


def load_pretrained(name: str) -> tuple[GPT, BPETokenizer | CharTokenizer]:
    """The GPT-2 called `name`, on the CPU and in float32, and its tokenizer.

    name    a folder; gpt2, gpt2-medium, gpt2-large or gpt2-xl; or owner/name on the hub, and
            owner/name@revision for a branch, tag or commit of it other than main

    Its dropout is 0. Rows of the embedding that stand for no token are padding (`pad_vocab_to`).
    Raises UserError for a name that is none, for what can not be downloaded, and for a model that
    GPT can not compute exactly.
    """
    source = find_source(name)
    tok = read_tokenizer(source)
    config = read_config(source.need("config.json"), tok.vocab_size)
    weights = read_weights(source)
    try:
        embedding = weights["transformer.wte.weight"]
        if config.tie_weights and not weights.setdefault("lm_head.weight", embedding).equal(
            embedding
        ):
            raise ValueError("the head is tied to the embedding and yet another matrix")
        model = GPT(config)
        model.load_state_dict(transpose(weights))
    except Exception as error:  # names or shapes that are not those of GPT
        raise UserError(
            f"{name}: its weights are not what config.json says ({one_line(error)[:200]})"
        ) from error
    return model, tok


def find_source(name: str) -> Source:
    """Where the model called `name` is."""
    if Path(name).is_dir():
        return Source(Path(name))
    repository, _, revision = name.partition("@")
    if repository in REVISIONS:
        repository, revision = f"openai-community/{repository}", revision or REVISIONS[repository]
    revision = revision or "main"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+@\w[\w./-]*", f"{repository}@{revision}"):
        known = ", ".join(REVISIONS)
        raise UserError(
            f"{name!r}: no folder here, and no name of a model; those are {known}, owner/name"
        )
    folder = Path("data") / "cache" / repository.replace("/", "--") / revision.replace("/", "--")
    return Source(folder, hub_url(f"{repository}/resolve/{quote(revision, safe='')}"))


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; take another copy of it")
    return value


def read_config(path: Path, tokens: int) -> GPTConfig:
    """The shape that config.json gives to a model of `tokens` tokens; what GPT does not compute is refused."""
    theirs = read_json(path)
    for name in (*SIZES, "n_positions", "vocab_size"):
        if type(theirs.get(name)) is not int or theirs[name] < 1:
            raise UserError(
                f"{path}: {name} is {theirs.get(name)!r} but must be a whole number; is this a GPT-2?"
            )
    computed = COMPUTED | {
        "n_inner": (None, 4 * theirs["n_embd"]),
        "tie_word_embeddings": (True, False),
    }
    for name, values in computed.items():
        if theirs.get(name, values[0]) not in values:
            known = " or ".join(map(repr, values))
            raise UserError(
                f"{path}: {name} is {theirs[name]!r}, and GPT computes {known}; choose another model"
            )
    rows = theirs["vocab_size"]
    if theirs["n_embd"] % theirs["n_head"]:
        raise UserError(
            f"{path}: n_head is {theirs['n_head']}, but must divide n_embd={theirs['n_embd']}"
        )
    if rows < tokens:
        raise UserError(f"{path}: vocab_size is {rows}, but the tokenizer has {tokens} tokens")
    return GPTConfig(
        vocab_size=tokens,
        pad_vocab_to=rows if rows > tokens else 0,
        tie_weights=theirs.get("tie_word_embeddings", True),
        gelu="exact" if theirs.get("activation_function") == "gelu" else "tanh",
        block_size=theirs["n_positions"],
        **{name: theirs[name] for name in SIZES},
    )


def read_weights(source: Source) -> dict[str, Tensor]:
    """The tensors of the safetensors files, under GPT's names and as they are stored."""
    path = source.find("model.safetensors", "model.safetensors.index.json")
    if path is None:
        raise UserError(
            f"{source.url or source.folder}: has no model.safetensors, and a pytorch_model.bin is not read because it "
            "can run code; load it with transformers' from_pretrained where you trust it, save_pretrained it to a "
            "folder, and give that folder"
        )
    paths = [path]
    if path.suffix == ".json":
        parts = read_json(path).get("weight_map")
        names = sorted({str(name) for name in parts.values()}) if isinstance(parts, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise UserError(
                f"{path}: its weight_map does not name files beside it; take another copy of it"
            )
        paths = [source.need(name) for name in names]
    weights = {}
    for path in paths:
        try:
            weights |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: can not be read ({one_line(error)[:99]}); take another copy of it"
            ) from error
    # OpenAI's files have no prefix, and have the causal masks, which are no parameters.
    return {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
        for name, tensor in weights.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }


def transpose(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """From the matrices of Conv1D to those of nn.Linear, or back."""
    return {
        name: w.t().contiguous() if name.endswith(TRANSPOSED) else w for name, w in weights.items()
    }


def read_tokenizer(source: Source) -> BPETokenizer | CharTokenizer:
    """The tokenizer of `source`; one is refused if tokenizer_json would not write it in the same way."""
    path = source.need("tokenizer.json", "vocab.json")
    fields = read_json(path)
    if path.name == "vocab.json":
        lines = source.need("merges.txt").read_text("utf-8", "replace").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        fields = {"pre_tokenizer": GPT2_SPLIT, "model": {"vocab": fields, "merges": merges}}
    try:
        vocab = fields["model"]["vocab"] | {
            token["content"]: token["id"] for token in fields.get("added_tokens", ())
        }
        tokens = sorted(vocab, key=vocab.get)
        if fields["pre_tokenizer"]["type"] == "Split":
            tok = CharTokenizer("".join(tokens))
        else:
            tok = BPETokenizer(
                [bytes(BYTES[c] for c in token) for token in tokens if token != END_OF_TEXT]
            )
        ours = tokenizer_json(tok)
        merges = [
            " ".join(pair) if isinstance(pair, list) else pair
            for pair in fields["model"].get("merges", ())
        ]
        same = vocab == ours["model"]["vocab"] and merges == ours["model"].get("merges", [])
        split = ours["pre_tokenizer"] | fields["pre_tokenizer"]  # old files do not say `use_regex`
        same = same and split == ours["pre_tokenizer"] and not fields.get("normalizer")
    except (UserError, AttributeError, KeyError, TypeError):
        same = False
    if not same:
        raise UserError(
            f"{path}: a tokenizer of another kind than GPT-2's, which has a token for each byte, then one for each "
            f"merge in their order, then {END_OF_TEXT}; choose another model"
        )
    return tok


def tokenizer_json(tok: BPETokenizer | CharTokenizer) -> dict:
    """The content of tokenizer.json, which the library `tokenizers` reads: the same ids for every text."""
    if isinstance(tok, CharTokenizer):
        # Its unk_token is not in the vocabulary, and so a character that is not either is an error.
        split, decoder, added = CHARACTER_SPLIT, {"type": "Fuse"}, []
        model = {"type": "WordLevel", "vocab": tok.ids, "unk_token": ""}
    else:
        assert tok.pattern == SPLIT_PATTERN, (
            "every tokenizer that this program makes cuts words as GPT-2 does"
        )
        split, decoder = (
            GPT2_SPLIT,
            GPT2_SPLIT,
        )  # the one name is for spelling bytes and for reading them
        added = [{"id": tok.end_of_text, "content": END_OF_TEXT, "special": True}]
        added[0] |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        vocab = {spell(token): i for i, token in enumerate(tok.tokens)} | {
            END_OF_TEXT: tok.end_of_text
        }
        model = {"type": "BPE", "vocab": vocab, "merges": merges_of(tok.tokens)}
    parts = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": split,
        "decoder": decoder,
        "model": model,
    }
    return parts | dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))


def spell(token: bytes) -> str:
    return "".join(SPELLING[byte] for byte in token)


def merges_of(tokens: list[bytes]) -> list[str]:
    """The two parts of each token that is no byte, spelled: what the tokens before it leave of its bytes."""
    ranks, merges = {token: i for i, token in enumerate(tokens)}, []
    for rank, token in enumerate(tokens):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            first, i = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts)))
            if (
                first >= rank
            ):  # three parts or more: no two tokens make this one, and BPE never does
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) > 1:
            merges.append(" ".join(map(spell, parts)))
    return merges
