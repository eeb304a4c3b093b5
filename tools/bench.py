"""Measure speed. Every answer is a table, a file of JSON lines and a picture.

    python -m tools.bench throughput --config=config/phase1_char.py --nanogpt=../nanoGPT
    python -m tools.bench loader --config=config/phase3_gpt2.py     # ways to load a batch
    python -m tools.bench generate --nanogpt=../nanoGPT --transformers

The options and config files of train.py are accepted, too. Training is measured as users see it, by
starting train.py, and nanoGPT's own, and reading their logs. All sides are measured in turn,
`rounds` times, so that a machine that slows down slows all of them. The table shows medians.
"""

import json
import pickle
import platform
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from configurator import UserError, check_range, configure, run
from dataclasses import dataclass, fields
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure

from model import GPT, GPTConfig
from support import runtime
from support.data import gather, open_dataset
from support.files import atomic_write
from support.log import read_log
from support.pictures import markdown_table, save_figure
from support.runtime import DTYPES, dtype_name, resolve_device, resolve_dtype
from support.tokenizer import import_transformers
from train import TrainConfig

ROOT = Path(__file__).parent.parent
# Tokens per second that training phase 3 takes: estimated from the generated code, not measured.
CONSUMERS = {"an A100 trains phase 3 (estimate)": 205_000, "an H100 (estimate)": 440_000}


@dataclass(frozen=True)
class BenchConfig(TrainConfig):
    """Measure speed: python -m tools.bench throughput, loader or generate."""

    # benchmark
    what: Literal["throughput", "loader", "generate"] = "throughput"  # what to measure
    rounds: int = 3  # measurements of each side
    steps: int = 50  # throughput: training steps in a measurement
    nanogpt: str = ""  # folder of a copy of nanoGPT, to measure it too
    transformers: bool = False  # generate: measure transformers too

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, 1000, "rounds")
        check_range(self, 2, 1 << 20, "steps")  # the first one warms up


# Throughput: training steps, beside what the machine can compute
def time_training(folder: Path, config: BenchConfig, vocab_size: int) -> float:
    """Return the tokens per second that the train.py in `folder` logs, ours or nanoGPT's."""
    device, data = resolve_device(config.device), Path("data", config.dataset).absolute()
    options = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    options |= dict(device=str(device), dtype=dtype_name(resolve_dtype(config.dtype, device)))
    options |= dict(dataset=str(data), init_from="scratch", max_iters=config.steps, decay_lr=False)
    options |= dict(eval_interval=10**9, eval_iters=1, sample_interval=0, checkpoint_interval=0)
    options["compile"] = config.compile is not False  # auto would not compile so short a run
    options["log_interval"] = max(1, config.steps // 10)  # each line is flushed to disk
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        options |= dict(out_dir=scratch, target_val_loss=0.0, wandb_log=False)
        if folder != ROOT:
            # As nanoGPT's README says, not compiled on a CPU. It always computes in float32 there.
            compiles = device.type == "cuda" if config.compile == "auto" else config.compile
            options |= dict(dataset=scratch, log_interval=1, compile=compiles)
            # It takes the size of the vocabulary from a meta.pkl, which our data sets do not have.
            Path(scratch, "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
            for name in ("train.bin", "val.bin"):
                Path(scratch, name).symlink_to(data / name)
        # Both programs read such a config file. nanoGPT ignores names that it does not know.
        lines = [f"{name} = {value!a}\n" for name, value in options.items()]
        Path(scratch, "run.py").write_text("".join(lines), "ascii")
        command = [sys.executable, "train.py", f"{scratch}/run.py"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise UserError(f"{folder}/train.py failed: {done.stderr[-300:]}")
        if folder == ROOT:
            records = [r for r in read_log(Path(scratch, "log.jsonl")) if "loss" in r]
            return median(record["tokens_per_second"] for record in records[1:])
    times = re.findall(r"^iter \d+:.* time ([\d.]+)ms", done.stdout, re.MULTILINE)
    tokens = config.gradient_accumulation_steps * config.batch_size * config.block_size
    return 1e3 * tokens / median(map(float, times[1:]))


def time_product(dtype: str, device: torch.device, flops: int) -> float:
    """Return the tokens per second of training if it were nothing but large matrix products."""
    runtime.set_up(device)
    n = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device, dtype=DTYPES[dtype])
    return 2 * n**3 / median_seconds(lambda: a @ b, device) / flops


def throughput(config: BenchConfig) -> tuple[dict[str, Callable], int]:
    device, meta = resolve_device(config.device), open_dataset(Path("data", config.dataset))[0]
    rows = max(meta["vocab_size"], config.pad_vocab_to)
    with torch.device("meta"):  # weights without memory
        c = GPTConfig(rows, n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)
        flops = GPT(c).flops_per_token(config.block_size)
    sides = {"ours": partial(time_training, ROOT, config, rows)}
    if config.nanogpt:
        sides["nanoGPT"] = partial(time_training, Path(config.nanogpt), config, rows)
    for dtype in dict.fromkeys((dtype_name(resolve_dtype(config.dtype, device)), "float32")):
        sides[f"{dtype} product"] = partial(time_product, dtype, device, flops)
    return sides, flops


# Loader: ways to load a batch, of ids, (B, T + 1), or of inputs and targets
def loader(config: BenchConfig) -> tuple[dict[str, Callable], int]:
    _, tokenizer, tokens, _ = open_dataset(Path("data", config.dataset))
    ids, B, T = tokens.open()[:2_000_000], config.batch_size, config.block_size
    text, width = tokenizer.decode(ids.tolist()), 16 * T  # 16 characters per token are enough

    def tokenize(start: int) -> list[int]:
        return tokenizer.encode(text[start : start + width])[: T + 1]

    def time_loading(load: Callable) -> float:
        random, cpu = np.random.default_rng(config.seed), torch.device("cpu")
        return B * T / median_seconds(lambda: load(random.integers(len(ids) - T, size=B)), cpu)

    loaders = {
        "text, tokenized in each step": lambda starts: np.array([tokenize(i) for i in starts]),
        "a slice per sequence": lambda starts: np.array([ids[i : i + T + 1] for i in starts], int),
        "one gather (train.py)": lambda starts: gather(tokens, starts, T),
    }
    return {name: partial(time_loading, load) for name, load in loaders.items()}, 0


# Generation, by models with new weights
def time_writing(side: str, dtype: str, B: int, config: BenchConfig) -> float:
    """Return the tokens per second that a model writes into B texts together."""
    device, n = resolve_device(config.device), min(200, config.block_size - 1)
    shape = dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)
    if side == "transformers":
        hf = import_transformers()
        model = hf.GPT2LMHeadModel(hf.GPT2Config(n_positions=config.block_size, **shape))
        model.generation_config.update(min_new_tokens=n, do_sample=True, top_k=0, pad_token_id=0)
    else:
        code = runpy.run_path(f"{ROOT if side == 'ours' else config.nanogpt}/model.py")
        shape |= dict(block_size=config.block_size, vocab_size=50_257)
        model = code["GPT"](code["GPTConfig"](**shape))
    model = model.to(device, DTYPES[dtype]).eval()
    if side == "ours":
        runtime.pack_weights(model)
    prompt = torch.zeros(B, 1, dtype=torch.int64, device=device)
    return B * n / median_seconds(lambda: list(model.generate(prompt, max_new_tokens=n)), device)


def generate(config: BenchConfig) -> tuple[dict[str, Callable], int]:
    sides = ["ours"] + ["transformers"] * config.transformers + ["nanoGPT"] * bool(config.nanogpt)
    best = dtype_name(resolve_dtype(config.dtype, resolve_device(config.device)))
    cases = product(dict.fromkeys(("float32", best)), (1, 8), sides)
    return {f"{s}, {d}, batch {B}": partial(time_writing, s, d, B, config) for d, B, s in cases}, 0


def median_seconds(function: Callable, device: torch.device, at_most: float = 10) -> float:
    """Return the median time of five calls, or of as many as begin within `at_most` seconds."""
    seconds = []
    while len(seconds) < 5 and sum(seconds) < at_most:
        started = now(device)
        function()
        seconds.append(now(device) - started)
    return median(seconds)


def now(device: torch.device) -> float:
    """Return the time in seconds at which `device` has finished all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


# Functions that return {side: a function that measures its tokens per second}, operations per token
BENCHMARKS = {"throughput": throughput, "loader": loader, "generate": generate}


@runtime.explain_out_of_memory()
def main(config: BenchConfig) -> None:
    sides, flops = BENCHMARKS[config.what](config)
    to = Path("out/bench", config.what)
    print(f"measuring {'; '.join(sides)} for {to}.jsonl and {to}.png ...", flush=True)
    rounds = [[time_side() for time_side in sides.values()] for _ in range(config.rounds)]
    speeds = dict(zip(sides, map(median, zip(*rounds, strict=True)), strict=True))
    speeds |= CONSUMERS if config.what == "loader" else {}
    rows = [{"what": name, "tokens_per_second": round(speed)} for name, speed in speeds.items()]
    for row in rows if flops else ():
        row["gflops"] = round(flops * speeds[row["what"]] / 1e9, 1)
        for peak in [name for name in speeds if name.endswith("product")]:
            row[f"share_of_{peak.replace(' ', '_')}"] = round(speeds[row["what"]] / speeds[peak], 3)
    device, cpu = resolve_device(config.device), torch.cpu.get_capabilities().get("cpu_name", "")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m tools.bench {' '.join(sys.argv[1:])}",
        "machine": f"{name or platform.machine()}, {torch.get_num_threads()} CPU threads",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }
    with atomic_write(to.with_suffix(".jsonl")) as file:
        file.writelines(json.dumps(record).encode() + b"\n" for record in (about, *rows))
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    header = [key.replace("_", " ") for key in rows[0]]
    cells = [[v if isinstance(v, str) else f"{v:,}" for v in row.values()] for row in rows]
    print(markdown_table(header, cells, right=set(range(1, len(header)))))
    figure = Figure(figsize=(9, 1.6 + 0.34 * len(rows)), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.bar_label(axes.barh(list(speeds), list(speeds.values())), fmt="{:,.0f}", padding=3)
    axes.set(
        title=f"{config.what}: {about['machine']}, {about['date']}", xlabel="tokens per second"
    )
    if max(speeds.values()) > 50 * min(speeds.values()):
        axes.set_xscale("log")
    axes.margins(x=0.25)  # for the numbers behind the bars
    axes.invert_yaxis()  # the first row at the top
    save_figure(figure, to.with_suffix(".png"))


if __name__ == "__main__":
    words = [word.removeprefix("--config=") for word in sys.argv[1:]]
    words = [f"--what={word}" if word in BENCHMARKS else word for word in words]
    run(main, configure(BenchConfig, words))
