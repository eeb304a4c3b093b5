"""Turn a checkpoint of nanoGPT (https://github.com/karpathy/nanoGPT) into one of ours.

    python -m tools.import_nanogpt --checkpoint=../nanoGPT/out/ckpt.pt --out_dir=out/imported
    python sample.py --out_dir=out/imported
    python train.py their_config.py --out_dir=out/imported --init_from=resume

The optimizer's state comes along, so the resumed run takes the step that nanoGPT would have taken.
Checkpoints of build-nanogpt (https://github.com/karpathy/build-nanogpt) have none: a run can begin
with their weights, --init_from=out/imported.
"""

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import UserError, configure, one_line, run
from model import GPTConfig
from support.checkpoint import Checkpoint, build_model, save_checkpoint
from support.data import read_meta
from support.optimizers import make_optimizers
from support.tokenizer import BPETokenizer, Tokenizer, from_dict
from train import TrainConfig


@dataclass(frozen=True)
class ImportConfig:
    """Turn a checkpoint of nanoGPT into one that train.py resumes and sample.py reads."""

    checkpoint: str = "out/ckpt.pt"  # nanoGPT's file
    out_dir: str = "out/imported"  # folder of the new run


class BuildConfig:
    """Stands for build-nanogpt's class GPTConfig, of which its checkpoints contain an object."""


def read(path: Path) -> dict:
    """Return the content of a checkpoint by nanoGPT, or of one by build-nanogpt in its form."""
    with zipfile.ZipFile(path) as archive:  # torch.load does not verify the checksums inside
        assert not archive.testzip(), "a checksum inside is wrong; take another copy of it"
    names = [(BuildConfig, f"{module}.GPTConfig") for module in ("__main__", "train_gpt2", "model")]
    with torch.serialization.safe_globals(names):
        theirs = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(theirs.get("config"), BuildConfig):
        arguments = vars(theirs["config"]) | {"gelu": "tanh"}
        theirs = {"model": theirs["model"], "iter_num": theirs["step"], "config": {"dataset": ""}}
        theirs |= {"model_args": arguments, "best_val_loss": math.inf, "optimizer": None}
    assert theirs.keys() >= {"model_args", "iter_num"}, "it is not nanoGPT's"
    return theirs


def convert(theirs: dict) -> Checkpoint:
    """Return nanoGPT's checkpoint as ours. Nothing is known of its data set's checksums."""
    arguments, options = {"gelu": "exact"} | theirs["model_args"], theirs["config"]
    if arguments["vocab_size"] == 50304:  # GPT-2's tokens, padded to a multiple of 64
        arguments = arguments | {"vocab_size": 50257, "pad_vocab_to": 50304}
    # torch.compile adds a prefix, and without flash attention nanoGPT stores the causal masks, too.
    weights = {name.removeprefix("_orig_mod."): w for name, w in theirs["model"].items()}
    weights = {name: w for name, w in weights.items() if not name.endswith(".attn.bias")}
    shape = GPTConfig(**arguments)
    model = build_model(shape, weights)
    # An optimizer numbers its parameters. nanoGPT's order: all matrices, then all vectors.
    their_order = sorted(model.parameters(), key=lambda p: p.dim() < 2)
    (adamw,) = make_optimizers(model, TrainConfig(optimizer="adamw"), torch.float32)
    our_order = [p for group in adamw.param_groups for p in group["params"]]
    numbers, optimizer = {p: i for i, p in enumerate(our_order)}, theirs["optimizer"]
    state = optimizer["state"] if optimizer else {}
    moments = {numbers[p]: state[i] for i, p in enumerate(their_order) if i in state}
    each = options.get("batch_size", 0) * options.get("gradient_accumulation_steps", 1)
    return Checkpoint(
        shape,
        model.state_dict(),
        find_tokenizer(options["dataset"], shape.vocab_size).to_dict(),
        train_config=options | {"optimizer": "adamw"},
        dataset={},
        step=theirs["iter_num"],
        tokens=theirs["iter_num"] * each * shape.block_size,
        best_val_loss=float(theirs["best_val_loss"]),
        evaluated_step=theirs["iter_num"],  # nanoGPT saves after an evaluation
        optimizers=[{"state": moments}] if optimizer else None,
        scaler={},
    )


def find_tokenizer(dataset: str, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of data/<dataset>, or GPT-2's: nanoGPT's checkpoints contain none."""
    path = Path("data") / dataset / "meta.json"
    if path.exists():
        tokenizer = from_dict(read_meta(path)["tokenizer"])
        if tokenizer.vocab_size == vocab_size:
            return tokenizer
    if vocab_size == 50257:
        return BPETokenizer.gpt2()
    raise UserError(f"{path} has no tokenizer of {vocab_size} tokens; prepare data/{dataset} first")


def main(config: ImportConfig) -> None:
    """Read nanoGPT's file and write ckpt.pt. Raises UserError."""
    source, out_dir = Path(config.checkpoint), Path(config.out_dir)
    if any((out_dir / name).exists() for name in ("ckpt.pt", "best.pt")):
        raise UserError(f"{out_dir} has a checkpoint; choose another --out_dir")
    try:
        checkpoint = convert(read(source))
    except Exception as error:  # a damaged or foreign file can raise anything
        raise UserError(f"{source}: can not be imported: {one_line(error)[:300]}") from error
    save_checkpoint(out_dir / "ckpt.pt", checkpoint)
    print(f"{out_dir / 'ckpt.pt'}: step {checkpoint.step:,}, {checkpoint.shape}")


if __name__ == "__main__":
    run(main, configure(ImportConfig))
