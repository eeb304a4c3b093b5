"""Check data, model and machine before a long run, and estimate what the run costs.

    python -m tools.preflight config/phase3_gpt2.py --dollars_per_hour=2

The options are those of train.py and one more. No run is resumed, and no file is written. On a GPU
the checks need no more memory than the run itself.
"""

import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configurator import UserError, configure, run
from model import GPT
from support import runtime
from support.data import eval_parts, open_dataset
from support.files import file_sha256
from support.optimizers import make_optimizers
from support.processes import Processes
from support.start import OWN, find_start
from tools.bench import median_seconds
from train import TrainConfig, micro_batches

# Operations per second in bfloat16 (NVIDIA's data sheets, without sparsity)
PEAKS = {"A100": 312e12, "H100": 989e12}


@dataclass(frozen=True)
class PreflightConfig(TrainConfig):
    """Check data, model and machine before a run of train.py, and estimate what the run costs."""

    # preflight
    dollars_per_hour: float = 0.0  # price of one GPU or machine; 0: unknown


def check_data(tokens: list, sha256: dict, batches: list, decode: Callable) -> Iterator:
    """Yield a name, whether it is sound, and what was measured, for files and two batches."""
    # The target of a token is the next token. The token itself could simply be copied.
    (x, y), (last_x, _) = batches
    right = (y[:, :-1] == x[:, 1:]).float().mean().item()
    yield "targets", right == 1, f"{right:.0%} of the first batch's targets are the next token"

    # Batches that do not decode to text belong to another tokenizer. Look at them.
    first, last = decode(x[0].tolist()), decode(last_x[0].tolist())
    bad = [c for c in first + last if c == "\ufffd" or not (c.isprintable() or c.isspace())]
    measured = f"the first batch begins {first[:30]!r}, the last one {last[:30]!r}"
    yield "text", len(bad) <= 0.1 * len(first + last), measured

    # Validation text that is also in the training text measures memory, not learning. Python
    # searches strings fastest, so each token id becomes a character; 17 million take seconds.
    parts = [each.open()[: 1 << 24].astype("<u4").tobytes() for each in tokens]
    train, val = (part.decode("utf-32-le", "surrogatepass") for part in parts)
    starts = np.linspace(0, max(0, len(val) - 64), 200).astype(int)
    passages = {val[start : start + 64] for start in starts}
    found = sum(passage in train for passage in passages)
    measured = f"{found} of {len(passages)} passages of val.bin are in train.bin"
    yield "data", found <= 0.01 * len(passages), measured

    # A run compares only the sizes of the files, because checksums of large files take a while.
    paths = {each.path.name: each.path for each in tokens}
    changed = [name for name in sha256 if file_sha256(paths[name]) != sha256[name]]
    changed += [t.path.name for t in tokens if len(t.open()) != len(t)]  # read as another type
    yield "files", not changed, f"different from meta.json: {' and '.join(changed) or 'none'}"


def free_bytes(path: Path) -> int:
    """Return the free space, in bytes, of the disk where `path` is or will be."""
    existing = next((p for p in (path, *path.absolute().parents) if p.exists()), None)
    return shutil.disk_usage(existing).free if existing else 0  # Windows: a drive may not exist


def check_model(model: GPT, x: Tensor, y: Tensor, dtype: torch.dtype, out_dir: Path) -> Iterator:
    """Yield the same three for a model in eval mode, on a few tokens. Changes the weights."""
    # ckpt.pt has up to three times the weights, best.pt once; old files stay until new are whole.
    needed, free = 8 * sum(p.nbytes for p in model.parameters()), free_bytes(out_dir)
    measured = f"the run needs {needed / 1e9:,.2f} GB of {free / 1e9:,.2f} GB free"
    yield "disk", needed < free, measured

    # A new model guesses evenly: ln(V), and half the variance of the logits, n_embd * 0.02^2.
    V, loss = model.config.vocab_size, model(x, y)[1].item()
    even, spread = math.log(V), model.config.n_embd * 0.02**2 / 2
    measured = f"{loss:.4f}; a new model has ln({V}) = {even:.4f} + {spread:.2f}"
    yield "initial loss", loss < 1.03 * (even + spread), measured

    with runtime.autocast(x.device, dtype):
        low = model(x, y)[1].item()
    measured = f"loss {low:.4f} in {runtime.dtype_name(dtype)}, {loss:.4f} in float32"
    yield "precision", abs(low - loss) < 0.01 * loss, measured

    # A parameter without a gradient is not connected to the loss.
    model(x, y)[1].backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    bad = [n for n, g in grads.items() if g is None or not (g.any() and g.isfinite().all())]
    model.zero_grad()
    measured = f"{len(grads) - len(bad)} of {len(grads)} parameters have one"
    yield "gradients", not bad, measured + f", but not {', '.join(bad[:3])}" * bool(bad)

    # A token changes its own logits and all later ones, but no earlier ones.
    t, changed = x.size(1) // 2, x[:1].clone()
    changed[0, t] = (x[0, t] + 1) % V
    moved = (model(changed)[0] - model(x[:1])[0])[0].abs().amax(dim=1)  # (T,)
    earlier, later = moved[:t].sum().item(), moved[t:].min().item()
    measured = f"a token moves earlier logits by {earlier:.1g}, later ones by {later:.1g} or more"
    yield "the future", earlier < 1e-5 and later > 0, measured

    # Without positions, a row of equal tokens gives equal logits everywhere.
    logits = model(torch.full_like(x[:1], x[0, 0].item()))[0][0]
    spread = (logits - logits[0]).abs().max().item()
    yield "positions", spread > 1e-4, f"logits of equal tokens differ by {spread:.2g}"

    # A model that can not learn a few tokens by heart can not learn at all.
    x, y, rate = x[:1, :32], y[:1, :32], min(3e-3, 0.3 / model.config.n_embd)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0, fused=True)
    n_updates, loss = 0, model(x, y)[1]
    while loss.item() >= 0.1 and n_updates < 200:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        n_updates, loss = n_updates + 1, model(x, y)[1]
    measured = f"loss {loss:.3f} on {x.numel()} tokens after {n_updates} updates"
    yield "one batch by heart", loss.item() < 0.1, measured


def print_bill(config, model: GPT, draw: Callable, n_train: int, processes) -> None:
    """Print what the run costs and what slows it down. draw() returns a batch of n_train tokens."""
    n_passes, steps, T = config.gradient_accumulation_steps, config.max_iters, draw()[0].size(1)
    device = processes.device
    dtype, best = (runtime.resolve_dtype(name, device) for name in (config.dtype, "auto"))
    precision, optimizers = runtime.autocast(device, dtype), make_optimizers(model, config, best)
    step_model = runtime.compile_model(model, config, draw(), precision, processes)

    def forward_backward() -> None:
        with precision:
            loss = step_model(*draw())[1]
        loss.backward()

    print("measuring a few training steps ...", flush=True)
    calls = (draw, forward_backward, lambda: [optimizer.step() for optimizer in optimizers])
    drawing, one_pass, update = (median_seconds(call, device) for call in calls)
    flops, per_step = model.flops_per_token(T), n_passes * config.batch_size * T
    seconds = n_passes * one_pass + update
    speed, tokens, n_params = per_step / seconds, steps * per_step, model.num_params()
    with torch.no_grad(), precision:  # an evaluation, not compiled, may need more memory
        model.eval()(*draw())
    if device.type == "cuda":
        print(f"{torch.cuda.max_memory_allocated(device) / 1e9:,.2f} GB of the GPU's memory")
    print(
        f"{n_params:,} parameters; {tokens:,} tokens in {steps:,} steps of {per_step:,}: "
        f"{tokens / n_train:.2f} epochs, {tokens / n_params:.1f} tokens per parameter\n"
        f"{seconds:.3f} s per step, {speed:,.0f} tokens/s, {flops * speed / 1e9:,.0f} GFLOPS; "
        f"{flops * tokens:.3g} operations in the whole run"
    )
    machines = {"this machine, measured without evaluations": flops * speed}
    for name, peak in PEAKS.items():  # a good trainer of a large model reaches 40%
        machines[f"{name}, estimated at 40% of its peak"] = 0.4 * peak
    for name, flops_per_second in machines.items():
        seconds = math.ceil(flops * tokens / flops_per_second)
        money = seconds / 3600 * config.dollars_per_hour
        print(f"{name}: {timedelta(seconds=seconds)} hours" + f", ${money:,.2f}" * (money > 0))
    if dtype not in (best, torch.float16):
        print(f"warning: {runtime.dtype_name(best)} is faster on this device; use --dtype=auto")
    if drawing > 0.05 * one_pass:
        print(f"warning: batches take {drawing / one_pass:.0%} of the time")


def main(config: PreflightConfig) -> None:
    """Print a line per check and then the bill. Raises UserError if a check fails."""
    if os.environ.get("RANK"):  # train.py takes an empty one as none, too
        raise UserError("the preflight needs a single process; run it without torchrun")
    print(f"checking data/{config.dataset} ...", flush=True)
    if config.init_from in OWN:
        config = replace(config, init_from="scratch")  # never resume
    with runtime.explain_out_of_memory(config.batch_size, config.gradient_accumulation_steps):
        check_run(config, Processes(config.device))


def check_run(config: PreflightConfig, processes: Processes) -> None:
    """Start as train.py does, run the checks, and print the bill."""
    device, dtype = processes.device, runtime.resolve_dtype(config.dtype, processes.device)
    runtime.set_up(device, config.deterministic)
    meta, tokenizer, *tokens = open_dataset(Path("data") / config.dataset)
    state = find_start(config, meta, tokenizer, processes)
    eval_parts(*tokens, state.shape.block_size, 0)  # raises UserError if a file is too short
    tokenizer.encode(config.sample_start if config.sample_interval else "")
    torch.manual_seed(config.seed)
    model = GPT(state.shape).to(device).eval()  # without dropout
    if state.weights:
        model.load_state_dict(state.weights)

    def draw(step: int = 0) -> tuple[Tensor, Tensor]:
        return next(micro_batches(tokens[0], config, state.shape.block_size, device, [0], step))

    batches, failed = [draw(), draw(max(0, config.max_iters - 1))], []
    x, y = (ids[:16, :64] for ids in batches[0])  # few tokens need little memory
    data_checks = check_data(tokens, meta["sha256"], batches, tokenizer.decode)
    model_checks = check_model(model, x, y, dtype, Path(config.out_dir))
    for name, ok, measured in itertools.chain(data_checks, model_checks):
        print(f"{'ok  ' if ok else 'FAIL'} {name}: {measured}", flush=True)
        failed += [name] * (not ok)
    if failed:
        raise UserError(f"preflight: {' and '.join(failed)} failed; correct this before a long run")
    print_bill(config, model.train(), draw, len(tokens[0]), processes)


if __name__ == "__main__":
    run(main, configure(PreflightConfig))
