"""Measure speed. Every answer is a table, a file of JSON lines and a picture.

    python -m tools.bench ladder        # a training step, made faster rung by rung
    python -m tools.bench loader        # ways to load a batch, beside what a GPU consumes
    python -m tools.bench throughput --config=config/phase1_char.py --nanogpt=../nanoGPT
    python -m tools.bench generate --nanogpt=../nanoGPT --transformers
    python -m tools.bench gpu           # everything to measure on a new GPU, in 8 minutes

Every measurement runs in its own process, so none changes the next. All sides are measured in turn,
`rounds` times, so that a machine that slows down slows all of them. The table shows medians.
"""

import itertools
import json
import math
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from configurator import UserError, check_range, configure, one_line, read_options, run
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import model as gpt
from support import preflight, runtime
from support.data import Dataset, gather, random_offsets, write_dataset
from support.files import atomic_write
from support.nanogpt import build_original
from support.pictures import markdown_table, save_figure
from support.processes import Processes
from support.runtime import median_seconds, resolve_device
from support.start import model_config
from support.tokenizer import CharTokenizer
from train import TrainConfig, Trainer, learning_rate

PHASE2, PHASE3, GPT2 = (f"config/{name}.py" for name in ("phase2_bpe", "phase3_gpt2", "gpt2_124m"))
RUNS = dict(ladder=PHASE2, loader=PHASE3, throughput=PHASE2, generate=GPT2, gpu=PHASE3)
TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=2, compile=False)
# Tokens per second that training phase 3 takes: estimated from the generated code, not measured.
CONSUMERS = {"an A100 trains phase 3 (estimate)": 205_000, "an H100 (estimate)": 440_000}
PARTS = ["forward_us", "backward_us", "optimizer_us", "data_us"]  # microseconds per token


@dataclass(frozen=True)
class BenchConfig:
    """Measure speed: python -m tools.bench ladder, loader, throughput, generate or gpu."""

    what: Literal["ladder", "loader", "throughput", "generate", "gpu"] = "ladder"  # what to measure
    rounds: int = 3  # measurements of each side (gpu: one)
    seconds: float = 10.0  # stop repeating a measurement after this many seconds
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
        check_range(self, 0, 1 << 16, "vocab_size")
        check_range(self, 0.001, 3600, "seconds")


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
    """AdamW that never skips a step: only the fused form obeys the found_inf of train_step."""

    def step(self) -> None:
        self.found_inf = None
        super().step()


FAST = dict(attention=gpt.attention, gelu=gpt.gelu, set_up=True, fused=True)
NAIVE = dict(attention=head_by_head, gelu=plain_gelu, set_up=False, fused=False)
RUNGS = {  # what each rung changes
    "naive": NAIVE | dict(dtype="float32", compile=False),
    "all heads at once": dict(attention=plain_attention),
    "GELU in one kernel": dict(gelu=gpt.gelu),
    "bfloat16 instead of float32": dict(dtype=None),  # where the device has it
    "the attention of model.py": dict(attention=gpt.attention),
    "freed memory kept for the next step": dict(set_up=True),  # on a CPU
    "AdamW in one kernel": dict(fused=True),
    "torch.compile": dict(compile=None),
}


def ladder(config: BenchConfig, options: TrainConfig) -> tuple[dict, tuple]:
    options = replace(options, optimizer="adamw")  # Muon computes something else: it is no rung
    sides, way = {}, {}
    for name, change in RUNGS.items():
        way = way | change
        sides[name] = (time_step, partial(make_trainer, options, **way), config.seconds)
    return sides, ("A training step, one change per rung: us per token", PARTS, "speedup")


# Loader: ways to load a batch, from naive to ours
class Source:
    """The same token ids as text, as files of two dtypes, and in memory."""

    def __init__(self, options: TrainConfig, folder: Path) -> None:
        data = Dataset(Path("data") / options.dataset, options.block_size)
        self.T, self.tokenizer, self.tokens = options.block_size, data.tokenizer, data.train
        ids = np.array(data.train.open()[:2_000_000])
        self.text = self.tokenizer.decode(ids.tolist())
        ids.astype(np.int64).tofile(folder / "int64.bin")
        self.int64 = np.memmap(folder / "int64.bin", np.int64, mode="r")
        self.uint16 = np.memmap(data.train.path, "<u2", mode="r")
        self.pool, self.ahead = ThreadPoolExecutor(1), None


def tokenize(source: Source, offset: int) -> list[int]:
    """Return T + 1 ids of the text at about `offset`: 16 characters per token are enough."""
    start = int(offset / len(source.int64) * (len(source.text) - 16 * source.T))
    return source.tokenizer.encode(source.text[start : start + 16 * source.T])[: source.T + 1]


def prefetch(source: Source, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the batch of the call before, while a thread gathers the batch of this one."""
    start = partial(source.pool.submit, gather, source.tokens, offsets, source.T)
    ready, source.ahead = source.ahead or start(), start()
    return ready.result()


OURS = "uint16, one gather (train.py)"
LOADERS = {  # functions of a Source and offsets, (B,): a list of ids, (B, T + 1), or x and y
    "text, tokenized in each step": lambda s, o: [[tokenize(s, i) for i in o]],
    "int64, id by id": lambda s, o: [[[int(s.int64[i + t]) for t in range(s.T + 1)] for i in o]],
    "int64, a slice per sequence": lambda s, o: [[s.int64[i : i + s.T + 1] for i in o]],
    "uint16, a slice per sequence": lambda s, o: [[s.uint16[i : i + s.T + 1] for i in o]],
    OURS: lambda s, o: gather(s.tokens, o, s.T),
    "the same, a batch ahead in a thread": prefetch,
}


def load(name: str, source: Source, offsets: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(np.asarray(ids, np.int64)) for ids in LOADERS[name](source, offsets)]


def time_loader(name: str, options: TrainConfig, seconds: float) -> dict:
    """Time one of LOADERS, until the batch of a forward pass is on the device."""
    device, B, T = resolve_device(options.device), options.batch_size, options.block_size
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        source = Source(options, Path(folder))
        draws = [random_offsets(options.seed, i, B, len(source.int64), T) for i in range(9)]
        batches = (load(name, source, offsets) for offsets in itertools.cycle(draws))
        seconds = median_seconds(lambda: [ids.to(device) for ids in next(batches)], device, seconds)
    return {"ms": 1e3 * seconds, "tokens_per_second": B * T / seconds}


def loader(config: BenchConfig, options: TrainConfig) -> tuple[dict, tuple]:
    sides = {name: (time_loader, name, options, config.seconds) for name in LOADERS}
    title = "Loading alone: tokens per second, and hours for all tokens of the run"
    return sides, (title, ["tokens_per_second"], "hours")


# Throughput: a training step, beside what the machine can compute
def time_step(make: Callable[[], Trainer], seconds: float) -> dict:
    """Time a training step of the Trainer that make() returns, and the parts of the step."""
    trainer = make()
    device, (x, y), tokens = trainer.device, trainer.micro_batch(0, 0), trainer.tokens_per_step

    def forward() -> Tensor:
        with runtime.autocast(device, trainer.dtype):
            return trainer.step_model(x, y)[1]

    calls = [partial(trainer.train_step, 0, trainer.config.learning_rate), forward]
    calls += [lambda: forward().backward(), lambda: [o.step() for o in trainer.optimizers]]
    calls.append(partial(trainer.micro_batch, 0, 0))
    step, once, both, update, data = (median_seconds(call, device, seconds) for call in calls)
    parts = (once / x.numel(), max(0, both - once) / x.numel(), update / tokens, data / x.numel())
    gflops = trainer.model.flops_per_token(x.size(1)) * tokens / step / 1e9
    row = {"ms": 1e3 * step, "tokens_per_second": tokens / step, "gflops": gflops}
    row["memory_gb"] = runtime.peak_memory(device) / 1e9
    return row | {name: 1e6 * t for name, t in zip(PARTS, parts, strict=True)}


def make_nanogpt(options: TrainConfig, folder: str) -> Trainer:
    """Return a Trainer of nanoGPT's model and optimizer; on a CPU as its README says: float32."""
    on_cpu = resolve_device(options.device).type == "cpu"
    way = dict(dtype="float32", set_up=False) if on_cpu else {}
    trainer = make_trainer(options, **way, compile=False)
    model = build_original(Path(folder), trainer.model.config).to(trainer.device)
    model.flops_per_token = trainer.model.flops_per_token
    rates = (options.weight_decay, options.learning_rate, (options.beta1, options.beta2))
    groups = model.configure_optimizers(*rates, trainer.device.type).param_groups
    groups = [group | {"initial_lr": options.learning_rate} for group in groups]
    trainer.model, trainer.optimizers = model, [PlainAdamW(groups)]
    trainer.step_model = model if on_cpu else torch.compile(model)
    return trainer


def time_product(dtype: str, device: torch.device, tiny: bool) -> dict:
    """Time the product of two large matrices: no training step computes faster."""
    runtime.set_up(device)
    n = 64 if tiny else 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device, dtype=runtime.DTYPES[dtype])
    seconds = median_seconds(lambda: a @ b, device)
    return {"ms": 1e3 * seconds, "gflops": 2 * n**3 / seconds / 1e9}


def throughput(config: BenchConfig, options: TrainConfig) -> tuple[dict, tuple]:
    device, makers = resolve_device(options.device), {"ours": partial(make_trainer, options)}
    if config.nanogpt:
        makers["nanoGPT"] = partial(make_nanogpt, options, config.nanogpt)
    sides = {name: (time_step, make, config.seconds) for name, make in makers.items()}
    for dtype in ("bfloat16", "float32"):  # on a GPU, float32 is computed as TF32
        if not runtime.is_slow(runtime.DTYPES[dtype], device):  # in software it takes minutes
            sides[f"{dtype} product"] = (time_product, dtype, device, config.tiny)
    return sides, ("GFLOPS of a training step and of a matrix product", ["gflops"], "gflops")


# Generation, with a cache of keys and values
def time_writing(side: str, dtype: str, B: int, config: BenchConfig, options: TrainConfig) -> dict:
    """Time the writing of new_tokens tokens in each of B sequences."""
    c = model_config(replace(options, pad_vocab_to=0), config.vocab_size or 50_257)
    n, device, settings = config.new_tokens, resolve_device(options.device), {}
    if side == "transformers":
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ImportError:
            raise UserError(
                "transformers is missing; run: pip install -r tests/requirements.txt"
            ) from None
        if n > c.block_size:
            raise UserError(f"new_tokens={n}: transformers writes at most {c.block_size}")

        shape = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, vocab_size=c.vocab_size)
        model = GPT2LMHeadModel(GPT2Config(n_positions=c.block_size, **shape))
        settings = dict(min_new_tokens=n, do_sample=True, top_k=0, pad_token_id=0)
    else:
        model = gpt.GPT(c) if side == "ours" else build_original(Path(config.nanogpt), c)
    model = model.to(device, runtime.DTYPES[dtype]).eval()
    if side == "ours":
        runtime.pack_weights(model)
    prompt = torch.zeros(B, 1, dtype=torch.int64, device=device)
    write = partial(model.generate, prompt, max_new_tokens=n, **settings)  # turns gradients off
    seconds = median_seconds(lambda: list(write()), device, config.seconds)
    return {"ms": 1e3 * seconds, "new_tokens_per_second": B * n / seconds}


def generate(config: BenchConfig, options: TrainConfig) -> tuple[dict, tuple]:
    best = runtime.resolve_dtype(options.dtype, resolve_device(options.device))
    dtypes = dict.fromkeys(("float32", runtime.dtype_name(best)))
    names = [n for n in ("ours", "transformers", "nanogpt") if n == "ours" or getattr(config, n)]
    sides = {}
    for dtype, B, name in itertools.product(dtypes, (1, 8), names):
        sides[f"{name}, {dtype}, batch {B}"] = (time_writing, name, dtype, B, config, options)
    return sides, ("Tokens per second written", ["new_tokens_per_second"], "new_tokens_per_second")


# GPU: all of the above on a new GPU, and a short training
def train_and_resume(options: TrainConfig, steps: int) -> dict:
    """Train and save. Then compare a step with the same step of a run that resumed there."""
    trainer = make_trainer(replace(options, log_interval=steps))  # to explain a NaN at the end
    started = runtime.now(trainer.device)
    done = [trainer.train_step(step, learning_rate(step, options)) for step in range(steps)]
    seconds = (runtime.now(trainer.device) - started) / steps
    first, last = (trainer.read(done[i])[0] for i in (0, -1))
    trainer.save_state(steps)
    resumed = make_trainer(replace(options, init_from="resume"))
    for each in (trainer, resumed):
        each.train_step(steps, options.min_lr)
    pairs = zip(trainer.model.parameters(), resumed.model.parameters(), strict=True)
    difference = max((a - b).abs().max().item() for a, b in pairs)
    same = f"differs by {difference:.1g}" if difference else "has the same bits"
    result = f"loss {first:.2f} to {last:.2f}; saved in {trainer.save_seconds:.1f} s"
    row = {"ms": 1e3 * seconds, "tokens_per_second": trainer.tokens_per_step / seconds}
    return row | {"result": f"{result}; a resumed step {same}"}


def gpu(config: BenchConfig, options: TrainConfig) -> tuple[dict, tuple]:
    scratch, steps = Path(options.out_dir), 10 if config.tiny else 200
    phase3 = read_run(config, PHASE3, config.vocab_size or 32_000, scratch)
    gpt2 = read_run(config, GPT2, config.vocab_size or 50_257, scratch)
    has_data = (Path("data") / options.dataset / "meta.json").is_file()
    training = replace(options if has_data else phase3, gradient_accumulation_steps=2)
    training = replace(training, warmup_iters=steps // 10, lr_decay_iters=steps)
    sides = throughput(replace(config, nanogpt=""), phase3)[0]
    del sides["ours"]
    for name in ("adamw", "muon"):
        each = replace(training, optimizer=name)
        sides[f"{steps} steps, {name}"] = (train_and_resume, each, steps)
    sides["loading"] = (time_loader, OURS, training, 2)
    for B in (1, 8):
        sides[f"generation, batch {B}"] = (time_writing, "ours", "bfloat16", B, config, phase3)
    runs = {"phase 3": phase3, "GPT-2 124M": gpt2}.items()
    for (name, each), B in itertools.product(runs, (8, 16, 32)):
        one_pass = replace(each, batch_size=B, gradient_accumulation_steps=1)
        sides[f"{name}, batch {B}"] = (time_step, partial(make_trainer, one_pass), 2)
    return sides, ("us per token, and tokens per second", PARTS, "tokens_per_second")


# What all of them use
def make_trainer(options: TrainConfig, **way) -> Trainer:
    """Return a Trainer that computes as `way` says, compiled if the options ask for it.

    It replaces functions of model.py for the rest of the process.
    """
    way = FAST | way
    gpt.attention, gpt.gelu = way["attention"], way["gelu"]
    changes = {name: way[name] for name in ("dtype", "compile") if way.get(name) is not None}
    if way["set_up"]:
        runtime.set_up(resolve_device(options.device), options.deterministic)
    trainer = Trainer(replace(options, **changes), Processes(options.device))
    runtime.compile_model(trainer)
    if not way["fused"]:
        plain = {"fused": False, "foreach": False}
        groups = [group | plain for o in trainer.optimizers for group in o.param_groups]
        trainer.optimizers = [PlainAdamW(groups)]
    return trainer


def in_child(function: Callable, *args) -> dict:
    """Return function(*args), called in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def measure(sides: dict[str, tuple], rounds: int, minutes: float = math.inf) -> list[dict]:
    """Call the function of each side, in turn, `rounds` times. Returns the rows of median time."""
    end, results = time.perf_counter() + 60 * minutes, {name: [] for name in sides}
    for name, side in list(sides.items()) * rounds:
        print(f"measuring {name} ...", flush=True)
        try:
            if time.perf_counter() > end:
                raise UserError(f"not started, {minutes} minutes are over")
            results[name].append(in_child(*side))
        except Exception as error:  # such as too little memory: with `minutes`, measure the rest
            if minutes == math.inf:
                raise
            results[name].append({"result": f"failed: {one_line(error)[:80]}"})
        results[name].sort(key=lambda row: row.get("ms", 0))
    return [{"what": name} | rows[rounds // 2] for name, rows in results.items()]


def draw_bars(title: str, rows: list[dict], parts: list[str], note: str):
    """Return a figure with a bar of stacked `parts` for each row, and a note behind it."""
    from matplotlib.figure import Figure  # takes half a second

    figure = Figure(figsize=(9, 1.6 + 0.34 * len(rows)), dpi=150, layout="constrained")
    axes, names, ends = figure.subplots(), [row["what"] for row in rows], np.zeros(len(rows))
    for part in parts:
        axes.barh(names, [row[part] for row in rows], left=ends, label=part.replace("_", " "))
        ends = ends + [row[part] for row in rows]
    for row, end in zip(rows, ends, strict=True):
        axes.annotate(f" {cell(note, row[note])}", (end, row["what"]), va="center", fontsize=9)
    for i, (label, value) in enumerate(CONSUMERS.items() if note == "hours" else ()):
        axes.axvline(value, color=f"C{i + 1}", ls="--", label=label)
        axes.set_xscale("log")
    axes.invert_yaxis()  # the first row at the top
    # space for the notes
    axes.set_xlim(right=max(ends, default=1) * (20 if note == "hours" else 1.25))
    axes.set_title(title)
    axes.legend(fontsize=8)
    return figure


def cell(key: str, value: str | float) -> str:
    """Return a figure as the table shows it."""
    if isinstance(value, str):
        return value
    if key.startswith("of_"):
        return f"{value:.0%}"
    unit = {"speedup": "x", "hours": " h"}.get(key, "")
    return (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") + unit


@runtime.explain_out_of_memory()
def main(config: BenchConfig) -> None:
    benchmark = {f.__name__: f for f in (ladder, loader, throughput, generate, gpu)}[config.what]
    path = config.config or RUNS[config.what]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        options = read_run(config, path, config.vocab_size, Path(scratch))
        sides, (title, parts, note) = benchmark(config, options)
        rows = measure(sides, 1, 7) if config.what == "gpu" else measure(sides, config.rounds)
    shape = (options.gradient_accumulation_steps, options.batch_size, options.block_size)
    total, first = options.max_iters * math.prod(shape), rows[0].get("tokens_per_second")
    peaks = {r["what"]: r["gflops"] for r in rows if "gflops" in r and "tokens_per_second" not in r}
    for row in rows:
        if speed := row.get("tokens_per_second"):
            row["hours"] = total / speed / 3600
            row |= {"speedup": speed / first} if first else {}
        if "gflops" in row:
            row |= {f"of_{name.split()[0]}": row["gflops"] / peaks[name] for name in peaks}
    step = next((row for row in rows if "gflops" in row and "hours" in row), None)
    for name, peak in preflight.GPUS.items() if config.what == "gpu" and step else ():
        hours = step["hours"] * step["gflops"] * 1e9 / (preflight.SHARE * peak)
        rows.append({"what": f"estimate of preflight, {name}", "hours": hours})
    device, info = resolve_device(options.device), Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)|$", info.read_text() if info.exists() else "")[1]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m tools.bench {' '.join(sys.argv[1:])}",
        "machine": f"{name or platform.machine()}, {torch.get_num_threads()} CPU threads",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "run": f"{path}, {' x '.join(map(str, shape))} tokens per step; hours: {total:,} tokens",
    }
    to = Path(config.to) / config.what
    with atomic_write(to.with_suffix(".jsonl")) as file:
        file.writelines(json.dumps(record).encode() + b"\n" for record in (about, *rows))
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[cell(key, row.get(key, "")) for key in keys] for row in rows]
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    print(
        markdown_table([key.replace("_", " ") for key in keys], cells, set(range(1, len(keys) - 1)))
    )
    figure = draw_bars(title, [row for row in rows if parts[0] in row], parts, note)
    figure.supxlabel(f"{about['machine']}, {about['date']}", fontsize=7, color="0.4")
    save_figure(figure, to.with_suffix(".png"))
    print(f"{to}.jsonl and {to}.png have the results")


if __name__ == "__main__":
    run(main, configure(BenchConfig, [f"--what={a}" if a in RUNS else a for a in sys.argv[1:]]))
