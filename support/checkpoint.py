"""Write and read checkpoints: out/<run>/ckpt.pt with everything, best.pt with the weights alone.

A checkpoint is a dict of tensors and plain Python values. It is read with `weights_only=True`, so
no code from the file runs. Every random draw of a run depends on its seed and the step alone, so
there are no random states to save.

    format, versions     of this file, and of the packages that wrote it
    model_config, model  GPTConfig as a dict, and the weights under GPT-2's names
    tokenizer            a tokenizer's to_dict(): sampling needs this file and nothing else
    train_config         the options of the run
    dataset              sha256 of train.bin and val.bin
    step, best_val_loss  finished updates, and the lowest validation loss so far
    evaluated_step       the last step whose evaluation is in the log (not in best.pt)
    optimizers, scaler   a list of state dicts, and one state dict (not in best.pt)
"""

import math
import zipfile
from configurator import UserError, one_line
from dataclasses import asdict
from pathlib import Path

import numpy
import torch

from model import GPT, GPTConfig
from support import nanogpt
from support.files import atomic_write

FORMAT = 1
KINDS = {  # what a file must have, and of which kind
    "model": dict,
    "tokenizer": dict,
    "train_config": dict,
    "dataset": dict,
    "step": int,
    "best_val_loss": float,
}
RESUMABLE = {"evaluated_step": int, "optimizers": list, "scaler": dict}  # ckpt.pt has these, too


def save_checkpoint(path: Path, model: GPT, **state) -> None:
    """Write `model` and `state` to `path`. An earlier file stays complete until it is replaced.

    Raises UserError if a weight is not finite or the disk does not take the file.
    """
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(
            f"{path}: not saved, the weights are not finite; the earlier file is unchanged: lower "
            "learning_rate or raise warmup_iters, and continue with --init_from=resume"
        )
    checkpoint = {
        "format": FORMAT,
        "versions": {"torch": str(torch.__version__), "numpy": numpy.__version__},
        "model_config": asdict(model.config),
        "model": model.state_dict(),
        **state,
    }
    with atomic_write(path, tensor_bytes(checkpoint)) as file:
        torch.save(checkpoint, file)


def load_checkpoint(path: Path) -> tuple[GPT, dict]:
    """Return the model, on the CPU, and the dict of the checkpoint at `path`. Raises UserError.

    A checkpoint of nanoGPT is converted.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; train first, or name a run with --out_dir")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify the checksums inside
            damaged = archive.testzip()
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file can raise anything in the two readers
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: can not be read as a checkpoint ({reason[:100]})") from error
    if damaged:
        raise UserError(f"{path}: damaged, a checksum inside is wrong; take another copy of it")
    try:
        if nanogpt.is_nanogpt(checkpoint):
            checkpoint = nanogpt.convert(checkpoint)
        elif not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
            raise UserError(f"not a checkpoint of this program (format {FORMAT}) or of nanoGPT")
        kinds = KINDS | (RESUMABLE if "optimizers" in checkpoint else {})
        for name, kind in kinds.items():
            value = checkpoint.get(name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise UserError(f"{name} is {str(value)[:50]!r}, not {kind.__name__}")
        if checkpoint["step"] < 0 or math.isnan(checkpoint["best_val_loss"]):
            raise UserError("step or best_val_loss is out of range")
        return build_model(checkpoint["model_config"], checkpoint["model"]), checkpoint
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # other contents than train.py or nanoGPT ever wrote
        raise UserError(f"{path}: not a valid checkpoint ({one_line(error)[:100]})") from error


def build_model(config: GPTConfig | dict, weights: dict) -> GPT:
    """Return a GPT with a float32 copy of `weights`, on the CPU.

    Names, shapes and values are checked before any memory is taken. Raises UserError.
    """
    try:
        config = GPTConfig(**config) if isinstance(config, dict) else config
        assert config.n_layer <= len(weights)
        with torch.device("meta"):  # tensors without memory
            model = GPT(config)
    except Exception as error:
        raise UserError(f"the weights do not fit the shape {config}") from error
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    found = {name: tuple(getattr(w, "shape", ())) for name, w in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{name} has shape {found.get(name)} where the model needs {expected.get(name)}"
            )
        if not weights[name].is_floating_point() or not weights[name].isfinite().all():
            raise UserError(f"{name} has values that are not finite floating-point numbers")
    model.load_state_dict(
        {n: w.to(torch.float32, copy=True) for n, w in weights.items()}, assign=True
    )
    if config.tie_weights:
        model.lm_head.weight = model.transformer.wte.weight
    return model


def load_optimizers(optimizers: list[torch.optim.Optimizer], saved: list[dict]) -> None:
    """Restore the optimizers' states, but keep this run's rates, weight decays and momenta.

    Raises UserError when the states do not belong to these optimizers.
    """
    keys = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}
    try:
        for o, state in zip(optimizers, (s["state"] for s in saved), strict=True):
            parameters = [p for group in o.param_groups for p in group["params"]]
            for i, values in state.items():
                assert values.keys() >= keys[type(o).__name__]
                assert all(v.shape in ((), parameters[i].shape) for v in values.values())
            assert len(state) in (0, len(parameters))
            o.load_state_dict({"state": state, "param_groups": o.state_dict()["param_groups"]})
    except Exception as error:
        raise UserError("the optimizer's state does not fit the model; start a new run") from error


def tensor_bytes(value) -> int:
    """Return the bytes of all tensors in nested dicts and lists; a shared tensor counts once."""
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
