"""Where a run starts: with new weights, with those of another model, or at its own checkpoint."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path

from configurator import UserError
from model import GPTConfig
from support.checkpoint import Checkpoint, load_checkpoint
from support.files import lock_path
from support.hub import load_model
from support.processes import Processes
from support.tokenizer import Tokenizer

OWN = ("scratch", "resume", "auto")  # any other init_from names a pretrained GPT-2 or a run
SHAPE = [field.name for field in fields(GPTConfig) if field.name != "vocab_size"]


def shape_options(config) -> dict:
    """Return the options of train.py that make the shape of a model, from a run's or a model's."""
    return {name: getattr(config, name) for name in SHAPE}


def find_start(config, meta: dict, tokenizer: Tokenizer, processes: Processes) -> Checkpoint:
    """Return the state that a run starts with. If it has no weights, the run draws new ones.

    A resumed run takes its shape from the checkpoint. An option with another value is refused,
    unless that is its default: then probably nobody gave the option. A pretrained model has its own
    shape whatever the options say, but the run may use a shorter context and its own dropout.
    Raises UserError where config.init_from contradicts the other options.
    """
    path, origin = Path(config.out_dir) / "ckpt.pt", config.init_from
    if origin == "resume" or (origin == "auto" and path.exists()):
        before = load_checkpoint(path)
        check_resume(path, before, config, meta)
        shape = replace(before.shape, dropout=config.dropout)
        first_origin = before.train_config.get("init_from", "scratch")
        options = asdict(config) | shape_options(shape) | {"init_from": first_origin}
        state = replace(before, shape=shape, train_config=options)
    elif origin in OWN:
        if 0 < config.pad_vocab_to < tokenizer.vocab_size:
            few = f"pad_vocab_to={config.pad_vocab_to} is below the {tokenizer.vocab_size} tokens"
            raise UserError(f"{few} of data/{config.dataset}; raise it, or set it to 0")
        shape = GPTConfig(tokenizer.vocab_size, **shape_options(config))
        state = Checkpoint(shape, {}, tokenizer.to_dict(), asdict(config), meta["sha256"])
    else:
        model, its_tokenizer = load_model(origin)[:2]
        if its_tokenizer.to_dict() != tokenizer.to_dict():
            raise UserError(
                f"data/{config.dataset} was not made with the tokenizer of init_from={origin}; "
                "prepare the text again with --tokenizer=gpt2 for OpenAI's models, otherwise with "
                "the model's own: --tokenizer=ITS_FOLDER or --tokenizer=data/NAME/meta.json"
            )
        T, weights = min(config.block_size, model.config.block_size), model.state_dict()
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:T]
        shape = replace(model.config, block_size=T, dropout=config.dropout)
        options = asdict(config) | shape_options(shape)
        state = Checkpoint(shape, weights, tokenizer.to_dict(), options, meta["sha256"])
    steps = sorted(set(processes.gather(str(state.step))))
    if len(steps) > 1:
        raise UserError(
            f"the processes start at different steps ({', '.join(steps)}); "
            f"out_dir={config.out_dir} must be a folder that all of them share"
        )
    return state


def check_resume(path: Path, before: Checkpoint, config, meta: dict) -> None:
    """Raise UserError if a run with these options can not continue from the checkpoint."""
    if before.optimizers is None:
        raise UserError(f"{path} has no optimizer state, so it can be sampled from but not resumed")
    if before.step > config.max_iters and not config.eval_only:
        raise UserError(
            f"{path} is at step {before.step}, after max_iters={config.max_iters}; raise it"
        )
    here = {"optimizer": config.optimizer, "vocab_size": meta["vocab_size"], **meta["sha256"]}
    there = before.train_config | before.dataset | {"vocab_size": before.shape.vocab_size}
    for name in SHAPE if before.train_config.get("init_from", "scratch") in OWN else ():
        default = type(config).__dataclass_fields__[name].default
        if name != "dropout" and getattr(config, name) != default:
            here[name], there[name] = getattr(config, name), getattr(before.shape, name)
    for name, value in here.items():
        if there.get(name, value) != value:
            raise UserError(
                f"{path} was made with {name}={there[name]} and this run has {name}={value}; "
                "set it back to continue, or choose another out_dir for a new run"
            )


@contextmanager
def lock_run(config, processes: Processes) -> Iterator[None]:
    """Keep other runs out of out_dir inside the block, unless this run only evaluates.

    Enter it before the checkpoint is read, because another run may still be saving one. Waits up to
    a minute under torchrun: a worker of the attempt before may still be ending. Raises UserError.
    """
    seconds = 60 if processes.distributed else 0
    locks = processes.is_first and not config.eval_only
    with lock_path(Path(config.out_dir), seconds) if locks else nullcontext():
        processes.gather("claimed")  # the others wait for the first
        yield


def make_run_folder(out_dir: Path) -> None:
    """Make the folder of a new run. An earlier run there is renamed to NAME.1, NAME.2, ..."""
    folder = out_dir.resolve()
    if any((folder / name).exists() for name in ("ckpt.pt", "best.pt")):
        if Path.cwd().is_relative_to(folder) or any(folder.glob("*/log.jsonl")):
            raise UserError(
                f"out_dir={out_dir} has an earlier run, and contains other runs or the folder that "
                "you are in; choose another, as in --out_dir=out/mine"
            )
        numbered = (folder.with_name(f"{folder.name}.{n}") for n in itertools.count(1))
        aside = next(path for path in numbered if not path.exists())
        folder.rename(aside)
        print(f"the earlier run is now in {aside}; to continue a run, use --init_from=resume")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("log.jsonl", "wandb_id.txt"):  # of a run that saved nothing
        (folder / name).unlink(missing_ok=True)
