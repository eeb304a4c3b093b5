"""Where a run starts: with new weights, with a pretrained GPT-2, or at its own checkpoint."""

from configurator import UserError
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import NamedTuple

from model import GPT, GPTConfig
from support.checkpoint import load_checkpoint, load_optimizers
from support.processes import Processes
from support.tokenizer import Tokenizer

OWN = ("scratch", "resume", "auto")  # any other init_from is the name of a pretrained GPT-2
SHAPE = [field.name for field in fields(GPTConfig) if field.name != "vocab_size"]  # also options
HARMLESS = {  # options that may change in a resumed run without changing what it computes
    *("out_dir", "init_from", "preflight", "eval_only", "eval_interval", "eval_iters"),
    *("always_save_checkpoint", "checkpoint_interval", "log_interval", "target_val_loss"),
    *("sample_interval", "sample_start", "sample_tokens", "tensorboard_log", "wandb_log"),
    *("wandb_project", "wandb_run_name", "max_iters", "device", "backend", "dollars_per_hour"),
}


class Start(NamedTuple):
    """What a run starts with."""

    config: object  # the options, with the shape of the model that was loaded
    model: GPT | None = None  # None: draw new weights
    tokenizer: Tokenizer | None = None  # of a pretrained model
    checkpoint: dict | None = None  # of the run to resume


def starting_point(config, processes: Processes) -> Start:
    """Load the model that config.init_from names, if any.

    A resumed run takes its shape from the checkpoint. An option with another value is refused,
    unless that is its default: then probably nobody gave the option. A pretrained model has its own
    shape whatever the options say, but the run may use a shorter context and its own dropout.
    """
    path, origin = Path(config.out_dir) / "ckpt.pt", config.init_from
    if origin == "resume" or (origin == "auto" and path.exists()):
        model, checkpoint = load_checkpoint(path)
        origin = checkpoint["train_config"].get("init_from", "scratch")
        for name in SHAPE if origin in OWN else ():
            here, there = getattr(config, name), getattr(model.config, name)
            default = type(config).__dataclass_fields__[name].default
            if name != "dropout" and here not in (default, there):
                refuse(path, name, there, here)
        if origin in OWN:
            config = replace(config, block_size=model.config.block_size)
        else:  # the next checkpoint names it, too
            config = replace(config, init_from=origin)
        return Start(in_shape_of(model, config), model, None, checkpoint)
    if origin in OWN:
        return Start(config)
    from support.hub import load_pretrained  # its downloads import requests, which takes a while

    model, tokenizer = processes.in_turn(lambda: load_pretrained(origin))
    return Start(in_shape_of(model, config), model, tokenizer)


def in_shape_of(model: GPT, config):
    """Return `config` with the model's shape, except for dropout and a shorter block_size."""
    shape = {name: getattr(model.config, name) for name in SHAPE if name != "dropout"}
    shape["block_size"] = min(config.block_size, model.config.block_size)
    return replace(config, **shape)


def model_config(config, vocab_size: int) -> GPTConfig:
    """Return the shape that the options give to a model of `vocab_size` tokens."""
    if 0 < config.pad_vocab_to < vocab_size:
        raise UserError(
            f"pad_vocab_to={config.pad_vocab_to} is below the {vocab_size} tokens of "
            f"data/{config.dataset}; raise it, or set it to 0"
        )
    return GPTConfig(vocab_size=vocab_size, **{name: getattr(config, name) for name in SHAPE})


def refuse(path: Path, name: str, there, here) -> None:
    """Raise the UserError about an option that contradicts the checkpoint."""
    raise UserError(
        f"{path} was made with {name}={there} and this run has {name}={here}; "
        "set it back to continue, or choose another out_dir for a new run"
    )


def restore(trainer, start: Start) -> list[str]:
    """Give a new trainer the weights of `start` and, of a checkpoint, the optimizers and the step.

    Returns lines for the user. Raises UserError where the checkpoint and the run contradict.
    """
    notes, config = [], trainer.config
    if start.checkpoint is not None:
        notes = resume(trainer, start.model, start.checkpoint)
    elif start.model is not None:
        if start.tokenizer.to_dict() != trainer.tokenizer.to_dict():
            raise UserError(
                f"data/{config.dataset} was not made with the tokenizer of init_from="
                f"{config.init_from}; prepare a data set with --tokenizer=gpt2 for OpenAI's models"
            )
        weights = start.model.state_dict()
        positions = weights["transformer.wpe.weight"]
        weights["transformer.wpe.weight"] = positions[: config.block_size]
        trainer.model.load_state_dict(weights)
    steps = sorted(set(trainer.processes.gather(str(trainer.start_step))))
    if len(steps) > 1:
        raise UserError(
            f"the processes start at different steps ({', '.join(steps)}); "
            f"out_dir={config.out_dir} must be a folder that all of them share"
        )
    return notes


def resume(trainer, model: GPT, checkpoint: dict) -> list[str]:
    """Give a new trainer the state of its checkpoint. Returns lines for the user."""
    config, before = trainer.config, checkpoint["train_config"]
    path = Path(config.out_dir) / "ckpt.pt"
    if "optimizers" not in checkpoint:
        raise UserError(f"{path} has no optimizer state, so it can be sampled from but not resumed")
    here = {"optimizer": config.optimizer} | trainer.data.meta["sha256"]
    there = {"optimizer": before.get("optimizer")} | checkpoint["dataset"]
    here, there = here | asdict(trainer.model.config), there | asdict(model.config)
    for name, value in here.items():
        if name != "dropout" and value != there.get(name, value):
            refuse(path, name, there[name], value)
    if checkpoint["step"] > config.max_iters:
        step = checkpoint["step"]
        raise UserError(f"{path} is at step {step}, after max_iters={config.max_iters}; raise it")
    trainer.model.load_state_dict(model.state_dict())
    try:
        load_optimizers(trainer.optimizers, checkpoint["optimizers"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if checkpoint["scaler"] and trainer.scaler.is_enabled():  # empty if dtype was not float16
        trainer.scaler.load_state_dict(checkpoint["scaler"])
    trainer.start_step, trainer.evaluated_step = checkpoint["step"], checkpoint["evaluated_step"]
    trainer.best_val_loss = checkpoint["best_val_loss"]
    decays_to_the_end = config.decay_lr and not config.lr_decay_iters
    harmless = HARMLESS - {"max_iters"} if decays_to_the_end else HARMLESS
    changes = [
        f"{name}: {before[name]} -> {value}"
        for name, value in asdict(config).items()
        if name in before and name not in harmless and before[name] != value
    ]
    note = f"changed since the checkpoint, so this is another run: {', '.join(changes)}"
    return [note] if changes else []
