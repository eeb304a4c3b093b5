"""The one writer and the one loader of a run's state.

A checkpoint is a dict of tensors and plain Python values, read with `weights_only=True`, which
runs no code from the file:

    format, versions     what wrote it
    model_config, model  GPTConfig as a dict, and the weights under GPT-2's names
    tokenizer            what `to_dict` gave, so that sampling needs this file and nothing else
    train_config         the options of the run
    dataset              sha256 of train.bin and val.bin
    step, best_val_loss  the number of steps taken; the lowest full-validation loss so far
    optimizers           a list of state dicts; absent in best.pt

No random states: every random draw of a run is a function of the seed and the step.
"""

from dataclasses import asdict
from pathlib import Path

import numpy
import torch

from configurator import UserError
from data import atomic_write
from model import GPT, GPTConfig

FORMAT = 1


def save_checkpoint(path: Path, model: GPT, **state) -> None:
    """Write `model` and `state` to `path`; an earlier file there stays whole until it is replaced."""
    checkpoint = {
        "format": FORMAT,
        "versions": {"torch": str(torch.__version__), "numpy": numpy.__version__},
        "model_config": asdict(model.config),
        "model": model.state_dict(),
        **state,
    }
    with atomic_write(path) as file:
        torch.save(checkpoint, file)


def load_checkpoint(path: Path) -> tuple[GPT, dict]:
    """The model on the CPU, and the whole dict, of the checkpoint at `path`. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; train first, or name its folder with --out_dir")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes the reader raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: can not be read as a checkpoint ({reason[:100]})") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint that this program wrote (format {FORMAT})")
    model = GPT(GPTConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    return model, checkpoint
