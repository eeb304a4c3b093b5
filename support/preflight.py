"""Check data, model and machine before a long run, and estimate what the run costs.

    python train.py config/phase1_char.py --preflight

Each check takes the Trainer and returns whether the run is sound, and what it measured. Checks
leave the run's files as they were. On a GPU they need no more memory than the run itself.
"""

import math
import sys
from configurator import UserError
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from support import runtime
from support.checkpoint import load_checkpoint, tensor_bytes
from support.files import free_bytes
from support.start import OWN

# bfloat16 peaks (NVIDIA's data sheets, without sparsity), and the share that a good trainer reaches
GPUS, SHARE = {"A100": 312e12, "H100": 989e12}, 0.4


def begin(config):
    """Return the options for the checks, which never resume a run."""
    print(f"checking data/{config.dataset} ...", flush=True)
    return replace(config, init_from="scratch") if config.init_from in OWN else config


def run_checks(trainer) -> None:
    """Print a line per check and then the cost. Raises UserError if a check fails."""
    if trainer.processes.distributed:
        raise UserError("preflight=True needs a single process; run it without torchrun")
    if trainer.config.block_size < 2:
        raise UserError("preflight=True needs block_size=2 or more")
    failed = []
    trainer.model.eval()  # no dropout
    for name, check in CHECKS.items():
        if sys.stdout.isatty():
            print(f"...  {name}", end="\r", flush=True)  # the result replaces this line
        try:
            ok, measured = check(trainer)
        except UserError as error:
            ok, measured = False, str(error)
        print(f"{'ok  ' if ok else 'FAIL'} {name}: {measured}", flush=True)
        failed += [name] * (not ok)
    trainer.model.train()
    if failed:
        raise UserError(f"preflight: {' and '.join(failed)} failed; correct this before a long run")
    print(bill(trainer))


def first_tokens(trainer, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return a corner of the first batch and its targets: a few tokens need little memory."""
    x, y = trainer.micro_batch(step=0, micro=0)
    return x[:rows, :columns], y[:rows, :columns]


@torch.no_grad()
def initial_loss(trainer) -> tuple[bool, str]:
    """A new model guesses evenly: ln(V), and half the variance of the logits, n_embd * 0.02^2."""
    config, loss = trainer.model.config, trainer.model(*first_tokens(trainer, 16, 128))[1].item()
    even, spread = math.log(config.vocab_size), config.n_embd * 0.02**2 / 2
    is_new = trainer.config.init_from == "scratch"  # otherwise pretrained, and better
    ok = abs(loss / (even + spread) - 1) < 0.03 if is_new else loss < even
    return ok, f"{loss:.4f}; a new model has ln({config.vocab_size}) = {even:.4f} + {spread:.2f}"


def targets(trainer) -> tuple[bool, str]:
    """The target of a token is the next token. The token itself could simply be copied."""
    x, y = trainer.micro_batch(step=0, micro=0)
    right = (y[:, :-1] == x[:, 1:]).float().mean().item()
    return right == 1, f"{right:.0%} of the first batch's targets are the next token"


def gradients(trainer) -> tuple[bool, str]:
    """A parameter without a gradient is not connected to the loss."""
    trainer.model(*first_tokens(trainer, 1, 64))[1].backward()
    grads = {name: p.grad for name, p in trainer.model.named_parameters()}
    bad = [n for n, g in grads.items() if g is None or not (g.any() and g.isfinite().all())]
    trainer.model.zero_grad(set_to_none=True)
    names = f", but not {', '.join(bad[:3])}" if bad else ""
    return not bad, f"{len(grads) - len(bad)} of {len(grads)} parameters have one{names}"


@torch.no_grad()
def future_by_perturbation(trainer) -> tuple[bool, str]:
    """Changing a token must not change the logits of earlier tokens."""
    x, _ = first_tokens(trainer, 1, 64)
    t, changed = x.size(1) // 2, x.clone()
    changed[0, t:] = (x[0, t:] + 1) % trainer.model.config.vocab_size
    leak = (trainer.model(changed)[0][0, :t] - trainer.model(x)[0][0, :t]).abs().max().item()
    return leak < 1e-5, f"logits move by {leak:.1g} when later tokens change"


def future_by_gradient(trainer) -> tuple[bool, str]:
    """The gradient of a logit with respect to the embeddings of later tokens must be zero."""
    x, _ = first_tokens(trainer, 1, 64)
    t, embedded = x.size(1) // 2, []
    hook = trainer.model.transformer.drop.register_forward_hook(
        lambda _module, _inputs, output: embedded.append(output) or output.retain_grad()
    )
    trainer.model(x)[0][0, t].float().square().sum().backward()
    hook.remove()
    trainer.model.zero_grad(set_to_none=True)
    sizes = embedded[0].grad[0].abs().sum(dim=-1)  # (T,)
    later, earlier = sizes[t + 1 :].max().item(), sizes[: t + 1].min().item()
    measured = f"position {t} gets {later:.1g} from later tokens, {earlier:.1g} or more from others"
    return later == 0 and earlier > 0, measured


@torch.no_grad()
def positions(trainer) -> tuple[bool, str]:
    """Without positions, a row of equal tokens gives equal logits everywhere."""
    x, _ = first_tokens(trainer, 1, 64)
    logits = trainer.model(torch.full_like(x, x[0, 0].item()))[0][0]
    spread = (logits - logits[0]).abs().max().item()
    return spread > 1e-4, f"logits of equal tokens differ by {spread:.2g} between positions"


def overfit(trainer) -> tuple[bool, str]:
    """A model that can not learn a few tokens by heart can not learn at all."""
    model, (x, y) = trainer.model, first_tokens(trainer, 1, 32)
    # The copy is in the CPU's memory, so that a GPU needs no more than for a training step.
    before = {name: p.to("cpu", copy=True) for name, p in model.state_dict().items()}
    lr = min(3e-3, 0.3 / model.config.n_embd)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0, fused=True)
    n_updates, loss = 0, model(x, y)[1]
    while loss.item() >= 0.1 and n_updates < 200:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        n_updates, loss = n_updates + 1, model(x, y)[1]
    model.load_state_dict(before)
    return loss.item() < 0.1, f"loss {loss:.3f} on {x.numel()} tokens after {n_updates} updates"


def data_overlap(trainer) -> tuple[bool, str]:
    """Validation text that is also in the training text measures memory, not learning."""
    for tokens in (trainer.data.train, trainer.data.val):
        if len(tokens.open()) != len(tokens):
            return False, f"{tokens.path.name}: read {len(tokens.open()):,} of {len(tokens):,} ids"
    length, at_most = 64, 1 << 25  # 33 million tokens take seconds
    train, val = trainer.data.train.open()[:at_most], trainer.data.val.open()[:at_most]
    if len(val) < length:
        return True, f"val.bin has only {len(val)} tokens; not searched in train.bin"
    starts = np.unique(np.linspace(0, len(val) - length, 1000).astype(np.int64))
    wanted = np.unique(window_hashes(val, length)[starts])
    found = np.isin(wanted, window_hashes(train, length)).sum()
    measured = (
        f"{found} of {len(wanted)} passages of val.bin are in {len(train):,} tokens of train.bin"
    )
    return found <= 0.01 * len(wanted), measured


def window_hashes(tokens: np.ndarray, length: int) -> np.ndarray:
    """Return a hash, a polynomial modulo 2^64, of each window of `length` tokens: 1, 2, 4, ..."""
    hashes, size, factor = tokens.astype(np.uint64) + np.uint64(1), 1, 0x9E3779B97F4A7C15
    while size < length:
        hashes = hashes[:-size] + hashes[size:] * np.uint64(factor)
        size, factor = 2 * size, factor * factor % (1 << 64)
    return hashes


def text(trainer) -> tuple[bool, str]:
    """Batches that do not decode to text belong to another tokenizer. Look at them."""
    steps = (0, max(0, trainer.config.max_iters - 1))
    batches = [trainer.micro_batch(step, micro=0)[0][0].tolist() for step in steps]
    first, last = map(trainer.tokenizer.decode, batches)
    bad = [c for c in first + last if c == "\ufffd" or not (c.isprintable() or c.isspace())]
    measured = f"the first batch begins {first[:30]!r}, the last one {last[:30]!r}"
    return len(bad) <= 0.1 * len(first + last), measured


def checkpoint(trainer) -> tuple[bool, str]:
    """A checkpoint can be written to the run's folder and is read back equal."""
    path = trainer.out_dir / "preflight.pt"
    try:
        trainer.save(path.name, step=0)
        loaded = load_checkpoint(path)[1]["model"]
    finally:
        path.unlink(missing_ok=True)
    weights = trainer.model.state_dict()
    equal = all(torch.equal(p.cpu(), loaded[name]) for name, p in weights.items())
    # ckpt.pt has at most three times the weights, best.pt once; old files stay until new ones are
    # whole.
    needed, free = 8 * tensor_bytes(weights), free_bytes(trainer.out_dir)
    disk = f"the run needs {needed / 1e9:,.2f} GB of {free / 1e9:,.2f} GB free"
    return equal and needed < free, f"read back {'equal' if equal else 'DIFFERENT'}; {disk}"


@torch.no_grad()
def precision(trainer) -> tuple[bool, str]:
    """The run's dtype gives the same loss as float32."""
    batch = first_tokens(trainer, 16, 128)
    with runtime.autocast(trainer.device, trainer.dtype):
        loss = trainer.model(*batch)[1].item()
    full, dtype = trainer.model(*batch)[1].item(), runtime.dtype_name(trainer.dtype)
    return abs(loss - full) < 0.01 * full, f"loss {loss:.4f} in {dtype}, {full:.4f} in float32"


CHECKS = {
    "initial loss": initial_loss,
    "targets": targets,
    "gradients": gradients,
    "the future, by perturbation": future_by_perturbation,
    "the future, by gradient": future_by_gradient,
    "positions": positions,
    "one batch by heart": overfit,
    "data": data_overlap,
    "text": text,
    "checkpoint": checkpoint,
    "precision": precision,
}


def bill(trainer) -> str:
    """Return what the run costs: measured on this machine, and estimated for GPUS."""
    c, device, compiled = trainer.config, trainer.device, runtime.compile_model(trainer)
    print("measuring a few training steps ...", flush=True)

    def step(n: int) -> None:
        batches = [trainer.micro_batch(0, micro) for micro in trainer.micros[:n]]
        trainer.read(trainer.train_step(0, lr=0.0, batches=batches))

    once, twice = (runtime.median_seconds(lambda n=n: step(n), device) for n in (1, 2))
    seconds = once + (c.gradient_accumulation_steps - 1) * (twice - once)  # of a whole step
    speed, tokens = trainer.tokens_per_step / seconds, c.max_iters * trainer.tokens_per_step
    flops, n_params = trainer.model.flops_per_token(c.block_size), trainer.model.num_params()
    lines = [
        f"{n_params:,} parameters; {tokens:,} tokens in {c.max_iters:,} steps of "
        f"{trainer.tokens_per_step:,}: {c.max_iters / trainer.steps_per_epoch:.2f} epochs, "
        f"{tokens / n_params:.1f} tokens per parameter",
        f"{seconds:.3f} s per step, {speed:,.0f} tokens/s, {flops * speed / 1e9:,.0f} GFLOPS, "
        f"peak memory {runtime.peak_memory(device) / 1e9:,.2f} GB; {compiled}",
        f"{flops / 1e6:,.1f} million operations per token, {flops * tokens:.3g} in the whole run",
    ]
    rows = [("measured, without evaluations: this machine", 1, flops * speed)]
    for n, name in ((1, "A100"), (1, "H100"), (8, "H100")):
        rows.append((f"estimate, not measured: {n} x {name}", n, SHARE * GPUS[name]))
    for name, count, flops_per_second in rows:
        hours = flops * tokens / (count * flops_per_second) / 3600
        money = f", ${hours * count * c.dollars_per_hour:,.2f}" if c.dollars_per_hour else ""
        time = f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:,.1f} minutes"
        lines.append(f"{name}: {time}{money}")
    return "\n".join(lines + [f"warning: {w}" for w in warnings(trainer, compiled, once)])


def warnings(trainer, compiled: str, pass_seconds: float) -> list[str]:
    """Return what slows the run down. A forward and backward pass takes `pass_seconds`."""
    c, device, found = trainer.config, trainer.device, []
    if trainer.dtype == torch.float32 != runtime.resolve_dtype("auto", device):
        found.append("float32 is slower than this device's bfloat16; use --dtype=auto")
    if runtime.is_slow(trainer.dtype, device):
        found.append("bfloat16 is slower than float32 on this CPU; use --dtype=auto")
    if compiled.startswith("not compiled") and c.max_iters >= 1000:
        found.append(compiled)
    share = runtime.median_seconds(lambda: trainer.micro_batch(1, 0), device) / pass_seconds
    if share > 0.05:
        place = "in memory" if trainer.data.train.in_memory else "too large for the memory"
        found.append(f"batches take {share:.0%} of the time; train.bin is {place}")
    if device.type == "cuda":
        # Of a step's peak, only what is beyond weights and moments grows with the batch.
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        fixed, factor = torch.cuda.memory_allocated(device), 1
        room = (0.9 * free - fixed) / max(1, runtime.peak_memory(device) - fixed)
        while c.gradient_accumulation_steps % (2 * factor) == 0 and 2 * factor <= room:
            factor *= 2
        if factor > 1:
            passes = f"gradient_accumulation_steps={c.gradient_accumulation_steps // factor}"
            found.append(f"batch_size={factor * c.batch_size} and {passes} should be faster")
    return found
