"""Measure speed. Every answer is a table, and a picture and the figures in out/bench.

    python -m tools.bench throughput --config=config/phase1_char.py --nanogpt=../nanoGPT
    python -m tools.bench generate --transformers
    python -m tools.bench race --dataset=shakespeare_char --nanogpt=../nanoGPT   # 20 minutes

The options and config files of train.py are accepted, too. Training is measured as users see it, by
starting train.py, and nanoGPT's own, and reading what they print. All sides are measured in turn,
`rounds` times, so that a machine that slows down slows all of them. The table shows medians.

In a race, each side of tools/races.toml trains alone, for the same minutes from the start of its
program, compiling included. Each of its checkpoints is then scored by tools.evaluate.
"""

import json
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from matplotlib.figure import Figure

from configurator import UserError, check_range, configure, run
from model import GPT, GPTConfig
from support import runtime
from support.data import open_dataset
from support.files import atomic_write
from support.pictures import markdown_table, save_figure
from support.runtime import ROOT, dtype_name, resolve_device, resolve_dtype
from support.tokenizer import import_transformers
from train import TrainConfig

RACES = ROOT / "tools/races.toml"
SAVES = 8  # checkpoints of each side of a race
WHOLE = 2  # seconds: a checkpoint that has not changed for so long is complete, also nanoGPT's


@dataclass(frozen=True)
class BenchConfig(TrainConfig):
    """Measure speed: python -m tools.bench throughput, race or generate."""

    # benchmark
    what: Literal["throughput", "race", "generate"] = "throughput"  # what to measure
    rounds: int = 3  # measurements of each side
    seconds: int = 20  # seconds of training in which a step is measured
    nanogpt: str = ""  # folder of a copy of nanoGPT, to measure it too
    transformers: bool = False  # generate: measure transformers too

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, 1000, "rounds", "seconds")


# Throughput: training steps, beside what the machine can compute
def start_training(folder: Path, options: dict, vocab_size: int, out_dir: Path) -> subprocess.Popen:
    """Start the train.py in `folder`, ours or nanoGPT's, and return its process."""
    device, data = resolve_device(options["device"]), Path("data", options["dataset"]).absolute()
    dtype, out_dir = dtype_name(resolve_dtype(options["dtype"], device)), out_dir.absolute()
    options = options | dict(device=str(device), dtype=dtype, dataset=str(data))
    options |= dict(out_dir=str(out_dir), init_from="scratch", target_val_loss=0.0)
    options |= dict(sample_interval=0, checkpoint_interval=0, wandb_log=False)
    if folder != ROOT:
        options |= dict(dataset=str(out_dir))
        # It takes the size of the vocabulary from a meta.pkl, which our data sets do not have.
        (out_dir / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
        for name in ("train.bin", "val.bin", "meta.json"):
            (out_dir / name).symlink_to(data / name)
    # Both programs read such a config file. nanoGPT ignores names that it does not know.
    lines = [f"{name} = {value!a}\n" for name, value in options.items()]
    (out_dir / "run.py").write_text("".join(lines), "ascii")
    # Nothing compiled before is used, so that a measurement does not depend on those before it.
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(out_dir / "compiled")}
    text = dict(encoding="utf-8", errors="replace", env=environment, stdout=subprocess.PIPE)
    command = [sys.executable, "-u", "train.py", str(out_dir / "run.py")]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.STDOUT, **text)


def time_steps(folder: Path, options: dict, vocab_size: int, at_least: int) -> tuple[float, float]:
    """Return the seconds that a run takes before its first step, and those of each step.

    The run is ended when it has taken steps for `at_least` seconds.
    """
    tokens = options["gradient_accumulation_steps"] * options["batch_size"] * options["block_size"]
    log_interval = max(1, 20_000 // tokens)  # each line is flushed to disk
    options = options | dict(max_iters=10**6, eval_interval=10**9, log_interval=log_interval)
    started, times, line = time.perf_counter(), {}, ""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
        start_training(folder, options | {"eval_iters": 1}, vocab_size, Path(scratch)) as process,
    ):
        for line in process.stdout:  # "step  4 | ... | loss 4.1 ..." or "iter 4: loss 4.1, ..."
            if found := re.match(r"(?:step|iter) +([\d,]+)\b.* loss", line):
                times[int(found[1].replace(",", ""))] = time.perf_counter() - started
            steps = list(times)[2:]  # without those that still warm up
            if steps and times[steps[-1]] > times[steps[0]] + at_least:
                break
        else:
            raise UserError(f"{folder}/train.py ended: {line[-300:]}")
        process.kill()
    seconds = (times[steps[-1]] - times[steps[0]]) / (steps[-1] - steps[0])
    return times[steps[0]] - steps[0] * seconds, seconds


def time_training(folder: Path, config: BenchConfig, vocab_size: int) -> float:
    """Return the tokens per second of the train.py in `folder`, ours or nanoGPT's."""
    options = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    if config.compile == "auto":
        # As nanoGPT's README says, not compiled on a CPU. It always computes in float32 there.
        options["compile"] = folder == ROOT or resolve_device(config.device).type == "cuda"
    tokens = config.gradient_accumulation_steps * config.batch_size * config.block_size
    return tokens / time_steps(folder, options, vocab_size, config.seconds)[1]


def time_product(dtype: str, device: torch.device, flops: int) -> float:
    """Return the tokens per second of training if it were nothing but large matrix products."""
    runtime.set_up(device)
    n = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device, dtype=getattr(torch, dtype))
    return 2 * n**3 / median_seconds(lambda: a @ b, device) / flops


def throughput(config: BenchConfig) -> tuple[dict[str, Callable], int]:
    """Return {side: a function that measures its tokens per second}, and operations per token."""
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


# Race: the losses that whole programs reach in the same minutes
def race(config: BenchConfig) -> None:
    """Let the sides of tools/races.toml train in turn; draw their losses over the minutes.

    A side whose result is in out/bench/race already, with the same options, does not train again.
    """
    sides = tomllib.loads(RACES.read_text("utf-8")).get(config.dataset)
    if not sides:
        raise UserError(f"dataset={config.dataset} is not in {RACES}; add its sides there")
    if not config.nanogpt:
        raise UserError("nanogpt is empty; name a copy of https://github.com/karpathy/nanoGPT")
    rows = open_dataset(Path("data", config.dataset))[0]["vocab_size"]
    to, cells = Path("out/bench/race", config.dataset), []
    figure = Figure(figsize=(5, 3.8), dpi=180, layout="constrained")
    axes = figure.subplots()
    for side in sides:
        name, is_ours = side["name"], side["program"] == "ours"
        scratch = to / name.replace(" ", "_")
        file = scratch.with_name(f"{scratch.name}.json")
        result = json.loads(file.read_bytes()) if file.exists() else {}
        if result.get("side") != side:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            folder = ROOT if is_ours else Path(config.nanogpt)
            saved = train_side(side, folder, rows, config.seconds, scratch)
            curve = [{"minutes": minutes, **score(path, is_ours)} for minutes, path in saved]
            result = {"side": side, **about(config), "curve": curve}
            with atomic_write(file) as writing:
                writing.write(json.dumps(result, indent=1).encode())
            shutil.rmtree(scratch, ignore_errors=True)  # each checkpoint of phase 2 has 120 MB
        curve = result["curve"]
        minutes, bits = ([point[key] for point in curve] for key in ("minutes", "bits_per_byte"))
        axes.plot(minutes, bits, marker=".", label=f"{name}: {bits[-1]:.3f}")
        cells.append([name, f"{minutes[-1]:.1f}", f"{curve[-1]['loss']:.4f}", f"{bits[-1]:.4f}"])
    axes.set_title(f"data/{config.dataset}, {result['date']}\n{result['machine']}")
    axes.set(xlabel="minutes since the program started", ylabel="validation loss (bits per byte)")
    axes.set_ylim(0.97 * axes.dataLim.y0, 1.5 * axes.dataLim.y0)  # training begins far above
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, to.with_suffix(".png"))
    print(markdown_table(["side", "minutes", "loss", "bits per byte"], cells, right={1, 2, 3}))


def train_side(side: dict, folder: Path, vocab_size: int, seconds: int, to: Path) -> list[tuple]:
    """Train for at most side["minutes"]; return [(minutes until a checkpoint, its file), ...].

    A step is measured first, for `seconds`, so that the learning rate's schedule ends in time.
    """
    options = asdict(configure(TrainConfig, side["options"].split()))
    if not (steps := side.get("steps")):
        before, each = time_steps(folder, options, vocab_size, seconds)
        steps = (0.9 * 60 * side["minutes"] - before) / each  # some machines drift
    interval = int(steps / SAVES)
    steps = SAVES * interval
    options |= dict(max_iters=steps, lr_decay_iters=steps, eval_interval=interval, eval_iters=1)
    options |= dict(log_interval=interval, always_save_checkpoint=True)
    print(f"{side['name']}: {steps:,} steps, at most {side['minutes']} minutes ...", flush=True)
    written, saved, began = to / "ckpt.pt", [], time.time()
    with start_training(folder, options, vocab_size, to) as process:
        while process.poll() is None or written.exists():
            time.sleep(WHOLE / 4)
            if time.time() > began + 60 * side["minutes"]:
                process.kill()
                break
            if written.exists() and time.time() > written.stat().st_mtime + WHOLE:
                saved.append(written.rename(to / f"{len(saved)}.pt"))
        output = process.stdout.read()
    if not saved:
        raise UserError(f"{folder}/train.py wrote no checkpoint: {output[-300:]}")
    return [((path.stat().st_mtime - began) / 60, path) for path in saved]


def score(checkpoint: Path, is_ours: bool) -> dict:
    """Return what tools.evaluate says of a checkpoint, ours or nanoGPT's, on all of val.bin."""
    words = [["evaluate", f"--out_dir={checkpoint.parent}", f"--checkpoint={checkpoint.name}"]]
    if not is_ours:
        out_dir = f"--out_dir={checkpoint.with_suffix('')}"
        words = [["import_nanogpt", f"--checkpoint={checkpoint}", out_dir], ["evaluate", out_dir]]
    for name, *options in words:
        command = [sys.executable, "-m", f"tools.{name}", *options]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise UserError(f"tools.{name} {' '.join(options)} failed: {done.stderr[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


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
        model = GPT(GPTConfig(50_257, block_size=config.block_size, **shape))
    model = model.to(device, getattr(torch, dtype)).eval()
    if side == "ours":
        runtime.pack_weights(model)
    prompt = torch.zeros(B, 1, dtype=torch.int64, device=device)
    return B * n / median_seconds(lambda: list(model.generate(prompt, max_new_tokens=n)), device)


def generate(config: BenchConfig) -> tuple[dict[str, Callable], int]:
    sides = ["ours"] + ["transformers"] * config.transformers
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


def about(config: BenchConfig) -> dict[str, str]:
    """Return what a measurement was made with: date, command, machine and versions."""
    device, cpu = resolve_device(config.device), torch.cpu.get_capabilities().get("cpu_name", "")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m tools.bench {' '.join(sys.argv[1:])}",
        "machine": f"{name or platform.machine()}, {torch.get_num_threads()} CPU threads",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }


@runtime.explain_out_of_memory()
def main(config: BenchConfig) -> None:
    if config.what == "race":
        return race(config)
    sides, flops = throughput(config) if config.what == "throughput" else generate(config)
    to = Path("out/bench", config.what)
    print(f"measuring {'; '.join(sides)} for {to}.jsonl and {to}.png ...", flush=True)
    rounds = [[time_side() for time_side in sides.values()] for _ in range(config.rounds)]
    speeds = dict(zip(sides, map(median, zip(*rounds, strict=True)), strict=True))
    rows = [{"what": name, "tokens_per_second": round(speed)} for name, speed in speeds.items()]
    for row in rows if flops else ():
        row["gflops"] = round(flops * speeds[row["what"]] / 1e9, 1)
        for peak in [name for name in speeds if name.endswith("product")]:
            row[f"share_of_{peak.replace(' ', '_')}"] = round(speeds[row["what"]] / speeds[peak], 3)
    facts = about(config)
    with atomic_write(to.with_suffix(".jsonl")) as file:
        file.writelines(json.dumps(record).encode() + b"\n" for record in (facts, *rows))
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    header = [key.replace("_", " ") for key in rows[0]]
    cells = [[v if isinstance(v, str) else f"{v:,}" for v in row.values()] for row in rows]
    print(markdown_table(header, cells, right=set(range(1, len(header)))))
    figure = Figure(figsize=(9, 1.6 + 0.34 * len(rows)), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.bar_label(axes.barh(list(speeds), list(speeds.values())), fmt="{:,.0f}", padding=3)
    axes.set_title(f"{config.what}: {facts['machine']}, {facts['date']}")
    axes.set_xlabel("tokens per second")
    axes.margins(x=0.25)  # for the numbers behind the bars
    axes.invert_yaxis()  # the first row at the top
    save_figure(figure, to.with_suffix(".png"))


if __name__ == "__main__":
    words = [word.removeprefix("--config=") for word in sys.argv[1:]]
    names = ("throughput", "race", "generate")
    words = [f"--what={word}" if word in names else word for word in words]
    run(main, configure(BenchConfig, words))
