"""GPT-2 in Hugging Face's format, and the one loader for "a run or a pretrained model".

The library `transformers` reads the files, and writes them in tools/export.py. It is imported only
when it is needed, and keeps downloads in ~/.cache/huggingface. Pickle files are never read, because
they can run code.
"""

from configurator import UserError, one_line
from pathlib import Path

from torch import Tensor

from model import GPT, GPTConfig
from support.checkpoint import Checkpoint, build_model, load_checkpoint
from support.tokenizer import END_OF_TEXT, BPETokenizer, CharTokenizer, Tokenizer, from_dict

# OpenAI's four models: commits of the repositories openai-community/<name>.
REVISIONS = {
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
SUPPORTED = {  # the values in config.json with which GPT computes the same function
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}
NAMES = {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}  # theirs: ours
NAMES |= {"n_positions": "block_size", "tie_word_embeddings": "tie_weights"}
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
# They write each byte of a token as a printable character, as OpenAI's encoder.py does: most bytes
# as themselves, the others as U+0100, U+0101, ... A space is U+0120.
BYTE_TO_CHAR = {b: chr(b) for b in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}
BYTE_TO_CHAR |= {b: chr(0x100 + i) for i, b in enumerate(sorted({*range(256)} - {*BYTE_TO_CHAR}))}
# Tokenizers that split or change a text in another way encode this one differently.
PROBE = "It's a DON'T 12ab_3c!?\t\r\n\n     \xa0x\xe9e\u0301\ufb01\u3000\u4f60 \U0001f600   'St \n"


def load_model(
    init_from: str, out_dir: str, checkpoint: str
) -> tuple[GPT, Tokenizer, Checkpoint | None]:
    """Return the model, its tokenizer and, if `init_from` is "resume", the whole checkpoint."""
    if init_from != "resume":
        return *load_pretrained(init_from), None
    loaded = load_checkpoint(Path(out_dir) / checkpoint)
    return build_model(loaded.shape, loaded.weights), from_dict(loaded.tokenizer), loaded


def load_pretrained(name: str) -> tuple[GPT, Tokenizer]:
    """Return the GPT-2 called `name`, on the CPU in float32 with dropout 0, and its tokenizer.

    `name` is the folder of a run or of a model; gpt2, gpt2-medium, gpt2-large or gpt2-xl; or
    owner/name or owner/name@revision on the hub. Rows of the embedding without a token become
    padding. Raises UserError for an unknown name, a failed download, and a model that GPT can not
    compute exactly.
    """
    path = Path(name) if name.endswith(".pt") else Path(name, "ckpt.pt")
    if path.exists() or path.suffix == ".pt" == Path(name).suffix:
        return load_model("resume", str(path.parent), path.name)[:2]
    hf, safe = import_transformers(), {"trust_remote_code": False, "local_files_only": True}
    strict = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        folder = name if Path(name).is_dir() else download_model(name)
        config = hf.AutoConfig.from_pretrained(folder, **safe)
        for key, known in SUPPORTED.items():
            if (value := getattr(config, key, None)) not in known:
                raise UserError(f"{key} is {value!r:.60}, not {' or '.join(map(repr, known))}")
        tokenizer = convert_tokenizer(hf.AutoTokenizer.from_pretrained(folder, **safe))
        theirs, report = hf.GPT2LMHeadModel.from_pretrained(folder, **safe, **strict)
        # transformers only warns of weights that do not fit, and draws missing ones at random.
        for kind, keys in report.items():  # masked_bias is a mask in the files of old versions
            if wrong := sorted(str(key) for key in keys if "masked_bias" not in key):
                raise UserError(f"{kind} in the weights: {', '.join(wrong)[:150]}")
        weights = transpose(theirs.state_dict())
        if config.tie_word_embeddings and not weights[HEAD].equal(weights[EMBEDDING]):
            raise UserError(f"{HEAD} is not {EMBEDDING}, but tie_word_embeddings is true")
        fields = {ours: getattr(config, theirs) for theirs, ours in NAMES.items()}
        rows, fields["vocab_size"] = config.vocab_size, tokenizer.vocab_size
        fields["pad_vocab_to"] = rows if rows > tokenizer.vocab_size else 0
        fields["gelu"] = "exact" if config.activation_function == "gelu" else "tanh"
        return build_model(GPTConfig(**fields), weights), tokenizer
    except Exception as error:  # the library raises many kinds for a bad network or bad files
        raise UserError(f"{name}: can not be loaded as a GPT-2: {one_line(error)[:300]}") from error


def download_model(name: str) -> str:
    """Return the folder of the cache with the model's files. Raises UserError."""
    from huggingface_hub import snapshot_download

    source, _, revision = name.partition("@")
    if source in REVISIONS:
        source, revision = f"openai-community/{source}", revision or REVISIONS[source]
    elif "/" not in source:
        raise UserError(f"no such folder or model; use {', '.join(REVISIONS)} or owner/name")
    files = {"allow_patterns": ["*.json", "*.txt", "*.safetensors"], "ignore_patterns": "*/*"}
    return snapshot_download(source, revision=revision or None, **files)


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


def transpose(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert between Hugging Face's linear layers, which compute x w + b, and ours: x w^T + b."""
    names = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {n: w.t().contiguous() if n.endswith(names) else w for n, w in weights.items()}


def convert_tokenizer(theirs) -> Tokenizer:
    """Return our tokenizer that gives the same ids as one of transformers. Raises UserError.

    The two encode a text with every token. A vocabulary of single characters has one token each.
    """
    try:
        names = sorted(vocab := theirs.get_vocab(), key=vocab.get)
        special = {
            name: vocab[name] for name in {*theirs.get_added_vocab(), END_OF_TEXT} & {*names}
        }
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
