"""A trained model as the folder that Hugging Face's transformers loads, or its weights alone.

    python export.py --out_dir=out/phase3_gpt2 --to=exported          # AutoModelForCausalLM, AutoTokenizer
    python export.py --out_dir=out/phase3_gpt2 --to=small --weights_only

The first is the form that vLLM, llama.cpp's converter and lm-evaluation-harness start from too; the
second is a checkpoint for sample.py, a third of the size of one with its optimizer.
"""

from dataclasses import dataclass

from configurator import UserError, configure, run


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained model as a folder for Hugging Face's transformers, or its weights alone for sample.py."""

    out_dir: str = "out/phase1_char"  # the run's folder
    checkpoint: str = "ckpt.pt"  # the file in it: ckpt.pt is the last state, best.pt the best
    to: str = ""  # the folder to write, a new or an empty one
    weights_only: bool = (
        False  # write a ckpt.pt without the optimizer instead: a third of the size, to sample from
    )

    def __post_init__(self) -> None:
        if not self.to:
            raise UserError("to is empty; name the folder to write, as in --to=exported")


if __name__ == "__main__":  # before torch is imported, so that --help and mistakes answer at once
    config = configure(ExportConfig)

import json
from pathlib import Path

import safetensors.torch
import torch

from model import GPT
from support import tokenizer
from support.checkpoint import load_checkpoint, save_checkpoint
from support.files import atomic_write
from support.hub import COMPUTED, SIZES, tokenizer_json, transpose


def main(config: ExportConfig) -> None:
    folder, path = Path(config.to), Path(config.out_dir) / config.checkpoint
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"to={folder}: there is something already; name a new folder")
    model, checkpoint = load_checkpoint(path)
    if config.weights_only:
        about = ("step", "best_val_loss", "tokenizer", "train_config", "dataset")
        save_checkpoint(folder / "ckpt.pt", model, **{name: checkpoint[name] for name in about})
    else:
        write_folder(folder, model, tokenizer.from_dict(checkpoint["tokenizer"]))
    files = sorted(folder.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(f"{folder}: {', '.join(file.name for file in files)}")
    print(f"{size / 1e6:,.1f} MB, where {path} has {path.stat().st_size / 1e6:,.1f} MB")


def write_folder(
    folder: Path, model: GPT, tok: tokenizer.BPETokenizer | tokenizer.CharTokenizer
) -> None:
    """What `pretrained.load_pretrained` and transformers read. A model without biases gets biases of zero."""
    c, end = model.config, getattr(tok, "end_of_text", None)
    ends = {"bos_token_id": end, "eos_token_id": end}
    config = {name: values[0] for name, values in COMPUTED.items() if values[0] is not None}
    config |= {name: getattr(c, name) for name in SIZES}
    config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout)
    config |= {
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu" if c.gelu == "exact" else "gelu_new",
        "vocab_size": c.vocab_size,
        "n_positions": c.block_size,
        "n_ctx": c.block_size,  # as llama.cpp's converter calls it
        "tie_word_embeddings": c.tie_weights,
        **ends,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": c.block_size,
        "clean_up_tokenization_spaces": False,  # decoding gives back every space
    }
    if end is not None:
        names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), tokenizer.END_OF_TEXT)
        tokenizer_config |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **names}
    contents = {
        "model.safetensors": safetensors.torch.save(
            their_weights(model), metadata={"format": "pt"}
        ),
        "generation_config.json": ends,
        "tokenizer_config.json": tokenizer_config,
        "tokenizer.json": tokenizer_json(tok),
        "config.json": config,  # the last: without it nothing takes the folder for a model
    }
    for name, content in contents.items():
        if not isinstance(content, bytes):
            content = json.dumps(content, indent=2, ensure_ascii=False).encode()
        with atomic_write(folder / name) as file:
            file.write(content)


def their_weights(model: GPT) -> dict[str, torch.Tensor]:
    """The parameters as transformers keeps them: a tied head once, no rows that stand for no token, all biases."""
    weights, c = model.state_dict(), model.config
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = weights[name][: c.vocab_size]
    if c.tie_weights:
        del weights["lm_head.weight"]
    for name, weight in list(weights.items()):
        if name.startswith(("transformer.h.", "transformer.ln_f.")) and name.endswith(".weight"):
            weights.setdefault(
                name.removesuffix("weight") + "bias", weight.new_zeros(weight.size(0))
            )
    return transpose(weights)


if __name__ == "__main__":
    run(main, config)
