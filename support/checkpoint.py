"""The one writer and the one loader of a run's state.

A checkpoint is a dict of tensors and plain Python values. It is read with `weights_only=True`, which
runs no code from the file:

    format, versions     what wrote it
    model_config, model  GPTConfig as a dict, and the weights under GPT-2's names
    tokenizer            what `to_dict` gave, so that sampling needs this file and nothing else
    train_config         the options of the run
    dataset              sha256 of train.bin and val.bin
    step, best_val_loss  the updates made so far; the lowest validation loss so far
    optimizers, scaler   a list of state dicts, and one; absent in best.pt
    evaluated_step       the last step whose evaluation is in the log; absent in best.pt

It has no random states: every random draw of a run is a function of its seed and the step.
"""

import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy
import torch

from configurator import UserError, one_line
from model import GPT, GPTConfig
from support import nanogpt
from support.files import atomic_write, free_bytes

FORMAT = 1


def save_checkpoint(path: Path, model: GPT, **state) -> None:
    """Write `model` and `state` to `path`; a file that was there stays whole until it is replaced.

    Raises UserError, with the bytes that are needed, when the disk does not take it.
    """
    checkpoint = {
        "format": FORMAT,
        "versions": {"torch": str(torch.__version__), "numpy": numpy.__version__},
        "model_config": asdict(model.config),
        "model": model.state_dict(),
        **state,
    }
    try:
        with atomic_write(path) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:
        # torch reports a failed write as a RuntimeError; behind it is the system's own reason.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise UserError(
            f"{path}: can not be written ({reason.strerror}); it needs {tensor_bytes(checkpoint):,} bytes where "
            f"{free_bytes(path.parent):,} are free; what was there is as it was"
        ) from error


def tensor_bytes(value) -> int:
    """The size of all tensors in a nest of dicts and lists; one that is there twice counts once."""
    seen: dict[int, int] = {}
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return sum(seen.values())


def load_checkpoint(path: Path) -> tuple[GPT, dict]:
    """The model, on the CPU, and the whole dict of the checkpoint at `path`. Raises UserError."""
    if not path.is_file():
        raise UserError(
            f"{path}: no such checkpoint; train first, or name its folder with --out_dir"
        )
    try:
        with zipfile.ZipFile(
            path
        ) as archive:  # torch.load does not compare the checksums in its files
            intact = archive.testzip() is None
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes the two readers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: can not be read as a checkpoint ({reason[:100]})") from error
    if not intact:
        raise UserError(f"{path}: damaged, a checksum in it is wrong; take another copy of it")
    nanogpts = nanogpt.is_nanogpt(checkpoint)
    if not nanogpts and (not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT):
        raise UserError(
            f"{path}: not a checkpoint that this program wrote (format {FORMAT}), nor one of nanoGPT's"
        )
    try:
        if nanogpts:
            checkpoint = nanogpt.convert(checkpoint)
        model = GPT(GPTConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
    except UserError:
        raise
    except Exception as error:  # keys, shapes or numbers that GPT can not be built from
        raise UserError(
            f"{path}: its weights and its model_config do not fit together ({one_line(error)[:100]})"
        ) from error
    return model, checkpoint
