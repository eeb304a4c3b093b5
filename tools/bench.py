"""Measure speed. Every answer is a table, a file of JSON lines and a picture.

    python -m tools.bench ladder        # a training step, made faster rung by rung
    python -m tools.bench loader        # ways to load a batch, beside what a GPU consumes
    python -m tools.bench throughput --config=config/phase1_char.py --nanogpt=../nanoGPT
    python -m tools.bench generate --nanogpt=../nanoGPT --transformers
    python -m tools.bench gpu           # everything to measure on a new GPU, in 8 minutes

Every measurement runs in a process of its own, so nothing that one leaves behind changes the next.
All sides are measured in turn, `rounds` times: a machine that slows down slows all of them. The
table shows medians. Without the data set of a run, --vocab_size measures on random tokens.
"""

import json
import math
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import model as gpt
from configurator import UserError, check_range, configure, one_line, read_options, run
from support import preflight, runtime
from support.data import Dataset, gather, random_offsets, write_dataset
from support.files import atomic_write
from support.nanogpt import build_original
from support.pictures import markdown_table, save_figure
from support.processes import Processes
from support.start import model_config
from support.tokenizer import CharTokenizer
from train import TrainConfig, Trainer, learning_rate

PHASE2, PHASE3, GPT2 = (f"config/{name}.py" for name in ("phase2_bpe", "phase3_gpt2", "gpt2_124m"))
RUNS = dict(ladder=PHASE2, loader=PHASE3, throughput=PHASE2, generate=GPT2, gpu=PHASE3)
TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=2, compile=False)
# Tokens per second that training phase 3 takes: estimated from the generated code, not measured.
CONSUMERS = {"one A100 (estimate)": 205_000, "one H100 (estimate)": 440_000}
PARTS = ["forward_us", "backward_us", "optimizer_us", "data_us"]  # microseconds per token


@dataclass(frozen=True)
class BenchConfig:
    """Measure speed: python -m tools.bench ladder, loader, throughput, generate or gpu."""

    # measurement
    what: Literal["ladder", "loader", "throughput", "generate", "gpu"] = "ladder"  # what to measure
    rounds: int = 3  # measurements of each side (gpu: one)
    seconds: float = 10.0  # a measurement starts no call after that
    nanogpt: str = ""  # folder of a copy of nanoGPT, to measure it too
    transformers: bool = False  # generate: measure transformers too
    new_tokens: int = 200  # generate: tokens to write
    to: str = "out/bench"  # folder for the results
    tiny: bool = False  # a tiny model, to try a benchmark quickly
    vocab_size: int = 0  # train on random token ids below this; 0: data set
    config: str | None = None  # config file of the run; None: see RUNS in bench.py
    # run (None: as in the config file)
    dataset: str | None = None  # folder under data/
    batch_size: int | None = None  # sequences in one forward pass
    optimizer: str | None = None  # adamw or muon
    device: str | None = None  # cpu, cuda, cuda:1, mps
    dtype: str | None = None  # float32, bfloat16, float16
    compile: bool | None = None  # torch.compile the model

    def __post_init__(self) -> None:
        check_range(self, 1, 1 << 20, "rounds", "new_tokens")
        check_range(self, 0, 1 << 16, "vocab_size", "seconds")


def read_run(config: BenchConfig, path: str, vocab_size: int, scratch: Path) -> TrainConfig:
    """Return the run of a config file with the changes of `config`, on random ids if vocab_size."""
    names = ("dataset", "batch_size", "optimizer", "device", "dtype", "compile")
    changes = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    changes = (TINY if config.tiny else {}) | changes | {"out_dir": scratch, "sample_interval": 0}
    if vocab_size:
        changes["dataset"] = folder = scratch.absolute() / f"random_{vocab_size}"
        tokenizer = CharTokenizer("".join(chr(1 << 16 | i) for i in range(vocab_size)))
        ids = np.random.default_rng(0).integers(vocab_size, size=500_000).tolist()
        write_dataset(folder, tokenizer, ids, ids[:50_000], 50_000, {"prepared by": "bench.py"})
    return read_options(TrainConfig, [path, *(f"--{k}={v}" for k, v in changes.items())])


# Ladder: one training step, from a naive one to ours


def plain_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Return attention, (..., T, hs), as formula 1 of Vaswani et al. 2017 is written."""
    T, hs = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) / math.sqrt(hs)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return F.dropout(scores.masked_fill(future, -math.inf).softmax(dim=-1), dropout) @ v


def head_by_head(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Return the same attention, (B, nh, T, hs), in a loop over the heads."""
    heads = zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True)
    return torch.stack([plain_attention(*head, dropout) for head in heads], dim=1)


def plain_gelu(x: Tensor, form: str = "tanh") -> Tensor:
    """Return the tanh form of GELU as the formula is written: eight passes over x."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class PlainAdamW(torch.optim.AdamW):
    """AdamW that updates one parameter after the other. It can not skip a step on the device."""

    def step(self) -> None:
        self.found_inf = None
        super().step()


NAIVE = dict(attention=head_by_head, gelu=plain_gelu, dtype="float32")
NAIVE |= dict(set_up=False, fused=False, compile=False)
RUNGS = {  # each one changes one thing; None: as in the run
    "naive": {},
    "all heads in one product": {"attention": plain_attention},
    "GELU in one kernel": {"gelu": gpt.gelu},
    "the dtype of the run instead of float32": {"dtype": None},
    "the attention of model.py": {"attention": gpt.attention},
    "freed memory kept for the next step": {"set_up": True},  # only on a CPU
    "AdamW in one kernel": {"fused": True},
    "torch.compile": {"compile": None},
}


def trainer_in(way: dict, options: TrainConfig) -> Trainer:
    """Return a Trainer that computes in this way. It changes model.py in this process for good."""
    gpt.attention, gpt.gelu = way["attention"], way["gelu"]
    changes = {name: way[name] for name in ("dtype", "compile") if way[name] is not None}
    trainer = make_trainer(replace(options, **changes), way["set_up"])
    if not way["fused"]:
        plain = {"fused": False, "foreach": False}
        groups = [group | plain for o in trainer.optimizers for group in o.param_groups]
        trainer.optimizers = [PlainAdamW(groups)]
    return trainer


def time_way(way: dict, options: TrainConfig, seconds: float) -> dict:
    """Time a training step whose batches are at hand."""
    trainer = trainer_in(way, options)
    batches = [trainer.micro_batch(0, micro) for micro in trainer.micros]
    step = partial(trainer.train_step, 0, options.learning_rate, batches=batches)
    return figures(time_call(step, trainer.device, seconds), trainer.tokens_per_step)


def ladder(config: BenchConfig, options: TrainConfig) -> tuple[dict, dict]:
    options = replace(options, optimizer="adamw")  # Muon computes something else: it is no rung
    sides, way = {}, NAIVE
    for name, change in RUNGS.items():
        way = way | change
        sides[name] = (time_way, way, options, config.seconds)
    title = "A training step, one change per rung (speed, and how often the naive speed)"
    return sides, dict(title=title, parts=["tokens_per_second"], note="speedup")


# Loader: ways to load a batch, from naive to ours


class Source:
    """The same token ids as text, as files of two dtypes, and in memory."""

    def __init__(self, options: TrainConfig, folder: Path) -> None:
        data = Dataset(Path("data") / options.dataset, options.block_size)
        self.T, self.tokenizer, self.tokens = options.block_size, data.tokenizer, data.train
        ids = np.array(data.train.open()[:2_000_000])
        self.text, self.n_tokens = self.tokenizer.decode(ids.tolist()), len(ids)
        ids.astype(np.int64).tofile(folder / "int64.bin")
        self.int64 = np.memmap(folder / "int64.bin", np.int64, mode="r")
        self.uint16 = np.memmap(data.train.path, "<u2", mode="r")
        self.pool, self.ahead = ThreadPoolExecutor(1), None


def tokenize(source: Source, offset: int) -> list[int]:
    """Return T + 1 ids of the text at about `offset`: 16 characters per token are enough."""
    start = int(offset / source.n_tokens * (len(source.text) - 16 * source.T))
    return source.tokenizer.encode(source.text[start : start + 16 * source.T])[: source.T + 1]


def prefetch(source: Source, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the batch of the call before, while a thread gathers the batch of this one."""
    start = partial(source.pool.submit, gather, source.tokens, offsets, source.T)
    ready, source.ahead = source.ahead or start(), start()
    return ready.result()


BY_ROW = {  # functions of a Source and one offset: T + 1 ids
    "text, tokenized in each step": tokenize,
    "int64, id by id in Python": lambda s, at: [int(s.int64[at + t]) for t in range(s.T + 1)],
    "int64, a slice per sequence": lambda s, at: s.int64[at : at + s.T + 1],
    "uint16, a slice per sequence": lambda s, at: s.uint16[at : at + s.T + 1],
}
OURS = "uint16, one gather (train.py)"
BY_BATCH = {  # functions of a Source and all offsets: x and y, (B, T) each
    OURS: lambda s, offsets: gather(s.tokens, offsets, s.T),
    "the same, a batch ahead in a thread": prefetch,
}


def load(name: str, source: Source, offsets: np.ndarray) -> list[Tensor]:
    """Return inputs and targets, (B, T) each, of the sequences at `offsets`."""
    if name in BY_BATCH:
        return [torch.from_numpy(ids) for ids in BY_BATCH[name](source, offsets)]
    rows = [BY_ROW[name](source, offset) for offset in offsets]
    windows = torch.from_numpy(np.array(rows, dtype=np.int64))
    return [windows[:, :-1], windows[:, 1:]]


def time_loader(name: str, options: TrainConfig, seconds: float) -> dict:
    """Time one way to bring the batch of a forward pass to the device."""
    device, sizes = runtime.resolve_device(options.device), (options.batch_size, options.block_size)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        source = Source(options, Path(folder))
        offsets = random_offsets(options.seed, 0, sizes[0], source.n_tokens, sizes[1])
        call = lambda: [ids.to(device) for ids in load(name, source, offsets)]  # noqa: E731
        return figures(time_call(call, device, seconds), math.prod(sizes))


def loader(config: BenchConfig, options: TrainConfig) -> tuple[dict, dict]:
    names = (*BY_ROW, *BY_BATCH)
    sides = {name: (time_loader, name, options, config.seconds) for name in names}
    title = "Loading alone, in tokens per second (and hours for the whole run)"
    return sides, dict(title=title, parts=["tokens_per_second"], note="hours", lines=CONSUMERS)


# Throughput: a training step and its parts, beside what the machine can compute


def time_step(options: TrainConfig, seconds: float) -> dict:
    """Time a training step and its parts."""
    trainer = make_trainer(options)
    device, (x, y), tokens = trainer.device, trainer.micro_batch(0, 0), trainer.tokens_per_step

    def forward() -> Tensor:
        with runtime.autocast(device, trainer.dtype):
            return trainer.step_model(x, y)[1]

    calls = (
        partial(trainer.train_step, 0, options.learning_rate),
        forward,
        lambda: forward().backward(),
        lambda: [optimizer.step() for optimizer in trainer.optimizers],
        partial(trainer.micro_batch, 0, 0),
    )
    step, once, both, update, data = (time_call(call, device, seconds) for call in calls)
    row = figures(step, tokens, trainer.model) | {"memory_gb": runtime.peak_memory(device) / 1e9}
    n = x.numel()
    per_token = (once / n, max(0, both - once) / n, update / tokens, data / n)
    return row | {name: 1e6 * t for name, t in zip(PARTS, per_token, strict=True)}


def time_nanogpt(folder: str, options: TrainConfig, seconds: float) -> dict:
    """Time a step of nanoGPT's model and optimizer; on a CPU in float32, as its README says."""
    trainer = make_trainer(replace(options, compile=False), set_up=False)  # for the batches
    device, on_gpu = trainer.device, trainer.device.type != "cpu"
    model = build_original(Path(folder), trainer.model.config).to(device)
    rates = (options.weight_decay, options.learning_rate, (options.beta1, options.beta2))
    optimizer = model.configure_optimizers(*rates, device.type)
    batches = [trainer.micro_batch(0, micro) for micro in trainer.micros]
    forward = torch.compile(model) if on_gpu else model

    def step() -> None:
        for x, y in batches:
            with runtime.autocast(device, trainer.dtype if on_gpu else torch.float32):
                loss = forward(x, y)[1] / len(batches)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), options.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return figures(time_call(step, device, seconds), trainer.tokens_per_step, trainer.model)


def time_product(dtype: str, device: torch.device, tiny: bool) -> dict:
    """Time the product of two large matrices: no training step computes faster."""
    runtime.set_up(device)  # on a GPU, float32 becomes TF32
    n = 64 if tiny else 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device, dtype=runtime.DTYPES[dtype])
    seconds = time_call(lambda: a @ b, device, 3)
    return {"ms": 1e3 * seconds, "gflops": 2 * n**3 / seconds / 1e9}


def throughput(config: BenchConfig, options: TrainConfig) -> tuple[dict, dict]:
    device, sides = (
        runtime.resolve_device(options.device),
        {"ours": (time_step, options, config.seconds)},
    )
    if config.nanogpt:
        sides["nanoGPT"] = (time_nanogpt, config.nanogpt, options, config.seconds)
    for dtype in ("bfloat16", "float32"):
        sides[f"{dtype} product"] = (time_product, dtype, device, config.tiny)
    return sides, dict(title="A training step and a matrix product", parts=["gflops"])


# Generation: ours, nanoGPT's and transformers'


def time_writing(side: str, dtype: str, B: int, config: BenchConfig, options: TrainConfig) -> dict:
    """Time the writing of new_tokens tokens in each of B sequences."""
    shape = model_config(replace(options, pad_vocab_to=0), config.vocab_size or 50_257)
    settings, n = {"max_new_tokens": config.new_tokens}, config.new_tokens
    if side == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel  # only the tests need this package

        names = ("vocab_size", "n_layer", "n_head", "n_embd")
        sizes = {name: getattr(shape, name) for name in names}
        model = GPT2LMHeadModel(GPT2Config(n_positions=shape.block_size, **sizes))
        settings |= dict(min_new_tokens=n, do_sample=True, top_k=0, pad_token_id=0)
    else:
        model = build_original(Path(config.nanogpt), shape) if side == "nanogpt" else gpt.GPT(shape)
    device = runtime.resolve_device(options.device)
    model = model.to(device, runtime.DTYPES[dtype]).eval()
    prompt = torch.zeros(B, 1, dtype=torch.int64, device=device)
    with torch.no_grad():
        seconds = time_call(
            lambda: list(model.generate(prompt, **settings)), device, config.seconds
        )
    return {"ms": 1e3 * seconds, "new_tokens_per_second": B * n / seconds}


def generate(config: BenchConfig, options: TrainConfig) -> tuple[dict, dict]:
    best = runtime.resolve_dtype(options.dtype, runtime.resolve_device(options.device))
    sides = {}
    for dtype in dict.fromkeys(("float32", runtime.dtype_name(best))):
        for side, B in (
            ("ours", 1),
            ("transformers", 1),
            ("nanogpt", 1),
            ("ours", 8),
            ("transformers", 8),
        ):
            if side == "ours" or getattr(config, side):
                sides[f"{side}, {dtype}, batch {B}"] = (
                    time_writing,
                    side,
                    dtype,
                    B,
                    config,
                    options,
                )
    return sides, dict(title="Generation", parts=["new_tokens_per_second"])


# A new GPU: the most important things first


def train_and_resume(options: TrainConfig, steps: int) -> dict:
    """Train and save. Compare the next step with the same step of a run resumed from there."""
    trainer, losses = make_trainer(options), []
    for step in range(steps):
        if step == steps // 10:  # the first steps are slower
            started = runtime.now(trainer.device)
        losses.append(trainer.train_step(step, learning_rate(step, options)))
    seconds = (runtime.now(trainer.device) - started) / (steps - steps // 10)
    first, last = (trainer.read(losses[i])[0] for i in (0, -1))
    trainer.save_state(steps)
    resumed = make_trainer(replace(options, init_from="resume"))
    for each in (trainer, resumed):
        each.train_step(steps, options.min_lr)
    pairs = zip(trainer.model.parameters(), resumed.model.parameters(), strict=True)
    difference = max((a - b).abs().max().item() for a, b in pairs)
    row = figures(seconds, trainer.tokens_per_step, trainer.model)
    row["result"] = f"loss {first:.2f} to {last:.2f}; saved in {trainer.save_seconds:.1f} s; "
    row["result"] += f"resumed: {f'differs by {difference:.1g}' if difference else 'same bits'}"
    return row


def gpu(config: BenchConfig, options: TrainConfig) -> tuple[dict, dict]:
    scratch, steps = Path(options.out_dir), 10 if config.tiny else 200
    phase3 = read_run(config, PHASE3, config.vocab_size or 32_000, scratch)
    gpt2 = read_run(config, GPT2, config.vocab_size or 50_257, scratch)
    has_data = (Path("data") / options.dataset / "meta.json").is_file()
    training = replace(options if has_data else phase3, gradient_accumulation_steps=2)
    training = replace(training, warmup_iters=steps // 10, lr_decay_iters=steps)
    one_pass = {"gradient_accumulation_steps": 1}

    sides = throughput(config, phase3)[0]
    del sides["ours"]
    for B in (16, 32, 64):
        sides[f"phase 3, batch {B}"] = (time_step, replace(phase3, batch_size=B, **one_pass), 2)
    for name, change in (("AdamW", {}), ("Muon", {"optimizer": "muon"})):
        sides[f"{steps} steps, {name}"] = (train_and_resume, replace(training, **change), steps)
    sides["loading, phase 3"] = (time_loader, OURS, training, 2)
    for B in (1, 8):
        sides[f"generation, batch {B}"] = (time_writing, "ours", "bfloat16", B, config, phase3)
    for B in (8, 16, 32):
        sides[f"GPT-2 124M, batch {B}"] = (time_step, replace(gpt2, batch_size=B, **one_pass), 2)
    exact = replace(training, deterministic=True)
    sides[f"{steps} steps, deterministic"] = (train_and_resume, exact, steps)
    return sides, dict(
        title="us per token (and tokens per second)", parts=PARTS, note="tokens_per_second"
    )


# What all of them use


def make_trainer(options: TrainConfig, set_up: bool = True) -> Trainer:
    processes = Processes(options.device)
    if set_up:
        runtime.set_up(processes.device, options.deterministic)
    trainer = Trainer(options, processes)
    runtime.compile_model(trainer)
    return trainer


def time_call(function: Callable, device: torch.device, seconds: float) -> float:
    """Return the median seconds of a call, after one that does not count."""
    function()
    return runtime.median_seconds(function, device, seconds)


def figures(seconds: float, tokens: int, model: gpt.GPT | None = None) -> dict:
    """Return the row of a measurement that takes `seconds` for `tokens` tokens."""
    row = {"ms": 1e3 * seconds, "tokens_per_second": tokens / seconds}
    if model is not None:
        row["gflops"] = model.flops_per_token(model.config.block_size) * tokens / seconds / 1e9
    return row


def in_child(function: Callable, *args) -> dict:
    """Return function(*args), called in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def measure(sides: dict[str, tuple], rounds: int, minutes: float = math.inf) -> list[dict]:
    """Call the function of each side, in turn, `rounds` times. Returns the row of median time.

    With `minutes`, a failure becomes a row, too, and no measurement starts after that time.
    """
    started, results = time.perf_counter(), {name: [] for name in sides}
    for i, (name, side) in itertools.product(range(rounds), sides.items()):
        print(f"round {i + 1} of {rounds}: {name} ...", flush=True)
        try:
            if time.perf_counter() - started > 60 * minutes:
                raise UserError(f"not measured: {minutes} minutes are over")
            results[name].append(in_child(*side))
        except Exception as error:  # such as too little memory
            if minutes == math.inf:
                raise
            results[name].append({"result": one_line(error)[:80]})
    middle = [
        sorted(rows, key=lambda row: row.get("ms", 0))[rounds // 2] for rows in results.values()
    ]
    return [{"what": name} | row for name, row in zip(sides, middle, strict=True)]


def compare(rows: list[dict], total: int) -> None:
    """Add hours for `total` tokens, the speed as a multiple of the first row's, shares of peaks."""
    peaks = {
        r["what"].split()[0]: r["gflops"] for r in rows if "product" in r["what"] and "gflops" in r
    }
    for row in rows:
        if "tokens_per_second" in row:
            row["hours"] = total / row["tokens_per_second"] / 3600
            if "tokens_per_second" in rows[0]:
                row["speedup"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        if "gflops" in row:
            row |= {f"of_{name}": row["gflops"] / peak for name, peak in peaks.items()}


def cell(key: str, value) -> str:
    """Return a figure as the table shows it."""
    if isinstance(value, str):
        return value
    if key.startswith("of_"):
        return f"{value:.0%}"
    return (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") + "x" * (key == "speedup")


def table(rows: list[dict]) -> str:
    """Return a Markdown table with a column for every key of the rows, "result" last."""
    keys = sorted(dict.fromkeys(key for row in rows for key in row), key="result".__eq__)
    cells = [[cell(key, row.get(key, "")) for key in keys] for row in rows]
    right = {i for i, key in enumerate(keys) if key not in ("what", "result")}
    return markdown_table([key.replace("_", " ") for key in keys], cells, right)


def draw_bars(
    rows: list[dict], title: str, parts: list[str], note: str = "", lines: dict | None = None
):
    """Return a figure: for each row that has `parts` a bar of them, with a note behind it.

    `lines` (label to value) cross the bars, on an axis of powers of ten.
    """
    from matplotlib.figure import Figure  # takes half a second

    rows = [row for row in rows if parts[0] in row]
    figure = Figure(figsize=(9, 1.6 + 0.34 * len(rows)), dpi=150, layout="constrained")
    axes, names, ends = figure.subplots(), [row["what"] for row in rows], np.zeros(len(rows))
    for part in parts:
        lengths = [row[part] for row in rows]
        axes.barh(names, lengths, left=ends, label=part.replace("_", " "))
        ends += lengths
    for name, end, row in zip(names, ends, rows, strict=True):
        behind = f" ({cell(note, row[note])}{' h' * (note == 'hours')})" if note else ""
        axes.annotate(f" {cell('', end)}{behind}", (end, name), va="center", fontsize=9)
    for i, (label, value) in enumerate((lines or {}).items()):
        axes.axvline(value, color=f"C{i + 1}", ls="--", label=label)
        axes.set_xscale("log")
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.legend(fontsize=8)
    axes.set_title(title)
    return figure


def describe(config: BenchConfig, options: TrainConfig) -> dict:
    """Return what the figures depend on."""
    device, info = runtime.resolve_device(options.device), Path("/proc/cpuinfo")
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif info.exists():
        name = re.search(r"model name\s*: (.+)|$", info.read_text(encoding="utf-8"))[1] or name
    names = (
        "batch_size",
        "gradient_accumulation_steps",
        "block_size",
        "n_layer",
        "n_head",
        "n_embd",
    )
    names += ("max_iters", "optimizer", "dtype")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m tools.bench {' '.join(sys.argv[1:])}",
        "machine": f"{name}, {psutil.cpu_count()} processors, {platform.system()}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "run": ", ".join(f"{name}={getattr(options, name)}" for name in names),
    }


def main(config: BenchConfig) -> None:
    benchmarks = (ladder, loader, throughput, generate, gpu)
    benchmark = {function.__name__: function for function in benchmarks}[config.what]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        path = config.config or RUNS[config.what]
        options = read_run(config, path, config.vocab_size, Path(scratch))
        about = describe(config, options)
        sides, chart = benchmark(config, options)
        rows = measure(sides, 1, 7) if config.what == "gpu" else measure(sides, config.rounds)
    total = (
        options.max_iters
        * options.gradient_accumulation_steps
        * options.batch_size
        * options.block_size
    )
    compare(rows, total)
    if config.what == "gpu":
        flops = gpt_flops
    to = Path(config.to) / config.what
    with atomic_write(to.with_suffix(".jsonl")) as file:
        file.writelines(json.dumps(record).encode() + b"\n" for record in (about, *rows))
    figure = draw_bars(rows, **chart)
    figure.supxlabel(f"{about['machine']}, {about['date']}", fontsize=7, color="0.4")
    save_figure(figure, to.with_suffix(".png"))
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    print(table(rows))
    print(f"{to}.jsonl and {to}.png have the results")


if __name__ == "__main__":
    run(main, configure(BenchConfig, [f"--what={a}" if a in RUNS else a for a in sys.argv[1:]]))
