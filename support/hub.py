"""GPT-2 in Hugging Face's format, and the one loader for "a run or a pretrained model".

The library `transformers` reads the files, writes them in tools/export.py, and keeps downloads in
~/.cache/huggingface. Pickle files are never read, because they can run code.
"""

from pathlib import Path

from torch import Tensor

from configurator import UserError, one_line
from model import GPT, GPTConfig
from support.checkpoint import Checkpoint, build_model, load_checkpoint
from support.tokenizer import SAFE, Tokenizer, from_dict, import_transformers, load_tokenizer

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


def load_model(name: str) -> tuple[GPT, Tokenizer, Checkpoint | None]:
    """Return the GPT-2 called `name`, its tokenizer and, if it is a run's, the whole checkpoint.

    `name` is a checkpoint; the folder of a run or of a model; gpt2, gpt2-medium, gpt2-large or
    gpt2-xl; or owner/name or owner/name@revision on the hub. The model is on the CPU in float32. A
    pretrained one has dropout 0, and rows of its embedding without a token become padding. Raises
    UserError for an unknown name, a failed download, and a model that GPT can not compute exactly.
    """
    path = Path(name, "ckpt.pt") if Path(name).is_dir() else Path(name)
    if path.is_file() or name.endswith(".pt"):
        loaded = load_checkpoint(path)
        return build_model(loaded.shape, loaded.weights), from_dict(loaded.tokenizer), loaded
    strict = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        folder = name if Path(name).is_dir() else download_model(name)
        hf = import_transformers()
        config = hf.AutoConfig.from_pretrained(folder, **SAFE)
        for key, known in SUPPORTED.items():
            if (value := getattr(config, key, None)) not in known:
                raise UserError(f"{key} is {value!r:.60}, not {' or '.join(map(repr, known))}")
        tokenizer = load_tokenizer(folder)
        theirs, report = hf.GPT2LMHeadModel.from_pretrained(folder, **SAFE, **strict)
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
        return build_model(GPTConfig(**fields), weights), tokenizer, None
    except Exception as error:  # the library raises many kinds for a bad network or bad files
        raise UserError(f"{name}: can not be loaded as a GPT-2: {one_line(error)[:300]}") from error


def download_model(name: str) -> str:
    """Return the folder of the cache with the model's files. Raises UserError."""
    source, _, revision = name.partition("@")
    if source in REVISIONS:
        source, revision = f"openai-community/{source}", revision or REVISIONS[source]
    elif "/" not in source or Path(source).parent.is_dir():  # out/nope is meant as a folder
        raise UserError(f"no such folder or model; use resume, {', '.join(REVISIONS)}, owner/name")
    import_transformers()  # before the download
    from huggingface_hub import snapshot_download

    files = {"allow_patterns": ["*.json", "*.txt", "*.safetensors"], "ignore_patterns": "*/*"}
    return snapshot_download(source, revision=revision or None, **files)


def transpose(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert between Hugging Face's linear layers, which compute x w + b, and ours: x w^T + b."""
    names = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {n: w.t().contiguous() if n.endswith(names) else w for n, w in weights.items()}
