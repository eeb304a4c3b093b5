"""nanoGPT (https://github.com/karpathy/nanoGPT): its checkpoints, its data sets, its model."""

import importlib.util
import sys
from configurator import UserError
from pathlib import Path

import numpy as np
from torch import nn

from model import GPTConfig
from support import data
from support.tokenizer import BPETokenizer, Tokenizer, from_dict


def is_nanogpt(checkpoint: object) -> bool:
    return isinstance(checkpoint, dict) and checkpoint.keys() >= {"model_args", "iter_num"}


def convert(checkpoint: dict) -> dict:
    """Return the same checkpoint in our form. `dataset` is empty: nanoGPT keeps no checksums."""
    arguments, options = checkpoint["model_args"], checkpoint["config"]
    if arguments["vocab_size"] == 50304:  # GPT-2's tokens, padded to a multiple of 64
        arguments = arguments | {"vocab_size": 50257, "pad_vocab_to": 50304}
    # torch.compile adds a prefix, and without flash attention nanoGPT stores the causal masks, too.
    weights = {n.removeprefix("_orig_mod."): w for n, w in checkpoint["model"].items()}
    weights = {n: w for n, w in weights.items() if not n.endswith(".attn.bias")}
    # An optimizer's state numbers the parameters. nanoGPT's order: all matrices, then all vectors.
    # Ours: the matrices of the blocks, the embeddings, then all vectors.
    theirs = sorted((n for n in weights if n != "lm_head.weight"), key=lambda n: -weights[n].dim())
    ours = sorted(theirs, key=lambda n: (-weights[n].dim(), ".h." not in n))
    state = checkpoint["optimizer"]["state"]
    moments = {ours.index(n): state[i] for i, n in enumerate(theirs) if i in state}
    return {
        "model_config": vars(GPTConfig(**arguments, gelu="exact")),
        "model": weights,
        "tokenizer": find_tokenizer(options["dataset"], arguments["vocab_size"]).to_dict(),
        "train_config": options | {"optimizer": "adamw"},
        "dataset": {},
        **dict.fromkeys(("step", "evaluated_step"), checkpoint["iter_num"]),
        "best_val_loss": float(checkpoint["best_val_loss"]),
        "optimizers": [{"state": moments}],
        "scaler": {},
    }


def find_tokenizer(dataset: str, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of data/<dataset>, or GPT-2's: nanoGPT's checkpoints contain none."""
    path = Path("data") / dataset / "meta.json"
    if path.exists():
        tokenizer = from_dict(data.read_meta(path)["tokenizer"])
        if tokenizer.vocab_size == vocab_size:
            return tokenizer
    if vocab_size == 50257:
        return BPETokenizer.gpt2()
    raise UserError(f"{path}: has no tokenizer of {vocab_size} tokens; prepare data/{dataset}")


def describe_data(folder: Path) -> dict:
    """Return the meta.json for token files of nanoGPT. Without a meta.pkl the ids are GPT-2's."""
    if (folder / "meta.pkl").exists():
        command = f"prepare_shakespeare.py --input={folder / 'input.txt'} --dataset={folder.name}"
        raise UserError(f"{folder / 'meta.pkl'}: pickles are unsafe; run python {command}")
    largest = np.fromfile(folder / "train.bin", dtype=data.TOKEN, count=1 << 20).max(initial=0)
    if largest < 1000:  # in any text, some common words are among GPT-2's later tokens
        raise UserError(f"{folder}: has no meta.json, and its ids are not GPT-2's; {data.PREPARE}")
    tokenizer = BPETokenizer.gpt2()
    val = np.fromfile(folder / "val.bin", dtype=data.TOKEN)
    val_bytes = len(tokenizer.decode_bytes(val[val < tokenizer.end_of_text].tolist()))
    return data.make_meta(folder, tokenizer, val_bytes, {"prepared by": "nanoGPT"})


def build_original(folder: Path, config: GPTConfig) -> nn.Module:
    """Return nanoGPT's own model with the shape `config`, from a copy of nanoGPT in `folder`."""
    path = folder / "model.py"
    if not path.is_file():
        raise UserError(f"{path}: no such file; nanogpt is the folder of a copy of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    shape = {name: getattr(config, name) for name in names}
    shape["vocab_size"] = config.pad_vocab_to or config.vocab_size
    model = module.GPT(module.GPTConfig(**shape))
    if not config.tie_weights:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model
