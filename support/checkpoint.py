"""Write and read checkpoints: out/<run>/ckpt.pt with everything, best.pt without the optimizers.

A checkpoint is a dict of tensors and plain Python values. It is read with `weights_only=True`, so
no code from the file runs. Every random draw of a run depends on its seed and the step alone, so
there are no random states to save. The keys are the fields of Checkpoint, but for two older names,
`model_config` and `model`, and `format` and the `versions` of the packages.
"""

import math
import re
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from configurator import UserError, one_line, quote
from model import GPT, GPTConfig
from support.files import atomic_write

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run. best.pt lacks the last two fields, which only a resumed run needs."""

    shape: GPTConfig
    weights: dict[str, Tensor]  # under GPT-2's names
    tokenizer: dict  # a tokenizer's to_dict(): sampling needs this file and nothing else
    train_config: dict  # the options of the run
    dataset: dict  # sha256 of train.bin and val.bin; empty if unknown
    step: int = 0  # finished updates
    tokens: int = 0  # training tokens read in these updates
    best_val_loss: float = math.inf  # the lowest validation loss so far
    evaluated_step: int = -1  # the last step whose evaluation is in the log
    optimizers: list[dict] | None = None  # a state dict for each
    scaler: dict | None = None  # the state dict of float16's gradient scaler


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint. An earlier file stays complete until the new one replaces it.

    Raises UserError if a weight is not finite or the disk does not take the file.
    """
    if not all(w.isfinite().all() for w in checkpoint.weights.values()):
        raise UserError(
            f"{path}: not saved, the weights are not finite; the earlier file is unchanged: lower "
            "learning_rate or raise warmup_iters, and continue with --init_from=resume"
        )
    fields = {name: value for name, value in vars(checkpoint).items() if value is not None}
    fields["model_config"], fields["model"] = asdict(fields.pop("shape")), fields.pop("weights")
    fields["versions"] = {"torch": str(torch.__version__), "numpy": numpy.__version__}
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, **fields}, file)


def load_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint at `path`, on the CPU. Raises UserError if it is not a whole one."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; train first, or name a run with --out_dir")
    try:
        if not zipfile.is_zipfile(path):
            hint = "a folder in Hugging Face's format is read with --init_from=FOLDER"
            raise UserError(f"torch did not write it, or it is cut; {hint}")
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify the checksums inside
            if archive.testzip():
                raise UserError("a checksum inside is wrong; take another copy of it")
        fields = torch.load(path, map_location="cpu", weights_only=True)
        if not fields.keys() >= {"format", "model_config"}:
            raise UserError(describe_foreign(path, fields))
        if fields["format"] != FORMAT:
            raise UserError(f"its format is {fields['format']!r:.50}, not {FORMAT}")
        fields |= {"shape": GPTConfig(**fields["model_config"]), "weights": fields["model"]}
        if "tokens" not in fields:  # an earlier version
            run, T = fields["train_config"], fields["shape"].block_size
            each = run["batch_size"] * run["gradient_accumulation_steps"] * T
            fields["tokens"] = fields["step"] * each
        names = Checkpoint.__dataclass_fields__.keys() & fields.keys()
        return Checkpoint(**{name: fields[name] for name in names})
    except Exception as error:  # a damaged or foreign file can raise anything
        reason = one_line(error) or type(error).__name__
        if found := re.search(r"GLOBAL (\S+)", reason):  # torch has refused to load this class
            kind = "config" if "GPTConfig" in found[1] else f"objects of {found[1]}"
            reason = describe_foreign(path, {kind: None})
        raise UserError(f"{path}: can not be used as a checkpoint: {reason[:300]}") from error


def describe_foreign(path: Path, fields: dict) -> str:
    """Return which program's checkpoint the file is by its `fields`, and how to use it."""
    if {"model_args", "config"} & fields.keys():
        run = f"python -m tools.import_nanogpt --checkpoint={quote(path)} --out_dir=out/imported"
        return f"it looks like one of nanoGPT or build-nanogpt; run: {run}"
    if any(name.endswith("wte.weight") for name in fields):
        return (
            "it has a GPT-2's weights alone, as pytorch_model.bin; write its folder again with "
            "GPT2LMHeadModel.from_pretrained(FOLDER).save_pretrained(NEW) and use --init_from=NEW"
        )
    return f"it is of another program, with {', '.join(map(str, fields))}"


def build_model(shape: GPTConfig, weights: dict[str, Tensor]) -> GPT:
    """Return a GPT with a float32 copy of `weights`, on the CPU. Raises UserError."""
    try:
        assert shape.n_layer <= len(weights)
        with torch.device("meta"):  # tensors without memory
            model = GPT(shape)
        copies = {name: w.to(torch.float32, copy=True) for name, w in weights.items()}
        model.load_state_dict(copies, assign=True)
    except Exception as error:
        reason = one_line(error)[:150]
        raise UserError(f"the weights do not fit the shape {shape}: {reason}") from error
    if shape.tie_weights:
        model.lm_head.weight = model.transformer.wte.weight
    if not all(w.isfinite().all() for w in model.parameters()):
        raise UserError("the weights are damaged: not all of them are finite numbers")
    return model
