"""Measure speed. Every answer is a table, a file of JSON lines and a picture.

    python -m tools.bench ladder                        # a training step, made faster rung by rung
    python -m tools.bench loader                        # ways to load a batch, and what a GPU needs
    python -m tools.bench throughput --config=config/phase1_char.py --nanogpt=../nanoGPT
    python -m tools.bench generate --nanogpt=../nanoGPT --transformers
    python -m tools.bench gpu                           # all about a new GPU, in 8 minutes

Every measurement runs in a process of its own, so nothing that one leaves behind changes the next.
The sides are measured in turn, `rounds` times: when the machine slows down, it slows all of them.
The table shows the medians. Without the data set of a run, --vocab_size measures on random tokens.
"""

import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import ProcessPoolExecutor as ProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

import model as gpt
from configurator import UserError, check_range, configure, one_line, read_options, run
from support import preflight, runtime
from support.data import TOKEN, Dataset, Tokens, gather, random_offsets, write_dataset
from support.files import atomic_write
from support.nanogpt import build_original
from support.pictures import markdown_table, save_figure
from support.processes import Processes
from support.start import model_config
from support.tokenizer import CharTokenizer
from train import TrainConfig, Trainer, learning_rate

RUNS = {  # what is measured, and on which run if --config does not name another one
    "ladder": "config/phase2_bpe.py",
    "loader": "config/phase3_gpt2.py",
    "throughput": "config/phase2_bpe.py",
    "generate": "config/gpt2_124m.py",
    "gpu": "config/phase3_gpt2.py",
}
TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=2, pad_vocab_to=0)
# Tokens per second that training phase 3 would take. Estimated from generated code, not measured.
CONSUMERS = {"one A100, estimated": 205_000, "one H100, estimated": 440_000}


@dataclass(frozen=True)
class BenchConfig:
    """Measure speed: python -m tools.bench ladder, loader, throughput, generate or gpu."""

    # measurement
    what: Literal[tuple(RUNS)] = "ladder"  # ladder, loader, throughput, generate or gpu
    rounds: int = 3  # measurements per side (gpu: one)
    seconds: float = 10.0  # longest time for the calls of one measurement
    nanogpt: str = ""  # folder of a copy of nanoGPT, to measure it too
    transformers: bool = False  # generate: measure transformers too
    new_tokens: int = 200  # generate: tokens to write
    to: str = "out/bench"  # folder for the results
    tiny: bool = False  # shrink the model, to try a benchmark quickly
    # run; None: as in the config file
    config: str | None = None  # config file of the run; None: see RUNS in bench.py
    vocab_size: int = 0  # vocabulary of random training data; 0: use the data set
    dataset: str | None = None  # folder under data/
    batch_size: int | None = None  # sequences in one forward pass
    optimizer: str | None = None  # adamw or muon
    device: str | None = None  # cpu, cuda, cuda:1, mps
    dtype: str | None = None  # float32, bfloat16, float16
    compile: bool | None = None  # torch.compile the model

    def __post_init__(self) -> None:
        check_range(self, 1, 1 << 20, "rounds", "new_tokens")
        check_range(self, 0, 1 << 16, "vocab_size")
        check_range(self, 0, 3600, "seconds")


def read_run(config: BenchConfig, path: str, vocab_size: int, scratch: Path) -> TrainConfig:
    """Return the run of a config file as `config` changes it, on random ids if vocab_size > 0."""
    names = ("dataset", "batch_size", "optimizer", "device", "dtype", "compile")
    changes = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    changes = (TINY if config.tiny else {}) | changes | {"out_dir": scratch, "sample_interval": 0}
    if vocab_size:
        changes["dataset"] = folder = scratch.absolute() / f"random_{vocab_size}"
        tokenizer = CharTokenizer("".join(chr(1 << 16 | i) for i in range(vocab_size)))
        ids = np.random.default_rng(0).integers(vocab_size, size=1_000_000).tolist()
        write_dataset(folder, tokenizer, ids, ids[:100_000], 100_000, {"prepared by": "bench.py"})
    return read_options(TrainConfig, [path, *(f"--{k}={v}" for k, v in changes.items())])


# Ladder: one training step, from a naive one to ours, one change per rung


def plain_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Return attention, (..., T, hs), computed as formula 1 of Vaswani et al. 2017 is written."""
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


@dataclass(frozen=True)
class Way:
    """How a training step is computed. The defaults are ours."""

    attention: Callable = gpt.attention
    gelu: Callable = gpt.gelu
    low_precision: bool = True  # the run's dtype instead of float32
    set_up: bool = True  # on a CPU, keep freed memory for the next step
    fused: bool = True  # AdamW in one kernel
    compile: bool = True


NAIVE = Way(head_by_head, plain_gelu, False, False, False, False)
CHANGES = {
    "all heads in one product": {"attention": plain_attention},
    "GELU in one kernel": {"gelu": Way.gelu},
    "bfloat16 instead of float32": {"low_precision": True},
    "the attention of model.py": {"attention": Way.attention},
    "freed memory kept for the next step": {"set_up": True},
    "AdamW in one kernel": {"fused": True},
    "torch.compile": {"compile": True},
}


def rungs() -> dict[str, Way]:
    """Return the ways of the ladder by name. Each one changes one thing in the one before."""
    ways = {"naive": NAIVE}
    for name, change in CHANGES.items():
        ways[name] = replace(list(ways.values())[-1], **change)
    return ways


def trainer_in(way: Way, options: TrainConfig) -> Trainer:
    """Return a Trainer that computes in this way. It changes model.py in this process for good."""
    gpt.attention, gpt.gelu = way.attention, way.gelu
    dtype = options.dtype if way.low_precision else "float32"
    compiled = options.compile if way.compile else False
    trainer = make_trainer(replace(options, dtype=dtype, compile=compiled), way.set_up)
    if not way.fused:
        one_by_one = {"fused": False, "foreach": False}
        for i, o in enumerate(trainer.optimizers):
            trainer.optimizers[i] = PlainAdamW([group | one_by_one for group in o.param_groups])
    runtime.compile_model(trainer)
    return trainer


def time_way(way: Way, options: TrainConfig, seconds: float) -> dict:
    """Return the seconds of a training step with its batches at hand."""
    trainer = trainer_in(way, options)
    batches = [trainer.micro_batch(0, micro) for micro in trainer.micros]
    step = partial(trainer.train_step, 0, options.learning_rate, batches=batches)
    return {"seconds": time_call(step, trainer.device, seconds)}


def ladder(config: BenchConfig, options: TrainConfig, _: Path) -> tuple:
    options = replace(options, optimizer="adamw")  # Muon is another algorithm, not a faster one
    sides = {name: (time_way, way, options, config.seconds) for name, way in rungs().items()}
    times = {name: r["seconds"] for name, r in measure(sides, config.rounds).items()}
    rows, first, before = [], times["naive"], times["naive"]
    for name, time in times.items():
        speed = tokens_per_step(options) / time
        row = {"rung": name, "step_ms": 1e3 * time, "tokens_per_second": speed}
        rows.append(row | {"factor": before / time, "product": first / time})
        before = time
    bars = [(r["rung"], [r["step_ms"]], f"{r['product']:.2f}x") for r in rows]
    return rows, dict(bars=bars, x="ms per step", title="A training step, one change per rung")


# Loader: ways to load a batch, from naive to ours. x and y are (B, T), on the CPU.


class Loader:
    """The same token ids as text, as files of two types, and in memory."""

    def __init__(self, data: Dataset, folder: Path, block_size: int) -> None:
        self.T, self.tokenizer = block_size, data.tokenizer
        ids = np.array(data.train.open()[:2_000_000])
        self.text = self.tokenizer.decode(ids.tolist())
        self.files = {dtype: folder / dtype.name for dtype in (TOKEN, np.dtype("<i8"))}
        for dtype, path in self.files.items():
            ids.astype(dtype).tofile(path)
        self.tokens = Tokens(self.files[TOKEN])
        self.pool, self.ahead = ThreadPoolExecutor(1), None


def split(rows: list) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of rows of T + 1 ids."""
    windows = torch.from_numpy(np.array(rows, dtype=np.int64))
    return windows[:, :-1], windows[:, 1:]


def from_text(loader: Loader, offsets: np.ndarray) -> tuple[Tensor, Tensor]:
    """Tokenize text for each sequence; 16 characters per token are enough."""
    length, rows = 16 * loader.T, []
    for offset in offsets:
        start = int(offset / len(loader.tokens) * (len(loader.text) - length))
        rows.append(loader.tokenizer.encode(loader.text[start : start + length])[: loader.T + 1])
    return split(rows)


def one_by_one(loader: Loader, offsets: np.ndarray) -> tuple[Tensor, Tensor]:
    rows = []
    for offset in offsets:
        with open(loader.files[np.dtype("<i8")], "rb") as file:
            file.seek(8 * int(offset))
            rows.append([int.from_bytes(file.read(8), "little") for _ in range(loader.T + 1)])
    return split(rows)


def rows_of(dtype: str, loader: Loader, offsets: np.ndarray) -> tuple[Tensor, Tensor]:
    ids = np.memmap(loader.files[np.dtype(dtype)], dtype, mode="r")
    return split([ids[offset : offset + loader.T + 1] for offset in offsets])


def one_gather(loader: Loader, offsets: np.ndarray) -> tuple[Tensor, Tensor]:
    x, y = gather(loader.tokens, offsets, loader.T)
    return torch.from_numpy(x), torch.from_numpy(y)


def prefetch(loader: Loader, offsets: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the batch of the call before, while a thread gathers the one of this call."""
    ready: Future | None = loader.ahead
    loader.ahead = loader.pool.submit(one_gather, loader, offsets)
    return (ready or loader.ahead).result()


LOADERS = {
    "tokenize text in every step": from_text,
    "read ids one by one in Python": one_by_one,
    "slice a file of int64 per sequence": partial(rows_of, "<i8"),
    "slice a file of uint16 per sequence": partial(rows_of, "<u2"),
    "one gather in memory (train.py)": one_gather,
    "the same, one batch ahead in a thread": prefetch,
}


def time_loader(load: Callable, options: TrainConfig, seconds: float) -> dict:
    """Return the seconds until a batch of one forward pass is on the device."""
    device, data = runtime.resolve_device(options.device), Path("data") / options.dataset
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        loader = Loader(Dataset(data, options.block_size), Path(folder), options.block_size)
        sizes = (options.batch_size, len(loader.tokens), options.block_size)
        offsets = random_offsets(options.seed, 0, *sizes)
        return {
            "seconds": time_call(
                lambda: [ids.to(device) for ids in load(loader, offsets)], device, seconds
            )
        }


def loader(config: BenchConfig, options: TrainConfig, _: Path) -> tuple:
    sides = {name: (time_loader, load, options, config.seconds) for name, load in LOADERS.items()}
    rows, bars, total = [], [], options.max_iters * tokens_per_step(options)
    for name, r in measure(sides, config.rounds).items():
        speed = options.batch_size * options.block_size / r["seconds"]
        rows.append({"loader": name, "tokens_per_second": speed, "hours": total / speed / 3600})
        note = f"{speed:,.0f} tokens/s: {cell('hours', rows[-1]['hours'])} h for {total / 1e9:.2f}B"
        bars.append((name, [speed], note))
    chart = dict(bars=bars, x="tokens per second", title="Loading alone", lines=CONSUMERS, log=True)
    return rows, chart


# Throughput: a training step and the share of what the machine can compute


def time_ours(options: TrainConfig, seconds: float) -> dict:
    """Return the seconds of a training step and of its parts, its operations and peak memory."""
    trainer = make_trainer(options)
    runtime.compile_model(trainer)
    model, device, n_passes = trainer.model, trainer.device, len(trainer.micros)
    x, y = trainer.micro_batch(0, 0)

    def forward() -> Tensor:
        with runtime.autocast(device, trainer.dtype):
            return trainer.step_model(x, y)[1]

    def forward_and_backward() -> None:
        model.zero_grad(set_to_none=True)
        forward().backward()

    def update() -> None:
        for optimizer in trainer.optimizers:
            optimizer.step()

    def train_step() -> None:
        trainer.train_step(0, options.learning_rate)

    def load() -> None:
        trainer.micro_batch(0, 0)

    calls = (train_step, load, forward, forward_and_backward, update)
    step, data, ahead, both, optimizer = (time_call(call, device, seconds) for call in calls)
    flops = model.flops_per_token(options.block_size)
    return {
        "seconds": step,
        "flops_per_token": flops,
        "gflops": flops * trainer.tokens_per_step / step / 1e9,
        "memory_gb": runtime.peak_memory(device) / 1e9,
        "forward_ms": 1e3 * n_passes * ahead,
        "backward_ms": 1e3 * n_passes * max(0.0, both - ahead),
        "optimizer_ms": 1e3 * optimizer,
        "data_ms": 1e3 * n_passes * data,
    }
