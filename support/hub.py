"""GPT-2 from and to Hugging Face's format, and the one loader for "a run or a pretrained model".

A model in that format is a folder, on a disk or on the Hugging Face hub:

    config.json         the shape of the model
    tokenizer.json      the tokenizer; older models have vocab.json and merges.txt instead
    model.safetensors   the weights; model.safetensors.index.json lists the files of a large model

Downloads are kept in data/cache/. Pickle files are never read, because they can run code.
"""

import json
import re
from configurator import UserError, one_line
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from model import GPT, GPTConfig
from support.checkpoint import build_model, load_checkpoint
from support.download import NotFound, download, hub_url
from support.files import atomic_write
from support.tokenizer import END_OF_TEXT, SPLIT_PATTERN, BPETokenizer, CharTokenizer, from_dict

# OpenAI's four models: commits of the repositories openai-community/<name>.
REVISIONS = {
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
SIZES = ("vocab_size", "n_layer", "n_head", "n_embd")  # GPTConfig has the same names
# The values in config.json with which GPT computes the same function. The first is the default.
SUPPORTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
    "tie_word_embeddings": (True, False),
}
# Parameters have the same names in both formats. But transformers stores the matrices of linear
# layers transposed: its Conv1D computes x w + b, and nn.Linear computes x w^T + b.
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"

# How tokenizer.json says that a text is split before merges: into GPT-2's words, or characters.
WORDS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CHARS = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
# tokenizer.json writes each byte as a printable character (`bytes_to_unicode` in OpenAI's
# encoder.py): most bytes as themselves, the others as U+0100, U+0101, ... A space is U+0120.
BYTE_TO_CHAR = {b: chr(b) for b in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}
BYTE_TO_CHAR |= {b: chr(0x100 + i) for i, b in enumerate(sorted({*range(256)} - {*BYTE_TO_CHAR}))}
CHAR_TO_BYTE = {char: b for b, char in BYTE_TO_CHAR.items()}


def load_model(
    init_from: str, out_dir: str, checkpoint: str
) -> tuple[GPT, BPETokenizer | CharTokenizer, dict | None]:
    """Return the model, its tokenizer and, if `init_from` is "resume", the whole checkpoint."""
    if init_from != "resume":
        return *load_pretrained(init_from), None
    model, state = load_checkpoint(Path(out_dir) / checkpoint)
    return model, from_dict(state["tokenizer"]), state


def load_pretrained(name: str) -> tuple[GPT, BPETokenizer | CharTokenizer]:
    """Return the GPT-2 called `name`, on the CPU in float32 with dropout 0, and its tokenizer.

    name    a folder; gpt2, gpt2-medium, gpt2-large or gpt2-xl; or owner/name on the hub, where
            owner/name@revision is a branch, tag or commit other than main

    Rows of the embedding that belong to no token become padding (`pad_vocab_to`). Raises UserError
    for an unknown name, a failed download, and a model that GPT can not compute exactly.
    """
    source = find_source(name)
    config = read_config(source.find("config.json"))
    tokenizer = read_tokenizer(source)
    rows, tokens = config.vocab_size, tokenizer.vocab_size
    if rows < tokens:
        raise UserError(f"{name}: vocab_size is {rows}, but the tokenizer has {tokens} tokens")
    config = replace(config, vocab_size=tokens, pad_vocab_to=rows if rows > tokens else 0)
    weights = read_weights(source)
    try:
        if config.tie_weights and EMBEDDING in weights:
            head = weights.setdefault(HEAD, weights[EMBEDDING])
            if not torch.equal(head.float(), weights[EMBEDDING].float()):
                raise UserError(f"{HEAD} is not {EMBEDDING}, but tie_word_embeddings is true")
        return build_model(config, weights), tokenizer
    except UserError as error:
        raise UserError(f"{name}: config.json and the weights do not match: {error}") from error


@dataclass(frozen=True)
class Source:
    """A model's folder; missing files are downloaded from `url`, unless that is empty."""

    folder: Path
    url: str = ""

    def find(self, *names: str) -> Path:
        """Return the first of these files that the folder or, failing that, the hub has."""
        for path in (self.folder / name for name in names):
            if path.is_file():
                return path
        for name in names if self.url else ():
            with suppress(NotFound):
                download(f"{self.url}/{name}", self.folder / name)
                return self.folder / name
        where, what = self.url or self.folder, " and no ".join(names)
        raise UserError(f"{where}: has no {what}; use a GPT-2 in the safetensors format")


def find_source(name: str) -> Source:
    if Path(name).is_dir():
        return Source(Path(name))
    repository, _, revision = name.partition("@")
    if repository in REVISIONS:
        repository, revision = f"openai-community/{repository}", revision or REVISIONS[repository]
    revision = revision or "main"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+@\w[\w./-]*", f"{repository}@{revision}"):
        raise UserError(f"{name!r}: no such folder or model ({', '.join(REVISIONS)}, owner/name)")
    folder = Path("data") / "cache" / repository.replace("/", "--") / revision.replace("/", "--")
    return Source(folder, hub_url(f"{repository}/resolve/{quote(revision, safe='')}"))


def read_json(path: Path) -> dict:
    with suppress(ValueError, RecursionError):
        value = json.loads(path.read_bytes())
        if isinstance(value, dict):
            return value
    raise UserError(f"{path}: not a JSON object; get this file again")


def read_config(path: Path) -> GPTConfig:
    """Return the shape in config.json. Raises UserError if GPT computes something else."""
    fields = read_json(path)
    for name, values in SUPPORTED.items():
        if fields.get(name, values[0]) not in values:
            known = " or ".join(map(repr, values))
            raise UserError(f"{path}: {name} is {fields[name]!r:.60}, not {known}; use a GPT-2")
    for name in (*SIZES, "n_positions"):
        size = fields.get(name)
        if type(size) is not int or size < 1:
            raise UserError(f"{path}: {name} is {size!r:.60}, not a whole number; use a GPT-2")
    if fields["n_embd"] % fields["n_head"]:
        raise UserError(f"{path}: n_head is {fields['n_head']}, which does not divide n_embd")
    return GPTConfig(
        **{name: fields[name] for name in SIZES},
        block_size=fields["n_positions"],
        tie_weights=bool(fields.get("tie_word_embeddings", True)),
        gelu="exact" if fields.get("activation_function") == "gelu" else "tanh",
    )


def read_weights(source: Source) -> dict[str, Tensor]:
    """Return the tensors of the safetensors files, as GPT names and stores them."""
    path = source.find("model.safetensors", "model.safetensors.index.json")
    names = {path.name}
    if path.suffix == ".json":
        files = read_json(path).get("weight_map")
        names = set(map(str, files.values())) if isinstance(files, dict) else set()
        if not names or any(Path(name).name != name for name in names):
            raise UserError(f"{path}: weight_map does not list files in its folder; get it again")
    stored = {}
    for path in [source.find(name) for name in sorted(names)]:
        try:
            stored |= safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: {one_line(error)[:90]}; get this file again") from error
    weights = {}
    for name, tensor in stored.items():
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks in old files
            if not name.startswith(("transformer.", "lm_head.")):
                name = f"transformer.{name}"  # old files leave this prefix out
            weights[name] = tensor
    return transpose(weights)


def transpose(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the matrices of Conv1D to those of nn.Linear, or back."""
    return {
        name: w.t().contiguous() if name.endswith(TRANSPOSED) and w.dim() == 2 else w
        for name, w in weights.items()
    }


def read_tokenizer(source: Source) -> BPETokenizer | CharTokenizer:
    """Return the tokenizer. Raises UserError if its file is not what tokenizer_json would write."""
    path = source.find("tokenizer.json", "vocab.json")
    fields = read_json(path)
    if path.name == "vocab.json":
        lines = source.find("merges.txt").read_text("utf-8", "replace").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        fields = {"pre_tokenizer": WORDS, "model": {"vocab": fields, "merges": merges}}
    unknown = []
    try:
        model, split = fields["model"], fields["pre_tokenizer"]
        vocab = dict(model["vocab"])
        for token in fields.get("added_tokens", ()):
            name = token["content"]
            if name in vocab or name == END_OF_TEXT:
                vocab[name] = token["id"]
            elif "pad" not in name.lower():  # no text contains padding, so its row is never used
                unknown.append(name)
        tokens = sorted(vocab.keys() - {END_OF_TEXT}, key=vocab.get)
        if split["type"] == "Split":
            tokenizer = CharTokenizer("".join(tokens))
        else:
            tokenizer = BPETokenizer([bytes(map(CHAR_TO_BYTE.get, token)) for token in tokens])
        ours = tokenizer_json(tokenizer)
        merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
        same = (
            vocab == ours["model"]["vocab"]
            and merges == ours["model"].get("merges", [])
            and split.items() <= ours["pre_tokenizer"].items()  # old files leave out `use_regex`
            and not fields.get("normalizer")
        )
    except (ValueError, AttributeError, KeyError, TypeError):  # UserError is a ValueError
        same = False
    if unknown or not same:
        more = f" (it adds {', '.join(unknown)[:60]!r})" if unknown else ""
        raise UserError(
            f"{path}: not a tokenizer like GPT-2's{more}, which has one token for each byte, then "
            f"one for each merge in order, then {END_OF_TEXT}; use another model"
        )
    return tokenizer


def write_folder(folder: Path, model: GPT, tokenizer: BPETokenizer | CharTokenizer) -> None:
    """Write what `load_pretrained` and transformers read. Missing biases are written as zeros."""
    c, end = model.config, getattr(tokenizer, "end_of_text", None)
    ends = {"bos_token_id": end, "eos_token_id": end}
    config = {name: values[0] for name, values in SUPPORTED.items() if values[0] is not None}
    config |= {name: getattr(c, name) for name in SIZES}
    config |= dict.fromkeys(("n_positions", "n_ctx"), c.block_size)  # llama.cpp reads n_ctx
    config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout)
    config |= {"architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": c.tie_weights, **ends}
    config |= {"activation_function": "gelu" if c.gelu == "exact" else "gelu_new"}
    # With clean_up_tokenization_spaces, decoding would remove some spaces.
    about = {"model_max_length": c.block_size, "clean_up_tokenization_spaces": False}
    about["tokenizer_class"] = "PreTrainedTokenizerFast" if end is None else "GPT2Tokenizer"
    if end is not None:
        about |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        about["add_prefix_space"] = False
    contents = {
        "model.safetensors": safetensors.torch.save(their_weights(model), {"format": "pt"}),
        "generation_config.json": ends,
        "tokenizer_config.json": about,
        "tokenizer.json": tokenizer_json(tokenizer),
        "config.json": config,  # last: without config.json a folder is not taken for a model
    }
    for name, content in contents.items():
        if isinstance(content, dict):
            content = json.dumps(content, indent=2, ensure_ascii=False).encode()
        with atomic_write(folder / name, len(content)) as file:
            file.write(content)


def their_weights(model: GPT) -> dict[str, Tensor]:
    """Return the weights as transformers stores them: a tied head once, no padding, every bias."""
    weights = model.state_dict()
    for name in (EMBEDDING, HEAD):
        weights[name] = weights[name][: model.config.vocab_size]
    if model.config.tie_weights:
        del weights[HEAD]
    for name, w in list(weights.items()):
        if ".h." in name or ".ln_f." in name:
            weights.setdefault(name.replace("weight", "bias"), w.new_zeros(len(w)))
    return transpose(weights)


def tokenizer_json(tokenizer: BPETokenizer | CharTokenizer) -> dict:
    """Return a tokenizer.json with which the library `tokenizers` gives the same ids as ours."""
    if isinstance(tokenizer, CharTokenizer):
        # An unk_token outside the vocabulary makes an unknown character an error, as it is here.
        split, decoder, added = CHARS, {"type": "Fuse"}, []
        model = {"type": "WordLevel", "vocab": tokenizer.ids, "unk_token": ""}
    else:
        assert tokenizer.pattern == SPLIT_PATTERN, "all our tokenizers split words as GPT-2 does"
        split = decoder = WORDS  # a pre-tokenizer and a decoder with the same name
        added = [{"id": tokenizer.end_of_text, "content": END_OF_TEXT, "special": True}]
        added[0] |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokens = [token.decode("latin-1").translate(BYTE_TO_CHAR) for token in tokenizer.tokens]
        vocab = {token: i for i, token in enumerate([*tokens, END_OF_TEXT])}
        model = {"type": "BPE", "vocab": vocab, "merges": merges_of(tokens)}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    parts = {"pre_tokenizer": split, "decoder": decoder, "model": model}
    return {"version": "1.0", "added_tokens": added, **empty, **parts}


def merges_of(tokens: list[str]) -> list[str]:
    """Return the merge behind each token of several bytes: its parts after all earlier merges."""
    ranks, merges = {token: i for i, token in enumerate(tokens)}, []
    for rank, token in enumerate(tokens):
        parts = list(token)
        while len(parts) > 2:
            first, i = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts)))
            if first >= rank:  # no merge makes this token, so BPE never produces it
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) > 1:
            merges.append(" ".join(parts))
    return merges
