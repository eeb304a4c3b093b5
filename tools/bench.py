"""How fast is it, and what made it so? Four answers, each a table, JSON lines and a picture.

    python bench.py ladder config/phase2_bpe.py       # one training step, from the naive way to ours
    python bench.py throughput config/phase2_bpe.py   # tokens per second, and the share of what the machine can do
    python bench.py generate                          # GPT-2 Small writing, with and without the cache
    python bench.py growth config/phase1_char.py      # time per token over context, batch, width and processes

Every measurement is made in a process of its own, so that nothing one side leaves behind helps or hurts
the next, and the sides take turns for `rounds` rounds, so that a machine that slows down slows all of
them; medians are told. Options are those of train.py and the ones below. `throughput` and `generate`
can measure nanoGPT, and `generate` transformers, beside it:

    python bench.py throughput config/phase1_char.py --optimizer=adamw --nanogpt=../nanoGPT
    python bench.py generate --nanogpt=../nanoGPT --transformers
"""

import importlib.util
import json
import math
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import model as gpt
from configurator import UserError, configure, run
from support import runtime
from support.data import TOKEN, Tokens, gather, random_offsets, write_dataset
from support.files import atomic_write
from support.tokenizer import CharTokenizer
from train import Processes, TrainConfig, Trainer

SHOWS = ("ladder", "throughput", "generate", "growth")


@dataclass(frozen=True)
class BenchConfig(TrainConfig):
    """Measure how fast it is: python bench.py ladder, throughput, generate or growth."""

    # bench
    show: str = "ladder"  # or throughput, generate, growth; the first word of the command
    rounds: int = 3  # times that each side is measured
    seconds: float = 10.0  # that a measurement takes, at least three steps
    vocab_size: int = 0  # random tokens of so many kinds in place of the data set; 0: the data set
    nanogpt: str = ""  # the folder of a copy of nanoGPT, to measure beside ours
    transformers: bool = False  # measure transformers beside ours (generate)
    new_tokens: int = 200  # that are written (generate)
    to: str = "out/bench"  # the folder for the tables and pictures

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.show not in SHOWS:
            raise UserError(f"show is {self.show!r} but must be one of {', '.join(SHOWS)}")
        for name in ("rounds", "new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)} but must be at least 1")
        if not 0 <= self.vocab_size <= 1 << 16:
            raise UserError(
                f"vocab_size is {self.vocab_size} but must be at least 0 and at most 65,536"
            )


# The ladder -----------------------------------------------------------------------------------------
#
# First the ways to make a batch, from naive to ours. Each is a function of the training tokens, their
# text and the offsets of the sequences; x and y are (B, T).


class Loader:
    """What the ways to make a batch read: the same ids as text, in files and in memory."""

    def __init__(self, trainer: Trainer, folder: Path, most: int = 2_000_000) -> None:
        self.T, self.tokenizer = trainer.config.block_size, trainer.tokenizer
        ids = np.array(trainer.data.train.open()[:most])
        self.text = self.tokenizer.decode(ids.tolist())
        self.uint16, self.int64 = folder / "uint16.bin", folder / "int64.bin"
        ids.astype(TOKEN).tofile(self.uint16)
        ids.astype(np.int64).tofile(self.int64)
        self.memory = Tokens(self.uint16)


def from_text(loader: Loader, offsets: np.ndarray) -> tuple[Tensor, Tensor]:
    """Tokenize a piece of the text for each sequence: 16 characters a token are enough."""
    rows = []
    for offset in offsets:
        start = int(offset / len(loader.memory) * (len(loader.text) - 16 * loader.T))
        rows.append(
            loader.tokenizer.encode(loader.text[start : start + 16 * loader.T])[: loader.T + 1]
        )
    return split(torch.tensor(rows))


def token_by_token(loader: Loader, offsets: np.ndarray) -> tuple[Tensor, Tensor]:
    """Ids from a file of int64, one after the other in a Python loop."""
    rows = []
    for offset in offsets:
        with open(loader.int64, "rb") as file:
            file.seek(8 * int(offset))
            rows.append([int.from_bytes(file.read(8), sys.byteorder) for _ in range(loader.T + 1)])
    return split(torch.tensor(rows))


def row_by_row(
    loader: Loader, offsets: np.ndarray, dtype: type = np.int64
) -> tuple[Tensor, Tensor]:
    """A slice of the mapped file for each sequence."""
    ids = np.memmap(loader.int64 if dtype == np.int64 else loader.uint16, dtype=dtype, mode="r")
    return split(
        torch.stack([torch.from_numpy(ids[o : o + loader.T + 1].astype(np.int64)) for o in offsets])
    )


def row_by_row_uint16(loader: Loader, offsets: np.ndarray) -> tuple[Tensor, Tensor]:
    return row_by_row(loader, offsets, TOKEN)


def in_one_gather(loader: Loader, offsets: np.ndarray) -> tuple[Tensor, Tensor]:
    """Ours: all sequences in one indexing of an array in memory."""
    x, y = gather(loader.memory, offsets, loader.T)
    return torch.from_numpy(x), torch.from_numpy(y)


def split(windows: Tensor) -> tuple[Tensor, Tensor]:
    return windows[:, :-1], windows[:, 1:]


# Then the ways to compute a step. The naive ones replace functions of model.py.


def plain_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Formula 1 of Vaswani et al. 2017 as one writes it down, for (..., T, hs)."""
    T, hs = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) / math.sqrt(hs)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return F.dropout(scores.masked_fill(future, -math.inf).softmax(dim=-1), dropout) @ v


def head_by_head(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """The same in a loop over the heads."""
    return torch.stack(
        [plain_attention(q[:, h], k[:, h], v[:, h], dropout) for h in range(q.size(1))], dim=1
    )


def plain_gelu(x: Tensor, form: str = "tanh") -> Tensor:
    """The tanh form of GELU as one writes it down: eight passes over x."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@dataclass(frozen=True)
class Way:
    """How a training step is computed. The defaults are ours."""

    attention: Callable = gpt.attention
    gelu: Callable = gpt.gelu
    dtype: str = "auto"
    fused: bool = True  # AdamW in one kernel, not parameter by parameter
    keep_memory: bool = True  # what a step frees stays for the next
    compile: bool = True


NAIVE = Way(head_by_head, plain_gelu, "float32", fused=False, keep_memory=False, compile=False)


def rungs() -> list[tuple[str, Callable, Way]]:
    """The name of each rung, how it makes a batch, and how it computes: one change after the other."""
    loaders = (
        ("text, tokenized in every step", from_text),
        ("ids in a file of int64, read one by one", token_by_token),
        ("a slice of the file per sequence", row_by_row),
        ("a file of uint16", row_by_row_uint16),
        ("all sequences in one gather, in memory", in_one_gather),
    )
    changes = (
        ("all heads in one product", {"attention": plain_attention}),
        ("GELU in one kernel", {"gelu": Way.gelu}),
        ("bfloat16 in place of float32", {"dtype": "auto"}),
        ("the fast attention of model.py", {"attention": Way.attention}),
        ("freed memory kept for the next step", {"keep_memory": True}),
        ("AdamW in one kernel", {"fused": True}),
        ("torch.compile", {"compile": True}),
    )
    ladder, way = [(name, load, NAIVE) for name, load in loaders], NAIVE
    for name, change in changes:
        way = replace(way, **change)
        ladder.append((name, in_one_gather, way))
    return ladder


class PlainAdamW(torch.optim.AdamW):
    """AdamW parameter by parameter, which can not be told on the device to leave a step out."""

    def step(self) -> None:
        self.found_inf = None
        super().step()


def trainer_in(way: Way, config: BenchConfig) -> Trainer:
    """A Trainer that computes in that way. It changes this process for good."""
    gpt.attention, gpt.gelu = way.attention, way.gelu
    trainer = make_trainer(replace(config, dtype=way.dtype, compile=way.compile), way.keep_memory)
    if not way.fused:
        for i, o in enumerate(trainer.optimizers):
            groups = [
                {"params": g["params"], "weight_decay": g["weight_decay"]} for g in o.param_groups
            ]
            lr, betas = config.learning_rate, (config.beta1, config.beta2)
            trainer.optimizers[i] = PlainAdamW(groups, lr=lr, betas=betas, foreach=False)
            for group in trainer.optimizers[i].param_groups:
                group["initial_lr"] = lr
    return trainer


def time_way(way: Way, config: BenchConfig) -> float:
    """Seconds of a step that has its batch already."""
    trainer = trainer_in(way, config)
    trainer.prepare()
    batches = {micro: trainer.micro_batch(0, micro) for micro in trainer.micros}
    trainer.micro_batch = lambda step, micro: batches[micro]
    return median_seconds(
        lambda: trainer.train_step(0, config.learning_rate), trainer.device, config.seconds
    )


def time_loader(load: Callable, config: BenchConfig) -> float:
    """Seconds for the batches of a step, until they are on the device."""
    trainer = make_trainer(replace(config, compile=False))
    with tempfile.TemporaryDirectory() as folder:
        loader = Loader(trainer, Path(folder))
        n_sequences = config.gradient_accumulation_steps * config.batch_size

        def batches() -> None:
            offsets = random_offsets(
                config.seed, 0, n_sequences, len(loader.memory), config.block_size
            )
            for micro in trainer.micros:
                mine = offsets[micro * config.batch_size : (micro + 1) * config.batch_size]
                [tensor.to(trainer.device) for tensor in load(loader, mine)]

        seconds = median_seconds(batches, trainer.device, min(config.seconds, 2.0))
    return seconds


def ladder(config: BenchConfig) -> None:
    config = replace(
        config, optimizer="adamw"
    )  # on every rung; Muon is another thing to compute, not a faster way
    ladder = rungs()
    loading = alternate(
        config, {load.__name__: (time_loader, load, config) for _, load, _ in ladder}
    )
    ways = list(dict.fromkeys(way for _, _, way in ladder))
    computing = alternate(config, {i: (time_way, way, config) for i, way in enumerate(ways)})
    tokens = config.batch_size * config.block_size * config.gradient_accumulation_steps
    rows, before, first = [], None, None
    for name, load, way in ladder:
        batch, compute = loading[load.__name__]["seconds"], computing[ways.index(way)]["seconds"]
        step = batch + compute
        first, before = first or step, before or step
        rows.append(
            {
                "rung": name,
                "batch_ms": 1e3 * batch,
                "compute_ms": 1e3 * compute,
                "step_ms": 1e3 * step,
                "tokens_per_second": tokens / step,
                "factor": before / step,
                "product": first / step,
            }
        )
        before = step
    show(config, rows)


# Throughput -----------------------------------------------------------------------------------------


def time_ours(config: BenchConfig) -> dict:
    """The seconds of a training step and of its parts, and the most memory it takes."""
    trainer = make_trainer(config)
    trainer.prepare()

    def step() -> None:
        trainer.train_step(0, config.learning_rate)

    seconds = median_seconds(step, trainer.device, config.seconds)
    parts = dict.fromkeys(("data", "forward", "optimizer"), 0.0)

    def timed(part: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            started = now(trainer.device)
            result = function(*args, **kwargs)
            parts[part] += now(trainer.device) - started
            return result

        return call

    trainer.micro_batch = timed("data", trainer.micro_batch)
    trainer.step_model = timed("forward", trainer.step_model)
    for o in trainer.optimizers:
        o.step = timed("optimizer", o.step)
    started, n = now(trainer.device), 5
    for _ in range(n):
        step()
    whole = now(trainer.device) - started
    shares = {part: s / whole for part, s in parts.items()}
    shares["backward"] = 1 - sum(shares.values())  # with the clipping
    flops = trainer.model.flops_per_token(config.block_size) * trainer.tokens_per_step
    return {
        "seconds": seconds,
        "gflops": flops / seconds / 1e9,
        "memory_gb": runtime.peak_memory(trainer.device) / 1e9,
        **{f"{part}_share": share for part, share in shares.items()},
    }


def load_nanogpt(config: BenchConfig, vocab_size: int):
    """nanoGPT's own model of the same shape, from the folder that the option names."""
    path = Path(config.nanogpt) / "model.py"
    if not path.is_file():
        raise UserError(f"{path}: no such file; nanogpt is the folder of a copy of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    shape = {
        name: getattr(config, name)
        for name in ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    }
    model = module.GPT(module.GPTConfig(vocab_size=vocab_size, **shape))
    if not config.tie_weights:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def time_nanogpt(config: BenchConfig) -> dict:
    """A step of nanoGPT's model and optimizer: on a CPU as its README says, in float32 and not compiled."""
    trainer = make_trainer(
        replace(config, compile=False), keep_memory=False
    )  # for the batch and the device
    device, vocab_size = trainer.device, trainer.tokenizer.vocab_size
    on_gpu = device.type != "cpu"
    autocast = runtime.autocast(device, trainer.dtype) if on_gpu else nullcontext()
    torch.use_deterministic_algorithms(False)
    model = load_nanogpt(config, vocab_size).to(device)
    flops = trainer.model.flops_per_token(config.block_size) * trainer.tokens_per_step
    betas = (config.beta1, config.beta2)
    optimizer = model.configure_optimizers(
        config.weight_decay, config.learning_rate, betas, device.type
    )
    batches = [trainer.micro_batch(0, micro) for micro in trainer.micros]
    del trainer
    forward = torch.compile(model) if on_gpu else model

    def step() -> None:
        for x, y in batches:
            with autocast:
                loss = forward(x, y)[1] / len(batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = median_seconds(step, device, config.seconds)
    memory = runtime.peak_memory(device) / 1e9
    return {"seconds": seconds, "gflops": flops / seconds / 1e9, "memory_gb": memory}


def time_peak(dtype: torch.dtype, config: BenchConfig) -> dict:
    """The rate of a large matrix product: the most that can be hoped for."""
    device = runtime.resolve_device(config.device)
    n = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    seconds = median_seconds(lambda: a @ b, device, min(config.seconds, 3.0))
    return {"seconds": seconds, "gflops": 2 * n**3 / seconds / 1e9}


def throughput(config: BenchConfig) -> None:
    sides = {"ours": (time_ours, config)}
    if config.nanogpt:
        sides["nanoGPT"] = (time_nanogpt, config)
    for dtype in (torch.bfloat16, torch.float32):
        sides[f"matrix product, {runtime.dtype_name(dtype)}"] = (time_peak, dtype, config)
    results = alternate(config, sides)
    tokens = config.batch_size * config.block_size * config.gradient_accumulation_steps
    peaks = {name: r["gflops"] for name, r in results.items() if name.startswith("matrix")}
    rows = []
    for name, r in results.items():
        row = {"side": name, "step_ms": 1e3 * r["seconds"]}
        if name not in peaks:
            row |= {"tokens_per_second": tokens / r["seconds"], "memory_gb": r["memory_gb"]}
        row |= {"gflops": r["gflops"]}
        row |= {f"of_{dtype.split()[-1]}": r["gflops"] / peak for dtype, peak in peaks.items()}
        if name == "nanoGPT":
            row["ours_is_faster_by"] = statistics.median(
                theirs["seconds"] / ours["seconds"]
                for theirs, ours in zip(r["rounds"], results["ours"]["rounds"], strict=True)
            )
        row |= {
            key: r[key]
            for key in ("data_share", "forward_share", "backward_share", "optimizer_share")
            if key in r
        }
        rows.append(row)
    show(config, rows)


# Generation -----------------------------------------------------------------------------------------


def time_generation(side: str, dtype: str, batch_size: int, config: BenchConfig) -> dict:
    """Seconds to write `new_tokens` tokens behind a prompt of one."""
    device, torch_dtype = runtime.resolve_device(config.device), runtime.DTYPES[dtype]
    vocab_size = config.vocab_size or 50257
    shape = {
        name: getattr(config, name)
        for name in ("block_size", "n_layer", "n_head", "n_embd", "bias")
    }
    if side == "nanoGPT":
        model = load_nanogpt(config, vocab_size)
    elif side == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        shape |= {"n_positions": shape.pop("block_size")}
        shape.pop("bias")
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **shape))
    else:
        model = gpt.GPT(
            gpt.GPTConfig(vocab_size=vocab_size, tie_weights=config.tie_weights, **shape)
        )
    model = model.to(device, torch_dtype).eval()
    prompt = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def write(n: int) -> None:
        if side == "transformers":
            settings = {"do_sample": True, "top_k": 0, "pad_token_id": 0}
            model.generate(prompt, min_new_tokens=n, max_new_tokens=n, **settings)
        elif side == "nanoGPT":
            model.generate(prompt, n)
        elif side == "ours":
            list(model.generate(prompt, n))
        else:
            write_without_cache(model, prompt, n)

    write(8)
    started = now(device)
    write(config.new_tokens)
    return {"seconds": now(device) - started}


def write_without_cache(model: gpt.GPT, idx: Tensor, n: int) -> None:
    """As nanoGPT does it: all tokens so far through the model for each new one."""
    for _ in range(n):
        logits = model(
            idx, caches=[gpt.KVCache(model.config.block_size) for _ in model.transformer.h]
        )[0][:, -1]
        idx = torch.cat((idx, gpt.sample_token(logits.float())), dim=1)


def time_reading(dtype: str, config: BenchConfig) -> dict:
    """Seconds in which the model's matrices can be read once, as products with a single vector."""
    device, torch_dtype = runtime.resolve_device(config.device), runtime.DTYPES[dtype]
    C, V = config.n_embd, config.vocab_size or 50257
    shapes = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)] * config.n_layer + [(V, C)]
    matrices = [
        torch.randn(rows, columns, device=device).to(torch_dtype) for rows, columns in shapes
    ]
    vectors = {
        columns: torch.randn(1, columns, device=device).to(torch_dtype) for _, columns in shapes
    }
    seconds = median_seconds(
        lambda: [F.linear(vectors[m.size(1)], m) for m in matrices], device, 2.0
    )
    return {"seconds": config.new_tokens * seconds, "gb": sum(m.nbytes for m in matrices) / 1e9}


def generate(config: BenchConfig) -> None:
    dtypes = ["float32"]
    if runtime.resolve_dtype("auto", runtime.resolve_device(config.device)) != torch.float32:
        dtypes.append("bfloat16")
    sides = {
        ("ours, without cache", "float32", 1): (
            time_generation,
            "without cache",
            "float32",
            1,
            config,
        )
    }
    if config.nanogpt:
        sides["nanoGPT", "float32", 1] = (time_generation, "nanoGPT", "float32", 1, config)
    for dtype in dtypes:
        for batch_size in (1, 8):
            sides["ours", dtype, batch_size] = (time_generation, "ours", dtype, batch_size, config)
            if config.transformers:
                side = (time_generation, "transformers", dtype, batch_size, config)
                sides["transformers", dtype, batch_size] = side
        sides["reading the weights", dtype, 1] = (time_reading, dtype, config)
    results = alternate(config, sides)
    rows = []
    for (side, dtype, batch_size), r in results.items():
        bound = results["reading the weights", dtype, 1]["seconds"]
        row = {"side": side, "dtype": dtype, "batch_size": batch_size}
        row |= {
            "tokens_per_second": batch_size * config.new_tokens / r["seconds"],
            "of_bound": bound / r["seconds"],
        }
        if "gb" in r:
            row["gb_per_second"] = r["gb"] * config.new_tokens / r["seconds"]
        rows.append(row)
    show(config, rows)


# Growth ---------------------------------------------------------------------------------------------


CONTEXTS, BATCHES, WIDTHS = (64, 128, 256, 512, 1024), (4, 8, 16, 32, 64), (64, 128, 256, 512)


def time_process(config: BenchConfig, rank: int, count: int, port: int) -> dict:
    """A step of one of `count` processes that share the machine's cores."""
    if count > 1:
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
        }
        os.environ |= {name: str(value) for name, value in environment.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(max(1, psutil.cpu_count() // count))
    trainer = make_trainer(config)
    trainer.prepare()
    # The processes must agree on the number of steps, so it does not depend on their clocks.
    seconds = median_seconds(
        lambda: trainer.train_step(0, config.learning_rate), trainer.device, 0.0, least=10
    )
    trainer.processes.wait()
    trainer.processes.leave()
    return {"seconds": seconds, "flops": trainer.model.flops_per_token(config.block_size)}


def time_processes(config: BenchConfig, count: int) -> dict:
    if count == 1:
        return time_process(config, 0, 1, 0)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        results = list(
            pool.map(time_process, [config] * count, range(count), [count] * count, [port] * count)
        )
    return max(results, key=lambda r: r["seconds"])


def growth(config: BenchConfig) -> None:
    tokens = config.batch_size * config.block_size
    config = replace(config, compile=config.compile is True, gradient_accumulation_steps=1)
    heads = config.n_embd // config.n_head  # a wider model has more of them, as GPT-2's family does
    settings = [
        ("context", T, replace(config, block_size=T, batch_size=max(1, tokens // T)))
        for T in CONTEXTS
    ]
    settings += [("batch", B, replace(config, batch_size=B)) for B in BATCHES]
    settings += [
        ("width", C, replace(config, n_embd=C, n_head=C // heads)) for C in WIDTHS if heads <= C
    ]
    sides = {(axis, value): (time_processes, c, 1) for axis, value, c in settings}
    for count in (1, 2):
        c = replace(
            config, gradient_accumulation_steps=count, batch_size=config.batch_size // count
        )
        sides["processes", count] = (time_processes, c, count)
    results = alternate(config, sides)
    sizes = {(axis, value): c.batch_size * c.block_size for axis, value, c in settings}
    rows = []
    for (axis, value), r in results.items():
        microseconds = 1e6 * r["seconds"] / sizes.get((axis, value), tokens)
        row = {
            "axis": axis,
            "value": value,
            "us_per_token": microseconds,
            "mflop_per_token": r["flops"] / 1e6,
        }
        rows.append(row | {"gflops": r["flops"] / microseconds / 1e3})
    show(config, rows)


# What all of them use -------------------------------------------------------------------------------


def now(device: torch.device) -> float:
    """The time when the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def median_seconds(function: Callable, device: torch.device, most: float, least: int = 3) -> float:
    """The median time of a call: of `least` or more, until `most` seconds are over, after one that does not count."""
    function()
    seconds = []
    while len(seconds) < least or sum(seconds) < most:
        started = now(device)
        function()
        seconds.append(now(device) - started)
    return statistics.median(seconds)


def make_trainer(config: BenchConfig, keep_memory: bool = True) -> Trainer:
    """The Trainer of train.py, on the data set or, with vocab_size, on random tokens."""
    processes = Processes(config)
    if processes.device.type == "cpu":
        runtime.repeatable()
        if keep_memory:
            runtime.keep_freed_memory()
    if not config.vocab_size:
        return Trainer(config, processes)
    with tempfile.TemporaryDirectory() as folder:
        rng, tok = (
            np.random.default_rng(0),
            CharTokenizer("".join(chr(1 << 16 | i) for i in range(config.vocab_size))),
        )
        train, val = (rng.integers(config.vocab_size, size=200_000).tolist() for _ in range(2))
        write_dataset(Path(folder), tok, train, val, len(val), {"prepared by": "bench.py"})
        return Trainer(replace(config, dataset=folder, sample_interval=0), processes)


def in_child(function: Callable, *args):
    """What the function returns, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def alternate(config: BenchConfig, sides: dict[object, tuple]) -> dict[object, dict]:
    """Call each side's function in a process of its own, all of them in turn, `rounds` times.

    Returns for each the figures of its median round, and as "rounds" those of all.
    """
    rounds: dict[object, list[dict]] = {name: [] for name in sides}
    for _ in range(config.rounds):
        for name, (function, *args) in tqdm(
            sides.items(), leave=False, disable=not sys.stderr.isatty()
        ):
            result = in_child(function, *args)
            rounds[name].append(result if isinstance(result, dict) else {"seconds": result})
    results = {}
    for name, measured in rounds.items():
        middle = sorted(measured, key=lambda r: r["seconds"])[len(measured) // 2]
        results[name] = middle | {"rounds": measured}
    return results


def machine(config: BenchConfig) -> dict:
    """What the figures depend on."""
    device = runtime.resolve_device(config.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python bench.py " + " ".join(sys.argv[1:]),
        "machine": f"{name}, {psutil.cpu_count()} processors, {platform.system()}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "dtype": runtime.dtype_name(runtime.resolve_dtype(config.dtype, device)),
        "shape": f"B {config.batch_size} x {config.gradient_accumulation_steps}, T {config.block_size}, "
        f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, {config.optimizer}",
    }


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def show(config: BenchConfig, rows: list[dict]) -> None:
    """Print the table, and write it as JSON lines, with what it depends on in the first, and as a picture."""
    about, folder = machine(config), Path(config.to)
    for key, value in about.items():
        print(f"{key}: {value}")
    print(table(rows))
    with atomic_write(folder / f"{config.show}.jsonl") as file:
        file.writelines(json.dumps(record).encode() + b"\n" for record in (about, *rows))
    draw(config.show, about, rows, folder / f"{config.show}.png")
    print(f"{folder} has {config.show}.jsonl and {config.show}.png")


def table(rows: list[dict]) -> str:
    """A Markdown table with a column for every key; numbers to the right."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    columns = []
    for name in names:
        cells = [written(name, row.get(name, "")) for row in rows]
        width, is_text = (
            max(map(len, (name, *cells))),
            any(isinstance(row.get(name), str) for row in rows),
        )
        rule = "-" * width if is_text else "-" * (width - 1) + ":"
        pad = str.ljust if is_text else str.rjust
        columns.append([pad(cell, width) for cell in (name, rule, *cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


def written(name: str, value) -> str:
    if isinstance(value, str | int):
        return str(value)
    if name.endswith("_share") or name.startswith("of_"):
        return f"{value:.0%}"
    if name in ("factor", "product", "ours_is_faster_by"):
        return f"{value:.2f}x"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw(what: str, about: dict, rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    tall = what != "growth"
    figure = Figure(
        figsize=(9, 1.6 + 0.34 * len(rows)) if tall else (9, 6), dpi=150, layout="constrained"
    )
    if what == "ladder":
        axes, y = figure.subplots(), range(len(rows))
        compute = [r["compute_ms"] / 1e3 for r in rows]
        axes.barh(y, compute, color="tab:blue", label="computation")
        axes.barh(
            y, [r["batch_ms"] / 1e3 for r in rows], left=compute, color="tab:orange", label="batch"
        )
        for i, r in enumerate(rows):
            axes.annotate(
                f" {r['step_ms'] / 1e3:.3g} s, {r['product']:.2f}x",
                (r["step_ms"] / 1e3, i),
                va="center",
                fontsize=9,
            )
        axes.set_yticks(y, [r["rung"] for r in rows])
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set(xlabel="seconds a step", title="One training step, one change a rung")
        axes.legend(loc="lower right")
    elif what == "throughput":
        axes = figure.subplots()
        axes.barh([r["side"] for r in rows], [r["gflops"] for r in rows], color="tab:blue")
        for i, r in enumerate(rows):
            speed = f", {r['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in r else ""
            axes.annotate(f" {r['gflops']:,.0f}{speed}", (r["gflops"], i), va="center", fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.28)
        axes.set(xlabel="GFLOPS", title="A training step against the machine's matrix products")
    elif what == "generate":
        axes = figure.subplots()
        names = [f"{r['side']}, {r['dtype']}, batch {r['batch_size']}" for r in rows]
        bound = ["0.8" if r["side"] == "reading the weights" else "tab:blue" for r in rows]
        axes.barh(names, [r["tokens_per_second"] for r in rows], color=bound)
        for i, r in enumerate(rows):
            axes.annotate(
                f" {r['tokens_per_second']:,.3g}",
                (r["tokens_per_second"], i),
                va="center",
                fontsize=9,
            )
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set(
            xlabel="tokens per second",
            title="Writing, and the bound that reading the weights sets (grey)",
        )
    else:
        for axes, axis in zip(
            figure.subplots(2, 2).flat, ("context", "batch", "width", "processes"), strict=True
        ):
            mine = [r for r in rows if r["axis"] == axis]
            x, base = [r["value"] for r in mine], mine[0]
            axes.plot(
                x, [r["us_per_token"] for r in mine], color="tab:blue", marker="o", label="measured"
            )
            scale = base["us_per_token"] / base["mflop_per_token"]
            arithmetic = [scale * r["mflop_per_token"] for r in mine]
            axes.plot(x, arithmetic, color="0.6", ls="--", label="as the arithmetic grows")
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, [str(value) for value in x])
            axes.set(
                xlabel={"context": "context (tokens)", "batch": "batch (sequences)"}.get(axis, axis)
            )
            axes.set(ylabel="µs a token", ylim=(0, None))
            axes.grid(alpha=0.3)
        figure.axes[0].legend()
    figure.supxlabel(
        f"{about['machine']}, {about['shape']}, {about['date']}", fontsize=7, color="0.4"
    )
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def main(config: BenchConfig) -> None:
    {"ladder": ladder, "throughput": throughput, "generate": generate, "growth": growth}[
        config.show
    ](config)


if __name__ == "__main__":
    run(main, configure(BenchConfig, [f"--show={a}" if a in SHOWS else a for a in sys.argv[1:]]))
