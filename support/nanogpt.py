"""A checkpoint that nanoGPT's train.py wrote, in the form of checkpoint.py.

nanoGPT (https://github.com/karpathy/nanoGPT) has an exact GELU where GPT-2 has the tanh form, and by
default no biases. Both are options of GPTConfig, so its models compute here what they computed there.
"""

from pathlib import Path

from configurator import UserError
from model import GPT, GPTConfig
from support import data
from support.tokenizer import BPETokenizer, Tokenizer, from_dict


def is_nanogpt(checkpoint: object) -> bool:
    return isinstance(checkpoint, dict) and checkpoint.keys() >= {
        "model",
        "optimizer",
        "model_args",
        "iter_num",
    }


def convert(checkpoint: dict) -> dict:
    """The dict that checkpoint.py describes; `dataset` is empty, for there are no checksums to compare."""
    arguments, options = checkpoint["model_args"], checkpoint["config"]
    if arguments["vocab_size"] == 50304:  # GPT-2's tokens and 47 rows that stand for none
        arguments = arguments | {"vocab_size": 50257, "pad_vocab_to": 50304}
    config = GPTConfig(**arguments, gelu="exact")
    model = GPT(config)
    # The names may have torch.compile's prefix, and without flash attention the masks are among the weights.
    weights = {
        name.removeprefix("_orig_mod."): value for name, value in checkpoint["model"].items()
    }
    # An optimizer knows its parameters by number. There all matrices come first, in the model's
    # order; here those of the blocks come before the embeddings.
    groups = model.param_groups()
    number = {p: i for i, p in enumerate(groups["hidden"] + groups["embedding"] + groups["vector"])}
    theirs = sorted(model.parameters(), key=lambda p: p.dim() < 2)
    state = checkpoint["optimizer"]["state"]
    return {
        "model_config": vars(config),
        "model": {
            name: value for name, value in weights.items() if not name.endswith(".attn.bias")
        },
        "tokenizer": find_tokenizer(options["dataset"], config.vocab_size).to_dict(),
        "train_config": options | {"optimizer": "adamw"},
        "dataset": {},
        "step": checkpoint["iter_num"],
        "evaluated_step": checkpoint["iter_num"],
        "best_val_loss": float(checkpoint["best_val_loss"]),
        "optimizers": [
            {"state": {number[p]: state[i] for i, p in enumerate(theirs) if i in state}}
        ],
        "scaler": {},
    }


def find_tokenizer(dataset: str, vocab_size: int) -> Tokenizer:
    """nanoGPT's checkpoints have no tokenizer: it is that of the data set, or GPT-2's."""
    path = Path("data") / dataset / "meta.json"
    if path.exists():
        tok = from_dict(data.read_meta(path)["tokenizer"])
        if tok.vocab_size == vocab_size:
            return tok
    if vocab_size == 50257:
        return BPETokenizer.gpt2()
    raise UserError(
        f"a checkpoint of nanoGPT's has no tokenizer, and {path} has not one of {vocab_size} tokens; "
        f"prepare that data set"
    )
