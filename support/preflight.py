"""The checks that a careful person makes before a long run, on the run's own options and data.

    python train.py config/phase1_char.py --preflight

Each check is a function of the Trainer that returns what it measured and whether that is right. All
of them leave the run's folder as it was.
"""

import copy
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from configurator import UserError
from support import runtime
from support.checkpoint import load_checkpoint, tensor_bytes
from support.files import free_bytes

Result = tuple[bool, str]
CHECKS: dict[str, Callable] = {}


def check(name: str) -> Callable:
    def register(function: Callable) -> Callable:
        CHECKS[name] = function
        return function

    return register


def run_checks(trainer) -> bool:
    """Print one line per check and, if all have passed, the bill. Returns whether they have."""
    if trainer.processes.distributed:
        raise UserError("preflight=True: run it without torchrun, in one process")
    passed = True
    for name, function in CHECKS.items():
        try:
            ok, measured = function(trainer)
        except UserError as error:
            ok, measured = False, str(error)
        passed = passed and ok
        print(f"{'ok  ' if ok else 'FAIL'} {name}: {measured}", flush=True)
    if passed:
        print(bill(trainer))
    return passed


def first_batch(trainer, most: int = 2048) -> tuple[Tensor, Tensor]:
    """The first sequences of the first batch: `most` tokens are enough, and quick in float32 too."""
    x, y = trainer.micro_batch(step=0, micro=0)
    n_sequences = max(1, most // x.size(1))
    return x[:n_sequences], y[:n_sequences]


def one_sequence(trainer, most: int) -> tuple[Tensor, Tensor]:
    """The beginning of the first sequence, (1, T) with T <= `most`: short, for checks that repeat it."""
    x, y = trainer.micro_batch(step=0, micro=0)
    return x[:1, :most], y[:1, :most]


@check("initial loss")
@torch.no_grad()
def initial_loss(trainer) -> Result:
    """A model that knows nothing guesses evenly, which costs ln(V); a pretrained one does better.

    The spread of the first logits, whose variance is n_embd * 0.02^2, costs half of that on top.
    """
    x, y = first_batch(trainer)
    config, loss = trainer.model.config, trainer.model(x, y)[1].item()
    even, spread = math.log(config.vocab_size), config.n_embd * 0.02**2 / 2
    ok = (
        loss < even
        if trainer.config.init_from != "scratch"
        else abs(loss / (even + spread) - 1) < 0.02
    )
    return (
        ok,
        f"{loss:.4f}, and ln({config.vocab_size}) = {even:.4f} with {spread:.2f} for the spread of the logits",
    )


@check("targets")
def targets(trainer) -> Result:
    """The target of a token is the token after it; one that was the token itself could be copied."""
    x, y = trainer.micro_batch(step=0, micro=0)
    right = (y[:, :-1] == x[:, 1:]).float().mean().item()
    return right == 1, f"{right:.0%} of the batch's targets are the token after theirs"


@check("gradients")
def gradients(trainer) -> Result:
    """A parameter without a gradient is not connected to the loss."""
    trainer.model(*first_batch(trainer))[1].backward()
    parameters = dict(trainer.model.named_parameters())
    without = [
        n
        for n, p in parameters.items()
        if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()
    ]
    trainer.model.zero_grad(set_to_none=True)
    if without:
        return False, f"{', '.join(without[:3])} and {max(0, len(without) - 3)} more have none"
    return True, f"all of {len(parameters)} parameters have one"


@check("the future, by perturbation")
@torch.no_grad()
def future_by_perturbation(trainer) -> Result:
    """Changing a token must not change the logits of those before it."""
    x, _ = one_sequence(trainer, 64)
    T, before, leaks = x.size(1), trainer.model.eval()(x)[0], []
    for t in {1, T // 2, T - 1}:
        changed = x.clone()
        changed[0, t:] = (x[0, t:] + 1) % trainer.model.config.vocab_size
        leaks.append((trainer.model(changed)[0][0, :t] - before[0, :t]).abs().max())
    trainer.model.train()
    leak = torch.stack(leaks).max().item()  # a NaN among them stays one
    return leak < 1e-5, f"logits move by {leak:.1g} when later tokens change"


@check("the future, by gradient")
def future_by_gradient(trainer) -> Result:
    """The gradient of a logit with respect to later tokens' embeddings must be zero."""
    x, _ = one_sequence(trainer, 64)
    t, embedded = x.size(1) // 2, []
    hook = trainer.model.transformer.drop.register_forward_hook(
        lambda _module, _inputs, output: embedded.append(output) or output.retain_grad()
    )
    trainer.model.eval()(x)[0][0, t].float().square().sum().backward()
    hook.remove()
    trainer.model.train()
    trainer.model.zero_grad(set_to_none=True)
    per_position = embedded[0].grad[0].abs().sum(dim=-1)
    later, earlier = per_position[t + 1 :].max().item(), per_position[: t + 1].min().item()
    return (
        later == 0 and earlier > 0,
        f"position {t} gets {later:.1g} from later tokens, {earlier:.1g} or more from others",
    )


@check("positions")
@torch.no_grad()
def positions(trainer) -> Result:
    """Without positions, a row of equal tokens gives equal logits everywhere."""
    x, _ = one_sequence(trainer, 64)
    logits = trainer.model.eval()(torch.full_like(x, x[0, 0].item()))[0][0]
    trainer.model.train()
    spread = (logits - logits[0]).abs().max().item()
    return spread > 1e-4, f"logits of equal tokens differ by {spread:.2g} between positions"


@check("one batch by heart")
def overfit(trainer) -> Result:
    """A model that can not learn a few tokens by heart can not learn at all."""
    model = copy.deepcopy(trainer.model).eval()  # without dropout
    x, y = one_sequence(trainer, 32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=min(3e-3, 0.3 / model.config.n_embd), weight_decay=0.0
    )
    updates, loss = 0, model(x, y)[1]
    while loss.item() >= 0.1 and updates < 200:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        updates, loss = updates + 1, model(x, y)[1]
    return (
        loss.item() < 0.1,
        f"loss {loss.item():.3f} on {x.numel()} tokens after {updates} updates",
    )


@check("data")
def data_overlap(trainer) -> Result:
    """Validation text that stands in the training text measures memory, not learning.

    (That all ids are within the vocabulary is checked whenever a data set is opened.)
    """
    for tokens in (trainer.data.train, trainer.data.val):
        if len(tokens.open()) != len(tokens):
            return (
                False,
                f"{tokens.path.name} has {len(tokens):,} ids, and {len(tokens.open()):,} are read from it",
            )
    length, most = 64, 1 << 25  # 33 million tokens take seconds
    train, val = trainer.data.train.open()[:most], trainer.data.val.open()[:most]
    if len(val) < length:
        return True, f"val.bin has {len(val)} tokens, too few to look for in train.bin"
    starts = np.unique(np.linspace(0, len(val) - length, 1000).astype(np.int64))
    wanted = np.unique(window_hashes(val, length)[starts])
    found = np.isin(wanted, window_hashes(train, length)).sum()
    return found <= 0.01 * len(wanted), (
        f"ids up to {train.max()} in a vocabulary of {trainer.data.meta['vocab_size']}; {found} of {len(wanted)} "
        f"passages of {length} tokens of val.bin are in the first {len(train):,} of train.bin"
    )


def window_hashes(tokens: np.ndarray, length: int) -> np.ndarray:
    """A hash of each window of `length` tokens, a power of two: a polynomial modulo 2^64, by doubling."""
    hashes, size, factor = tokens.astype(np.uint64) + np.uint64(1), 1, 0x9E3779B97F4A7C15
    while size < length:
        hashes = hashes[:-size] + hashes[size:] * np.uint64(factor)
        size, factor = 2 * size, factor * factor % (1 << 64)
    return hashes


@check("text")
def text(trainer) -> Result:
    """Batches that do not decode to text belong to another tokenizer. Look at them."""
    ends = []
    for step in (0, max(0, trainer.config.max_iters - 1)):
        ends.append(trainer.tokenizer.decode(trainer.micro_batch(step, micro=0)[0][0].tolist()))
    return all(
        map(readable, ends)
    ), f"the first batch begins {ends[0][:50]!r}, the last {ends[1][:50]!r}"


def readable(said: str) -> bool:
    """Nine of ten characters can be printed, and are not the mark of a byte that could not be decoded."""
    return sum(c != "\ufffd" and (c.isprintable() or c.isspace()) for c in said) >= 0.9 * len(said)


@check("checkpoint")
def checkpoint(trainer) -> Result:
    """A checkpoint is written to the run's folder, read back, compared and removed."""
    path = trainer.out_dir / "preflight.pt"
    try:
        started = time.perf_counter()
        trainer.save_weights(path.name, step=0)
        seconds = time.perf_counter() - started
        back = load_checkpoint(path)[1]["model"]
        size = path.stat().st_size
    finally:
        path.unlink(missing_ok=True)
    equal = all(torch.equal(p.cpu(), back[name]) for name, p in trainer.model.state_dict().items())
    # Weights, two moments in the optimizer, best.pt, and a ckpt.pt being written beside the old one.
    needed, free = 8 * tensor_bytes(trainer.model.state_dict()), free_bytes(trainer.out_dir)
    return equal and needed < free, (
        f"{size / 1e6:,.0f} MB of weights written in {seconds:.1f} s and read back {'' if equal else 'not '}equal; "
        f"the run needs {needed / 1e9:,.2f} GB of {free / 1e9:,.0f} GB free"
    )


@check("precision")
@torch.no_grad()
def precision(trainer) -> Result:
    """The dtype of the run gives the loss that float32 gives."""
    x, y = first_batch(trainer)
    model = trainer.model.eval()  # without dropout, which would differ
    full = model(x, y)[1].item()
    with runtime.autocast(trainer.device, trainer.dtype):
        used = model(x, y)[1].item()
    model.train()
    measured = f"loss {used:.4f} in {runtime.dtype_name(trainer.dtype)}, {full:.4f} in float32"
    return abs(used - full) < 0.01 * full, measured


def bill(trainer) -> str:
    """What the run will cost on this machine, from a few of its real steps."""
    c, n_micros = trainer.config, len(trainer.micros)
    compiled = trainer.prepare()
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    first = time_step(
        trainer, 1
    )  # the forward passes after the first cost the same, and the optimizer nothing more
    step_seconds = first + (n_micros - 1) * (time_step(trainer, 2) - first if n_micros > 1 else 0.0)
    n, tokens = trainer.model.num_params(), c.max_iters * trainer.tokens_per_step
    flops = trainer.model.flops_per_token(c.block_size)
    weights = tensor_bytes(trainer.model.state_dict())
    moments = tensor_bytes([o.state_dict() for o in trainer.optimizers])
    free = free_bytes(trainer.out_dir)
    # bfloat16 peaks without sparsity from NVIDIA's data sheets, of which a well-kept trainer reaches 40%.
    gpus = {
        name: 6 * n * tokens / (0.4 * peak) for name, peak in (("A100", 312e12), ("H100", 989e12))
    }
    lines = [
        f"{n:,} parameters, {tokens:,} tokens in {c.max_iters:,} steps of {trainer.tokens_per_step:,}: "
        f"{c.max_iters / trainer.steps_per_epoch:.2f} passes over the data, {tokens / n:.1f} tokens per parameter",
        f"{step_seconds:.3f} s a step, {trainer.tokens_per_step / step_seconds:,.0f} tokens/s, "
        f"{flops * trainer.tokens_per_step / step_seconds / 1e9:,.0f} GFLOPS; {compiled}",
        f"the whole run: {flops * tokens:.3g} floating-point operations, "
        f"{duration(c.max_iters * step_seconds)} without evaluations",
        f"peak memory {runtime.peak_memory(trainer.device) / 1e9:,.2f} GB; ckpt.pt takes "
        f"{(weights + moments) / 1e9:,.3f} GB, best.pt {weights / 1e9:,.3f} GB, of {free / 1e9:,.0f} GB free",
        "by estimate, not measured: "
        + ", ".join(f"{duration(seconds)} on one {name}" for name, seconds in gpus.items())
        + " (6 N operations per token at 40% of the bfloat16 peak)",
    ]
    lines += [f"warning: {warning}" for warning in warnings(trainer, compiled, first)]
    return "\n".join(lines)


def time_step(trainer, n_micros: int) -> float:
    """Seconds of a training step made of its first `n_micros` forward passes: the median of a few."""
    micros = trainer.micros
    try:
        trainer.micros = micros[:n_micros]
        return median_seconds(lambda: trainer.read(trainer.train_step(0, lr=0.0)), most=20)
    finally:
        trainer.micros = micros


def duration(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:,.1f} minutes"


def warnings(trainer, compiled: str, micro_seconds: float) -> list[str]:
    """What makes a run slow for no good reason. `micro_seconds` is the time of a step of one forward pass."""
    c, found = trainer.config, []
    if (
        trainer.dtype == torch.float32
        and runtime.resolve_dtype("auto", trainer.device) != torch.float32
    ):
        found.append("float32, where this device has bfloat16; --dtype=auto takes it")
    if compiled.startswith("not compiled") and c.max_iters >= 1000:
        found.append(compiled)
    reading = median_seconds(lambda: trainer.micro_batch(step=1, micro=0)) / micro_seconds
    if not trainer.data.train.in_memory:
        found.append(
            f"train.bin does not fit into memory; its batches come from the disk and take {reading:.0%} of the time"
        )
    elif reading > 0.05:
        found.append(
            f"batches take {reading:.0%} of the time, though train.bin is in memory; is the machine busy?"
        )
    gain = gain_of_larger_batch(trainer)
    if gain > 1.25:
        found.append(
            f"batch_size={c.batch_size} leaves the device idle: at {2 * c.batch_size} it computes {gain:.1f} times "
            f"as many tokens a second; halve gradient_accumulation_steps={c.gradient_accumulation_steps} for it"
        )
    return found


@torch.no_grad()
def gain_of_larger_batch(trainer) -> float:
    """Tokens per second of a forward pass with twice the batch, over those with the batch itself."""
    x, y = trainer.micro_batch(step=0, micro=0)
    with runtime.autocast(trainer.device, trainer.dtype):
        once, twice = (
            median_seconds(lambda n=n: trainer.model(x.repeat(n, 1), y.repeat(n, 1))[1].item())
            for n in (1, 2)
        )
    return 2 * once / twice


def median_seconds(function: Callable, most: float = 10) -> float:
    """The median time of five calls, or of those that begin before `most` seconds are over."""
    seconds = []
    while len(seconds) < 5 and sum(seconds) < most:
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[len(seconds) // 2]
